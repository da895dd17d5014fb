"""Chat: tokenizes conversations with a chat template, and finds the tokens that an assistant writes.

Training data and `generate --chat` use the same functions, so that a network reads in both what it was trained on: the
tokens before an answer in training are exactly those after which it has to write one.
"""

import bisect
import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from lm_lightning.compat.transformers import render_chat
from lm_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Turn = Mapping[str, Any]  # `role` and `content`, and whatever else the template reads, such as `tool_calls`

# Templates that can be chosen by name. The turns of `chatml` end with special tokens, those of `headings` with the
# end-of-text token, so that it needs no new tokens.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "headings": (
        "{% for message in messages %}{{ '### ' + message['role'] | capitalize + '\\n' + message['content'] }}"
        "{{ eos_token if message['role'] == 'assistant' else '\\n\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Assistant\\n' }}{% endif %}"
    ),
}
SPECIAL_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}  # that a template of `TEMPLATES` needs
REMEDY = "give another template with --data.chat_template"
CACHED = 1000  # maximum number of texts whose tokens are kept


def template_text(value: str) -> str:
    """The chat template that an option gives: a name in `TEMPLATES`, a file, or the template itself.

    Raises:
        UserError: If it is none of these.
    """
    if value in TEMPLATES:
        return TEMPLATES[value]
    if "{%" in value or "{{" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the chat template {value!r:.100} is neither {', '.join(TEMPLATES)} nor a readable file ({error}), "
            "nor a template in Jinja"
        ) from error


def conversation_ids(
    tokenizer: "PreTrainedTokenizerFast", turns: Sequence[Turn], template: Optional[str] = None
) -> tuple[list[int], list[bool]]:
    """Tokenizes a conversation, see `ChatFormat.conversation`.

    Args:
        tokenizer: A fast tokenizer.
        turns: Turns with `role` and `content`.
        template: The chat template. Default: that of the tokenizer.
    """
    return ChatFormat(tokenizer, template).conversation(turns)


def chat_ids(tokenizer: "PreTrainedTokenizerFast", turns: Sequence[Turn]) -> list[int]:
    """Tokenizes a conversation up to the beginning of the assistant's next turn, see `ChatFormat.prompt`."""
    return ChatFormat(tokenizer).prompt(turns)


class Region(NamedTuple):
    """What the assistant writes in a turn, with its end token: a part of a rendered text."""

    start: int
    end: int


class Tokens(NamedTuple):
    """A tokenized text.

    Attributes:
        ids: The ids.
        offsets: Where each token begins in the text without marks.
        special: Numbers of the tokens that are special.
        cuts: Number of the first token after each place where the text was split.
    """

    ids: list[int]
    offsets: list[int]
    special: list[int]
    cuts: dict[int, int]


