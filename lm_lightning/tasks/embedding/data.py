"""Data of sentence embeddings: pairs of texts that belong together, or that have a score for their similarity.

Embeddings are evaluated with such rows, or with a search whose correct answers are known (`Retrieval`). `predict`
computes the embeddings of rows with one text each.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch

from lm_lightning.console import printable
from lm_lightning.data.corpus import expand
from lm_lightning.data.order import sequence_key
from lm_lightning.data.reading import ReadReport
from lm_lightning.errors import UserError
from lm_lightning.finetuning.counts import Counts, count_phrase
from lm_lightning.finetuning.data import LabelledData
from lm_lightning.finetuning.examples import Examples
from lm_lightning.finetuning.tables import Row, Tables, read_files
from lm_lightning.tasks.embedding.mining import PairExamples
from lm_lightning.tasks.embedding.modules import prompts_of
from lm_lightning.tasks.embedding.retrieval import Judgments, Retrieval, answers, judge, scores_of, split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


PRETRAINED = "pretrained"  # value of an option: that of the pretrained model


@dataclass
class PairColumns:
    """Names of the columns.

    Args:
        text: A text, such as a question; the only column that `predict` reads.
        pair: The text that belongs to it, such as its answer; if there are scores, any other text.
        negatives: A similar text that does not belong to it (a hard negative), or a list of such texts; only for
            training rows.
        score: A number for the similarity of the two texts. Default: each text belongs to its pair.
    """

    text: str = "text"
    pair: str = "pair"
    negatives: Optional[str] = None
    score: Optional[str] = None


@dataclass
class Prompts:
    """Text that is inserted before texts, such as `query: ` and `passage: `. Exported models have them, for
    sentence-transformers as the prompts `query` and `document`. On the command line, YAML needs quotes around such a
    text: `--data.prompts '{query: "query: ", document: "passage: "}'`.

    Args:
        query: Before texts of the column `text`, queries of `retrieval`, and what `search` searches for. `pretrained`:
            that of the pretrained model, if it has one.
        document: Before pairs, hard negatives, documents of `retrieval`, and texts that `predict` embeds. `pretrained`:
            as for `query`.
    """

    query: str = PRETRAINED
    document: str = PRETRAINED

    def __post_init__(self) -> None:
        for name, text in vars(self).items():
            if text.startswith('{"') and text.endswith(": null}"):  # `query: ` on the command line is YAML
                raise UserError(
                    f"data.prompts.{name} is {text}, a mapping: give a text that ends with a colon and a space as in "
                    f"--data.prompts '{{{name}: \"{text[2:-8]}: \"}}'"
                )


def collate_pairs(tokenizer: "PreTrainedTokenizerFast", items: list[dict]) -> dict:
    """Collates examples, which have the concatenated tokens of the same number of texts each, to a batch.

    Returns:
        For the first texts, `input_ids` and `attention_mask`, (B, T), and `keys`, (B,), which are equal for texts with
        the same tokens. For the other texts, if there are any, `candidate_ids` and `candidate_mask`, (C, S), and
        `candidate_keys`, (C,): all second texts, then all third texts, and so on. All are int64. Also `targets`, (B,),
        and `id`, B numbers.
    """
    texts = [split(item) for item in items]
    batch: dict[str, Any] = {"targets": torch.stack([item["targets"] for item in items])}
    anchors, candidates = [row[0] for row in texts], [text for role in list(zip(*texts))[1:] for text in role]
    for name, tokens in (("", anchors), ("candidate_", candidates)):
        if tokens:
            padded = tokenizer.pad({"input_ids": tokens}, padding_side="right", return_tensors="pt")
            batch[f"{name or 'input_'}ids"] = padded["input_ids"]
            batch[f"{name or 'attention_'}mask"] = padded["attention_mask"]
            batch[f"{name}keys"] = torch.tensor([sequence_key(text) for text in tokens])
    return batch | {"id": [item["id"] for item in items]}


class PairData(LabelledData):
    """Pairs of texts that belong together, or with a number for their similarity.

    Args:
        columns: Names of the tables' columns.
        retrieval: A search for evaluation. `predict` embeds its corpus, unless `tables` has rows to predict.
        prompts: Text that is inserted before texts.
        hard_negatives: Number of texts in `columns.negatives` that are used, the first ones. If a row has fewer, they
            are repeated, which does not change the loss.
        min_score: The score of texts that have nothing in common.
        max_score: The score of texts with the same meaning.
        options: Options of all labelled data, see `LabelledData`.
    """

    not_encoded = LabelledData.not_encoded | {"judged", "answered", "retrieval", "prompts"}

    def __init__(
        self,
        columns: PairColumns = PairColumns(),
        retrieval: Retrieval = Retrieval(),
        prompts: Prompts = Prompts(),
        hard_negatives: int = 1,
        min_score: float = 0.0,
        max_score: float = 5.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if hard_negatives < 1:
            raise UserError(f"data.hard_negatives is {hard_negatives}, but must be 1 or more")
        if not min_score < max_score:
            raise UserError(f"data.min_score is {min_score}, but must be less than data.max_score, {max_score}")
        if columns.negatives is not None and columns.score is not None:
            raise UserError("data.columns.negatives cannot be combined with data.columns.score: omit one of the two")
        self.columns, self.retrieval, self.hard_negatives = columns, retrieval, hard_negatives
        self.min_score, self.max_score = min_score, max_score
        self.prompts = prompts
        self.judged: dict[str, Judgments] = {}
        self.answered: Sequence[dict] = []  # `id` and `text` of each row to predict

    def load_tokenizer(self) -> "PreTrainedTokenizerFast":
        """Also finds the prompts."""
        module = self.trainer.lightning_module
        has_prompts = getattr(module, "pretrained", None) is not None  # not of a module of the user
        known = prompts_of(module.pretrained_folder()) if has_prompts else {}
        given = {name: text for name, text in vars(self.prompts).items() if text != PRETRAINED}
        self.prompts = Prompts(**({"query": "", "document": ""} | known | given))
        return super().load_tokenizer()

    def encoding_options(self, split: str) -> Any:
        return [self.prompts.query, self.prompts.document, self.of_retrieval(split)]

    def make_collate(self) -> Callable[[list[dict]], dict]:
        return functools.partial(collate_pairs, self.tokenizer)

    def make_examples(self, split: str, rows: Any) -> Examples:
        if split == "predict":
            self.answered = rows.notes()
        elif self.searches(split):
            path, ignore = getattr(self.retrieval, split), self.retrieval.ignore_identical_ids
            self.judged[split] = judge(path, scores_of(path, split, self.file_options()), rows.notes(), ignore)
        elif split != "train" and self.columns.score is None:
            self.judged[split] = answers(rows)
        return PairExamples(rows, self.seed if split == "train" else None)

    def key(self, row: Row) -> str:
        return row.text(self.columns.text)

    # Retrieval

    def searches(self, split: str) -> bool:
        """Whether the rows of a split are the documents and queries of `retrieval`."""
        return split in ("validation", "test") and getattr(self.retrieval, split) is not None

    def of_retrieval(self, split: str) -> bool:
        """Whether the rows of a split are those of `retrieval`, not of the tables."""
        return self.searches(split) or (split == "predict" and self.embeds_corpus())

    def embeds_corpus(self) -> bool:
        """Whether the rows to predict are the corpus of `retrieval`."""
        return bool(self.retrieval.corpus) and not (self.tables.predict or self.tables.test)

    def files(self, split: str) -> list[Path]:
        names = [self.retrieval.corpus] if split == "predict" and self.embeds_corpus() else []
        if self.searches(split):
            if missing := [name for name in ("queries", "corpus") if not getattr(self.retrieval, name)]:
                raise UserError(f"data.retrieval.{missing[0]} is missing: give its JSONL file")
            names = [self.retrieval.corpus, self.retrieval.queries, getattr(self.retrieval, split)]
        if not names:
            return super().files(split)
        return [path for name in names if name for _, path in expand(name)]

    def hub_content(self, split: str, folder: Path) -> list[str]:
        return [] if self.of_retrieval(split) else super().hub_content(split, folder)

    def read(self, split: str, report: ReadReport) -> Iterator[Row]:
        """The rows of a split: of the tables, or the documents and then the queries of `retrieval`, with `_id`."""
        if split == "predict" and self.embeds_corpus():
            yield from self.texts("corpus", report)
        elif not self.searches(split):
            yield from super().read(split, report)
        else:
            scores, known = scores_of(getattr(self.retrieval, split), split, self.file_options()), set[str]()
            yield from self.texts("corpus", report)
            for row in self.texts("queries", report):
                known.add(row["_id"])
                if any(score > 0 for score, _ in scores.get(row["_id"], {}).values()):
                    yield Row({**row, "query": True}, row.where)
                else:
                    self.counts.add("unanswered")
            for where in (where for query, of in scores.items() if query not in known for _, where in of.values()):
                self.counts.add("unknown queries", 1, where)

    def texts(self, name: str, report: ReadReport) -> Iterator[Row]:
        """The queries or the corpus of `retrieval`, with `_id` and the column of texts; texts may be empty.

        Raises:
            UserError: If a row has no `_id` or text, or has the same `_id` as another row.
        """
        path, empty = str(getattr(self.retrieval, name)), 0
        places: dict[str, str] = {}  # file and line of each _id
        for row in read_files(path, self.file_options(), report=report):
            if row.get("_id") is None or "text" not in row:
                raise UserError(f"{row.where}: a row of data.retrieval.{name} needs _id and text")
            if row.where != (first := places.setdefault(str(row["_id"]), row.where)):
                raise UserError(f"{row.where}: {first} has the same _id, {row['_id']!r}: remove one of the rows")
            text = " ".join(str(row.get(column) or "") for column in ("title", "text")).strip()
            empty += not text
            yield Row({"_id": str(row["_id"]), self.columns.text: text}, row.where)
        if not places:
            raise UserError(f"{path} has no rows: give another file with --data.retrieval.{name}")
        if empty:
            report.notes.append(f"{path}: {empty:,} rows have no text, and are embedded as empty texts")

    def file_options(self) -> Tables:
        """How the files of `retrieval` are read."""
        return Tables(encoding=self.tables.encoding, encoding_errors=self.tables.encoding_errors)

    def report(self, split: str, examples: Examples, counts: Counts) -> None:
        if not self.searches(split):
            super().report(split, examples, counts)
            return
        judged = self.judged[split]
        itself = sum(own is not None for own in judged.excluded)
        lost = sum(own in found for own, found in zip(judged.excluded, judged.relevant))
        self.print(
            f"{split}: {len(judged.queries):,} queries to {len(judged.documents):,} documents"
            + count_phrase(counts["unanswered"], "queries without a correct answer are omitted")
            + count_phrase(
                counts["unknown queries"],
                f"answers to unknown queries are ignored (first: {printable(counts.example('unknown queries'))})",
            )
            + count_phrase(
                len(judged.missing),
                f"correct answers are not in the corpus, so cannot be found (first: {', '.join(judged.missing[:1])})",
            )
            + count_phrase(itself, "documents have the _id of a query, and do not count as answers to it (as in BEIR)")
            + count_phrase(lost, "of them are correct answers, which data.retrieval.ignore_identical_ids ignores")
        )
        super().report(split, examples, counts)

    # Examples

    def encode(self, split: str, rows: list[Row]) -> list[dict]:
        """Tokenizes all texts of rows; rows of a search and of `predict` have one text each."""
        searched = self.of_retrieval(split)
        alone = searched or split == "predict"
        column = self.columns.text
        first = [row[column] if searched else row.text(column) for row in rows]
        others = [[] if alone else [row.text(self.columns.pair)] for row in rows]
        if split == "train" and self.columns.negatives is not None:
            others = [[*texts, *self.negatives(row)] for texts, row in zip(others, rows)]
        query, document = self.prompts.query, self.prompts.document
        prompts = [document if alone and "query" not in row else query for row in rows]
        texts = [
            [prompt + text, *(document + other for other in more)] for prompt, text, more in zip(prompts, first, others)
        ]
        encoded = self.tokenizer(
            [text for row in texts for text in row],
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=True,
            max_length=self.block_size,
        )
        tokens, overflowing = iter(encoded["input_ids"]), iter(bool(e.overflowing) for e in encoded.encodings)
        examples, truncated = list[dict](), 0
        for row, of_row in zip(rows, texts):
            ids_of_row = [next(tokens) for _ in of_row]
            truncated += sum(next(overflowing) for _ in of_row) > 0  # (in any text)
            example = {"input_ids": sum(ids_of_row, []), "lengths": [len(ids) for ids in ids_of_row]}
            examples.append(example | {"targets": torch.tensor(0) if alone else self.target(row)})
        for number, (example, row, text) in enumerate(zip(examples, rows, first) if alone else (), self.first_row):
            name = row.get("_id", row.get("id", number))
            example["notes"] = (
                {"id": name, "query": "query" in row} if split != "predict" else {"id": name, "text": text}
            )
        self.count_tokens(examples, truncated, (text for of_row in texts for text in of_row))
        return examples

    def negatives(self, row: Row) -> list[str]:
        """The hard negatives of a row; all rows get the same number."""
        column = str(self.columns.negatives)
        texts = row.entries(column) or [row.text(column)]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"{row.where}: column {column!r} has no texts, or an empty one: fix or remove the row")
        return [texts[i % len(texts)] for i in range(self.hard_negatives)]

    def target(self, row: Row) -> torch.Tensor:
        """The similarity of the two texts of a row, from 0 to 1, () float32; 0, () int64, if there are no scores."""
        if self.columns.score is None:
            return torch.tensor(0)
        number = row.number(self.columns.score)
        if not self.min_score <= number <= self.max_score:
            raise UserError(
                f"{row.where}: column {self.columns.score!r} is {number:g}, but must be a number from "
                f"{self.min_score:g} (data.min_score) to {self.max_score:g} (data.max_score)"
            )
        return torch.tensor((number - self.min_score) / (self.max_score - self.min_score))
