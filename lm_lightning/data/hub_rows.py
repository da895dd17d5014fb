"""Data sets of the Hugging Face Hub: their rows, one at a time."""

from typing import Any, Optional

from lm_lightning.data.formats import Rows
from lm_lightning.data.reading import package
from lm_lightning.errors import UserError


def _named(label: Any, names: list[str]) -> Any:
    """Return the name of a label that is a number, or the names of a list of such; None if there is none (-1)."""
    if isinstance(label, list):
        return [_named(item, names) for item in label]
    return None if label is None or label < 0 else names[label]


def hub_rows(
    name: str, config: Optional[str], split: str, revision: Optional[str], streaming: bool, remedy: str
) -> Rows:
    """Yield the rows of a data set of the Hub, numbered from 1; labels with names have these, none (-1) is None.

    Args:
        name: Of the data set.
        config: Its configuration, if it has several.
        split: Its split.
        revision: Its branch, tag or commit. None: the newest.
        streaming: Whether to read it over the network instead of downloading it first.
        remedy: How a downloaded one is used without the network, for the message.
    """
    datasets, hub = package("datasets"), package("huggingface_hub")
    try:
        if streaming:  # without a network, fail at once instead of after half a minute of retries
            hub.get_session().head(hub.constants.ENDPOINT, timeout=10)
        dataset = datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
        features = getattr(dataset, "features", None) or {}  # not every stream knows them
        kinds = {column: getattr(kind, "feature", kind) for column, kind in features.items()}  # of a list, its items'
        names = {column: kind.names for column, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}
        for number, row in enumerate(dataset, start=1):
            yield number, row | {column: _named(row[column], names[column]) for column in names}
    except Exception as error:  # the packages raise whatever their own dependencies do
        reason = " ".join(str(error).split())
        raise UserError(
            f"The data set {name!r} cannot be read from the Hugging Face Hub ({reason:.300}); check its name and "
            f"the network (a downloaded one needs none: {remedy})."
        ) from error
