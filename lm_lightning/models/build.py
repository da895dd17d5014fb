"""Building networks: settings or pretrained weights in, a network of `transformers` that fits the data out."""

import contextlib
import copy
import difflib
import fnmatch
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
import transformers
from lightning.pytorch.strategies import Strategy
from torch import nn

from lm_lightning import hub
from lm_lightning.data import contract
from lm_lightning.data.tokenizer import adopt, document_ids, fingerprint, load, vocabulary
from lm_lightning.errors import UserError
from lm_lightning.models.adapter import Adapter
from lm_lightning.networks import blocks, positions
from lm_lightning.security import untrusted
from lm_lightning.security.trust import trust_remote_code

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class NetworkBuilder:
    """Makes networks for the data and the trainer of a run.

    Args:
        auto_class: A class of `transformers`, such as AutoModelForCausalLM.
        strategy: The trainer's strategy, which may refuse networks.
        tokenizer: The data's tokenizer; None if it has none.
        block_size: Number of tokens of the longest sample; None if unknown.
        length_option: The option of the data that sets `block_size`, for messages.
        head_settings: Settings of the network's config that its head needs.
        attn_implementation: Attention implementation of `transformers`. Default: the best that it finds.
        adapter: The adapter that will be added to a pretrained network.
        precision: The trainer's, such as `bf16-mixed`.
        print: Prints a line in the first process.
    """

    auto_class: Any
    strategy: Strategy
    tokenizer: Optional[transformers.PreTrainedTokenizerFast] = None
    block_size: Optional[int] = None
    length_option: str = "block_size"
    head_settings: Mapping[str, Any] = field(default_factory=dict)
    attn_implementation: Optional[str] = None
    adapter: Optional[Adapter] = None
    precision: str = "32-true"
    print: Callable[[str], Any] = print

    # New networks

    def new(self, settings: Mapping[str, Any]) -> transformers.PreTrainedModel:
        """A network with new weights, with the vocabulary of the tokenizer.

        Args:
            settings: `model_type` and settings of its config.
        """
        settings = dict(settings)
        model_type = settings.pop("model_type", None)
        refuse_unknown(model_type, settings)
        settings |= self.head_settings
        settings = self.vocabulary_settings(str(model_type), settings) | settings
        config = transformers.AutoConfig.for_model(model_type, **settings)
        self.refuse_mismatched_tokenizer(config)
        self.check(config)
        network = self.auto_class.from_config(config, attn_implementation=self.attn_implementation)
        self.refuse_length(positions(network))
        return network

    def vocabulary_settings(self, model_type: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`vocab_size` and the special tokens of a new network, where the settings do not have them."""
        if self.tokenizer is None:
            if not isinstance(size := settings.get("vocab_size"), int):
                raise UserError(
                    "the data module has no tokenizer, so model.network needs vocab_size, the number of tokens"
                )
            default = transformers.AutoConfig.for_model(model_type)
            own = {name: getattr(default, name, None) for name in SPECIAL_TOKENS}
            return {name: token if isinstance(token, int) and token < size else None for name, token in own.items()}
        tokens = vocabulary(self.tokenizer)
        if settings.get("vocab_size", tokens) < tokens:
            raise UserError(
                f"model.network.vocab_size is {settings['vocab_size']}, but the tokenizer has {tokens} tokens: omit it"
            )
        return {
            # Padded to a multiple of 64, which is faster. The additional rows are not in the loss and not exported.
            "vocab_size": -(-tokens // 64) * 64,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": document_ids(self.tokenizer)[1][-1],
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def refuse_mismatched_tokenizer(self, config: transformers.PreTrainedConfig) -> None:
        """Refuses a type of network for which `transformers` would load the saved tokenizer as a different one."""
        if self.tokenizer is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            if fingerprint(load(folder)) != fingerprint(self.tokenizer):
                raise UserError(
                    f"for a network of type {config.model_type}, transformers would load this tokenizer as a different "
                    f"one: use a tokenizer of {config.model_type} (data.tokenizer.path), or another "
                    "model.network.model_type"
                )

    # New and pretrained networks

    def check(self, config: transformers.PreTrainedConfig) -> None:
        """Refuses a network that this run could not train, before its weights are created or loaded."""
        self.refuse_length(getattr(config, "max_position_embeddings", None))
        if self.adapter is not None:
            self.adapter.check(self.strategy)
        if hasattr(self.strategy, "check"):  # a strategy of this project
            self.strategy.check(config)

    def refuse_length(self, limit: Optional[int]) -> None:
        """Refuses data whose samples have more tokens than the network has positions for."""
        if limit is not None and self.block_size is not None and self.block_size > limit:
            raise UserError(
                f"data.{self.length_option} is {self.block_size}, but this network has positions for {limit} tokens: "
                "lower it, or use a network with more positions"
            )

    # Pretrained networks

    def load(self, name: str, training: bool) -> tuple[transformers.PreTrainedModel, list[str]]:
        """Loads a pretrained network.

        Args:
            name: Folder or Hub name.
            training: Whether it will be trained, which a quantized one cannot be.

        Returns:
            The network, float32, in evaluation mode; and the names of its new tensors, which the pretrained weights
            lack or have in another size.
        """
        self.refuse_other_tokenizer(name)
        try:
            config = hub.config(name)
            self.check(config)
            if training and getattr(config, "quantization_config", None) is not None:
                raise UserError(
                    f"{name} is quantized, so it can be evaluated but not trained: train the original model"
                )
            network, info = self.auto_class.from_pretrained(
                name,
                local_files_only=hub.local_only(name),
                trust_remote_code=trust_remote_code(),
                attn_implementation=self.attn_implementation,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=bool(self.head_settings),  # of a head for other labels; see below
                **self.head_settings,
                **self.adapter_options(config),
            )
        except (OSError, ValueError) as error:
            raise hub.explain(name, error) from error
        self.refuse_length(positions(network))
        mismatched = {key for key, *_ in info["mismatched_keys"]}
        body = sorted(key for key in mismatched if key.startswith(f"{network.base_model_prefix}."))
        if body:
            raise UserError(f"{name} has weights whose sizes are not those of its config.json: {', '.join(body)}")
        new = sorted(mismatched | set(info["missing_keys"]))
        if new:
            self.print(f"{name} has no weights for {len(new)} tensors, which are new: {', '.join(new)}")
        return network, new

    def adapter_options(self, config: transformers.PreTrainedConfig) -> dict[str, Any]:
        """Arguments of `from_pretrained` that the adapter needs."""
        if self.adapter is None:
            return {}
        skeleton = self.skeleton(config)
        return self.adapter.loading_options(skeleton, self.strategy.root_device, self.precision)

    def skeleton(self, config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
        """A network without weights, on the meta device."""
        with torch.device("meta"):
            return self.auto_class.from_config(config, trust_remote_code=trust_remote_code())

    def refuse_other_tokenizer(self, name: str) -> None:
        """Refuses pretrained weights that were trained with a different tokenizer."""
        if self.tokenizer is None:
            return
        try:
            own = load(name)
        except UserError:
            return  # the folder has only weights, or does not exist, which `load` of this class reports
        adopt(own, self.tokenizer)
        if fingerprint(own) != fingerprint(self.tokenizer):
            raise UserError(
                f"{name} was not trained with the data's tokenizer: give --data.tokenizer.path {name} without "
                "--data.tokenizer.min_count, or remove the "
                "tokenizer from that folder if this is intended"
            )

    def add_tokens(self, network: transformers.PreTrainedModel) -> list[str]:
        """Adds embeddings for those tokens of the data's tokenizer that a pretrained network lacks, in place.

        Returns:
            Descriptions of what is new.
        """
        name = network.config.name_or_path
        rows = network.get_input_embeddings().weight.shape[0]
        if self.tokenizer is None or rows >= (tokens := vocabulary(self.tokenizer)):
            return []
        if self.adapter is not None:
            raise UserError(
                f"{name} has {rows} tokens, the tokenizer {tokens}, and model.adapter would not train the additional "
                f"embeddings: give --data.tokenizer.path {name}, or omit model.adapter"
            )
        self.print(f"{name} has {rows} tokens, the tokenizer {tokens}: the additional embeddings are new")
        network.resize_token_embeddings(tokens)
        return [f"{tokens - rows} tokens of the data's tokenizer"]

    def replace_head(
        self,
        network: transformers.PreTrainedModel,
        own: list[str],
        labels: list[str],
        new: Sequence[str],
        keep: bool,
    ) -> list[str]:
        """Replaces the weights of a pretrained head by new ones, in place, as the head is for other labels.

        Args:
            network: The network.
            own: The labels that its head predicts; empty if it predicts none.
            labels: The labels of the data; empty for numbers.
            new: Names of tensors that are new already.
            keep: Whether to keep the head anyway.

        Returns:
            Names of the tensors that got new weights: those whose sizes depend on the number of labels.

        Raises:
            UserError: If the head is to be kept, but has a different number of labels.
        """
        name = network.config.name_or_path
        if keep:
            if len(own) != len(labels):
                raise UserError(
                    f"model.keep_head cannot keep the head of {name}, which has {len(own)} labels, as the data has "
                    f"{len(labels)}: omit it"
                )
            self.print(f"kept head: {', '.join(f'{a} is now {b}' for a, b in list(zip(own, labels))[:20])}")
            return []
        sizes: list[dict[str, torch.Size]] = []
        for number in (len(labels) or 1, len(labels) + 2):
            config = copy.deepcopy(network.config)
            config.num_labels = number
            sizes.append({key: parameter.shape for key, parameter in self.skeleton(config).named_parameters()})
        reset = [key for key, size in sizes[0].items() if size != sizes[1][key] and key not in new]
        for key in reset:
            parameter = network.get_parameter(key)
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=getattr(network.config, "initializer_range", 0.02))
            else:
                nn.init.zeros_(parameter)
        if reset:
            had = f"for the labels {', '.join(own[:20])}" if own else "of another task"
            wanted = f"the data's {', '.join(labels[:20])}" if labels else "numbers"
            self.print(f"{name} has a head {had}, not for {wanted}: it is replaced by a new one ({', '.join(reset)})")
        return reset


def builder_of(module: Any) -> NetworkBuilder:
    """The builder for a `LanguageModule` with its data and its trainer."""
    data = module.trainer.datamodule
    return NetworkBuilder(
        auto_class=module.auto_class,
        strategy=module.trainer.strategy,
        tokenizer=module.tokenizer,
        block_size=contract.optional(data, "block_size"),
        length_option=contract.optional(data, "length_option"),
        head_settings=module.head_settings(),
        attn_implementation=module.attn_implementation,
        adapter=module.adapter,
        precision="32-true" if module.adapter is None else module.trainer.precision,
        print=module.print,
    )


def check_options(
    network: Optional[dict[str, Any]], pretrained: Optional[str], adapter: Optional[Adapter], checkpointing: int
) -> None:
    """Refuses options of `LanguageModule` that contradict each other.

    Raises:
        UserError: Names them.
    """
    if checkpointing < 0:
        raise UserError(f"model.activation_checkpointing is {checkpointing}, but must be 0 or more")
    if (network is None) == (pretrained is None):
        both = ", not both: --model.network null drops the one of a config"
        raise UserError(
            "give either model.network (a new network, such as {model_type: gpt2, n_layer: 4}) or model.pretrained "
            f"(weights to start from){both if network else ''}"
        )
    if adapter is not None and pretrained is None:
        raise UserError(
            "model.adapter requires model.pretrained: give it instead of model.network, or omit model.adapter"
        )


def refuse_unknown(model_type: Any, settings: Mapping[str, Any]) -> None:
    """Refuses types of networks and settings that `transformers` does not know.

    Raises:
        UserError: Suggests similar names.
    """
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
        raise UserError(f"model_type {model_type} is not a network for text alone: use {text_type}")
    for key in settings:
        if not hasattr(known, key):
            names = [*known.to_dict(), *known.attribute_map]
            close = difflib.get_close_matches(key, names, n=1)
            raise UserError(
                f"model.network has {key}, which is not a setting of {model_type}"
                + (f": did you mean {close[0]}?" if close else "")
            )


def freeze(network: nn.Module, patterns: Sequence[str], print: Callable[[str], Any]) -> None:
    """Excludes the parameters whose names match a pattern from training.

    Raises:
        UserError: If a pattern matches none.
    """
    for pattern in patterns:
        found = [p for name, p in network.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            names = [name for name, _ in network.named_parameters()]
            raise UserError(f"model.freeze has {pattern}, which matches no parameter; the first one is {names[0]}")
        for parameter in found:
            parameter.requires_grad_(False)
        print(f"frozen: {len(found)} tensors with {sum(p.numel() for p in found):,} parameters ({pattern})")


def checkpoint_activations(network: transformers.PreTrainedModel, every: int) -> None:
    """Recomputes the activations of every n-th block in the backward pass instead of keeping them; 0 for none."""
    if not every:
        return
    if not network.supports_gradient_checkpointing:
        raise UserError(
            f"networks of type {network.config.model_type} do not support model.activation_checkpointing: omit it"
        )
    network.gradient_checkpointing_enable({"use_reentrant": False})
    for number, block in enumerate(blocks(network)):
        setattr(block, "gradient_checkpointing", number % every == 0)  # noqa: B010 (mypy)


def compile_body(network: transformers.PreTrainedModel) -> None:
    """Compiles the body of a network when it is first used; later runs find the code in the cache.

    By default, `torch.compile` keeps it in a temporary folder, which does not outlive a restart of the machine. The
    code is executed and is for the processor, so its folder is that of the user and the host, and not `data.cache_dir`.
    """
    with contextlib.suppress(OSError, RuntimeError):  # without a home, or if it cannot be written
        folder = Path("~/.cache/lm_lightning/compiled").expanduser() / platform.node()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    network.base_model.compile()


def refuse_untrained(network: transformers.PreTrainedModel, name: str, new: list[str], training: bool) -> None:
    """Refuses new tensors that would stay random, because they are frozen or the network is only evaluated.

    Args:
        network: The network.
        name: Origin of its other weights, for messages.
        new: Names of its tensors without pretrained weights.
        training: Whether it will be trained.
    """
    if not training and new:
        raise hub.untrained(name, network, new)
    parameters = dict(network.named_parameters())
    frozen = [key for key in new if key in parameters and not parameters[key].requires_grad]
    if frozen:
        raise UserError(
            f"{name} has no weights for {', '.join(frozen[:5])}, and model.freeze would leave them random: give "
            "patterns that do not match them"
        )


def config_of(description: dict[str, Any]) -> transformers.PreTrainedConfig:
    """The config of a network's description in a checkpoint, see `export.describe`."""
    config = untrusted.network_class(description["class"]).config_class.from_dict(description["config"])
    config.architectures = [description["class"]]
    return config


def labels_of(config: transformers.PreTrainedConfig, auto_class: Any) -> list[str]:
    """The labels that a network predicts, in the order of their numbers; empty if it has no head of `auto_class`."""
    head = auto_class.__name__.removeprefix("AutoModel")  # such as ForSequenceClassification
    if not any(architecture.endswith(head) for architecture in config.architectures or []):
        return []
    return [config.id2label[number] for number in range(config.num_labels)]
