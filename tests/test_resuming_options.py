"""Options that are changed on resuming: each is honored, or refused with a reason, and none is forgotten."""

import importlib
import inspect
import json
import pkgutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import needs
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from test_resuming import TINY

from lm_lightning import features
from lm_lightning.checkpoints.callback import Checkpoints
from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.cli import explain
from lm_lightning.errors import UserError
from lm_lightning.models.module import LanguageModule
from lm_lightning.optim import Schedule


class Seen(Callback):
    """Keeps the trainer of the last run."""

    trainer: ClassVar[Any] = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Seen.trainer = trainer
        Seen.lr = trainer.optimizers[0].param_groups[0]["initial_lr"]


def early(trainer: Any) -> EarlyStopping:
    return trainer.early_stopping_callback


def checkpoints(trainer: Any, monitor: Any) -> Checkpoints:
    return next(c for c in trainer.checkpoint_callbacks if c.monitor == monitor)


HONORED = {  # option: new value, and where it is seen to be in force
    "trainer.max_steps": (6, lambda t: t.global_step),
    "trainer.max_epochs": (50, lambda t: t.max_epochs),
    "trainer.min_steps": (5, lambda t: t.min_steps),
    "trainer.min_epochs": (2, lambda t: t.min_epochs),
    "trainer.max_time": ("00:05:00:00", lambda t: "00:05:00:00" if timer(t) == 5 * 3600 else timer(t)),
    "trainer.limit_train_batches": (7, lambda t: t.num_training_batches),
    "trainer.limit_val_batches": (2, lambda t: sum(t.num_val_batches)),
    "trainer.val_check_interval": (2, lambda t: t.val_check_batch // t.accumulate_grad_batches),
    "trainer.log_every_n_steps": (1, lambda t: t.log_every_n_steps),
    "trainer.accumulate_grad_batches": (2, lambda t: t.accumulate_grad_batches),
    "trainer.gradient_clip_val": (0.5, lambda t: t.gradient_clip_val),
    "model.skip_limit": (3, lambda t: t.lightning_module.optimizer_steps.nonfinite.limit),
    "model.on_nonfinite": ("skip", lambda t: t.lightning_module.optimizer_steps.nonfinite.on_nonfinite),
    "model.activation_checkpointing": (1, lambda t: t.lightning_module.activation_checkpointing),
    "model.schedule.shape": ("linear", lambda t: t.lightning_module.schedule.shape),
    "model.optimizer.lr": (0.003, lambda t: Seen.lr),
    "data.batch_size": (4, lambda t: t.datamodule.batch_size),
    "data.mask_documents": ("true", lambda t: str(t.datamodule.mask_documents).lower()),
    "best.save_top_k": (1, lambda t: len(checkpoints(t, "val/loss").best_k_models)),
    "last.every_n_train_steps": (2, lambda t: checkpoints(t, None)._every_n_train_steps),
    "EarlyStopping.patience": (70, lambda t: early(t).patience),
    "EarlyStopping.min_delta": (0.25, lambda t: abs(early(t).min_delta)),
}
REFUSED = {
    "model.network.n_head": (4, "the checkpoint's network has n_head 2 .here 4."),
    "model.layer_decay": (0.5, r"the checkpoint was made with model.layer_decay 1.0 \(here 0.5\)"),
    "model.freeze": ('["*wpe*"]', r"the checkpoint was made with model.freeze \[\] \(here \['\*wpe\*'\]\)"),
    "model.optimizer": ("lm_lightning.optim.MuonAdamW", "the checkpoint's optimizer is AdamW, this run's MuonAdamW"),
    "data.block_size": (16, "the checkpoint was made with data.block_size 8, but this run has 16"),
    "data.tokenizer": ('{"vocab_size": 280}', "the checkpoint"),
    "data.corpus": ('{"paths": ["OTHER"]}', "the checkpoint"),
    "seed_everything": (5, "the checkpoint was made with seed_everything 1, but this run has 5"),
    "trainer.max_steps": (4, "raise trainer.max_steps"),
}
# Options that are about something else than what is trained, by reason.
ELSEWHERE = {
    "how the machine is used; the losses stay the same": "accelerator strategy devices num_nodes precision "
    "deterministic benchmark compile attn_implementation num_workers cache_dir plugins sync_batchnorm detect_anomaly "
    "inference_mode use_distributed_sampler reload_dataloaders_every_n_epochs gather_across_devices mini_batch_size "
    "barebones ngrams_in_memory",
    "what is shown and recorded": "logger enable_progress_bar enable_model_summary profiler enable_autolog_hparams "
    "model_registry default_root_dir verbose log_rank_zero_only callbacks num_sanity_val_steps",
    "other commands and trial runs": "limit_test_batches limit_predict_batches fast_dev_run texts",
    "Lightning reads it anew": "check_val_every_n_epoch overfit_batches gradient_clip_algorithm enable_checkpointing "
    "strict check_finite stopping_threshold divergence_threshold check_on_train_epoch_end",
    "names and times of checkpoints, read anew": "filename dirpath save_last save_on_exception save_weights_only "
    "auto_insert_metric_name train_time_interval every_n_epochs save_on_train_epoch_end enable_version_counter",
    "another metric begins anew, with its own state": "monitor mode",
    "where training has begun, before the checkpoint": "pretrained unigram_start keep_head adapter decoder",
    "part of the fingerprint of the training rows or of the data's identity": "tables columns max_length language "
    "masking next_sentence kind separator scheme mark overlap max_question retrieval hard_negatives min_score "
    "max_score parallel max_target_length max_tokens source_language target_language "
    "pack special_tokens chat_template prompts",
    "of the loss or the evaluation, read anew": "top_k class_weights label_smoothing dropout max_answer threshold "
    "scoring scale pooling decoding evaluation objective reference sampling max_new_tokens "
    "mining",
    "of a mixture of corpora: they change what follows the stages in the checkpoint": "corpora temperature stages",
    "sizes of the network, which a checkpoint does not fit otherwise": "arc_size relation_size",
    "settings with options of their own, which are checked": "schedule network",
    "of the schedule, read anew": "warmup_ratio warmup_steps min_lr_ratio decay_ratio",
}


# Options of our callbacks: those that the state in a checkpoint fits alone are refused, others are read anew.
CALLBACKS = {
    "Gradients": {"anew": "every_n_steps bins"},  # fork: diagnostics
    "Spikes": {"anew": "deviations steps"},  # fork: diagnostics
    "Export": {"anew": "weights"},
    "Predictions": {"anew": "escape_formulas"},
}


def timer(trainer: Any) -> float:
    return next(c._duration for c in trainer.callbacks if type(c).__name__ == "Timer")


def options(cls: type) -> set[str]:
    """The names of a class's options, with those of its bases."""
    signatures = [inspect.signature(c.__init__) for c in inspect.getmro(cls) if "__init__" in vars(c)]
    parameters = [p for signature in signatures for p in signature.parameters.values()]
    return {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}


@needs(
    "tasks.masked_lm",
    "tasks.classification",
    "tasks.tagging",
    "tasks.parsing",
    "tasks.questions",
    "tasks.embedding",
    "tasks.seq2seq",
    "tasks.instruction",
    "tasks.preference",
)
def test_every_option_is_in_a_class_of_those_that_are_checked():
    features.import_classes()
    parts = [c for base in (LanguageModule, LightningDataModule) for c in explain.subclasses(base).values()]
    parts = [LanguageModule, *(c for c in parts if c.__module__.startswith("lm_lightning."))]
    assert len(parts) > 12
    found = set().union(*map(options, [*parts, Trainer, Checkpoints, EarlyStopping, Schedule]))
    listed = [name for names in ELSEWHERE.values() for name in names.split()]
    checked = {name.split(".")[-1] for name in HONORED | REFUSED}
    assert len(listed) == len(set(listed))
    assert found - {*listed, *checked} == set(), "say what happens to these when they are changed on resuming"
    assert {*listed} - found == set(), "there are no such options"


def test_every_option_of_our_callbacks_is_in_a_class():
    packages = ["lm_lightning.callbacks"]
    packages += ["lm_lightning.diagnostics"]  # fork: diagnostics
    modules = [
        importlib.import_module(f"{package}.{m.name}")
        for package in packages
        for m in pkgutil.iter_modules(importlib.import_module(package).__path__)
    ]
    classes = [c for m in modules for c in vars(m).values() if inspect.isclass(c) and issubclass(c, Callback)]
    ours = [c for c in classes if c.__module__.startswith(tuple(packages))]
    found = {c.__name__: set(inspect.signature(c).parameters) for c in ours if inspect.signature(c).parameters}
    assert found == {name: set(" ".join(kinds.values()).split()) for name, kinds in CALLBACKS.items()}


def flags(changes: dict[str, Any]) -> list[Any]:
    stopping = {k.split(".")[1]: v for k, v in changes.items() if k.startswith("EarlyStopping.")}
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 50} | stopping}
    rest = [item for key, value in changes.items() if "Stopping" not in key for item in [f"--{key}={value}"]]
    seen = {"class_path": "test_resuming_options.Seen"}
    start = ["--trainer.max_steps", 4, "--trainer.val_check_interval", 1, "--best.save_top_k", 3]
    return [*TINY, *start, "--trainer.callbacks", json.dumps([seen, stopping]), *rest]


def test_changed_options_are_honored(fit):
    run = fit(*flags({}))
    assert len(list((run / "checkpoints").glob("best*"))) == 3
    again = fit(*flags({name: value for name, (value, _) in HONORED.items()}), "--ckpt_path", "last")
    assert again == run
    assert {name: seen(Seen.trainer) for name, (_, seen) in HONORED.items()} == {
        name: value for name, (value, _) in HONORED.items()
    }
    assert len(list((run / "checkpoints").glob("best*"))) == 1


@pytest.mark.slow
def test_other_changed_options_are_refused_and_leave_the_run_as_it_was(fit, corpus_file: Path, tmp_path: Path):
    other = tmp_path / "other.txt"
    other.write_text(corpus_file.read_text(encoding="utf-8") + "\n\nOne more.", encoding="utf-8")
    run = fit(*flags({}))
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    for name, (value, message) in REFUSED.items():
        changes = {"trainer.max_steps": 8} | {name: str(value).replace("OTHER", str(other))}
        with pytest.raises(UserError, match=message):
            fit(*flags(changes), "--ckpt_path", "last")
        assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()} == before, name
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 4
