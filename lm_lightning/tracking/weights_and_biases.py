"""Weights & Biases: logs a run to W&B, online during training or offline in its run folder.

`Samples` and `Predictions` also log their tables, and `RunFolder` its config. W&B itself monitors the machine.
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
    """Lightning's WandbLogger for a run folder, which does not prompt for input and does not wait for long.

    Without an API key, or if the server does not answer, it is offline: everything is written to `wandb/` in the run
    folder, and `wandb sync` can upload it later. The environment variables of W&B (WANDB_MODE, WANDB_PROJECT,
    WANDB_ENTITY, WANDB_TAGS, WANDB_NOTES, WANDB_NAME, WANDB_RUN_GROUP, ...) set options that are not given.

    A resumed run continues the same W&B run. Each start is a part of it; `trainer/part` has the number of the part,
    from 0. Since the step of W&B cannot decrease, metrics are plotted over `trainer/global_step`; a step that is
    repeated has two values, with different parts.

    Args:
        save_dir: The run folder.
        mode: `online`, `offline` or `disabled`. Default: WANDB_MODE, otherwise online if there is an API key.
        project: Name of the project. Default: WANDB_PROJECT, otherwise `lm_lightning`.
        entity: User or team. Default: the one of the API key.
        name: Name of the run. Default: the name of the experiment and the time of the run.
        group: Group of the run. Default: the name of the experiment.
        tags: Tags of the run.
        notes: Notes about the run.
        log_model: Whether to log `checkpoints/` and `model/` as artifacts at the end of the run. Their alias is
            `step-<number>`; checkpoints also have the name of their file, such as `best`.
        timeout: Seconds to wait for the server at the start.
        finish_timeout: Seconds to wait for uploads at the end.
    """

    logs_evaluations = True  # `validate`, `test` and `predict` also use this logger

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
        self.before: dict[Path, int] = {}  # the products of earlier parts

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:  # noqa: D102 (as in Lightning)
        if compat.is_started(self):
            return super().experiment
        import wandb

        os.environ.setdefault(
            "WANDB_DATA_DIR", str(self.folder / "data")
        )  # tables to upload; by default in the home folder
        options = compat.init_options(self)
        options |= {"id": self.run_id(), "mode": self.mode()}
        self.part = len(list(self.folder.glob(f"*run-*-{options['id']}*")))
        self.before = self.products()
        options["settings"] = wandb.Settings(
            init_timeout=self.timeout,
            finish_timeout=self.finish_timeout,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=0.1,  # seconds that are lost with kill -9; by default 15
        )
        with redacted_command_line():  # W&B records it
            try:
                return super().experiment
            except wandb.Error as error:
                options["mode"] = self.offline(f"as it could not be started: {error}")
                return super().experiment

    def run_id(self) -> str:
        """The ID of the run in this folder, which is generated when it starts, unless the agent of a sweep sets it."""
        file = self.folder / "id"
        if "WANDB_RUN_ID" in os.environ or not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(file, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(5))
        return file.read_text(encoding="utf-8")

    def mode(self) -> str:
        """The mode of the option or of WANDB_MODE; offline if there is no API key, or W&B does not answer."""
        import wandb

        mode = compat.init_options(self)["mode"] or os.environ.get("WANDB_MODE") or "online"
        if mode == "offline":
            return self.offline("as requested")
        try:
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                return self.offline("as there is no API key (WANDB_API_KEY, or `wandb login`)")
        except wandb.Error as error:
            return self.offline(f"as the API key is invalid: {error}")
        if mode == "online":
            url = wandb.setup().settings.base_url
            try:
                urllib.request.urlopen(url, timeout=self.timeout).close()
            except urllib.error.HTTPError:
                pass  # an error is also an answer
            except OSError as error:  # (W&B would retry for half a minute)
                return self.offline(f"as {url} does not answer ({getattr(error, 'reason', error)})")
        return mode

    def offline(self, reason: str) -> str:
        """Prints once that the run is offline, why, and how to upload it."""
        import wandb

        print(f"W&B: offline, {' '.join(reason.split())[:200]}; `wandb sync {self.folder}` uploads the run")
        os.environ.setdefault("WANDB_SILENT", "true")  # otherwise W&B would print it again
        wandb.teardown()  # makes W&B read the variable, and forget a run that could not be started
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
        """Does nothing: Lightning would give the alias `best` to any file that is the only one of its callback."""

    def products(self) -> dict[Path, int]:
        """The checkpoints and the model in the run folder, with their modification times."""
        run = self.folder.parent
        return {path: path.stat().st_mtime_ns for path in [*sorted(run.glob("checkpoints/*.ckpt")), *run.glob("model")]}

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Logs the products of this part as artifacts if it was successful, and ends it."""
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
            print(f"W&B: upload incomplete after {limit}; `wandb sync --include-online {self.folder}` uploads the rest")
        else:
            if not run.offline:
                shutil.rmtree(self.folder / "artifacts", ignore_errors=True)
        compat.forget_run(self)

    def log_artifact(self, path: Path, kind: str, alias: str, step: int) -> None:
        """Logs the current content of a file or folder as an artifact `<kind>-<ID of the run>`.

        Args:
            path: The file or folder. It may be replaced later, but not changed in place.
            kind: Type of the artifact.
            alias: Name of this version, in addition to `step-<step>`.
            step: The training step of its weights.
        """
        import wandb

        # W&B would copy everything to a folder in the home folder until it is uploaded. Links need no disk space.
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
    """Creates a hard link to a file, or a copy if the file system does not support links."""
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
