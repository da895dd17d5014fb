"""The search space of a study, a YAML file: which values to try for flags of `fit`, and which metric is optimized."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Optional, Union

from lm_lightning import yaml_text
from lm_lightning.cli.explain import of_command_line
from lm_lightning.errors import UserError

if TYPE_CHECKING:
    import optuna


@dataclass
class Values:
    """The values of a flag: a range, which is one of integers if all its numbers are, or choices.

    Args:
        low: Smallest value of a range.
        high: Largest value.
        log: Whether the logarithm is drawn uniformly, as suits learning rates.
        step: Distance of values from each other.
        choices: Values instead of a range.
    """

    low: Optional[Union[int, float]] = None
    high: Optional[Union[int, float]] = None
    log: bool = False
    step: Optional[Union[int, float]] = None
    choices: Optional[list[Union[bool, int, float, str, None]]] = None

    def distribution(self) -> "optuna.distributions.BaseDistribution":
        """The same in Optuna's terms.

        Raises:
            ValueError: If they are not possible.
        """
        from optuna import distributions

        if self.choices is not None:
            if (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise ValueError("choices have no low, high, log or step")
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
        metric: Column of `metrics.csv` whose best value of a run is optimized.
        direction: Whether lower or higher values are better.
        pruner: Which trials are ended early, at a validation: `median`, those whose best value so far is worse than
            the median of the trials before at that step; `halving`, all but the best quarter at each of some steps
            (successive halving); `none`.
        pruner_startup: Trials before `median` ends one.
        timeout: Seconds after which no further trial is started. Default: no limit.
        trial_timeout: Seconds after which a trial has failed.
        seed: Of the proposals, which Optuna's tree-structured Parzen estimator makes; the first ten are random.
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
        """The values in Optuna's terms, by flag.

        Raises:
            UserError: Names a flag whose values are not possible.
        """
        found = {}
        for flag, values in self.flags.items():
            try:
                found[flag] = values.distribution()
            except ValueError as error:
                raise UserError(f"the search space has {flag}, which is not possible: {error}") from error
        return found


def read_search_space(file: str, trials: Optional[int] = None) -> SearchSpace:
    """Reads a YAML file with the fields of `SearchSpace`, of which `trials` may be given.

    Raises:
        UserError: Names the file and what is wrong with it.
    """
    import yaml
    from jsonargparse import ArgumentParser

    if not Path(file).is_file():
        raise UserError(f"there is no search space {file}: configs/tuning/gpt.yaml shows what is in one")
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
        raise UserError(f"the search space {file} cannot be used: {of_command_line(error, ['tune'])}") from error
    search.trials = search.trials if trials is None else trials
    if not search.flags:
        raise UserError(f"the search space {file} has no flags to try")
    for name, least in (("trials", 1), ("pruner_startup", 0)):
        if getattr(search, name) < least:
            raise UserError(
                f"the search space {file} has {name} {getattr(search, name)}, but must have {least} or more"
            )
    search.distributions()
    return search
