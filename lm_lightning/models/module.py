"""The LightningModule that all models share: training, evaluation, optimizer and checkpoints.

Networks are created in `build.py` and exported in `export.py`; gradients are scaled in `steps.py`.
"""

import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Optional

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from lightning.pytorch import LightningModule
from torch import Tensor

from lm_lightning import hub
from lm_lightning.compat.transformers import network_error
from lm_lightning.console import printable
from lm_lightning.data import contract
from lm_lightning.data.order import seed_of
from lm_lightning.data.tokenizer import vocabulary
from lm_lightning.errors import UserError
from lm_lightning.models import adapter as adapters
from lm_lightning.models import attention, build, export, resuming
from lm_lightning.models.adapter import Adapter
from lm_lightning.models.metrics import LossRatio, Mode
from lm_lightning.models.overriding import check_attribute, check_class, hook, refuse_early_network
from lm_lightning.models.steps import OptimizerSteps, gather_samples, schedule_steps, set_seed
from lm_lightning.optim import OptimizerFactory, Schedule, group_settings, make_optimizer, restore_settings
from lm_lightning.run import pretrained_name


class LanguageModule(LightningModule):
    """Base of all models: a network of `transformers`, its training and its evaluation.

    A subclass, which is a task, must set `auto_class` and define `loss`. It may override all methods with `@hook`:
    `main_metric`, `metrics` with `metric_modes`, `validation_step` and `join_predictions` (what is measured);
    `head_settings`, `head_fits`, `own_labels`, `new_network`, `pretrained_network`, `replace_head` and `network_made`,
    with the attribute `unused` (the network and its head); `distillation_loss`; `extra_files`. It may define
    `predict_step`, and override Lightning's hooks, such as `on_save_checkpoint`, if it calls those of this class. All
    other names of this class are refused. docs/extending.md describes these methods, and `data/contract.py` what is
    read from the data module and its batches.

    Args:
        network: Settings of a new `transformers` network, such as `{model_type: gpt2, n_layer: 4}`; settings that are
            omitted have that model type's defaults. The vocabulary and its special tokens come from the tokenizer.
        pretrained: Run folder, `from_pretrained` folder or Hub name of weights to start from, instead of `network`.
        optimizer: A `torch.optim.Optimizer` class with its settings; it gets the groups of `parameter_groups`. If you
            choose a class other than the default, its own default settings apply.
        schedule: Learning rate over the steps.
        attn_implementation: Attention implementation of `transformers` (`sdpa`, `eager`, `flash_attention_2`, ...).
            Default: the best that `transformers` finds; on a CPU, `sdpa` is then made faster for short sequences.
        compile: Whether to compile the network's body with `torch.compile`: slower to start, then faster. The compiled
            code is cached for later runs.
        activation_checkpointing: Recomputes the activations of every n-th block in the backward pass instead of keeping
            them, which needs less memory but more time: 1 for all blocks, 2 for every second, ... 0 for none.
        on_nonfinite: What to do when the loss or gradient of an optimizer step is not finite: `stop` the run, or `skip`
            the step, which leaves weights and optimizer as they are. With `skip`, the host waits for an accelerator at
            each step, unless the optimizer is a fused one of torch (`fused: true`).
        skip_limit: Maximum number of consecutive steps that are skipped; at the next one, the run stops.
        freeze: Patterns of names of parameters that are not trained, such as `*embeddings*`.
        layer_decay: Factor of the learning rate from each layer to the one below it; the head has the full rate.
        adapter: A method, such as `LoRA`, that trains a few new tensors in addition to those of `pretrained`, which are
            frozen. Default: all weights are trained.
        keep_head: Whether to keep the head of `pretrained` although its labels have other names than the data's, such
            as LABEL_0 and LABEL_1; they then stand for the data's labels in sorted order. Default: such a head is
            replaced.
    """

    auto_class: Any  # of transformers, such as AutoModelForCausalLM
    unused: tuple[str, ...] = ()  # prefixes of the names of tensors that are not used, and need not be pretrained
    # Description of the network in the checkpoint that `validate`, `test` or `predict` will load, else None. The
    # command line sets it, because labels depend on it, and Lightning loads checkpoints only after the data's setup.
    evaluated_network: Optional[dict[str, Any]] = None

    def __init__(
        self,
        network: Optional[dict[str, Any]] = None,
        pretrained: Optional[str] = None,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        schedule: Schedule = Schedule(),
        attn_implementation: Optional[str] = None,
        compile: bool = False,
        activation_checkpointing: int = 0,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        skip_limit: int = 10,
        freeze: Sequence[str] = (),
        layer_decay: float = 1.0,
        adapter: Optional[Adapter] = None,
        keep_head: bool = False,
    ) -> None:
        super().__init__()
        build.check_options(network, pretrained, adapter, activation_checkpointing)
        self.settings, self.pretrained = network, pretrained
        self.adapter, self.new_tensors = adapter, list[str]()  # tensors without pretrained weights
        self.strict_loading = adapter is None  # checkpoints of an adapter do not have the base
        self.optimizer_factory, self.schedule = optimizer, schedule
        self.attn_implementation, self.compile_body = attn_implementation, compile
        self.activation_checkpointing = activation_checkpointing
        self.network: transformers.PreTrainedModel = None  # created by `configure_model`
        self.val_loss = LossRatio()
        self.freeze_patterns, self.layer_decay, self.keep_head = freeze, layer_decay, keep_head
        self.optimizer_steps = OptimizerSteps(on_nonfinite, skip_limit, partial(gather_samples, self), self.print)
        self.resumed_at = 0  # optimizer step of the checkpoint that this run resumed from
        self.checked = set[str]()  # stages whose batches were checked
        self.network_changes = list[Callable[[Any], None]]()  # by callbacks, before the network is sharded
        self.training_loss: Optional[Callable[[dict], tuple[Tensor, Tensor]]] = None  # set by a callback

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_class(cls, LanguageModule, LightningModule)

    def __setattr__(self, name: str, value: Any) -> None:
        check_attribute(self, LanguageModule, name)
        super().__setattr__(name, value)

    def print(self, *values: Any, **settings: Any) -> None:
        """Prints in the first process; control characters of names and texts from files are escaped."""
        super().print(*(printable(value) if isinstance(value, str) else value for value in values), **settings)

    @property
    def tokenizer(self) -> Optional[transformers.PreTrainedTokenizerFast]:
        """The data's tokenizer, None if it has none."""
        return contract.tokenizer_of(self.trainer.datamodule)

    # What a task defines

    @hook
    def loss(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The loss of a batch: its sum over target tokens, () float32, and their number, () int64."""
        raise NotImplementedError

    @staticmethod
    @hook
    def main_metric(data: Any) -> str:
        """The metric of an evaluation by which the best checkpoint is chosen, unless `best.monitor` names another.

        Args:
            data: Options of the data module by name, which may decide which metrics there are.
        """
        return "loss"

    @hook
    def head_settings(self) -> dict[str, Any]:
        """Settings of the network's config that its head needs, in addition to the user's."""
        return {}

    @hook
    def head_fits(self) -> bool:
        """Whether the head of `pretrained` predicts the data's labels, in their order."""
        return self.own_labels() == self.trainer.datamodule.labels

    @hook
    def network_made(self) -> None:
        """Called once, when `configure_model` has created the network."""

    @hook
    def metrics(self, loss: Tensor, split: str) -> dict[str, Tensor]:
        """The metrics of an evaluation of a split, by name: () float32 each. `loss` is in nats per token."""
        return {"loss": loss}

    @hook
    def metric_modes(self) -> dict[str, Optional[Mode]]:
        """The names in `metrics`, each with the better direction, `min` or `max`; None if neither is better.

        It is called when the data is set up, before the network is created.
        """
        return {"loss": "min"}

    @hook
    def join_predictions(self, rows: list[dict]) -> list[dict]:
        """Converts all dicts from `predict_step`, in the order of the samples, to those that are written."""
        return rows

    @hook
    def distillation_loss(self, batch: dict, teacher: Any, distiller: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of a batch in training with a teacher.

        Args:
            batch: As for `loss`.
            teacher: A model of the same class, without gradients and in evaluation mode.
            distiller: Computes the losses: `divergence(logits, teacher_logits)` of each row, `mix(own, distillation)`
                of both losses, and `token_losses` does all of this for a model that predicts tokens.

        Returns:
            The loss, summed over targets, () float32; the number of targets, () int64; the distillation loss alone,
            summed over targets, () float32.

        Raises:
            UserError: If the task does not support it.
        """
        raise UserError(f"{type(self).__name__} does not support distillation: omit the callback Distillation")

    @hook
    def extra_files(self) -> Optional[export.ExtraFiles]:
        """Additional files of an exported network."""
        return None

    # Network

    def configure_model(self) -> None:
        """Creates the network, which needs the tokenizer; Lightning calls this after the data is set up."""
        if self.network is not None:
            refuse_early_network(self)
            return
        attention.choose(self.attn_implementation)
        try:
            self.network = self.new_network() if self.settings is not None else self.pretrained_network()
        except (ValueError, TypeError, ImportError, StrictDataclassError) as error:  # transformers refuses the settings
            reason = network_error(error)
            raise UserError(f"the network of model.network or model.pretrained cannot be created: {reason}") from error
        self.network.train()  # `from_pretrained` leaves it in evaluation mode
        if self.adapter is not None:
            self.own_tensors = self.adapter.adapt(self.network, self.new_tensors)
            self.adapter_record = adapters.record_of(self.adapter, self.pretrained_folder(), self.new_tensors)
        build.freeze(self.network, self.freeze_patterns, self.print)
        if self.evaluated_network is None:
            new = [name for name in self.new_tensors if not name.startswith(self.unused)]
            build.refuse_untrained(self.network, str(self.pretrained), new, training=self.trainer.state.fn == "fit")
        self.network_class = type(self.network).__name__  # sharding changes it
        build.checkpoint_activations(self.network, self.activation_checkpointing)
        self.print(f"network: {type(self.network).__name__}, {self.network.num_parameters():,} parameters")
        self.network_made()
        if self.adapter is not None:
            self.print(adapters.summary(self.adapter, self.network))
        for change in self.network_changes:
            change(self.network)
        if self.compile_body:  # last: not for the few tokens of checks, nor with layers that callbacks replace
            build.compile_body(self.network)

    def builder(self) -> build.NetworkBuilder:
        """Creates networks for this run's data and trainer."""
        return build.builder_of(self)

    @hook
    def new_network(self) -> transformers.PreTrainedModel:
        """A network with new weights, from the settings and the tokenizer's vocabulary."""
        return self.builder().new(self.settings or {})

    @hook
    def pretrained_network(self) -> transformers.PreTrainedModel:
        """The network of `pretrained`; sets `new_tensors`."""
        builder = self.builder()
        network, self.new_tensors = builder.load(self.pretrained_folder(), training=self.trainer.state.fn == "fit")
        self.replace_head(builder, network)
        self.new_tensors += builder.add_tokens(network)
        return network

    @hook
    def replace_head(self, builder: build.NetworkBuilder, network: transformers.PreTrainedModel) -> None:
        """Replaces the weights of the head of `pretrained` by new ones if it is for other labels than the data's."""
        if builder.head_settings and not self.head_fits():
            own, labels = self.own_labels(), self.trainer.datamodule.labels
            reset = builder.replace_head(network, own, labels, self.new_tensors, self.keep_head)
            self.new_tensors = sorted({*self.new_tensors, *reset})

    def label_settings(self) -> dict[str, Any]:
        """`head_settings` of a head that predicts the data's labels, whose names the config keeps."""
        labels = self.trainer.datamodule.labels
        return {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}

    @hook
    def own_labels(self) -> list[str]:
        """The labels that the evaluated checkpoint or `pretrained` predicts, in the order of their numbers.

        Empty without a head for them.
        """
        if self.evaluated_network is not None:
            return build.labels_of(build.config_of(self.evaluated_network), self.auto_class)
        return [] if self.pretrained is None else build.labels_of(hub.config(self.pretrained_folder()), self.auto_class)

    def pretrained_folder(self) -> str:
        """The folder or Hub name for `pretrained`, which may also be a run."""
        return pretrained_name(str(self.pretrained))

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the vocabulary that are tokens; a new network has up to 63 more. Known when the network exists."""
        if self.settings is None or self.tokenizer is None:
            return self.network.get_input_embeddings().weight.shape[0]
        return vocabulary(self.tokenizer)

    # Export

    def description(self) -> dict[str, Any]:
        """Everything that is needed to create the network again, except the weights, see `export.describe`."""
        padding = None if self.tokenizer is None else self.tokenizer.pad_token_id
        return export.describe(self.network, self.network_class, self.vocab_size, padding, self.extra_files())

    def exporter(self) -> export.Exporter:
        """Prepares the network for export, as it is now or with the weights of a checkpoint."""
        record = None if self.adapter is None else self.adapter_record
        first = self.trainer.is_global_zero
        return export.Exporter(self.network, self.description(), self.tokenizer, self.adapter, record, first)

    # Training

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        # Dropout is a function of (seed, step, micro-batch, replica), so that a resumed run draws the same numbers.
        seed, replica = int(os.environ.get("PL_GLOBAL_SEED", 0)), contract.place(self.trainer)["rank"]
        set_seed(seed_of(seed, self.trainer.global_step, self.optimizer_steps.rows, replica), self.device)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        self.check_batch(batch, "train")
        return self.optimizer_steps.add(self.trainer, batch, *(self.training_loss or self.loss)(batch))

    def check_batch(self, batch: Any, stage: str) -> None:
        """Refuses batches that this model cannot use; only the first batch of each stage is checked."""
        if stage not in self.checked:
            self.checked.add(stage)
            contract.check_batch(batch, self.trainer.datamodule, self.vocab_size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log_dict(self.optimizer_steps.finish(self.trainer, self, optimizer, self.device))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Optional[float] = None,
        gradient_clip_algorithm: Optional[str] = None,
    ) -> None:
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:  # the norm is known already
            self.optimizer_steps.clip_norm(self.parameters(), gradient_clip_val)

    # Optimizer

    def total_steps(self) -> float:
        """Optimizer steps of the full run, `inf` if it has no end."""
        trainer = self.trainer
        if trainer.max_steps > 0 and trainer.max_epochs == -1:
            return trainer.max_steps
        return trainer.estimated_stepping_batches

    def configure_optimizers(self) -> dict:
        self.schedule_steps = schedule_steps(self.trainer, self.total_steps())
        if not self.trainer.fast_dev_run:
            self.schedule.check(self.schedule_steps(0))
        optimizer, scheduler = make_optimizer(
            self.network, self.optimizer_factory, self.schedule, self.schedule_steps, self.layer_decay
        )
        self.group_settings = group_settings(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        contract.check_loader(self.trainer)
        # A checkpoint restores the optimizer settings of its run; those of this run replace them.
        restore_settings(self.trainer.optimizers[0], self.group_settings)
        step = self.trainer.global_step
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * self.schedule.factor(step, self.schedule_steps(step))
        self.lr_schedulers().base_lrs = [settings["initial_lr"] for settings in self.group_settings]

    # Evaluation

    @hook
    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Adds a batch to the metrics of an evaluation; `test_step` does the same."""
        self.check_batch(batch, "evaluation")
        self.val_loss.update(*self.loss(batch))

    def test_step(self, batch: dict, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.log_evaluation("val", "validation")

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
        """The title of tables and figures of an evaluation: the split, and the step or the name of the weights."""
        if self.trainer.state.fn == "fit":
            return f"{split}, step {self.trainer.global_step:,}"
        return f"{split}, {Path(str(self.trainer.ckpt_path or self.pretrained)).name}"

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        self.optimizer_steps.nonfinite.check()
        checkpoint |= resuming.state_of(self)
        if self.adapter is not None:
            checkpoint["state_dict"] = adapters.without_base(checkpoint["state_dict"], self.own_tensors)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        resuming.check(self, checkpoint)
        if self.trainer.state.fn == "fit":
            self.resumed_at = checkpoint["global_step"]
            self.optimizer_steps.nonfinite.skipped = checkpoint.get("skipped_steps", 0)
            if self.pretrained is not None and self.adapter is None:
                self.print(f"weights: those of the checkpoint, not of model.pretrained ({self.pretrained})")
