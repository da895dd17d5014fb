"""Searches whose correct answers are known, with which embeddings are evaluated."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

from lm_lightning.errors import UserError
from lm_lightning.finetuning import cells
from lm_lightning.finetuning.tables import Tables, read_files


@dataclass
class Retrieval:
    """A search whose correct answers are known, in the files of BEIR (Thakur et al., 2021).

    Args:
        queries: JSONL file with `_id` and `text`.
        corpus: JSONL file with `_id`, `text` and, optionally, `title`, which is prepended to the text.
        validation: TSV file with `query-id`, `corpus-id` and `score` (0 for wrong answers), used for validation instead
            of rows of `tables`. Queries without a correct answer are omitted.
        test: The same for the test split.
        ignore_identical_ids: Whether to ignore the document that has the same `_id` as the query, as BEIR does. Set it
            to false if queries and documents are numbered independently.
    """

    queries: Optional[str] = None
    corpus: Optional[str] = None
    validation: Optional[str] = None
    test: Optional[str] = None
    ignore_identical_ids: bool = True


class Judgments(NamedTuple):
    """Correct answers to the queries of a split.

    Attributes:
        queries: Numbers of the queries' rows.
        documents: Numbers of the rows that are searched.
        relevant: For each query, the row numbers of its correct answers with their relevance. Negative numbers are
            documents that do not exist, and count as not found.
        excluded: For each query, the row number of a document that is not an answer because it is the query itself, or
            None. Empty if no query has such a document.
        missing: Names of the correct answers that do not exist.
    """

    queries: list[int]
    documents: list[int]
    relevant: list[dict[int, float]]
    excluded: Sequence[Optional[int]] = ()
    missing: Sequence[str] = ()


def scores_of(path: str, split: str, tables: Tables) -> dict[str, dict[str, tuple[float, str]]]:
    """The scores in `retrieval` for a split, with file and line: by `_id` of the query and of the document.

    Args:
        path: The file.
        split: Name of the split.
        tables: How the file is read.

    Raises:
        UserError: If a row has no score, or a query and a document have several.
    """
    scores: dict[str, dict[str, tuple[float, str]]] = {}
    for row in read_files(path, tables):
        try:
            query, document, score = str(row["query-id"]), str(row["corpus-id"]), cells.number(row["score"])
        except (KeyError, ValueError):
            raise UserError(
                f"{row.where}: data.retrieval.{split} needs the columns query-id, corpus-id and score, a number"
            ) from None
        _, first = scores.setdefault(query, {}).setdefault(document, (score, row.where))
        if row.where != first:
            raise UserError(
                f"{row.where}: query {query} and document {document} already have a score at {first}: remove one"
            )
    return scores


def judge(
    path: str, scores: dict[str, dict[str, tuple[float, str]]], notes: Iterable[dict], ignore_identical_ids: bool
) -> Judgments:
    """The correct answers in `retrieval` for a split.

    Args:
        path: The file with the scores.
        scores: See `scores_of`.
        notes: The `id` of each row, and whether it is a `query`.
        ignore_identical_ids: See `Retrieval`.

    Raises:
        UserError: If there are none.
    """
    names = [(note["id"], note["query"]) for note in notes]
    places = {name: number for number, (name, is_query) in enumerate(names) if not is_query}
    asked = [name for name, is_query in names if is_query]
    correct = [{name: score for name, (score, _) in scores[query].items() if score > 0} for query in asked]
    missing = [document for documents in correct for document in documents if document not in places]
    numbers = places | {document: -1 - number for number, document in enumerate(dict.fromkeys(missing))}
    relevant = [{numbers[name]: score for name, score in documents.items()} for documents in correct]
    if all(number < 0 for found in relevant for number in found):
        raise UserError(
            f"{path} has no correct answer whose query and document are in data.retrieval.queries and "
            "data.retrieval.corpus: give files that belong together"
        )
    excluded = [places.get(name) if ignore_identical_ids else None for name in asked]
    rows = list(range(len(places), len(names)))
    return Judgments(rows, list(range(len(places))), relevant, excluded, missing)


def split(example: dict) -> list[list[int]]:
    """The tokens of each text of an example."""
    ends = [sum(example["lengths"][: i + 1]) for i in range(len(example["lengths"]))]
    return [example["input_ids"][end - length : end] for end, length in zip(ends, example["lengths"])]


def answers(examples: Iterable[dict]) -> Judgments:
    """A search that is made of pairs: the pair of each text must be found among the pairs of all rows.

    Equal texts count as one text, which may have several correct answers. A document that is equal to the query is not
    an answer, unless it is the query's pair.
    """
    queries: dict[tuple, int] = {}
    documents: dict[tuple, int] = {}
    relevant: dict[int, dict[int, float]] = {}
    for number, example in enumerate(examples):
        text, pair = map(tuple, split(example)[:2])
        query, document = queries.setdefault(text, number), documents.setdefault(pair, number)
        relevant.setdefault(query, {})[document] = 1.0
    equal = [documents.get(text) for text in queries]
    excluded = [None if row in relevant[query] else row for query, row in zip(relevant, equal)]
    return Judgments(list(relevant), list(documents.values()), list(relevant.values()), excluded)
