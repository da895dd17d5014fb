"""Tokenizers: loaded from a folder or the Hub, or trained on the corpus.

All are fast `transformers` tokenizers, and a saved one is a folder that `AutoTokenizer.from_pretrained` reads. The same
options and texts give the same tokenizer, to the byte. Two things differ from what `transformers` does by itself: the
string of a special token in a text is plain text, so that no document can end itself with a written `<|endoftext|>`
(an exported tokenizer follows `transformers` again, see `save`), and a trained tokenizer has no maximum length, since
the model knows its context length.
"""

import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Optional

from lm_lightning import hub
from lm_lightning import run as runs
from lm_lightning.errors import UserError
from lm_lightning.security.trust import trust_remote_code

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

SpecialTokens = Literal["gpt", "bert"]

END, UNKNOWN = "<|endoftext|>", "<|unk|>"
BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
RARE = 1e-6  # share of the text below which a character is left out of a WordPiece alphabet and becomes unknown
MANY = 0.03  # share of unknown tokens above which a tokenizer does not suit a text
MOST = 10_000_000  # tokens of a trained vocabulary
CHUNK = 100_000  # characters that the trainers get at a time, since they need many times a text's size in memory

logger = logging.getLogger(__name__)


@dataclass
class Tokenizer:
    """Which tokenizer to use: an existing one, or one that is trained on the corpus.

    Args:
        path: Folder or Hub name of an existing tokenizer. Without it one is trained, as the other options say.
        algorithm: `bpe` (byte-level), `wordpiece` (as in BERT), `unigram` (byte-level), `characters` (a token per
            Unicode character) or `bytes` (a token per byte). All but `wordpiece`, which drops white space, give back
            the exact text; `wordpiece` and `characters` know only the characters of the training text.
        vocab_size: Largest size of the vocabulary with its special tokens. With few different words or characters it
            is smaller, and `bytes` has no more than the 256 bytes.
        lowercase: Lower-cases the text and strips its accents; for `wordpiece` only.
        training_megabytes: Largest amount of text to train on, in megabytes of UTF-8; the rest is not looked at.
    """

    path: Optional[str] = None
    algorithm: Literal["bpe", "wordpiece", "unigram", "characters", "bytes"] = "bpe"
    vocab_size: int = 4096
    lowercase: bool = False
    training_megabytes: int = 200


GAPS = 100_000  # ids of a vocabulary that may be unused


def load(path: str) -> "PreTrainedTokenizerFast":
    """The tokenizer of a local folder or, where there is no such folder, of the Hub.

    Code that comes with a tokenizer is not run, unless the command line has `--trust_remote_code true`.

    Raises:
        UserError: There is none, it cannot be read, or it has no fast implementation.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = runs.pretrained_name(path, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            local_files_only=hub.local_only(path),
            trust_remote_code=trust_remote_code(),
            split_special_tokens=True,
        )
        tokenizer("a")  # which shows settings of other types
    except Exception as error:  # a damaged file is a bare `Exception` of the `tokenizers` library
        raise hub.explain(path, error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{path!r} is a {type(tokenizer).__name__}, which has no fast version: give a fast tokenizer")
    if (rows := vocabulary(tokenizer)) > 4 * len(tokenizer) + GAPS:  # each of which a network would have weights for
        raise UserError(f"{path!r} has {len(tokenizer):,} tokens, but one of them has the id {rows - 1:,}: fix its ids")
    # `transformers` makes a tokenizer without a vocabulary from a folder that only has a model in it.
    if len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)) < 2:
        raise UserError(f"{path!r} has no tokenizer in it: give a folder with a tokenizer.json or vocabulary files")
    return tokenizer


def save(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Writes a tokenizer beside an exported network, for programs that expect what `transformers` does by itself.

    To them, the string of a special token in a text is that token: a chat template and a text with `[MASK]` need it.
    """
    own = tokenizer.init_kwargs.get("split_special_tokens", False), tokenizer.split_special_tokens
    tokenizer.init_kwargs["split_special_tokens"] = tokenizer.split_special_tokens = False
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.init_kwargs["split_special_tokens"], tokenizer.split_special_tokens = own


