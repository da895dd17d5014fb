"""The format of SQuAD's JSON files: each row is a question with its context."""

import json
from pathlib import Path

from lm_lightning.data.formats import Format, Rows
from lm_lightning.data.reading import ReadOptions, ReadReport, lines
from lm_lightning.errors import UserError


class Squad(Format):
    """The JSON files of SQuAD 1.1 and 2.0: articles with paragraphs with questions. Questions are numbered from 1."""

    name = "squad"
    suffixes = (".json",)

    def rows(self, path: Path, options: ReadOptions, report: ReadReport) -> Rows:
        text = "\n".join(line.text for line in lines(path, options, report))
        try:
            content = json.loads(text)
            rows = [
                {"title": article.get("title"), "context": paragraph["context"], **question}
                for article in content["data"]
                for paragraph in article["paragraphs"]
                for question in paragraph["qas"]
            ]
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: not valid JSON ({error}): fix the file or, if each line is a JSON object, rename it to "
                f".jsonl or give {options.prefix}.format jsonl"
            ) from None
        except (TypeError, KeyError, AttributeError):
            raise UserError(
                f"{path}: not in the format of SQuAD's files, with data, paragraphs and qas: convert it to JSONL, with "
                "an object on each line"
            ) from None
        yield from enumerate(rows, start=1)
