"""The LightningModule that all models share: network, optimizer, token-exact gradients, metrics.

A batch flows in; a subclass says what its loss is, as a sum over target tokens and their number; out flow gradients
that belong to the mean over all target tokens of an optimizer step, however these were split into micro-batches and
over processes.
"""

import copy
import difflib
import fnmatch
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from lm_lightning import hub
from lm_lightning import run as runs
from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.console import printable
from lm_lightning.data.order import PADDING, seed_of
from lm_lightning.data.tokenizer import document_ids, fingerprint, load, vocabulary
from lm_lightning.data.tokenizer import save as save_tokenizer
from lm_lightning.errors import UserError
from lm_lightning.lora import lora as adapters
from lm_lightning.lora.lora import LoRA
from lm_lightning.models.export import save_network
from lm_lightning.models.metrics import Mode, Ratio
from lm_lightning.models.nonfinite import NonFiniteGuard, Step
from lm_lightning.networks import blocks, gradient_norm, positions
from lm_lightning.optim import OptimizerFactory, Schedule, parameter_groups
from lm_lightning.security import untrusted

# Settings of a network that training may change on resuming: they decide no weight and no output in evaluation.
HARMLESS_KEYS = ("drop", "use_cache", "transformers_version", "dtype", "_name_or_path", "token_id", "architectures")


class StepAccumulator(NamedTuple):
    """Sums over the micro-batches of the optimizer step in progress, of this process.

    Attributes:
        step: Optimizer steps before it.
        samples: Ids of its samples.
        loss_sum: Loss, summed over target tokens: () float32.
        tokens: Target tokens: () int64.
    """

    step: int
    samples: list[int]
    loss_sum: Tensor
    tokens: Tensor


