"""The search space of a study, a YAML file: the values to try for flags of `fit`, and the metric to optimize."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Optional, Union

from lm_lightning import yaml_text
from lm_lightning.cli.explain import command_line_error
from lm_lightning.errors import UserError

if TYPE_CHECKING:
    import optuna


@dataclass
class Values:
    """The values of a flag: a range, or a list of choices. A range has integers if all its numbers are integers.

    Args:
        low: Smallest value of a range.
        high: Largest value of a range.
        log: Whether values are sampled uniformly on a logarithmic scale, as is usual for learning rates.
        step: Distance between successive values.
        choices: List of values, instead of a range.
    """

    low: Optional[Union[int, float]] = None
    high: Optional[Union[int, float]] = None
    log: bool = False
    step: Optional[Union[int, float]] = None
    choices: Optional[list[Union[bool, int, float, str, None]]] = None

    def distribution(self) -> "optuna.distributions.BaseDistribution":
        """The values as a distribution of Optuna.

        Raises:
            ValueError: If they are invalid.
        """
        from optuna import distributions

        if self.choices is not None:
            if (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise ValueError("choices cannot have low, high, log or step")
            return distributions.CategoricalDistribution(self.choices)
        if self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        if isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step, (int, type(None))):
            step = 1 if self.step is None else self.step
            return distributions.IntDistribution(self.low, self.high, log=self.log, step=step)
        return distributions.FloatDistribution(self.low, self.high, log=self.log, step=self.step)


@dataclass
class SearchSpace:
    """The values that a study tries, and the metric that it optimizes.

    Args:
        flags: Flags of `fit`, without the dashes, and the values to try for each.
        trials: Number of trials, including those that are pruned or fail.
        metric: Column of `metrics.csv` to optimize; the value of a trial is the best value in its run.
        direction: Whether lower (`minimize`) or higher values (`maximize`) are better.
        pruner: Which trials are ended early, at a validation. `median`: trials whose best value so far is worse than
            the median of the previous trials at the same step. `halving`: all except the best quarter, at increasing
            numbers of steps (successive halving). `none`: no trials.
        pruner_startup: Number of complete trials before `median` ends any.
        timeout: Seconds after which no further trial is started. Default: no limit.
        trial_timeout: Seconds after which a trial is killed and counts as failed.
        seed: Seed of Optuna's tree-structured Parzen estimator, which proposes the values; the first ten trials are
            random.
    """

    flags: dict[str, Values]
    trials: int = 20
    metric: str = "val/loss"
    direction: Literal["minimize", "maximize"] = "minimize"
    pruner: Literal["median", "halving", "none"] = "median"
    pruner_startup: int = 4
    timeout: Optional[float] = None
    trial_timeout: float = 86400
    seed: int = 1

    def distributions(self) -> dict[str, "optuna.distributions.BaseDistribution"]:
        """The values as distributions of Optuna, by flag.

        Raises:
            UserError: If the values of a flag are invalid; names the flag.
        """
        found = {}
        for flag, values in self.flags.items():
            try:
                found[flag] = values.distribution()
            except ValueError as error:
                raise UserError(f"the values of {flag} in the search space are invalid: {error}") from error
        return found


def read_search_space(file: str, trials: Optional[int] = None) -> SearchSpace:
    """Reads a YAML file with the fields of `SearchSpace`; the argument `trials` overrides the field.

    Raises:
        UserError: If the file is invalid; names the file and the reason.
    """
    import yaml
    from jsonargparse import ArgumentParser

    if not Path(file).is_file():
        raise UserError(f"there is no search space {file}: configs/tuning/gpt.yaml is an example of one")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SearchSpace)
    try:
        content = yaml_text.load(Path(file).read_text(encoding="utf-8"))
        flags = content.get("flags") if isinstance(content, dict) else None
        if not isinstance(flags, dict) or not all(isinstance(values, dict) for values in flags.values()):
            raise UserError(
                f"the search space {file} needs flags, each with a range or choices, as "
                "`flags: {model.schedule.warmup_steps: {low: 10, high: 100}}`"
            )
        search = SearchSpace(**vars(parser.instantiate(parser.parse_path(file))))
    except (argparse.ArgumentError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"the search space {file} cannot be used: {command_line_error(error, ['tune'])}") from error
    search.trials = search.trials if trials is None else trials
    if not search.flags:
        raise UserError(f"the search space {file} has no flags to try: add at least one under `flags`")
    for name, least in (("trials", 1), ("pruner_startup", 0)):
        if getattr(search, name) < least:
            raise UserError(
                f"the search space {file} has {name} {getattr(search, name)}, but must have {least} or more"
            )
    search.distributions()
    return search
