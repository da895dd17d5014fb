"""Data of preference tuning: converts prompts with a better and a worse answer to batches."""

import functools
import json
from collections.abc import Iterator
from typing import Any, Optional

import torch
import torch.nn.functional as F

from lm_lightning.data.order import sequence_key
from lm_lightning.data.tokenizer import document_ids
from lm_lightning.errors import UserError
from lm_lightning.finetuning import encoding
from lm_lightning.finetuning.counts import Counts, count_phrase
from lm_lightning.finetuning.data import LabelledData
from lm_lightning.finetuning.examples import Examples
from lm_lightning.finetuning.tables import Row
from lm_lightning.generation.chat import ChatFormat, template_text
from lm_lightning.tasks.preference.rows import Pair, PreferenceColumns, pair_of


class PreferenceData(LabelledData):
    """Prompts with a better and a worse answer.

    Texts are the prompt followed by the answer and the end-of-text token; both are tokenized separately, as they are
    when the answer is generated. Messages are rendered with a chat template, and all that the assistant writes after
    the prompt is the answer. The strings of special tokens in texts and messages are plain text.

    Pairs that are longer than `max_length` tokens are truncated at their ends. Pairs whose prompt alone is that long
    have no answer left: they are omitted, and their number is printed.

    Args:
        columns: Names of the tables' columns.
        chat_template: Template for messages: `chatml`, `headings`, a file or the template itself. Default: that of the
            tokenizer.
        options: Options of all labelled data, see `LabelledData`.
    """

    def __init__(
        self, columns: PreferenceColumns = PreferenceColumns(), chat_template: Optional[str] = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.columns, self.chat_template = columns, chat_template

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.collate = functools.partial(collate_pairs, self.tokenizer.pad_token_id)

    def key(self, row: Row) -> str:
        """The prompt, so that all pairs of a prompt are in the same split."""
        pair = pair_of(row, self.columns)
        return json.dumps(pair.prompt or list(pair), ensure_ascii=False)

    def load_tokenizer(self) -> Any:
        tokenizer = super().load_tokenizer()
        if self.chat_template is not None:
            tokenizer.chat_template = template_text(self.chat_template)  # it is exported with the network
        return tokenizer

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """Converts messages to tokens."""
        return ChatFormat(self.tokenizer)

    def encoding_options(self, split: str) -> Any:
        return encoding.code(ChatFormat)

    def encode(self, split: str, rows: list[Row]) -> list[dict]:
        pairs = [pair_of(row, self.columns) for row in rows]
        examples = [self.example(row, pair) for row, pair in zip(rows, pairs)]
        truncated = sum(example.pop("truncated") for example in examples)
        answers = (example["targets"].split(example["lengths"]) for example in examples)
        empty = [any(bool((answer == -100).all()) for answer in pair) for pair in answers]
        self.counts.add("empty", sum(empty))
        self.counts.add("equal", sum(pair.chosen == pair.rejected for pair in pairs))
        if split != "predict":  # which has a result for each row
            examples = [example for example, is_empty in zip(examples, empty) if not is_empty]
        self.count_tokens(examples, truncated, (text for pair in pairs for text in texts_of(pair)))
        return examples

    def check_counts(self, split: str, counts: Counts) -> None:
        if counts["empty"] == counts["rows"]:
            raise UserError(
                f"no pair of the {split} split has an answer within data.max_length, {self.block_size} tokens: "
                "increase it"
            )

    def report(self, split: str, examples: Examples, counts: Counts) -> None:
        super().report(split, examples, counts)
        phrases = count_phrase(
            counts["empty"], "rows have no answer, as their prompts have data.max_length tokens or more"
        ) + count_phrase(counts["equal"], "rows have equal answers, so that nothing is learned from them")
        if phrases:
            self.print(f"{split}:{phrases.removeprefix(',')}")

    def example(self, row: Row, pair: Pair) -> dict:
        """The inputs of the better answer and of the worse one, concatenated, with their `lengths` and `targets`.

        `targets` is the next token at each position of an answer, -100 in the prompt; `truncated` is whether something
        is truncated.
        """
        ids, targets, lengths = list[int](), list[int](), list[int]()
        truncated = False
        for answer in (pair.chosen, pair.rejected):
            tokens, is_answer = self.tokens(row, pair.prompt, answer)
            truncated |= len(tokens) > self.block_size
            tokens, is_answer = tokens[: self.block_size], is_answer[: self.block_size]
            ids += tokens[:-1]
            targets += [token if own else -100 for token, own in zip(tokens[1:], is_answer[1:])]
            lengths.append(len(tokens) - 1)
        return {"input_ids": ids, "lengths": lengths, "targets": torch.tensor(targets), "truncated": truncated}

    def tokens(self, row: Row, prompt: Any, answer: Any) -> tuple[list[int], list[bool]]:
        """The tokens of a prompt and an answer, and which of them are the answer's."""
        if isinstance(prompt, str):
            prefix, suffix = document_ids(self.tokenizer)
            before, after = (
                self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                for text in (prompt, answer)
            )
            before = prefix + before or suffix  # the first token of an answer must be predicted from something
            return before + after + suffix, [False] * len(before) + [True] * (len(after) + len(suffix))
        try:
            tokens, is_target = self.chat_format.conversation([*prompt, *answer])
            before = self.chat_format.prompt(prompt)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        start = next((i for i, (a, b) in enumerate(zip(before, tokens)) if a != b), min(len(before), len(tokens)))
        is_target = [target and number >= start for number, target in enumerate(is_target)]
        end = max((number for number, target in enumerate(is_target) if target), default=len(tokens) - 1) + 1
        return tokens[:end], is_target[:end]

    def row_keys(self, split: str) -> torch.Tensor:
        """A number for the content of each row of a split, (rows,) int64."""
        rows = self.examples[split].rows
        return torch.tensor([sequence_key([*row["lengths"], *row["input_ids"]]) for row in rows])

    def identity(self) -> dict:
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return super().identity() | template


def texts_of(pair: Pair) -> Iterator[str]:
    """The texts of a pair."""
    for part in pair:
        yield from [part] if isinstance(part, str) else (message["content"] for message in part)


def collate_pairs(padding: int, items: list[dict]) -> dict:
    """Collates examples to a batch.

    Args:
        padding: The id of the padding token.
        items: Examples, see `PreferenceData.example`.

    Returns:
        `input_ids`, `attention_mask` and `targets`, -100 outside of the answers: (B, 2, T) int64, for the better and
        the worse answer with their prompt; `id`, B numbers.
    """
    multiple = 8 if torch.cuda.is_available() else 1  # tensor cores need multiples of 8, CPUs do not
    longest = -(-max(max(item["lengths"]) for item in items) // multiple) * multiple
    ids, targets = list[torch.Tensor](), list[torch.Tensor]()
    for item in items:
        ids += torch.tensor(item["input_ids"]).split(item["lengths"])
        targets += item["targets"].split(item["lengths"])

    def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.stack([F.pad(row, (0, longest - len(row)), value=value) for row in rows]).view(len(items), 2, -1)

    batch: dict[str, Any] = {"input_ids": padded(ids, padding), "targets": padded(targets, -100)}
    batch["attention_mask"] = padded([torch.ones_like(row) for row in ids], 0)
    return batch | {"id": [item["id"] for item in items]}
