"""Tokenizers: loaded from a folder or the Hub, or trained on the corpus.

All are fast tokenizers of `transformers`, and a saved one is a folder that `AutoTokenizer.from_pretrained` reads. The
same options and texts give the same tokenizer, byte for byte. Two things differ from the defaults of `transformers`.
First, the string of a special token in a text is plain text, so that the text `<|endoftext|>` does not end a document
(an exported tokenizer has the default of `transformers` again, see `save`). Second, a trained tokenizer has no maximum
length, since the context length belongs to the model.
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

from lm_lightning import features, hub
from lm_lightning import run as runs
from lm_lightning.data import used_tokens
from lm_lightning.errors import UserError
from lm_lightning.security.trust import trust_remote_code

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

SpecialTokens = Literal["gpt", "bert", "seq2seq"]

END, UNKNOWN = "<|endoftext|>", "<|unk|>"
BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
SEQ2SEQ = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
RARE = 1e-6  # characters with a smaller share of the text are omitted from a WordPiece alphabet and become unknown
MANY = 0.03  # share of unknown tokens above which a tokenizer is not suitable for a text
MOST = 10_000_000  # maximum size of a trained vocabulary
GAPS = 100_000  # maximum number of unused ids of a vocabulary
CHUNK = 100_000  # characters that are passed to the trainers at a time, as they need many times that size in memory

logger = logging.getLogger(__name__)


@dataclass
class Tokenizer:
    """The tokenizer: an existing one, or one that is trained on the corpus.

    Args:
        path: Folder or Hub name of an existing tokenizer. Default: a tokenizer is trained with the other options.
        min_count: How often a token of `path` must occur in the training text to be kept. With 1, the text has the same
            tokens as with the whole vocabulary, and a new network has a smaller one, which makes training faster.
            Tokens from which others are made, single characters and special tokens are always kept. 0 keeps all tokens,
            as a pretrained network needs them.
        algorithm: `bpe` (byte-level), `wordpiece` (as in BERT), `unigram` (byte-level), `characters` (a token per
            Unicode character) or `bytes` (a token per byte). All except `wordpiece`, which drops white space, restore
            the exact text when decoding. `wordpiece` and `characters` know only characters of the training text.
        vocab_size: Maximum size of the vocabulary, including special tokens. The vocabulary is smaller if the text has
            few different words or characters; `bytes` has only the 256 bytes.
        lowercase: Whether to convert the text to lower case and to strip accents; only for `wordpiece`.
        training_megabytes: Maximum amount of text to train on, in megabytes of UTF-8; the rest is not used.
    """

    path: Optional[str] = None
    min_count: int = 0
    algorithm: Literal["bpe", "wordpiece", "unigram", "characters", "bytes"] = "bpe"
    vocab_size: int = 4096
    lowercase: bool = False
    training_megabytes: int = 200

    def check(self) -> None:
        """Refuses a `min_count` that has no effect."""
        if self.min_count < 0:
            raise UserError(f"--data.tokenizer.min_count is {self.min_count}, but must be 0 or more")
        if self.min_count and self.path is None:
            raise UserError(
                "--data.tokenizer.min_count is for an existing tokenizer: give its --data.tokenizer.path, or omit it"
            )

    @property
    def is_made(self) -> bool:
        """Whether the tokenizer is made from the training text."""
        return self.path is None or self.min_count > 0


def load(path: str, **options: str) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer of a local folder or, if there is no such folder, of the Hub.

    `options` are more arguments of `from_pretrained`, such as `src_lang`. Python code of a tokenizer is not run, unless
    the command line has `--trust_remote_code true`.

    Raises:
        UserError: If it does not exist, cannot be read, or has no fast implementation.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    features.register_networks()  # the class of a tokenizer may depend on the network's config
    path = runs.pretrained_name(path, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            local_files_only=hub.local_only(path),
            trust_remote_code=trust_remote_code(),
            split_special_tokens=True,
            **options,
        )
        tokenizer("a")  # fails if settings have wrong types
    except Exception as error:  # for a damaged file, the `tokenizers` library raises a bare `Exception`
        raise hub.explain(path, error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{path!r} is a {type(tokenizer).__name__}, which has no fast version: give a fast tokenizer")
    if (rows := vocabulary(tokenizer)) > 4 * len(tokenizer) + GAPS:  # a network would have weights for each id
        raise UserError(f"{path!r} has {len(tokenizer):,} tokens, but one of them has the id {rows - 1:,}: fix its ids")
    # If a folder contains only a model, `transformers` creates a tokenizer without a vocabulary.
    if len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)) < 2:
        raise UserError(f"{path!r} contains no tokenizer: give a folder with a tokenizer.json or vocabulary files")
    return tokenizer


def save(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Saves a tokenizer with an exported network, with the default behavior of `transformers`.

    By default, the string of a special token in a text is that token; chat templates and texts with `[MASK]` need this.
    """
    own = tokenizer.init_kwargs.get("split_special_tokens", False), tokenizer.split_special_tokens
    tokenizer.init_kwargs["split_special_tokens"] = tokenizer.split_special_tokens = False
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.init_kwargs["split_special_tokens"], tokenizer.split_special_tokens = own