class ChatFormat:
    """Converts conversations to tokens with a chat template.

    Only special tokens of the template are special: their strings within a turn are plain text, so that nobody can end
    a turn, or write one of another role, by typing them.

    What an assistant writes begins where the template's generation prompt ends, and ends with the token that the
    template writes after an answer. If the template has generation markers (`{% generation %}`), only what is between
    these is a target, and the end token. If a token would contain both the end of the generation prompt and the
    beginning of the answer, the text is split there, as it is when the answer is generated.

    Args:
        tokenizer: A fast tokenizer.
        template: The chat template. Default: that of the tokenizer.

    Attributes:
        unlocated: Number of answers that `examples` has omitted, since the template has no generation prompt there.

    Raises:
        UserError: If there is no template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", template: Optional[str] = None) -> None:
        if template is None and not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template: give one with --data.chat_template, such as chatml")
        self.tokenizer = tokenizer
        try:
            self.template: str = template or tokenizer.get_chat_template()
        except ValueError as error:  # there are several, and none is the default
            names = ", ".join(tokenizer.chat_template)
            raise UserError(
                f"the tokenizer has several chat templates ({names}), none of them default: {REMEDY}"
            ) from error
        self.has_markers = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        # Any text can become the unknown token, which therefore says nothing about places.
        self.special_ids = set(tokenizer.convert_tokens_to_ids(special)) - {tokenizer.unk_token_id}
        self.cache: dict[str, list[int]] = {}
        self.unlocated = 0

    @functools.cached_property
    def end(self) -> str:
        """The token that the template writes after an answer.

        Raises:
            UserError: If a network could not be trained to write answers in this template.
        """
        answer = "Some-answer"
        turns = [{"role": "user", "content": "A-question"}, {"role": "assistant", "content": answer}]
        text, before = self.render(turns)[0], self.render(turns[:1], prompt=True)[0]
        if not text.startswith(before):
            raise UserError(
                f"the chat template begins an answer that is to be generated with {before[-40:]!r}, but not those in "
                f"conversations, so that a network would be trained on something else: {REMEDY}"
            )
        header = text[len(before) :].partition(answer)[0]
        if header.strip() and before == self.render(turns[:1])[0]:
            raise UserError(
                f"the chat template has no generation prompt (such as {header!r:.40}, if add_generation_prompt is "
                f"true): {REMEDY}"
            )
        found = self.special.search(text, len(before) + len(header) + len(answer))
        if found is None or found[0] == self.tokenizer.unk_token:
            raise UserError(
                "the chat template ends answers with no special token of the tokenizer, so that a network would not "
                f"learn to stop: {REMEDY}, or add its token with --data.special_tokens"
            )
        return found[0]

    @property
    def end_id(self) -> int:
        """The id of `end`."""
        return self.tokenizer.convert_tokens_to_ids(self.end)

    # Conversations

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The ids of a conversation up to the beginning of the assistant's next turn."""
        turns, mark = self.guarded(turns)
        text = self.render(turns, prompt=True)[0]
        try:
            regions = list(self.regions(text, turns).values())
        except UserError:  # a template that no network could be trained with here, but elsewhere
            regions = []
        return self.locate(text, regions, mark)[0].ids

    def conversation(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, and which of them are targets: the assistant's turns with their end tokens.

        Some templates render an answer in another way once there are later turns, for example without its reasoning.
        Such an answer is a target only in the conversation that it ends, see `examples`.

        Raises:
            UserError: If the last turn of the assistant cannot be located.
        """
        ids, is_target, _ = self.located(turns, range(len(turns)))
        return ids, is_target

    def examples(self, turns: Sequence[Turn]) -> list[tuple[list[int], list[bool]]]:
        """The ids and targets of a conversation, so that each turn of the assistant is a target once.

        This is one pair, unless the template renders answers in another way once there are later turns: the beginning
        of the conversation up to such an answer then is an example of its own. What follows the last answer is omitted.
        """
        left = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        found: list[tuple[list[int], list[bool]]] = []
        while left:
            try:
                ids, is_target, done = self.located(turns[: left[-1] + 1], left)
            except UserError:
                if not found:
                    raise
                self.unlocated += len(left)  # such as the greeting before the first question
                break
            found.append((ids, is_target))
            left = [number for number in left if number not in done]
        return found[::-1]

    def located(self, turns: Sequence[Turn], wanted: Collection[int]) -> tuple[list[int], list[bool], set[int]]:
        """The ids of a conversation, which of them are targets, and the numbers of the turns that could be located.

        Args:
            turns: The conversation.
            wanted: Numbers of the turns that are targets, if they are those of the assistant.
        """
        turns, mark = self.guarded(turns)
        text, spans = self.render(turns)
        regions = self.regions(text, turns)
        answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        if answers and answers[-1] not in regions:
            raise UserError(f"the chat template has no generation prompt before the last answer: {REMEDY}")
        tokens, places = self.locate(text, list(regions.values()), mark)
        is_target = [False] * len(tokens.ids)
        for number, region, (start, end) in zip(regions, regions.values(), places):
            if number in wanted:
                parts = [part for part in spans if part[0] < region.end and part[1] > region.start]
                for token in range(start, end) if parts or not self.has_markers else ():
                    is_target[token] = not self.has_markers or token == end - 1
                for first, last in parts:
                    if not text[last : region.end - len(self.end)].strip():  # white space before the end token
                        last = region.end
                    low, high = (index - text.count(mark, 0, index) for index in (first, last))
                    for token in range(start, end):
                        inside = first <= region.start or tokens.offsets[token] >= low
                        is_target[token] |= inside and (tokens.offsets[token] < high or last == region.end)
        return tokens.ids, is_target, set(regions)

    # Rendering

    def render(self, turns: Sequence[Turn], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the places of what is between generation markers."""
        return render_chat(self.tokenizer, turns, self.template, prompt, self.has_markers)

    def guarded(self, turns: Sequence[Turn]) -> tuple[list[dict[str, Any]], str]:
        """Inserts a mark into the strings of special tokens in turns.

        It distinguishes them from those of the template, and is a character that no turn contains.
        """
        text = "".join(strings(turns))
        mark = next((chr(code) for code in range(0xFDD0, 0xFDF0) if chr(code) not in text), "")
        if not mark:
            raise UserError("the conversation has all characters from U+FDD0 to U+FDEF, which are none: remove them")

        def guard(value: Any) -> Any:
            if isinstance(value, str):
                return self.special.sub(lambda match: match[0][0] + mark + match[0][1:], value)
            if isinstance(value, Mapping):  # without empty fields, as in `apply_chat_template`
                return {key: guard(item) for key, item in value.items() if item is not None}
            return [guard(item) for item in value] if isinstance(value, (list, tuple)) else value

        return [guard(turn) for turn in turns], mark

    def regions(self, text: str, turns: Sequence[Turn]) -> dict[int, Region]:
        """The places in the text of what the assistant writes in each turn, by the number of the turn.

        A turn that is rendered in another way than when it was the last one is omitted.
        """
        found, token = dict[int, Region](), self.end
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            try:
                before = self.render(turns[:number], prompt=True)[0]
                own = text if number + 1 == len(turns) else self.render(turns[: number + 1])[0]
            except UserError:
                continue  # many templates refuse a conversation without a question
            ends = list(self.special.finditer(own, len(before)))
            end = next((match.end() for match in ends if match[0] == token), ends[-1].end() if ends else 0)
            if before and end and text.startswith(before) and own.startswith(before) and text[:end] == own[:end]:
                found[number] = Region(len(before), end)
        return found

    # Tokens

    def locate(self, text: str, regions: list[Region], mark: str) -> tuple[Tokens, list[tuple[int, int]]]:
        """Tokenizes a rendered text.

        Returns:
            The tokens; for each region, the numbers of its first token and of the token after its last one.
        """
        found = [match for match in self.special.finditer(text) if match[0] != self.tokenizer.unk_token]
        starts, ends = [match.start() for match in found], [match.end() for match in found]
        cuts: list[int] = []
        while True:
            tokens, places = self.encode(text, mark, cuts), []
            if len(tokens.special) != len(found):
                raise UserError(
                    f"the tokenizer reads {len(tokens.special)} special tokens in a conversation with {len(found)}, so "
                    f"that answers cannot be located: {REMEDY}"
                )
            for region in regions:
                before = bisect.bisect_right(ends, region.start)
                begin, first = (starts[before - 1], tokens.special[before - 1]) if before else (0, 0)
                start = self.start(text, (begin, region.start), first, mark, cuts, tokens)
                if start is None:
                    cuts = [*cuts, region.start]
                    break
                places.append((start, tokens.special[bisect.bisect_left(ends, region.end)] + 1))
            else:
                return tokens, places

    def start(
        self, text: str, part: tuple[int, int], first: int, mark: str, cuts: list[int], tokens: Tokens
    ) -> Optional[int]:
        """The number of the first token after a part of the text; None if the part alone has other tokens.

        Args:
            text: The text.
            part: From the last special token before the place, or the beginning of the text, to the place.
            first: Number of the first token of the part.
            mark: See `guarded`.
            cuts: Where the text was split.
            tokens: Those of the text.
        """
        begin, place = part
        if place in cuts:
            return tokens.cuts[place]
        inside = [cut - begin for cut in cuts if begin < cut < place]
        own = None if inside else self.cache.get(text[begin:place])
        if own is None:
            own = self.encode(text[begin:place], mark, inside).ids
            if len(self.cache) < CACHED and not inside:
                self.cache[text[begin:place]] = own
        return first + len(own) if tokens.ids[first : first + len(own)] == own else None

    def encode(self, text: str, mark: str, cuts: Sequence[int]) -> Tokens:
        """Tokenizes a text with marks, separately before and after each cut."""
        found, shift = Tokens([], [], [], {}), 0
        for low, high in zip([0, *cuts], [*cuts, len(text)]):
            for part, plain in self.parts(text[low:high], mark):
                encoded = self.tokenizer(
                    part, add_special_tokens=False, split_special_tokens=plain, return_offsets_mapping=True
                )
                found.ids.extend(encoded["input_ids"])
                found.offsets.extend(start + shift for start, _ in encoded["offset_mapping"])
                shift += len(part)
            found.cuts[high] = len(found.ids)
        found.special.extend(number for number, token in enumerate(found.ids) if token in self.special_ids)
        return found

    def parts(self, text: str, mark: str) -> Iterator[tuple[str, bool]]:
        """The parts of a text that are tokenized separately, without marks, and whether special tokens are plain text.

        Texts between special tokens of the template are parts only if they have marks, since some tokenizers begin each
        part with a space.
        """
        start = begin = 0
        for match in [*self.special.finditer(text), None] if mark in text else ():
            end = match.start() if match else len(text)
            if mark in text[begin:end]:
                if begin > start:
                    yield text[start:begin], False
                yield text[begin:end].replace(mark, ""), True
                start = end
            begin = match.end() if match else end
        if start < len(text):
            yield text[start:], False


def strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)
