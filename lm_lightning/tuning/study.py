"""A study: trials of a search space, each a run of `fit`, in a common folder.

Each trial is a `fit` in a separate process, with the user's config and flags and the values that Optuna proposes. Its
validations are read from `metrics.csv` while it runs, so that bad trials can be ended early. The folder of a study has

study.db               Optuna's database of all trials; a study that was killed is resumed from it
config.yaml            settings that all trials share
trial-003/<time>/      run folder of a trial; the best one keeps its checkpoints and model
best.yaml              complete config of the best trial
parallel.png           flags and metric of each trial, as parallel coordinates
"""

import argparse
import collections
import json
import math
import shlex
import shutil
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from filelock import FileLock, Timeout

from lm_lightning import files, yaml_text
from lm_lightning.cli import settings
from lm_lightning.errors import UserError
from lm_lightning.security import untrusted
from lm_lightning.security.redaction import redact
from lm_lightning.tuning.fit_process import fit, logged, newest_run, read_settings
from lm_lightning.tuning.search_space import SearchSpace

if TYPE_CHECKING:
    import optuna


class Study:
    """Trials of a search space, in a common folder.

    Args:
        fit_flags: `--config` and any other flag of `fit`.
        search: The search space.
        name: Name of the study's folder in `runs_dir`. Default: the name of the config followed by `-study`.

    Raises:
        UserError: If `fit` refuses the flags.
    """

    def __init__(self, fit_flags: list[str], search: SearchSpace, name: Optional[str] = None) -> None:
        first = {flag: values.choices[0] if values.choices else values.low for flag, values in search.flags.items()}
        with tempfile.TemporaryDirectory(prefix="tune-") as scratch:
            self.settings = read_settings([*fit_flags, *flags_of(first)], Path(scratch))
        if self.settings["ckpt_path"] is not None:
            raise UserError("tune cannot resume from --ckpt_path: to start from weights, use --model.pretrained")
        self.search = search
        self.settings["name"] = self.settings["name"] or config_name(fit_flags)
        name = untrusted.plain_name(f"{self.settings['name']}-study" if name is None else name, "--study")
        self.folder = Path(self.settings["runs_dir"]).absolute() / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot create the folder {self.folder} ({error.strerror}): choose another --runs_dir"
            ) from error
        untrusted.refuse_links(self.folder)

    def open(self) -> "optuna.Study":
        """Optuna's study, new or with its existing trials.

        Raises:
            UserError: If it was started with other settings.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        search = self.search
        study = optuna.create_study(
            storage=f"sqlite:///{self.folder / 'study.db'}",
            study_name=self.folder.name,
            direction=search.direction,
            load_if_exists=True,
            pruner={
                "median": optuna.pruners.MedianPruner(n_startup_trials=search.pruner_startup),
                "halving": optuna.pruners.SuccessiveHalvingPruner(),
                "none": optuna.pruners.NopPruner(),
            }[search.pruner],
        )
        space = {"metric": search.metric, "flags": {flag: asdict(values) for flag, values in search.flags.items()}}
        made_of = {"direction": search.direction} | space | redact(self.settings)
        made_of = json.loads(json.dumps(made_of, default=str))
        earlier = redact(study.user_attrs.get("made_of"))
        if earlier is None:
            study.set_user_attr("made_of", made_of)
        elif different := [key for key in made_of if made_of[key] != earlier.get(key)]:
            raise UserError(
                f"the study {self.folder} was started with another {' and another '.join(different)}: use the same as "
                "then, or give another --study"
            )
        return study

    def ended(self) -> "list[optuna.trial.FrozenTrial]":
        """Trials that have ended, including failed and pruned ones, but not interrupted ones."""
        return [t for t in self.trials.trials if t.state.name in ("COMPLETE", "PRUNED") or "reason" in t.user_attrs]

    def best(self) -> "Optional[optuna.trial.FrozenTrial]":
        """The trial with the best value; None if there is none."""
        complete = [t for t in self.trials.trials if t.state.name == "COMPLETE"]
        return self.trials.best_trial if complete else None

    def runs(self, number: int) -> str:
        """Name of the runs of a trial."""
        return f"trial-{number:03}"

    def run(self) -> None:
        """Runs the missing trials, and reports the best trial.

        Raises:
            UserError: If another process runs the study, the folder contains another study, or no trial has a value.
        """
        try:
            with FileLock(self.folder / "study.lock").acquire(timeout=0), tempfile.TemporaryDirectory() as private:
                self.trials = self.open()
                files.write_text(self.folder / "config.yaml", yaml_text.dump(redact(self.settings)))
                self.config = Path(private) / "config.yaml"
                files.write_text(self.config, yaml_text.dump(self.settings))
                self.run_trials()
                self.report()
        except Timeout:
            raise UserError(f"another process runs the study {self.folder}: wait until it ends, or end it") from None

    def run_trials(self) -> None:
        """Runs trials until there are enough; interrupted ones are repeated first."""
        import optuna

        before = len(self.ended())
        interrupted = [t for t in self.trials.trials if t.state == optuna.trial.TrialState.RUNNING]
        for cut in interrupted:
            self.trials.tell(cut.number, state=optuna.trial.TrialState.FAIL)
            if "reason" not in cut.user_attrs:
                self.trials.enqueue_trial(cut.params)
        if before or interrupted:
            print(f"{self.folder}: {before} trials are done, {len(interrupted)} were interrupted", flush=True)
        begin, distributions = time.monotonic(), self.search.distributions()
        while (done := len(self.ended())) < self.search.trials:
            if self.search.timeout is not None and time.monotonic() - begin > self.search.timeout:
                print(f"no further trial is started after {self.search.timeout:g} seconds (timeout)")
                break
            # A seed for each trial, so that a resumed study does not propose the same values again.
            self.trials.sampler = optuna.samplers.TPESampler(seed=self.search.seed + len(self.trials.trials))
            trial = self.trials.ask(distributions)
            tried = ", ".join(f"{flag.rpartition('.')[2]} {short(value)}" for flag, value in trial.params.items())
            start = time.monotonic()
            outcome = self.run_trial(trial)
            best = self.best()
            so_far = f"; the best is {best.value:.4f} of {self.runs(best.number)}" if best else ""
            print(
                f"{done + 1}/{self.search.trials} {self.runs(trial.number)} ({tried}): {outcome}, "
                f"{time.monotonic() - start:.0f} s{so_far}",
                flush=True,
            )
            self.clean(best)
        if self.best() is None:
            reasons = [t.user_attrs["reason"] for t in self.ended() if "reason" in t.user_attrs]
            raise UserError(f"no trial of {self.folder} has a value" + (f": {reasons[-1]}" if reasons else ""))

    def run_trial(self, trial: "optuna.Trial") -> str:
        """Runs a trial, reports it to Optuna, and returns its result as text."""
        from optuna.trial import TrialState

        metric, name, reported = self.search.metric, self.runs(trial.number), set[int]()

        def prune() -> str:
            for step, value in logged(newest_run(self.folder, name), metric).items():
                if step not in reported:
                    trial.report(value, step)
                    reported.add(step)
                    if trial.should_prune():
                        return f"pruned at step {step} with {metric} {value:.4f}"
            return ""

        place = self.folder / name
        place.mkdir(exist_ok=True)
        common = ["--config", str(self.config), "--runs_dir", str(self.folder), "--name", name]
        flags = [*common, "--trainer.enable_progress_bar", "false", *flags_of(trial.params)]
        out, reason = fit(flags, place, self.search.trial_timeout, watch=prune)
        values = logged(newest_run(self.folder, name), metric)
        if reason.startswith("pruned"):
            self.trials.tell(trial, state=TrialState.PRUNED)
            return reason
        if not reason and not values:
            raise UserError(
                f"{newest_run(self.folder, name)}/metrics.csv has no column {metric}: choose another metric in the "
                "search space"
            )
        finite = [value for value in values.values() if math.isfinite(value)]
        if reason or not finite:
            trial.set_user_attr("reason", reason or f"no {metric} is finite")
            self.trials.tell(trial, state=TrialState.FAIL)
            return f"failed: {trial.user_attrs['reason']}"
        for step in values.keys() - reported:
            trial.report(values[step], step)
        value = min(finite) if self.search.direction == "minimize" else max(finite)
        self.trials.tell(trial, value)
        return f"{metric} {value:.4f}"

    def clean(self, best: "Optional[optuna.trial.FrozenTrial]") -> None:
        """Removes the weights of all trials except the best one."""
        for run in self.folder.glob("trial-*/*/"):
            if best is None or run.parent.name != self.runs(best.number):
                for part in ("checkpoints", "model"):
                    shutil.rmtree(run / part, ignore_errors=True)

    def report(self) -> None:
        """Writes `best.yaml` and `parallel.png`, and prints the results."""
        best = self.best()
        assert best is not None, "`run` ensures that there is one"
        run = newest_run(self.folder, self.runs(best.number))
        assert run is not None
        found = settings.read(str(run / "config.yaml"))
        own = {key: self.settings[key] for key in ("name", "runs_dir")}
        own["trainer"] = found["trainer"] | {
            "enable_progress_bar": self.settings["trainer"]["enable_progress_bar"],
        }
        files.write_text(self.folder / "best.yaml", yaml_text.dump(found | own))
        states = collections.Counter(trial.state.name for trial in self.ended())
        kinds = [f"{states[name]} {word}" for name, word in KINDS.items() if states[name]]
        print(f"{sum(states.values())} trials: {', '.join(kinds)}")
        print(f"best: {self.runs(best.number)} with {self.search.metric} {best.value:.6g}, {run}")
        for flag, value in best.params.items():
            print(f"  --{flag} {short(value)}")
        if self.draw():
            print(f"parallel coordinates: {self.folder / 'parallel.png'}")
        print(f"to train it: python -m lm_lightning fit --config {shlex.quote(str(self.folder / 'best.yaml'))}")

    def draw(self) -> bool:
        """Draws the complete trials as parallel coordinates, and returns whether there was something to draw."""
        import matplotlib
        import optuna

        if sum(trial.state.name == "COMPLETE" for trial in self.trials.trials) < 2:
            return False
        matplotlib.use("Agg")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an experimental function, and axes with a single value
            axes = optuna.visualization.matplotlib.plot_parallel_coordinate(self.trials, target_name=self.search.metric)
        names = [flag.rpartition(".")[2] for flag in sorted(self.search.flags)]  # Optuna truncates long names
        axes.set_xticklabels([self.search.metric, *names])
        for lines in axes.collections:
            lines.set_cmap("viridis_r")  # Optuna's colors fade to white
        figure: Any = axes.figure
        figure.set_size_inches(3 + 2 * len(self.search.flags), 5)
        files.write_picture(self.folder / "parallel.png", figure, bbox_inches="tight")
        return True


KINDS = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


def flags_of(values: dict[str, Any]) -> list[str]:
    """Flags of `fit` that set options to values."""
    return [f"--{flag}={value if isinstance(value, str) else json.dumps(value)}" for flag, value in values.items()]


def short(value: Any) -> str:
    """A value in readable form."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def config_name(fit_flags: list[str]) -> str:
    """The default name of an experiment: the name of its first config file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    configs = parser.parse_known_args(fit_flags)[0].config
    return Path(configs[0]).stem if configs else "run"
