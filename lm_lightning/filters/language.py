"""The language of documents, by the model that is part of the package py3langid."""

import functools
from collections.abc import Sequence
from typing import Any

from lm_lightning import errors
from lm_lightning.data.filter import Document, Filter, Marked, Removed, Verdict
from lm_lightning.errors import UserError

SAMPLES = 3  # parts of a text that are read: at its beginning, in the middle and at the end


class Language(Filter):
    """Removes documents that are not in one of some languages.

    The model (Lui and Baldwin 2012, "langid.py: An Off-the-shelf Language Identification Tool") knows more than 90
    languages and is part of the package, so nothing is downloaded. It needs about 50 characters, less of languages with
    a script of their own. Documents that it is not sure about are kept and marked.

    Args:
        keep: Languages to keep, as two letters of ISO 639-1, such as `en`, `zh`.
        min_probability: Documents are removed if the model gives less probability than this to each language to keep,
            and at least this much to another one.
        min_characters: Shorter documents are kept.
        characters: Number of characters of a document that are read at most, from its beginning, middle and end.
        options: Arguments of `Filter`.
    """

    def __init__(
        self,
        keep: Sequence[str] = ("en",),
        min_probability: float = 0.8,
        min_characters: int = 50,
        characters: int = 600,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.keep, self.min_probability = list(keep), min_probability
        self.min_characters, self.characters = min_characters, characters

    def check(self) -> None:
        self.require("min_probability", 0.5, 1)
        self.require("min_characters", 0)
        self.require("characters", SAMPLES)
        known = identifier().labels
        if unknown := sorted(set(self.keep) - set(known)):
            raise UserError(
                f"keep of the filter Language has {', '.join(unknown)}, but its model knows only "
                f"{', '.join(sorted(known))}"
            )
        if not self.keep:
            raise UserError("keep of the filter Language is empty: give at least one language, such as [en]")

    def judge(self, document: Document) -> Verdict:
        text = " ".join(document.text.split()) if len(document.text) <= self.characters else self.sample(document.text)
        if len(text) < self.min_characters:
            return None
        language, probability = identifier().classify(text)
        if language in self.keep:
            return None
        reason = f"{probability:.2f} {language}"
        if probability < self.min_probability:
            return Marked("not sure", reason)
        return Removed(language, reason)

    def sample(self, text: str) -> str:
        """The beginning, middle and end of a text."""
        size = self.characters // SAMPLES
        starts = (part * (len(text) - size) // (SAMPLES - 1) for part in range(SAMPLES))
        return " ".join(text[start : start + size] for start in starts)


@functools.cache
def identifier() -> Any:
    """The model of py3langid."""
    module = errors.package("py3langid.langid", "the filter Language", "filters")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)
