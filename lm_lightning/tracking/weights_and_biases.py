"""Weights & Biases: logs a run to W&B, online while it trains or offline in its run folder.

`Samples` and `Predictions` log their tables here, `RunFolder` its config. W&B itself watches the machine.
"""

import contextlib
import os
import secrets
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.errors import UserError
from lm_lightning.files import write_text
from lm_lightning.run import PLACEHOLDER, TRAINING
from lm_lightning.security.redaction import redact_arguments
from lm_lightning.security.untrusted import read_json
from lm_lightning.tracking import compat


class WandbRun(WandbLogger):
    """Lightning's WandbLogger for a run folder, which never asks and never waits for long.

    Without a key, or if the server does not answer, it is offline: all is written to `wandb/` in the run folder, for
    `wandb sync` to send later. W&B's environment variables (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_TAGS,
    WANDB_NOTES, WANDB_NAME, WANDB_RUN_GROUP, ...) apply where an option is omitted.

    A run that is resumed is the same run of W&B; each start is a part of it, which `trainer/part`
    numbers from 0. W&B's own step only ever rises, so the metrics are drawn over `trainer/global_step`; a step that is
    done again is there twice, with two parts.

    Args:
        save_dir: The run folder.
        mode: `online`, `offline` or `disabled`. Default: WANDB_MODE, else online if there is a key.
        project: Default: WANDB_PROJECT, else `lm_lightning`.
        entity: User or team. Default: that of the key.
        name: Of the run. Default: that of the experiment and its time.
        group: Of runs. Default: the name of the experiment.
        tags: Of the run.
        notes: Of the run.
        log_model: Whether a run that has ended leaves `checkpoints/` and `model/` as artifacts. Their aliases are
            `step-<number>`, and of a checkpoint the name of its file, such as `best`.
        timeout: Seconds to wait for the server at the start.
        finish_timeout: Seconds to wait at the end, until all is sent.
    """

    logs_evaluations = True  # `validate`, `test` and `predict` use this logger, too

    def __init__(
        self,
        save_dir: str = PLACEHOLDER,
        mode: Optional[Literal["online", "offline", "disabled"]] = None,
        project: Optional[str] = None,
        entity: Optional[str] = None,
        name: Optional[str] = None,
        group: Optional[str] = None,
        tags: Optional[Sequence[str]] = None,
        notes: Optional[str] = None,
        log_model: bool = True,
        timeout: float = 15.0,
        finish_timeout: float = 600.0,
    ) -> None:
        run = Path(save_dir)
        try:
            super().__init__(
                save_dir=save_dir,
                project=project or os.environ.get("WANDB_PROJECT", "lm_lightning"),
                name=name or os.environ.get("WANDB_NAME", f"{run.parent.name} {run.name}"),
                group=group or os.environ.get("WANDB_RUN_GROUP", run.parent.name),
                entity=entity,
                tags=tags,
                notes=notes,
                mode=mode,
            )
        except ModuleNotFoundError as error:
            raise UserError('wandb is not installed: pip install -e ".[wandb]"') from error
        del compat.init_options(self)["anonymous"]  # W&B warns of it, whatever it is
        self.folder = run / "wandb"
        self.log_artifacts = log_model
        self.timeout, self.finish_timeout = timeout, finish_timeout
        compat.forget_run(self)
        self.part = 0
        self.before: dict[Path, int] = {}  # what there was when this part began

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:  # noqa: D102 (as in Lightning)
        if compat.is_started(self):
            return super().experiment
        import wandb

        os.environ.setdefault("WANDB_DATA_DIR", str(self.folder / "data"))  # tables to be sent; else at home
        options = compat.init_options(self)
        options |= {"id": self.run_id(), "mode": self.mode()}
        self.part = len(list(self.folder.glob(f"*run-*-{options['id']}*")))
        self.before = self.products()
        options["settings"] = wandb.Settings(
            init_timeout=self.timeout,
            finish_timeout=self.finish_timeout,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=0.1,  # seconds of which a kill -9 leaves nothing, else 15
        )
        with redacted_command_line():  # which W&B records
            try:
                return super().experiment
            except wandb.Error as error:
                options["mode"] = self.offline(f"as it could not be started: {error}")
                return super().experiment

    def run_id(self) -> str:
        """The id of the run in this folder, which is drawn when it starts; a sweep's agent gives its own."""
        file = self.folder / "id"
        if "WANDB_RUN_ID" in os.environ or not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(file, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(5))
        return file.read_text(encoding="utf-8")

    def mode(self) -> str:
        """The mode of the option or of WANDB_MODE; offline if W&B would ask for a key, or does not answer."""
        import wandb

        mode = compat.init_options(self)["mode"] or os.environ.get("WANDB_MODE") or "online"
        if mode == "offline":
            return self.offline("as requested")
        try:
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                return self.offline("as there is no key (WANDB_API_KEY, or `wandb login`)")
        except wandb.Error as error:
            return self.offline(f"as the key is none: {error}")
        if mode == "online":
            url = wandb.setup().settings.base_url
            try:
                urllib.request.urlopen(url, timeout=self.timeout).close()
            except urllib.error.HTTPError:
                pass  # an answer, too
            except OSError as error:  # (W&B would try for half a minute)
                return self.offline(f"as {url} does not answer ({getattr(error, 'reason', error)})")
        return mode

    def offline(self, reason: str) -> str:
        """Prints once that the run is offline, why, and how to send it."""
        import wandb

        print(f"W&B: offline, {' '.join(reason.split())[:200]}; `wandb sync {self.folder}` sends the run")
        os.environ.setdefault("WANDB_SILENT", "true")  # which would print it again
        wandb.teardown()  # it reads that anew, and forgets a run that could not be started
        return "offline"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: Optional[int] = None) -> None:  # noqa: D102 (as in Lightning)
        super().log_metrics({**metrics, "trainer/part": self.part}, step)

    def log_histograms(self, histograms: Mapping[str, Any], step: int) -> None:
        """Logs histograms by name, each as `torch.histogram` returns it."""
        import wandb

        made = {
            name: wandb.Histogram(np_histogram=(found.hist.numpy(), found.bin_edges.numpy()))
            for name, found in histograms.items()
        }
        self.log_metrics(made, step)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Lightning would give an artifact the alias `best` for any file that is the only one of its callback."""

    def products(self) -> dict[Path, int]:
        """The checkpoints and the model in the run folder, with the times when they were written."""
        run = self.folder.parent
        return {path: path.stat().st_mtime_ns for path in [*sorted(run.glob("checkpoints/*.ckpt")), *run.glob("model")]}

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Logs what this part has written as artifacts if it was successful, and ends it."""
        run = compat.current_run(self)
        if run is None:
            return
        step = 0
        for path, time in self.products().items() if status == "success" and self.log_artifacts else ():
            model = path.name == "model"
            if model and (path / TRAINING).exists():
                step = read_json(path / TRAINING)["step"]
            elif not model:
                step = load_checkpoint(path, weights=False, verified=True)["global_step"]
            if self.before.get(path) != time:
                self.log_artifact(path, *(("model", "latest") if model else ("checkpoint", path.stem)), step)
        try:
            run.finish(exit_code=int(status != "success"))
        except TimeoutError:
            limit = f"{self.finish_timeout:g} seconds"
            print(f"W&B: not all was sent within {limit}; `wandb sync --include-online {self.folder}` sends the rest")
        else:
            if not run.offline:
                shutil.rmtree(self.folder / "artifacts", ignore_errors=True)
        compat.forget_run(self)

    def log_artifact(self, path: Path, kind: str, alias: str, step: int) -> None:
        """Logs a file or folder as it is now, as an artifact `<kind>-<id of the run>`.

        Args:
            path: The file or folder, which may be replaced later, but is not written to.
            kind: What it is.
            alias: What this version is called, beside `step-<step>`.
            step: The step that it holds.
        """
        import wandb

        # W&B would copy all to a folder of its own at home until it is sent. Links cost nothing.
        kept = self.folder / "artifacts" / f"part-{self.part}" / path.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        artifact = wandb.Artifact(
            f"{kind}-{self.version}", kind, metadata={"step": step, "run_folder": str(path.parent)}
        )
        if path.is_dir():
            shutil.copytree(path, kept, copy_function=link)
            artifact.add_dir(str(kept), policy="immutable")
        else:
            link(path, kept)
            artifact.add_file(str(kept), policy="immutable")
        self.experiment.log_artifact(artifact, aliases=[alias, f"step-{step}"])


def link(source: str | Path, target: str | Path) -> None:
    """Makes a hard link to a file, or a copy if the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextlib.contextmanager
def redacted_command_line() -> Iterator[None]:
    """Hides the secrets of the command line from libraries that record `sys.argv`.

    A library such as W&B may also replace the hook that prints tracebacks; the hook is restored.
    """
    arguments, hook = sys.argv, sys.excepthook
    sys.argv = redact_arguments(arguments)
    try:
        yield
    finally:
        sys.argv, sys.excepthook = arguments, hook
