"""Scores of generated texts against correct ones, as the usual packages compute them.

`TextScore` is the base class. Your own subclass is chosen by its class path:

    --model.evaluation.scores '[Bleu, my_package.MyScore]'
"""

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

from lm_lightning import errors
from lm_lightning.models.metrics import Mode

package = partial(errors.package, extra="scores")


class TextScore:
    """Base class of scores; a subclass defines `modes` and `compute`. Arguments of its `__init__` are options."""

    def modes(self) -> dict[str, Mode]:
        """Return the names of the numbers that `compute` returns, each with the better direction."""
        raise NotImplementedError

    def compute(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """Return the scores of all texts of an evaluation.

        Args:
            texts: The generated texts, at least one.
            references: The correct texts of each of them, at least one each.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Raise a UserError if the score cannot be computed, such as for a missing package; called before training."""

    def signature(self) -> str:
        """Return how the score is computed, for comparisons with other systems; empty if its name says it all."""
        return ""


class _SacreBleu(TextScore):
    """Base of the scores of sacrebleu.

    Args:
        options: Options of its class in `sacrebleu.metrics`.
    """

    name = ""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.latest = ""  # signature of the latest result, which has the number of references

    def modes(self) -> dict[str, Mode]:
        return {self.name.lower(): "max"}

    def metric(self) -> Any:
        """Return a new object of the class in `sacrebleu.metrics`."""
        return getattr(package("sacrebleu.metrics", f"the score {type(self).__name__}"), self.name)(**self.options)

    def check(self) -> None:
        self.metric()

    def compute(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        metric = self.metric()
        score = metric.corpus_score(list(texts), [list(column) for column in zip_longest(*references)]).score
        self.latest = str(metric.get_signature())
        return {self.name.lower(): score}

    def signature(self) -> str:
        return f"{self.name}|{self.latest}" if self.latest else ""


class Bleu(_SacreBleu):
    """BLEU of sacrebleu over all texts together, from 0 to 100 (Post, 2018).

    Args:
        tokenize: How texts are split into words: `13a`, `intl`, `zh`, `ja-mecab`, `ko-mecab`, `char`, `flores200`, ...
        lowercase: Whether upper and lower case are the same.
    """

    name = "BLEU"

    def __init__(self, tokenize: str = "13a", lowercase: bool = False) -> None:
        super().__init__(tokenize=tokenize, lowercase=lowercase)

    def check(self) -> None:
        try:
            super().check()
        except (AssertionError, ValueError, KeyError) as error:
            raise errors.UserError(
                f"sacrebleu cannot split words with the tokenize option {self.options['tokenize']!r} of Bleu "
                f"({error}): choose another, such as 13a, zh or char"
            ) from error


class Chrf(_SacreBleu):
    """chrF of sacrebleu over all texts together, from 0 to 100 (Popovic, 2015).

    Args:
        char_order: Longest n-grams of characters.
        word_order: Longest n-grams of words: 2 for chrF++.
    """

    name = "CHRF"

    def __init__(self, char_order: int = 6, word_order: int = 0) -> None:
        super().__init__(char_order=char_order, word_order=word_order)


class Rouge(TextScore):
    """ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum of rouge-score: the mean F-measure, from 0 to 1 (Lin, 2004).

    Of several correct texts, the one with the best F-measure counts. ROUGE-Lsum compares line by line. rouge-score
    knows Latin letters and digits only.

    Args:
        use_stemmer: Whether English words are reduced to their stems.
    """

    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")

    def __init__(self, use_stemmer: bool = True) -> None:
        self.use_stemmer = use_stemmer

    def modes(self) -> dict[str, Mode]:
        return dict.fromkeys(self.names, "max")

    def scorer(self) -> Any:
        """Return a new scorer of rouge-score."""
        module = package("rouge_score.rouge_scorer", "the score Rouge")
        return module.RougeScorer(list(self.names), use_stemmer=self.use_stemmer)

    def check(self) -> None:
        self.scorer()

    def compute(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        scorer = self.scorer()
        results = [scorer.score_multi(list(correct), text) for text, correct in zip(texts, references)]
        return {name: sum(result[name].fmeasure for result in results) / len(results) for name in self.names}

    def signature(self) -> str:
        return f"ROUGE|rouge-score|stemmer:{'yes' if self.use_stemmer else 'no'}"


class ExactMatch(TextScore):
    """Share of the texts that are equal to a correct one, apart from surrounding white space."""

    def modes(self) -> dict[str, Mode]:
        return {"exact_match": "max"}

    def compute(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        equal = [text.strip() in [one.strip() for one in correct] for text, correct in zip(texts, references)]
        return {"exact_match": sum(equal) / len(equal)}