def make(options: Tokenizer, texts: Iterator[str], special: SpecialTokens) -> "PreTrainedTokenizerFast":
    """Trains a tokenizer or, with `path`, removes the tokens that are too rare in the texts; see `train`."""
    if options.path is None:
        return train(options, texts, special)
    whole = load(options.path)
    reduced = used_tokens.keep_used(whole, texts, options.min_count)
    print(f"tokenizer: {len(reduced):,} of the {len(whole):,} tokens of {options.path} are kept")
    return reduced


def train(options: Tokenizer, texts: Iterator[str], special: SpecialTokens) -> "PreTrainedTokenizerFast":
    """Trains a tokenizer.

    Args:
        options: The algorithm and its options.
        texts: Texts of the training split, read once, at most `options.training_megabytes` of them.
        special: `gpt` is for causal models: `<|endoftext|>` is the token for beginning, end and padding, and algorithms
            for which characters can be unknown also have `<|unk|>`. `bert` is for masked models: `[PAD]`, `[UNK]`,
            `[CLS]`, `[SEP]` and `[MASK]` have the ids 0 to 4, and `[CLS]` and `[SEP]` are added around a text or a pair
            of texts. `seq2seq` is for encoder-decoders: `<pad>`, `</s>` and `<unk>` have the ids 0 to 2, and `</s>` is
            added after a text.

    Raises:
        UserError: If the options contradict each other, or there is no text.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if options.lowercase and options.algorithm != "wordpiece":
        raise UserError(
            f"--data.tokenizer.lowercase is only for the algorithm wordpiece, not for {options.algorithm}: omit it"
        )
    gpt = {"bos_token": END, "eos_token": END, "pad_token": END}
    names = {"bert": BERT, "seq2seq": SEQ2SEQ, "gpt": gpt}[special]
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
    if special == "seq2seq":
        backend.post_processor = TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=inputs, split_special_tokens=True, **names
    )


def fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 of everything that determines the ids of a text; tokenizers with the same fingerprint are equivalent."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Padding and truncation of the latest call are part of the backend's state, but not of the tokenizer.
    del backend["padding"], backend["truncation"]
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokenizer.special_tokens_map.items()}
    state = json.dumps([backend, ids, tokenizer.split_special_tokens], sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()


def everything(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """`fingerprint` and the settings that do not change ids, such as the chat template."""
    return [fingerprint(tokenizer), repr(sorted(used_tokens.settings_of(tokenizer).items()))]


def adopt(tokenizer: "PreTrainedTokenizerFast", other: "PreTrainedTokenizerFast") -> None:
    """Gives a tokenizer what another has, if it does not change the meaning of its tokens: padding, languages, and
    tokens that were added."""
    tokenizer.pad_token = tokenizer.pad_token or other.pad_token  # it is no part of a text
    for name in ("src_lang", "tgt_lang"):
        if hasattr(tokenizer, name) and getattr(other, name, None):
            setattr(tokenizer, name, getattr(other, name))
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([t for _, t in sorted(other.added_tokens_decoder.items()) if str(t) not in known])


def text_ids(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """Ids that the tokenizer adds before and after a text, such as those of `[CLS]` and `[SEP]`."""
    full, text = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(text)] == text)
    return full[:start], full[start + len(text) :]


def unknown_id(tokenizer: "PreTrainedTokenizerFast") -> Optional[int]:
    """The id of unknown tokens; None if the vocabulary can represent every text, as with bytes."""
    model = tokenizer.backend_tokenizer.model
    if (token := getattr(model, "unk_token", None)) is not None:
        found = tokenizer.backend_tokenizer.token_to_id(token)
    else:  # Unigram has an id instead, but no attribute for it
        unigram = type(model).__name__ == "Unigram"
        found = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("unk_id") if unigram else None
    others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return None if found in others else found


def unknown_word(tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str]) -> str:
    """The first part of the texts that is unknown to a tokenizer; empty if there is none."""
    unknown = unknown_id(tokenizer)
    for text in texts:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"]):
            if token == unknown:
                return text[start:end].strip()
    return ""


def about_unknown(unknown: int, tokens: int) -> str:
    """The number of unknown tokens, as part of a sentence; empty if there are none."""
    return f", {unknown:,} of the tokens are unknown ({unknown / tokens:.2%})" if unknown else ""


def unknown_warning(what: str, unknown: int, tokens: int, example: str, remedy: str) -> str:
    """A warning if a large share of the tokens is unknown; otherwise empty."""
    if unknown <= MANY * tokens:
        return ""
    return (
        f"warning: {what}: {unknown / tokens:.0%} of the tokens are unknown to the tokenizer, such as {example!r}, "
        f"so the network cannot distinguish them: {remedy}"
    )


def warn_about_unknown(what: str, unknown: int, tokens: int, example: str, remedy: str) -> None:
    """Prints a warning if a large share of the tokens is unknown."""
    if warning := unknown_warning(what, unknown, tokens, example, remedy):
        print(warning)


def vocabulary(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Number of embeddings that a network needs for the tokenizer: its highest id plus 1, as ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def document_ids(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """Ids that are added before and after each document in causal pretraining.

    Before it, the beginning-of-text token, if the tokenizer adds it and it is not also the end-of-text token; after it,
    the end-of-text token or, in vocabularies like BERT's, the separator.

    Raises:
        UserError: If the tokenizer has neither an end-of-text token nor a separator.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        remedy = "set eos_token in its tokenizer_config.json, or train a tokenizer on the corpus"
        raise UserError(f"the tokenizer has no end-of-text token: {remedy}")
    begin = tokenizer.bos_token_id
    begins = begin is not None and begin != end and tokenizer("a")["input_ids"][0] == begin
    return ([begin] if begins else []), [end]


