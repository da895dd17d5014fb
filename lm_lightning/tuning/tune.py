"""`tune`: searches for good values of flags of `fit`, for a learning rate, or for the largest micro-batch."""

import importlib.util
import sys
from typing import Literal, Optional

from lm_lightning.errors import UserError


def tune(
    fit_flags: list[str],
    search: Optional[str] = None,
    study: Optional[str] = None,
    trials: Optional[int] = None,
    find: Optional[Literal["lr", "batch_size"]] = None,
    memory: Optional[float] = None,
) -> None:
    """Searches for good values of `fit` flags, in full runs (--search) or in runs of a few steps (--find).

    The same command resumes a study that was interrupted.

    Args:
        fit_flags: `--config` and any other flag of `fit`.
        search: YAML file with the search space of a study, described below.
        study: Name of the study's folder in `runs_dir`. Default: the name of the config followed by `-study`.
        trials: Number of trials. Default: the number in the search space.
        find: `lr` finds the learning rate at which the loss falls fastest, `batch_size` the largest micro-batch that
            fits into memory.
        memory: Memory that each process may use with `--find batch_size`, in GiB. Default: all memory of the device.

    Raises:
        UserError: If neither or both of `search` and `find` are given, or one of them is invalid.
    """
    if (search is None) == (find is None):
        raise UserError("give --search FILE for a study, or --find lr or --find batch_size")
    from lm_lightning.tuning import find as finders

    if find == "lr":
        finders.learning_rate(fit_flags)
    elif find == "batch_size":
        finders.batch_size(fit_flags, memory)
    else:
        if importlib.util.find_spec("optuna") is None:
            raise UserError('studies need Optuna: pip install -e ".[tune]"')
        from lm_lightning.tuning.search_space import read_search_space
        from lm_lightning.tuning.study import Study

        space = read_search_space(str(search), trials)
        try:
            Study(fit_flags, space, study).run()
        except KeyboardInterrupt:
            print("stopped: the same command resumes the study", file=sys.stderr)
            raise


def main() -> None:
    """Reads the command line."""
    from lm_lightning.cli import command
    from lm_lightning.tuning.search_space import SearchSpace

    _, keys = (SearchSpace.__doc__ or "").replace("\n    ", "\n").split("Args:\n")
    command.run(
        tune, epilog=f"A search space is a YAML file, such as configs/tuning/gpt.yaml, with these keys:\n{keys}"
    )
