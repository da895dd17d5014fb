"""Reads the rows of data sets of the Hugging Face Hub, one at a time."""

import hashlib
from pathlib import Path
from typing import Any, Optional

from lm_lightning.data import cache as cached
from lm_lightning.data.formats import Rows
from lm_lightning.data.reading import package
from lm_lightning.errors import UserError, one_line


def _named(label: Any, names: list[str]) -> Any:
    """Convert the number of a label, or a list of numbers, to names; None if there is no label (-1)."""
    if isinstance(label, list):
        return [_named(item, names) for item in label]
    return None if label is None or label < 0 else names[label]


def hub_rows(
    name: str, config: Optional[str], split: str, revision: Optional[str], streaming: bool, remedy: str
) -> Rows:
    """Yield the rows of a data set of the Hub, numbered from 1. Labels are converted to their names, -1 to None.

    Args:
        name: Name of the data set.
        config: Configuration of the data set, if it has several.
        split: Split of the data set.
        revision: Branch, tag or commit of the data set. None: the newest.
        streaming: Whether to read it over the network instead of downloading it first.
        remedy: How to use a downloaded data set without a network connection, for the message.
    """
    datasets, hub = package("datasets"), package("huggingface_hub")
    try:
        if streaming:  # without a network connection, fail at once instead of after half a minute of retries
            hub.get_session().head(hub.constants.ENDPOINT, timeout=10)
        dataset = datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
        features = getattr(dataset, "features", None) or {}  # not every stream has them
        kinds = {column: getattr(kind, "feature", kind) for column, kind in features.items()}  # of items, if a list
        names = {column: kind.names for column, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}
        for number, row in enumerate(dataset, start=1):
            yield number, row | {column: _named(row[column], names[column]) for column in names}
    except Exception as error:  # the packages pass on any error of their dependencies
        reason = one_line(error, 300)
        raise UserError(
            f"the data set {name!r} cannot be read from the Hugging Face Hub ({reason}): check its name and "
            f"the network connection (a downloaded data set needs no connection: {remedy})"
        ) from error


def hub_content(name: str, config: Optional[str], split: str, revision: Optional[str], cache: Path) -> str:
    """A hash of the content of a data set of the Hub, which is downloaded first, see `hub_rows`."""
    datasets = package("datasets")
    try:
        dataset = datasets.load_dataset(name, config, split=split, revision=revision, streaming=False)
        files = [Path(file["filename"]) for file in getattr(dataset, "cache_files", [])]
    except Exception:  # `hub_rows` reports it
        return f"{name} {config} {split} {revision}"
    if files:
        return " ".join(cached.content(file, cache) for file in files)
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(repr(row).encode())
    return digest.hexdigest()