def train(options: Tokenizer, texts: Iterator[str], special: SpecialTokens) -> "PreTrainedTokenizerFast":
    """Trains a tokenizer.

    Args:
        options: The algorithm and its options.
        texts: Texts of the training split, read once, at most `options.training_megabytes` of them.
        special: `gpt` for causal models: `<|endoftext|>` begins, ends and pads, and algorithms that can meet unknown
            characters have `<|unk|>`, too. `bert` for masked models: `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]` and `[MASK]`
            are 0 to 4, and a text or a pair of texts gets `[CLS]` and `[SEP]` put around it.

    Raises:
        UserError: The options contradict each other, or there is no text.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if options.lowercase and options.algorithm != "wordpiece":
        raise UserError(f"lowercase is for the algorithm wordpiece, not for {options.algorithm}: leave it out")
    names = BERT if special == "bert" else {"bos_token": END, "eos_token": END, "pad_token": END}
    if special == "gpt" and options.algorithm in ("wordpiece", "characters"):
        names = {**names, "unk_token": UNKNOWN}
    tokens = list(dict.fromkeys(names.values()))

    learn = {"bpe": _bpe, "wordpiece": _wordpiece, "unigram": _unigram, "characters": _characters, "bytes": _bytes}
    sample = [] if options.algorithm == "bytes" else _sample(texts, options.training_megabytes)
    backend = learn[options.algorithm](options, sample, tokens)
    backend.add_special_tokens(tokens)
    inputs = ["input_ids", "attention_mask"]
    if special == "bert":
        inputs.insert(1, "token_type_ids")
        backend.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=inputs, split_special_tokens=True, **names
    )


def fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 of all that decides the ids of a text: two tokenizers with the same one are interchangeable."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # How the latest call padded and truncated is part of the backend's state, but not of the tokenizer.
    del backend["padding"], backend["truncation"]
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokenizer.special_tokens_map.items()}
    state = json.dumps([backend, ids, tokenizer.split_special_tokens], sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()


def text_ids(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """Ids that the tokenizer itself puts before and after a text, such as those of `[CLS]` and `[SEP]`."""
    full, text = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(text)] == text)
    return full[:start], full[start + len(text) :]


def unknown_id(tokenizer: "PreTrainedTokenizerFast") -> Optional[int]:
    """The id of what is not in the vocabulary; None if every text can be written in it, as in bytes."""
    model = tokenizer.backend_tokenizer.model
    if (token := getattr(model, "unk_token", None)) is not None:
        found = tokenizer.backend_tokenizer.token_to_id(token)
    else:  # only Unigram keeps an id instead, which has no attribute
        unigram = type(model).__name__ == "Unigram"
        found = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("unk_id") if unigram else None
    others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return None if found in others else found


def unknown_word(tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str]) -> str:
    """The first part of some texts that is unknown to a tokenizer, empty if there is none."""
    unknown = unknown_id(tokenizer)
    for text in texts:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"]):
            if token == unknown:
                return text[start:end].strip()
    return ""


def about_unknown(unknown: int, tokens: int) -> str:
    """A part of a sentence: how many tokens are unknown, empty if none is."""
    return f", {unknown:,} of the tokens are unknown ({unknown / tokens:.2%})" if unknown else ""


def warn_of_unknown(what: str, unknown: int, tokens: int, example: str, remedy: str) -> None:
    """Prints a warning if so many tokens are unknown that much of the text is lost."""
    if unknown > MANY * tokens:
        print(
            f"warning: {what}: {unknown / tokens:.0%} of the tokens are unknown to the tokenizer, such as {example!r}, "
            f"and all look the same to the network: {remedy}"
        )


def vocabulary(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Rows that a network needs for the tokenizer: one more than its highest id, as there may be gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def document_ids(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """Ids that go before and after each document in causal pretraining.

    Before it the beginning-of-text token, if it is one of its own that the tokenizer itself puts there; after it the
    end-of-text token or, in vocabularies like BERT's, the separator.

    Raises:
        UserError: The tokenizer has neither of the two.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        remedy = "set eos_token in its tokenizer_config.json, or train a tokenizer on the corpus"
        raise UserError(f"the tokenizer has no token that ends a document: {remedy}")
    begin = tokenizer.bos_token_id
    begins = begin is not None and begin != end and tokenizer("a")["input_ids"][0] == begin
    return ([begin] if begins else []), [end]


