"""Data of instruction tuning: converts rows to conversations, and these to batches."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch

from lm_lightning.console import printable
from lm_lightning.data.tokenizer import document_ids, unknown_id
from lm_lightning.errors import UserError
from lm_lightning.finetuning import encoding
from lm_lightning.finetuning.counts import Counts, count_phrase
from lm_lightning.finetuning.data import LabelledData
from lm_lightning.finetuning.examples import Examples
from lm_lightning.finetuning.tables import Row
from lm_lightning.generation.chat import SPECIAL_TOKENS, ChatFormat, template_text
from lm_lightning.generation.generation import prompt_ids
from lm_lightning.tasks.instruction.conversations import ConversationColumns, conversation, is_answer
from lm_lightning.tasks.instruction.examples import Packs, Questions, TokenizedConversations, collate

PLAIN = "plain"  # the name of having no chat template


def without_targets(counts: Counts) -> str:
    """How many rows of a split have no targets, and why; empty if all have some."""
    kinds = (("unanswered", "have no answer"), ("too long", "are longer than data.max_length"))
    return " and ".join(
        f"{counts[name]:,} {what} (such as {counts.example(name)})" for name, what in kinds if counts[name]
    )


class InstructionData(LabelledData):
    """Conversations, or prompts with completions, for causal networks that learn to answer.

    The loss is that of the assistant's turns and of the token that ends each of them. A conversation that is longer
    than `max_length` keeps the turns up to the last answer that ends before it.

    Args:
        columns: What the tables' columns contain.
        chat_template: How turns are written: `chatml`, `headings`, a file with a template in Jinja, or the template
            itself. `plain`: prompts are directly followed by completions and the end-of-text token. Default: the
            tokenizer's template or, for prompts and completions without one, `plain`. Exports have it.
        special_tokens: Tokens that the template needs, to add to the tokenizer; those of `chatml` are known.
        pack: Whether to put several conversations into a row of `max_length` tokens, without attention between them,
            which needs no padding. `batch_size` is the number of these rows.
        max_length: Maximum number of tokens of a conversation.
        batch_size: Number of conversations, or of packed rows, per micro-batch and process.
        options: Other options of all labelled data, see `LabelledData`.
    """

    not_encoded = LabelledData.not_encoded | {"pack", "chat", "targets_per_sample", "content", "left_out"}

    def __init__(
        self,
        columns: ConversationColumns = ConversationColumns(),
        chat_template: Optional[str] = None,
        special_tokens: Sequence[str] = (),
        pack: bool = False,
        max_length: int = 1024,
        batch_size: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(max_length=max_length, batch_size=batch_size, **options)
        self.columns, self.chat_template = columns, chat_template
        self.special_tokens, self.pack = special_tokens, pack
        self.chat: Optional[ChatFormat] = None
        self.targets_per_sample = 1.0
        self.content: dict[str, TokenizedConversations] = {}
        self.left_out: dict[str, str] = {}

    # Tokenizer

    def load_tokenizer(self) -> Any:
        tokenizer = super().load_tokenizer()
        named = dict.fromkeys([*SPECIAL_TOKENS.get(self.chat_template or "", ()), *self.special_tokens])
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        if new := [name for name in named if name not in special]:
            self.add_tokens(tokenizer, new)
        if self.chat_template is not None:
            text = None if self.chat_template == PLAIN else template_text(self.chat_template)
            tokenizer.chat_template = text
        self.chat = ChatFormat(tokenizer) if tokenizer.chat_template else None
        if self.chat is not None:
            self.print(f"chat template: answers end with {printable(self.chat.end)}")
        return tokenizer

    def add_tokens(self, tokenizer: Any, names: list[str]) -> None:
        """Adds special tokens, whose embeddings are new."""
        from tokenizers import AddedToken

        if self.trainer is not None and getattr(self.trainer.lightning_module, "adapter", None) is not None:
            raise UserError(
                f"the tokenizer has no tokens {', '.join(names)}, whose new embeddings model.adapter would not train: "
                "omit --data.chat_template and --data.special_tokens if the tokenizer has a template, use "
                "--data.chat_template headings, which needs no new tokens, or omit model.adapter"
            )
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names], special_tokens=True)
        self.print(f"the tokenizer gets the tokens {', '.join(map(printable, names))}")

    def make_collate(self) -> Callable[[list[dict]], dict]:
        return functools.partial(collate, self.padding)

    @property
    def padding(self) -> int:
        """The token after the end of a row; no other sees it, so that any will do."""
        return self.tokenizer.pad_token_id or 0

    @property
    def mask_documents(self) -> bool:
        """Whether `position_ids` separate conversations."""
        return self.pack

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end a generated answer; empty if only the end-of-text token does."""
        return [] if self.chat is None else list(dict.fromkeys([self.chat.end_id, document_ids(self.tokenizer)[1][-1]]))

    @property
    def tokens_per_batch(self) -> int:
        """Number of targets of a typical micro-batch."""
        return max(1, round(self.batch_size * self.targets_per_sample))

    def print(self, text: str) -> None:
        if self.trainer is None or self.trainer.is_global_zero:  # `prepare` has no trainer
            print(text)

    # Examples

    def key(self, row: Row) -> str:
        """What is said before the first answer, so that the same question is never in both splits."""
        said = []
        for turn in conversation(row, self.columns):
            if turn["role"] == "assistant":
                break
            said.append(str(turn.get("content")))
        return "\n".join(said)

    def setup(self, stage: str) -> None:
        if stage == "predict" and not hasattr(self.trainer.lightning_module, "answers"):
            raise UserError("predict writes answers, which needs the model InstructionLM")
        super().setup(stage)

    def encoding_options(self, split: str) -> Any:
        return encoding.code(ChatFormat)

    def encode(self, split: str, rows: list[Row]) -> list[dict]:
        """Has `tokens` and `is_target`, see `TokenizedConversations`."""
        if split == "predict":
            asked = [self.question(row) for row in rows]
            return [{"tokens": ids, "is_target": torch.zeros(len(ids), dtype=torch.bool)} for ids in asked]
        unknown, examples = unknown_id(self.tokenizer), list[dict]()
        for row in rows:
            for ids, is_target in self.shortened(self.tokens(row), row):
                examples.append({"tokens": ids, "is_target": torch.tensor(is_target)})
                self.counts.add("tokens", len(ids))
                self.counts.add("targets", sum(is_target))
                self.counts.add("unknown", 0 if unknown is None else ids.count(unknown))
        if self.chat is not None:
            self.counts.add("unlocated", self.chat.unlocated)
            self.chat.unlocated = 0
        return examples

    def check_counts(self, split: str, counts: Counts) -> None:
        if split != "predict" and not counts["targets"]:
            raise UserError(
                f"the {split} split has no targets, as of its {counts['rows']:,} rows {without_targets(counts)}: give "
                "other data, or increase --data.max_length"
            )

    def make_examples(self, split: str, rows: Any) -> Examples:
        return Examples(self.make_samples(split, rows), self.seed if split == "train" else None)

    def make_samples(self, split: str, rows: Any) -> Any:
        """The samples of a split: questions, conversations, or packs of them."""
        if split == "predict":
            return Questions(rows)
        self.content[split] = content = TokenizedConversations(rows)
        return Packs(content, self.block_size, self.padding) if self.pack else content

    def question(self, row: Row) -> list[int]:
        """The ids of a row to predict before the last answer, which it need not have."""
        turns = conversation(row, self.columns, answered=False)
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns:
            raise UserError(f"{row.where}: there is nothing to answer: fix or remove the row")
        if self.chat is None:
            self.check_plain([*turns, {"role": "assistant"}])
            return prompt_ids(self.tokenizer, turns[0]["content"])
        return self.chat.prompt(turns)

    def tokens(self, row: Row) -> list[tuple[list[int], list[bool]]]:
        """The ids of a row's conversation, and which of them are targets; usually one pair, see `ChatFormat`."""
        turns = conversation(row, self.columns)
        asked = next((number for number, turn in enumerate(turns) if turn["role"] != "assistant"), len(turns))
        if not any(map(is_answer, turns[asked:])):
            self.counts.add("unanswered", 1, row.where)
            return []
        try:
            return [self.plain_tokens(turns)] if self.chat is None else self.chat.examples(turns)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error

    def plain_tokens(self, turns: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        """A prompt, its completion and the end-of-text token, without a chat template."""
        self.check_plain(turns)
        prompt = prompt_ids(self.tokenizer, turns[0]["content"])
        answer = self.tokenizer(turns[1]["content"], add_special_tokens=False)["input_ids"]
        answer += document_ids(self.tokenizer)[1]
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)

    def check_plain(self, turns: list[dict[str, Any]]) -> None:
        """Refuses conversations that need a chat template."""
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            raise UserError(
                "conversations of more than a prompt and a completion need a chat template: give one with "
                "--data.chat_template, such as chatml"
            )

    def shortened(self, examples: list[tuple[list[int], list[bool]]], row: Row) -> list[tuple[list[int], list[bool]]]:
        """The examples of a row up to the last answer that ends within the maximum length."""
        found = []
        ends_answer = {self.tokenizer.eos_token_id} if self.chat is None else self.chat.special_ids
        for ids, is_target in examples:
            after = [*is_target[1:], False]
            ends = [
                number + 1
                for number, token in enumerate(ids)
                if is_target[number] and not after[number] and (token in ends_answer or number + 1 == len(ids))
            ]
            fitting = [end for end in ends if end <= self.block_size + 1]  # the last token is only a target
            if fitting:
                found.append((ids[: fitting[-1]], is_target[: fitting[-1]]))
                self.counts.add("cut", len(ends) - len(fitting))
        if examples and not found:  # a template's generation markers can also omit all answers
            has_targets = any(any(is_target) for _, is_target in examples)
            self.counts.add("too long" if has_targets else "unanswered", 1, row.where)
        return found

    def report(self, split: str, examples: Examples, counts: Counts) -> None:
        """Prints the size of a split, and what was omitted from it."""
        if split == "predict":
            return
        content = self.content[split]
        if split == "train":
            self.targets_per_sample = counts["targets"] / len(examples)
        self.left_out[split] = without_targets(counts)
        self.print(
            f"{split}: {len(content):,} conversations, {counts['tokens']:,} tokens, "
            f"{counts['targets']:,} of them targets" + count_phrase(counts["unknown"], "unknown")
        )
        if self.left_out[split]:
            self.print(f"{split}: rows without targets are not used: {self.left_out[split]}")
        if counts["cut"]:
            self.print(f"{split}: {counts['cut']:,} answers are not used, as they end after data.max_length")
        if counts["unlocated"]:
            self.print(f"{split}: {counts['unlocated']:,} answers before the first question are no targets")
        if self.pack:
            share = content.lengths.sum() / (len(examples) * self.block_size)
            self.print(f"{split}: {len(examples):,} rows of {self.block_size} tokens, {share:.1%} full")

    # Description

    @property
    def info(self) -> dict:
        conversations = {split: len(content) for split, content in self.content.items()}
        return super().info | {"conversations": conversations, "rows_without_targets": self.left_out}

    def identity(self) -> dict:
        return super().identity() | {"data.pack": self.pack and self.block_size}

    # Command `prepare`

    def prepare_corpus(self, show: Sequence[int] = ()) -> None:
        """Tokenizes the training split, and prints its size or, if `show` has numbers of samples, these samples.

        Lines that begin with `>` are targets. The command `prepare` calls this method without a trainer.
        """
        self.check()
        self.start_encoding()
        found = encoding.encoded(self, "train")
        samples = self.make_samples("train", found.examples)
        self.report("train", samples, found.counts)
        for number in show:
            if not 0 <= number < len(samples):
                raise UserError(f"there is no sample {number}: the training split has {len(samples)} samples")
            print(f"--- sample {number}\n{self.shown(samples[number])}")

    def shown(self, sample: dict[str, Any]) -> str:
        """A sample as text, with a `>` at the beginning of each line of targets."""
        targets = sample["targets"].tolist()
        end = max(place for place, target in enumerate(targets) if target != -100) + 1  # padding comes after it
        ids = [*sample["input_ids"][:end].tolist(), targets[end - 1]]
        flags = [False, *(target != -100 for target in targets[:end])]
        pieces, start = [], 0
        for place in range(1, len(ids) + 1):
            if place == len(ids) or flags[place] != flags[start]:
                text = printable(self.tokenizer.decode(ids[start:place])).removesuffix("\n")
                pieces.append("\n".join(("> " if flags[start] else "  ") + line for line in text.split("\n")))
                start = place
        return "\n".join(pieces)