class LanguageModule(LightningModule):
    """Base of all models; a subclass sets `auto_class` and defines `loss`.

    Args:
        network: Settings of a new `transformers` network, such as `{model_type: gpt2, n_layer: 4}`; whatever is left
            out has that model type's default. The vocabulary and its special tokens come from the tokenizer.
        pretrained: Folder or Hub name of weights to start from, instead of `network`.
        optimizer: A `torch.optim.Optimizer` class with its settings; it gets the groups of `parameter_groups`. A class
            that is chosen has its own defaults.
        schedule: Learning rate over the steps.
        attention: Attention implementation of `transformers` (`sdpa`, `eager`, `flash_attention_2`, ...).
            Default: the best that `transformers` finds.
        compile: Whether to compile the network's body with `torch.compile`: slower to start, then faster.
        activation_checkpointing: Every how many blocks one is computed again in the backward pass, instead of its
            activations being kept: 1 for all, 2 for every second, ... 0 for none. Less memory, more time.
        on_nonfinite: What to do when the loss or gradient of an optimizer step is not finite: `stop` the run, or `skip`
            the step, whose samples are passed over; weights and optimizer stay as they are. To skip, an accelerator
            is waited for at each step, unless the optimizer is a fused one of torch (`fused: true`).
        skip_limit: Steps in a row that are skipped; at one more, the run stops.
        freeze: Patterns of names of parameters that are not trained, such as `*embeddings*`.
        layer_decay: Factor of the learning rate from each layer to the one below it; the head has the whole rate.
        lora: Trains small matrices beside those of `pretrained`, which stay as they are. Default: trains all weights.
        keep_head: Keeps the head of `pretrained` although its labels have other names than the data's, such as LABEL_0
            and LABEL_1; they then mean the data's labels in sorted order. Default: such a head is replaced.
    """

    auto_class: Any  # of transformers, such as AutoModelForCausalLM
    unused: tuple[str, ...] = ()  # beginnings of the names of tensors that the model does not use
    activation_checkpointing: int

    def __init__(
        self,
        network: Optional[dict[str, Any]] = None,
        pretrained: Optional[str] = None,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        schedule: Schedule = Schedule(),
        attention: Optional[str] = None,
        compile: bool = False,
        activation_checkpointing: int = 0,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        skip_limit: int = 10,
        freeze: Sequence[str] = (),
        layer_decay: float = 1.0,
        lora: Optional[LoRA] = None,
        keep_head: bool = False,
    ) -> None:
        super().__init__()
        if activation_checkpointing < 0:
            raise UserError(f"model.activation_checkpointing is {activation_checkpointing}, but must be 0 or more")
        if (network is None) == (pretrained is None):
            raise UserError(
                "give one of model.network (a new network, such as {model_type: gpt2, n_layer: 4}) and "
                f"model.pretrained (weights to start from), not {'both' if network else 'neither'}"
            )
        if lora is not None and pretrained is None:
            raise UserError(
                "model.lora leaves the weights as they are, which of a new network says nothing: give "
                "model.pretrained in the place of model.network, or leave model.lora out"
            )
        self.settings, self.pretrained = network, pretrained
        self.lora, self.new_tensors = lora, list[str]()  # of these, `pretrained` has none, or not in this size
        self.strict_loading = lora is None  # of LoRA, a checkpoint has not the base
        self.optimizer_factory, self.schedule = optimizer, schedule
        self.attention, self.compile_body = attention, compile
        self.activation_checkpointing = activation_checkpointing
        self.has_linear_head: bool
        self.network: transformers.PreTrainedModel = None  # made by `configure_model`
        self.val_loss = Ratio()
        self.accumulator: Optional[StepAccumulator] = None  # None between two optimizer steps
        self.freeze, self.layer_decay, self.keep_head = freeze, layer_decay, keep_head
        self.nonfinite = NonFiniteGuard(on_nonfinite, skip_limit, self.all_samples, self.print)
        self.resumed_at = 0  # the step of the checkpoint
        # Of an evaluation; the command line sets it, since Lightning tells of it only when the network is made.
        self.evaluated_checkpoint: Optional[str] = None
        self.unfinished = False  # whether the run that is resumed was killed before it wrote model/
        self.from_checkpoint = False  # whether a checkpoint's weights will take the place of those made here

    @staticmethod
    def main_metric(data: Any) -> str:
        """The metric of an evaluation by which the best checkpoint is chosen, unless `best.monitor` names another.

        Args:
            data: Options of the data module by name, which may decide which metrics there are.
        """
        return "loss"

    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The loss of a batch: its sum over target tokens, () float32, and their number, () int64."""
        raise NotImplementedError

    def print(self, *values: Any, **settings: Any) -> None:
        """Prints in the first process; control characters of names and texts from files are escaped."""
        super().print(*(printable(value) if isinstance(value, str) else value for value in values), **settings)

    # Network

    def configure_model(self) -> None:
        """Makes the network, which needs the tokenizer; Lightning calls it once the data is set up."""
        if self.network is not None:
            return
        try:
            self.network = self.new_network() if self.settings is not None else self.pretrained_network()
        except (ValueError, TypeError, ImportError, StrictDataclassError) as error:  # of transformers, for the settings
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"the network of model.network or model.pretrained cannot be made: {reason}") from error
        self.network.train()  # `from_pretrained` leaves it in evaluation mode
        if self.lora is not None:
            self.own_tensors = self.lora.adapt(self.network, self.new_tensors)
            self.lora_description = adapters.described(self.lora, self.pretrained_folder(), self.new_tensors)
        self.freeze_parameters()
        self.refuse_untrained()
        self.network_class = type(self.network).__name__  # sharding makes another one of it
        if self.activation_checkpointing:
            self.checkpoint_activations()
        self.print(f"network: {type(self.network).__name__}, {self.network.num_parameters():,} parameters")
        if self.compile_body:
            self.network.base_model.compile()
        self.network_made()
        if self.lora is not None:
            trained = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
            self.print(
                f"lora: rank {self.lora.rank} in {len(adapters.adapted_layers(self.network))} layers, {trained:,} "
                f"parameters are trained ({trained / self.network.num_parameters():.2%}); base: {self.lora.base}"
            )

    def network_made(self) -> None:
        """What a subclass does, once, when the network is there; `configure_model` calls it."""

    def freeze_parameters(self) -> None:
        """Takes the parameters whose names match a pattern of `freeze` out of the training."""
        for pattern in self.freeze:
            found = [p for name, p in self.network.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
            if not found:
                names = [name for name, _ in self.network.named_parameters()]
                raise UserError(f"model.freeze has {pattern}, which is the name of no parameter, such as {names[0]}")
            for parameter in found:
                parameter.requires_grad_(False)
            self.print(f"frozen: {len(found)} tensors with {sum(p.numel() for p in found):,} parameters ({pattern})")

    def refuse_untrained(self) -> None:
        """Refuses new tensors that stay random: those of an evaluation of `pretrained`, or that are frozen."""
        new = [name for name in self.new_tensors if not name.startswith(self.unused)]
        if self.trainer.state.fn == "fit":
            parameters = dict(self.network.named_parameters())
            frozen = [name for name in new if name in parameters and not parameters[name].requires_grad]
            if frozen:
                raise UserError(
                    f"{self.pretrained} has no weights for {', '.join(frozen[:5])}, and model.freeze would leave them "
                    "random: give patterns that do not match them"
                )
        elif new and self.evaluated_checkpoint is None:  # (a checkpoint brings them)
            raise hub.untrained(str(self.pretrained), self.network, new)

    def head_settings(self) -> dict[str, Any]:
        """Settings of the network's config that its head needs, beside those of the user."""
        return {}

    def label_settings(self) -> dict[str, Any]:
        """`head_settings` of a head that tells the data's labels, whose names the config keeps."""
        labels = self.trainer.datamodule.labels
        return {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}

    def own_labels(self) -> list[str]:
        """The labels that the evaluated checkpoint or `pretrained` predicts, in the order of their numbers.

        None without a head for them.
        """
        if self.evaluated_checkpoint is not None:
            saved = load_checkpoint(Path(self.evaluated_checkpoint), weights=False, verified=True)["network"]
            config = untrusted.network_class(saved["class"]).config_class.from_dict(saved["config"])
            config.architectures = [saved["class"]]
        elif self.pretrained is not None:
            config = hub.config(self.pretrained_folder())
        else:
            return []
        head = self.auto_class.__name__.removeprefix("AutoModel")  # such as ForSequenceClassification
        if not any(architecture.endswith(head) for architecture in config.architectures or []):
            return []
        return [config.id2label[number] for number in range(config.num_labels)]

    def pretrained_folder(self) -> str:
        """What `pretrained` names: a folder, that of a run's model, or a download of the Hub."""
        return runs.pretrained_name(str(self.pretrained))

    def checkpoint_activations(self) -> None:
        """Has every `activation_checkpointing`-th block compute its activations again."""
        if not self.network.supports_gradient_checkpointing:
            raise UserError(
                f"networks of type {self.network.config.model_type} do not support model.activation_checkpointing: "
                "leave it out"
            )
        self.network.gradient_checkpointing_enable({"use_reentrant": False})
        for number, block in enumerate(blocks(self.network)):
            setattr(block, "gradient_checkpointing", number % self.activation_checkpointing == 0)  # noqa: B010 (mypy)

    def new_network(self) -> transformers.PreTrainedModel:
        """A network with new weights, from the settings and the tokenizer's vocabulary."""
        tokenizer, settings = self.trainer.datamodule.tokenizer, dict(self.settings or {})
        model_type = settings.pop("model_type", None)
        if model_type is None:
            raise UserError("model.network has no model_type: give one, such as gpt2, llama, qwen3 or bert")
        if model_type not in transformers.CONFIG_MAPPING:
            close = difflib.get_close_matches(str(model_type), list(transformers.CONFIG_MAPPING))
            raise UserError(
                f"model.network has model_type {model_type}, unknown to transformers {transformers.__version__}"
                + (f": did you mean {' or '.join(close)}?" if close else ", which knows gpt2, llama, qwen3 and bert")
            )
        known = transformers.AutoConfig.for_model(model_type)
        if known.get_text_config() is not known:
            text_type = known.get_text_config().model_type
            raise UserError(f"model_type {model_type} is a network of more than text: take {text_type}")
        for key in settings:
            if not hasattr(known, key):
                names = [*known.to_dict(), *known.attribute_map]
                close = difflib.get_close_matches(key, names, n=1)
                raise UserError(
                    f"model.network has {key}, which is no setting of {model_type}"
                    + (f": did you mean {close[0]}?" if close else "")
                )
        special = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": document_ids(tokenizer)[1][-1],
            "pad_token_id": tokenizer.pad_token_id,
        }
        # Rows padded to a multiple of 64 are faster; they are no tokens, are left out of the loss and not exported.
        settings |= self.head_settings()
        settings = {"vocab_size": -(-vocabulary(tokenizer) // 64) * 64} | special | settings
        if settings["vocab_size"] < vocabulary(tokenizer):
            raise UserError(
                f"model.network.vocab_size is {settings['vocab_size']}, but the tokenizer has {vocabulary(tokenizer)} "
                "tokens: leave it out"
            )
        config = transformers.AutoConfig.for_model(model_type, **settings)
        with tempfile.TemporaryDirectory() as folder:  # before any work is done for a model that could not be used
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if fingerprint(load(folder)) != fingerprint(tokenizer):
                raise UserError(
                    f"transformers would read this tokenizer, saved beside a network of type {model_type}, as another "
                    f"one: take {model_type}'s own (data.tokenizer.path), or another model.network.model_type"
                )
        self.check_config(config)
        network = self.auto_class.from_config(config, attn_implementation=self.attention)
        self.refuse_length(positions(network))
        return network

    def check_config(self, config: transformers.PreTrainedConfig) -> None:
        """Refuses a network that this run could not train, before its weights are made or loaded."""
        self.refuse_length(getattr(config, "max_position_embeddings", None))
        if self.lora is not None:
            self.lora.check(self.trainer.strategy)
        if hasattr(self.trainer.strategy, "check"):  # one of ours
            self.trainer.strategy.check(config)

    def refuse_length(self, limit: Optional[int]) -> None:
        """Refuses data whose samples have more tokens than the network has positions for."""
        block_size = self.trainer.datamodule.block_size
        if limit is not None and block_size > limit:
            raise UserError(
                f"data.{self.trainer.datamodule.length_option} is {block_size}, but this network has positions for "
                f"{limit} tokens: lower it, or use a network with more of them"
            )

    def pretrained_network(self) -> transformers.PreTrainedModel:
        """The network of `pretrained`, with rows added if the tokenizer has more tokens."""
        tokenizer, name = self.trainer.datamodule.tokenizer, self.pretrained_folder()
        self.refuse_other_tokenizer(name)
        try:
            config = hub.config(name)
            self.check_config(config)
            if self.trainer.state.fn == "fit" and getattr(config, "quantization_config", None) is not None:
                raise UserError(f"{name} is quantized, and can be measured, but not trained: train what it was made of")
            quantization: dict[str, Any] = {}
            if self.lora is not None:
                with torch.device("meta"):
                    skeleton = self.auto_class.from_config(config, trust_remote_code=hub.trust_remote_code())
                device, precision = self.trainer.strategy.root_device, self.trainer.precision
                quantization = self.lora.quantization(skeleton, device, precision)
            network, info = self.auto_class.from_pretrained(
                name,
                local_files_only=hub.local_only(name),
                trust_remote_code=hub.trust_remote_code(),
                attn_implementation=self.attention,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=bool(self.head_settings()),  # of a head for other labels; see below
                **self.head_settings(),
                **quantization,
            )
        except (OSError, ValueError) as error:
            raise hub.explain(name, error) from error
        self.refuse_length(positions(network))
        other = {key for key, *_ in info["mismatched_keys"]}
        body = sorted(key for key in other if key.startswith(f"{network.base_model_prefix}."))
        if body:
            raise UserError(f"{name} has weights whose sizes are not those of its config.json: {', '.join(body)}")
        self.new_tensors = sorted(other | set(info["missing_keys"]))
        if missing := self.new_tensors:
            self.print(f"{name} has no weights for {len(missing)} tensors, which are new: {', '.join(missing)}")
        self.replace_head(network, name)
        rows = network.get_input_embeddings().weight.shape[0]
        if rows < vocabulary(tokenizer):
            if self.lora is not None:
                raise UserError(
                    f"{name} has {rows} tokens and the tokenizer {vocabulary(tokenizer)}, whose rows model.lora would "
                    f"not train: give --data.tokenizer.path {name}, or leave model.lora out"
                )
            self.new_tensors.append(f"{vocabulary(tokenizer) - rows} tokens of the data's tokenizer")
            self.print(f"{name} has {rows} tokens, the tokenizer {vocabulary(tokenizer)}: the others' rows are new")
            network.resize_token_embeddings(vocabulary(tokenizer))
        return network

    def head_fits(self) -> bool:
        """Whether the head of `pretrained` predicts the data's labels, in their order."""
        return self.own_labels() == self.trainer.datamodule.labels

    def replace_head(self, network: transformers.PreTrainedModel, name: str) -> None:
        """Gives new weights to those tensors of a pretrained head that belong to other labels than the data's.

        In a head of another number of labels they are new already.

        Args:
            network: That of `pretrained`.
            name: Its folder or name, for messages.
        """
        settings = self.head_settings()
        if not settings or self.head_fits():
            return
        labels, own = self.trainer.datamodule.labels, self.own_labels()
        if self.keep_head:
            if len(own) != len(labels):
                raise UserError(
                    f"model.keep_head cannot keep the head of {name}, which has {len(own)} labels, the data "
                    f"{len(labels)}: leave it out"
                )
            self.print(f"kept head: {', '.join(f'{a} is now {b}' for a, b in list(zip(own, labels))[:20])}")
            return
        sizes: list[dict[str, torch.Size]] = []  # tensors whose sizes depend on the number of labels belong to these
        for number in (len(labels) or 1, len(labels) + 2):
            config = copy.deepcopy(network.config)
            config.num_labels = number
            with torch.device("meta"):
                skeleton = self.auto_class.from_config(config, trust_remote_code=hub.trust_remote_code())
            sizes.append({key: parameter.shape for key, parameter in skeleton.named_parameters()})
        loaded = [key for key, size in sizes[0].items() if size != sizes[1][key] and key not in self.new_tensors]
        if not loaded:
            return
        for key in loaded:
            parameter = network.get_parameter(key)
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=getattr(network.config, "initializer_range", 0.02))
            else:
                nn.init.zeros_(parameter)
        self.new_tensors = sorted({*self.new_tensors, *loaded})
        had = f"for the labels {', '.join(own[:20])}" if own else "of another task"
        wanted = f"the data's {', '.join(labels[:20])}" if labels else "numbers"
        self.print(f"{name} has a head {had}, not for {wanted}: it is replaced by a new one ({', '.join(loaded)})")

    def refuse_other_tokenizer(self, name: str) -> None:
        """Refuses weights whose rows mean other tokens than the data's."""
        try:
            own = load(name)
        except UserError:
            return  # weights alone, or nothing at all, as will be seen
        own.pad_token = own.pad_token or self.trainer.datamodule.tokenizer.pad_token  # which is no part of a text
        if fingerprint(own) != fingerprint(self.trainer.datamodule.tokenizer):
            raise UserError(
                f"{name} was trained with another tokenizer than the data's: give --data.tokenizer.path {name}, or "
                "take the tokenizer out of that folder if you mean it"
            )

    @property
    def vocab_size(self) -> int:
        """Rows of the vocabulary that are tokens; a new network has up to 63 more."""
        if self.settings is None:
            return self.network.get_input_embeddings().weight.shape[0]
        return vocabulary(self.trainer.datamodule.tokenizer)

    def description(self) -> dict[str, Any]:
        """All but the weights that is needed to make the network again, JSON-able.

        Returns:
            `class`, its name in `transformers`; `config` and `generation` (None for networks that do not generate), as
            they are exported; `rows`, how many the vocabulary has here with those that pad it. Of a sentence encoder,
            `embedding`: the arguments of `embedding.files`.
        """
        tokenizer, generation = self.trainer.datamodule.tokenizer, getattr(self.network, "generation_config", None)
        own = {"vocab_size": self.vocab_size, "pad_token_id": tokenizer.pad_token_id}
        config = self.network.config.to_dict()
        if self.lora is not None:
            config.pop("quantization_config", None)  # what is exported is whole
        return {
            "class": self.network_class,
            "config": config | own,
            "generation": None if generation is None else generation.to_dict(),
            "rows": self.network.config.vocab_size,
        }

    def export(self, folder: Path, saved: Optional[dict[str, Any]] = None) -> None:
        """Writes the network and its tokenizer as a `from_pretrained` folder; all processes call it.

        Where the weights are sharded, the first process gathers them in the host's memory.

        Args:
            folder: Is made if it does not exist.
            saved: A checkpoint of this network, whose weights are written instead of the present ones.
        """
        weights = self.whole_weights(saved)
        if self.trainer.is_global_zero:
            if self.lora is not None:
                weights = adapters.merged(self.network, weights, self.lora.alpha / self.lora.rank)
            save_network(self.description(), weights, folder)
            save_tokenizer(self.trainer.datamodule.tokenizer, folder)

    def export_adapter(self, folder: Path, saved: Optional[dict[str, Any]] = None) -> None:
        """Writes what LoRA has trained, now or in a checkpoint, as a folder of peft's; all processes call it."""
        weights = self.whole_weights(saved)
        if self.trainer.is_global_zero:
            adapters.save_adapter(self.network, weights, self.lora_description | self.description(), folder)

    def whole_weights(self, saved: Optional[dict[str, Any]] = None) -> dict[str, Any]:
        """The state dict of the network, or that of a checkpoint, each tensor whole; in the first process."""
        weights = saved["state_dict"] if saved else {}
        weights = {name.removeprefix("network."): w for name, w in weights.items() if name.startswith("network.")}
        if saved is not None and self.lora is None:
            return weights
        if self.lora is not None and self.lora.base != "whole":  # never sharded, and PyTorch does not know its tensors
            return {name: tensor.cpu() for name, tensor in self.network.state_dict().items()} | weights
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.network, options=whole) | weights  # (of LoRA, checkpoints have not the base)

    # Training

    def on_train_start(self) -> None:
        # A checkpoint brings back the optimizer's settings of its run; those of this run were asked for.
        for group, settings in zip(self.optimizers().param_groups, self.group_settings):
            group.update(settings)
            group["lr"] = group["initial_lr"] * self.schedule.factor(self.trainer.global_step, self.total_steps())
        self.lr_schedulers().base_lrs = [settings["initial_lr"] for settings in self.group_settings]

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        # Dropout is a function of (seed, step, micro-batch, replica), so that a resumed run draws what it would have.
        data = self.trainer.datamodule
        micro_batch = len(self.accumulator.samples) if self.accumulator else 0
        torch.manual_seed(seed_of(data.seed, self.trainer.global_step, micro_batch, data.replica))

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        loss_sum, tokens = self.loss(batch)
        seen = self.accumulator or StepAccumulator(
            self.trainer.global_step, [], torch.zeros_like(loss_sum), torch.zeros_like(tokens)
        )
        self.accumulator = StepAccumulator(
            seen.step, seen.samples + batch["id"], seen.loss_sum + loss_sum.detach(), seen.tokens + tokens
        )
        # The right divisor is known when the step is complete; a constant keeps the sums near 1 until then.
        return loss_sum / self.trainer.datamodule.tokens_per_batch

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turns the accumulated gradient into that of the mean over the step's target tokens."""
        total, self.accumulator = self.accumulator, None
        assert total is not None, "an optimizer step comes after at least one training step"
        totals = torch.stack([total.loss_sum, total.tokens.float()])
        totals = self.trainer.strategy.reduce(totals, reduce_op="sum")
        loss_sum, tokens = totals[0], totals[1].where(totals[1] > 0, 1)  # (weighted targets may come to less than 1)
        # Lightning has divided by the micro-batches, the strategy by the replicas, `training_step` by its constant; a
        # replica of several processes (tensor parallelism) has counted its tokens on each.
        divided = (
            self.trainer.accumulate_grad_batches * self.trainer.world_size * self.trainer.datamodule.tokens_per_batch
        )
        self.scale_gradients(divided / tokens)
        self.gradient_norm = gradient_norm(self.parameters())

        # To ask for a value makes the host wait for the device. So a GPU is asked one step late, when it has the answer
        # anyway, and XLA after a step that was logged, which had to be waited for. (With float16, the scaler provokes
        # infinite gradients, and leaves their steps out itself.)
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        skip = self.nonfinite.on_nonfinite == "skip" and not scaled
        in_kernel = skip and all(group.get("fused") for group in optimizer.param_groups)
        loss = (loss_sum + 0 * self.gradient_norm) / tokens
        if in_kernel:  # as torch's GradScaler tells them
            optimizer.found_inf = (~torch.isfinite(loss)).float()  # type: ignore
        if not scaled:
            self.nonfinite.pending.append(Step(total.step + 1, total.samples, loss))
        at_once = self.device.type == "cpu" or (skip and not in_kernel)
        if at_once or self.device.type != "xla" or total.step % self.trainer.log_every_n_steps == 0:
            finite = self.nonfinite.check(keep=0 if at_once else 1)
            if at_once and not finite and not in_kernel:
                for parameter in self.parameters():
                    parameter.grad = None  # an optimizer leaves such parameters and their state alone
        self.trainer.datamodule.consumed += len(total.samples) * self.trainer.datamodule.replicas
        metrics = {
            # Lightning's name for the x-axis of the loggers: finished steps
            "step": torch.tensor(float(total.step + 1)),  # (numbers, not tensors, it would send to the device)
            "train/loss": loss_sum / tokens,
            "train/gradient_norm": self.gradient_norm,
            "train/learning_rate": torch.tensor(optimizer.param_groups[0]["lr"]),
        }
        if skip:
            metrics["train/skipped_steps"] = torch.tensor(float(self.nonfinite.skipped))
        self.log_dict(metrics)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Optional[float] = None,
        gradient_clip_algorithm: Optional[str] = None,
    ) -> None:
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:  # the norm is known already
            self.scale_gradients((gradient_clip_val / (self.gradient_norm + 1e-6)).clamp(max=1))

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiplies all gradients by a number, () float."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients:
            torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)

    def all_samples(self, own: list[int]) -> list[int]:
        """The samples of all processes, which have to call this together."""
        samples = self.all_gather(torch.tensor(own, device=self.device)).flatten().tolist()
        return sorted({sample for sample in samples if sample != PADDING})

    # Optimizer

    def total_steps(self) -> float:
        """Optimizer steps of the whole run, `inf` if it has no end."""
        trainer = self.trainer
        if trainer.max_steps > 0 and trainer.max_epochs == -1:
            return trainer.max_steps
        return trainer.estimated_stepping_batches

    def configure_optimizers(self) -> dict:
        total = self.total_steps()
        if not self.trainer.fast_dev_run:
            self.schedule.check(total)
        try:
            optimizer = self.optimizer_factory(parameter_groups(self.network, self.layer_decay))
        except (ValueError, TypeError) as error:
            raise UserError(f"the optimizer does not accept its settings: {error}") from error
        sharded = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
        if sharded and type(optimizer).__module__.startswith("bitsandbytes."):
            raise UserError(
                f"{type(optimizer).__name__} of bitsandbytes cannot step with sharded weights: take --trainer.strategy "
                "ddp, or an optimizer of torch"
            )
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_factor", 1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.factor(step, total))
        self.group_settings = [
            {key: copy.copy(value) for key, value in group.items() if key not in ("params", "lr")}
            for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def grouping(self) -> dict[str, Any]:
        """How the optimizer's state belongs to the parameters, JSON-able: the options that decide it, and a hash."""
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        groups = parameter_groups(self.network, self.layer_decay)
        content = repr([[names[id(parameter)] for parameter in group["params"]] for group in groups])
        return {
            "model.layer_decay": self.layer_decay,
            "model.freeze": list(self.freeze),
            "groups": hashlib.sha256(content.encode()).hexdigest()[:16],
        }

    # Evaluation

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        loss_sum, tokens = self.loss(batch)
        self.val_loss.update(loss_sum, tokens)

    def on_validation_epoch_end(self) -> None:
        self.log_evaluation("val", "validation")

    def test_step(self, batch: dict, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.log_evaluation("test", "test")

    def log_evaluation(self, prefix: str, split: str) -> None:
        """Logs the metrics of a finished evaluation of a split; the loss is the mean over all its target tokens."""
        loss = self.val_loss.compute()
        self.val_loss.reset()
        metrics = {f"{prefix}/{name}": value for name, value in self.metrics(loss, split).items()}
        if self.trainer.state.fn == "fit":
            metrics["step"] = torch.tensor(float(self.trainer.global_step))
        self.log_dict(metrics)

    def title(self, split: str) -> str:
        """What an evaluation is of, for tables and pictures: the split, and the step or what the weights are from."""
        if self.trainer.state.fn == "fit":
            return f"{split}, step {self.trainer.global_step:,}"
        return f"{split}, {Path(str(self.trainer.ckpt_path or self.pretrained)).name}"

    def metrics(self, loss: Tensor, split: str) -> dict[str, Tensor]:
        """The metrics that follow from the mean loss, in nats a token, of a split."""
        return {"loss": loss}

    def metric_modes(self) -> dict[str, Optional[Mode]]:
        """The names in `metrics`, each with the direction that is better, `min` or `max`; None if neither is.

        It is called when the data is set up, before there is a network.
        """
        return {"loss": "min"}

    def join_predictions(self, rows: list[dict]) -> list[dict]:
        """What is written of all that `predict_step` has found, in the order of the samples."""
        return rows

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self.nonfinite.check()
        checkpoint["network"] = self.description()
        checkpoint["tokenizer"] = fingerprint(self.trainer.datamodule.tokenizer)
        checkpoint["optimizer"] = type(self.optimizers().optimizer).__name__
        checkpoint["parameters"] = self.grouping()
        checkpoint["skipped_steps"] = self.nonfinite.skipped
        if self.lora is not None:
            checkpoint["lora"], own = self.lora_description, {f"network.{name}" for name in self.own_tensors}
            checkpoint["state_dict"] = {
                name: tensor
                for name, tensor in checkpoint["state_dict"].items()
                if name in own or not name.startswith("network.")
            }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        saved, own = checkpoint["network"]["config"], self.description()["config"]
        different = [
            f"{key} {saved.get(key)} (here {own.get(key)})"
            for key in sorted(saved.keys() | own.keys())
            if saved.get(key) != own.get(key) and not any(part in key for part in HARMLESS_KEYS)
        ]
        if different:
            raise UserError(
                f"the checkpoint's network has {', '.join(different)}: take the model.network that it was made with"
            )
        tokenizer = fingerprint(self.trainer.datamodule.tokenizer)
        if checkpoint.get("tokenizer", tokenizer) != tokenizer:
            raise UserError(
                "the checkpoint was made with another tokenizer than the data's, so that its tokens mean other texts: "
                "give the tokenizer/ of its run folder as data.tokenizer.path"
            )
        adapters.refuse_other(checkpoint.get("lora"), None if self.lora is None else self.lora_description)
        if self.trainer.state.fn != "fit":
            return
        self.resumed_at, self.nonfinite.skipped = checkpoint["global_step"], checkpoint.get("skipped_steps", 0)
        optimizer = type(self.optimizer_factory(parameter_groups(self.network, self.layer_decay))).__name__
        if checkpoint["optimizer"] != optimizer:
            raise UserError(
                f"the checkpoint's optimizer is {checkpoint['optimizer']}, this run's {optimizer}, which cannot go on "
                "with its state: take the same, or start a new run from the weights with --model.pretrained RUN/model"
            )
        own_groups, saved_groups = self.grouping(), checkpoint.get("parameters", self.grouping())
        if saved_groups["groups"] != own_groups["groups"]:
            changed = [
                f"{name} {saved_groups[name]} (here {value})"
                for name, value in own_groups.items()
                if name != "groups" and saved_groups[name] != value
            ]
            raise UserError(
                f"the checkpoint was made with {', '.join(changed) or 'other trained parameters'}, which its optimizer "
                "state fits alone: use the old value, or start a new run from the weights with --model.pretrained "
                "RUN/model"
            )
        if self.pretrained is not None and self.lora is None:
            self.print(f"weights: those of the checkpoint, not of model.pretrained ({self.pretrained})")
        self.unfinished = runs.is_unfinished(Path(self.trainer.default_root_dir), Path(self.trainer.ckpt_path))