def _sample(texts: Iterator[str], megabytes: int) -> list[str]:
    """The first `megabytes` of `texts` in chunks, and a word about it if that is not all."""
    room, documents, chunks = megabytes * 1_000_000, 0, []
    for text in texts:
        size = len(text.encode())
        if size > room:
            text = text.encode()[:room].decode(errors="ignore")
            message = "The tokenizer is trained on the first %d MB of text: %d documents and a part of the next."
            logger.warning(message + " training_megabytes sets how much.", megabytes, documents)
        chunks += [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
        if size > room:
            break
        room, documents = room - size, documents + 1
    if not any(chunk.strip() for chunk in chunks):
        raise UserError("there is no text to train a tokenizer on: the corpus is empty, or training_megabytes is 0")
    return chunks


def _require(options: Tokenizer, least: int) -> None:
    if options.vocab_size > MOST:  # the library would take the memory for them at once
        raise UserError(f"vocab_size {options.vocab_size} is more than {MOST:,}, the most that can be trained")
    if options.vocab_size < least:
        room = f"vocab_size {options.vocab_size} has no room for the alphabet and the special tokens"
        raise UserError(f"{room} of {options.algorithm}: give at least {least}")


def _unknown(special: list[str]) -> str:
    return BERT["unk_token"] if BERT["unk_token"] in special else UNKNOWN


def _byte_level(model: "tokenizers.models.Model", split_words: bool = True) -> "tokenizers.Tokenizer":
    """A tokenizer over UTF-8 bytes, each written as one printable character as in GPT-2; nothing is unknown to it."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())  # the library gives it in another order in each process


def _bytes(options: Tokenizer, texts: list[str], special: list[str]) -> "tokenizers.Tokenizer":
    from tokenizers.models import BPE

    vocabulary = special + _byte_alphabet()
    _require(options, len(vocabulary))
    return _byte_level(BPE({token: id for id, token in enumerate(vocabulary)}, merges=[]), split_words=False)


def _bpe(options: Tokenizer, texts: list[str], special: list[str]) -> "tokenizers.Tokenizer":
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    alphabet = _byte_alphabet()
    _require(options, len(special) + len(alphabet))
    backend = _byte_level(BPE())
    size, show = options.vocab_size, sys.stderr.isatty()
    trainer = BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=show)
    backend.train_from_iterator(texts, trainer)
    return backend


def _unigram(options: Tokenizer, texts: list[str], special: list[str]) -> "tokenizers.Tokenizer":
    from tokenizers.models import Unigram
    from tokenizers.trainers import UnigramTrainer

    alphabet = _byte_alphabet()
    _require(options, len(special) + len(alphabet) + 1)  # asked for the bare alphabet, the trainer gives all it has
    learner = _byte_level(Unigram())
    size, show = options.vocab_size - len(special), sys.stderr.isatty()
    trainer = UnigramTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=show)
    learner.train_from_iterator(texts, trainer)
    # The trainer goes through its words in a random order, in which rounding errors (1e-11) add up and bytes it has no
    # use for are given scores 0.0001 apart, from the lowest one up. Both are evened out before the pieces are numbered.
    scores = dict(json.loads(learner.to_str())["model"]["vocab"])
    lowest = min(scores.values())
    unused = {piece for piece in alphabet if scores[piece] < lowest + 0.0001 * len(alphabet)}
    rounded = ((piece, round(lowest if piece in unused else score, 4)) for piece, score in scores.items())
    pieces = sorted(rounded, key=lambda item: (-item[1], item[0]))
    return _byte_level(Unigram([(token, 0.0) for token in special] + pieces))


def _characters(options: Tokenizer, texts: list[str], special: list[str]) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    _require(options, len(special) + 1)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    kept = [character for character, _ in counts.most_common(options.vocab_size - len(special))]
    vocabulary = {token: id for id, token in enumerate(special + sorted(kept))}
    # Without merges, BPE is a look-up of single characters, and the fastest one that the library has.
    backend = Tokenizer(BPE(vocabulary, merges=[], unk_token=_unknown(special)))
    backend.decoder = decoders.Fuse()
    return backend


def _wordpiece(options: Tokenizer, texts: list[str], special: list[str]) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import WordPiece
    from tokenizers.trainers import WordPieceTrainer

    def wordpiece(vocabulary: dict[str, int]) -> Tokenizer:
        backend = Tokenizer(WordPiece(vocabulary, unk_token=_unknown(special)))
        backend.normalizer = normalizers.BertNormalizer(lowercase=options.lowercase)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        return backend

    def learn(first: list[str], vocab_size: int) -> dict[str, int]:
        learner = wordpiece({})
        trainer = WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=first,
            initial_alphabet=characters,
            limit_alphabet=len(characters),
            show_progress=sys.stderr.isatty(),
        )
        learner.train_from_iterator(texts, trainer)
        return learner.get_vocab()

    counts: Counter[str] = Counter()
    normalizer = wordpiece({}).normalizer
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    least = RARE * counts.total()
    characters = [character for character, count in counts.items() if count >= least and not character.isspace()]
    # The trainer numbers the alphabet's `##` forms in the random order in which it meets them, and pairs of the same
    # count are merged by number. So the alphabet is learned first and then given to the trainer in a fixed order.
    alphabet = sorted(learn([], vocab_size=0))
    _require(options, len(special) + len(alphabet))
    return wordpiece(learn(special + alphabet, options.vocab_size))