def _sample(texts: Iterator[str], megabytes: int) -> list[str]:
    """The first `megabytes` of `texts` in chunks; prints a note if there is more text."""
    room, documents, chunks = megabytes * 1_000_000, 0, []
    for text in texts:
        size = len(text.encode())
        if size > room:
            text = text.encode()[:room].decode(errors="ignore")
            message = "The tokenizer is trained on the first %d MB of text: %d documents and a part of the next."
            logger.warning(message + " --data.tokenizer.training_megabytes sets the amount.", megabytes, documents)
        chunks += [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
        if size > room:
            break
        room, documents = room - size, documents + 1
    if not any(chunk.strip() for chunk in chunks):
        raise UserError(
            "there is no text to train a tokenizer on: add text to the corpus, or increase "
            "--data.tokenizer.training_megabytes"
        )
    return chunks


def _require(options: Tokenizer, least: int) -> None:
    if options.vocab_size > MOST:  # the library would allocate the memory for them at once
        raise UserError(f"--data.tokenizer.vocab_size is {options.vocab_size}, but must be {MOST:,} or less")
    if options.vocab_size < least:
        room = f"--data.tokenizer.vocab_size {options.vocab_size} is too small for the alphabet and the special tokens"
        raise UserError(f"{room} of {options.algorithm}: give at least {least}")


def _unknown(special: list[str]) -> str:
    return next(token for token in (BERT["unk_token"], SEQ2SEQ["unk_token"], UNKNOWN) if token in special)


def _byte_level(model: "tokenizers.models.Model", split_words: bool = True) -> "tokenizers.Tokenizer":
    """A tokenizer of UTF-8 bytes, each represented by a printable character as in GPT-2; no text is unknown to it."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())  # the library returns it in a different order in each process


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
    _require(options, len(special) + len(alphabet) + 1)  # for the bare alphabet, the trainer returns all pieces
    learner = _byte_level(Unigram())
    size, show = options.vocab_size - len(special), sys.stderr.isatty()
    trainer = UnigramTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=show)
    learner.train_from_iterator(texts, trainer)
    # The trainer processes words in a random order. It affects rounding errors (1e-11), and the scores of unused bytes,
    # which are 0.0001 apart, from the lowest score up. Both are made deterministic before the pieces are numbered.
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
    # Without merges, BPE is a lookup of single characters, and the fastest one in the library.
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
    # The trainer numbers the `##` forms of the alphabet in random order, and merges pairs of the same count by these
    # numbers. So the alphabet is learned first, and then passed to the trainer in a fixed order.
    alphabet = sorted(learn([], vocab_size=0))
    _require(options, len(special) + len(alphabet))
    return wordpiece(learn(special + alphabet, options.vocab_size))
