"""The base classes of filters, which remove, mark or change documents of a corpus.

A subclass of your own is chosen by its class path in `--data.corpus.filters`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from lm_lightning.data.verdicts import SPLITS, Changed, Document, Marked, Removed, SplitName, Verdict
from lm_lightning.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from lm_lightning.data.documents import Documents

__all__ = ["Changed", "CorpusFilter", "Document", "Filter", "Finding", "Marked", "Removed", "Verdict"]


class Finding(NamedTuple):
    """A verdict of a `CorpusFilter` about a document.

    Attributes:
        number: Number of the document.
        verdict: Removed or Marked.
        kept: Number of the document that is kept instead of it, if there is one.
    """

    number: int
    verdict: Removed | Marked
    kept: Optional[int] = None


class Filter:
    """Base class of filters that judge each document by its own text; a subclass defines `judge`.

    For example, one that removes documents in capital letters:

        class Shouting(Filter):
            def __init__(self, most: float = 0.5, **options: Any) -> None:
                super().__init__(**options)
                self.most = most

            def judge(self, document: Document) -> Verdict:
                share = sum(map(str.isupper, document.text)) / len(document.text)
                return Removed("capital letters", f"{share:.0%} capital letters") if share > self.most else None

    Filters are sent to other processes, so they must be picklable, and `judge` must depend on nothing but the document
    and the options, which are attributes with the names of the arguments.

    Args:
        splits: Splits whose documents may be removed or changed. Default: all of them. With `[train]`, the validation
            and test splits are the same with and without the filter, so that results can be compared.

    Attributes:
        version: Part of the key of the cache: increase it when the filter's results change.
    """

    version = 1

    def __init__(self, splits: Optional[list[SplitName]] = None) -> None:
        self.splits = list(SPLITS) if splits is None else splits

    def check(self) -> None:
        """Called before anything is read.

        Raises:
            UserError: If an option is invalid or a package is missing; states the remedy.
        """

    def judge(self, document: Document) -> Verdict:
        """Decides about one document, in any of several processes."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Everything that determines the results, JSON-serializable, as a part of the key for caching them."""
        kind = type(self)
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "version": self.version, **vars(self)}

    def require(self, option: str, least: float, most: float = float("inf")) -> None:
        """Refuses a value of an option that is not in a range; None is allowed."""
        value = getattr(self, option)
        if value is not None and not least <= value <= most:
            limits = f"from {least} to {most}" if most < float("inf") else f"{least} or more"
            raise UserError(f"{option} of the filter {type(self).__name__} is {value}, but must be {limits}")


class CorpusFilter(Filter):
    """Base class of filters that compare documents with each other; a subclass defines `find`."""

    def find(self, documents: "Documents") -> Iterator[Finding | str]:
        """Yields findings, the documents to remove or to mark, and sentences for the report.

        The findings must not depend on the order of the documents. Documents of other splits than `self.splits` may be
        compared, but must not be found; `removable` says which may.

        Args:
            documents: The documents that remain. `documents.map(function)` applies a function to all of them in several
                processes.
        """
        raise NotImplementedError

    def removable(self, documents: "Documents") -> "np.ndarray":
        """Whether each document may be found, (documents,) bool."""
        import numpy as np

        return documents.remaining & np.isin(documents.splits, [SPLITS.index(split) for split in self.splits])
