"""Shards: a corpus, tokenized once into memory-mapped integers.

Documents are tokenized and appended to a file for each split. The name of the folder is a fingerprint of everything
that determines the content of the files, so that later runs find them, and any change creates new ones:

    <cache>/shards/<fingerprint>/info.json              counts, token type, unigram perplexity, sizes and checksums
                                 frequencies.npy        number of occurrences of each token in the training split
                                 <split>.tokens         token ids, uint16 if the vocabulary is small enough, else uint32
                                 <split>.documents      int64, where each document starts in <split>.tokens
                                 <split>.sentences      int64, where each sentence starts, if required
                                 <split>.words          uint8, 1 for tokens that follow white space, if required
    <cache>/tokenizers/<fingerprint>/tokenizer.json     a tokenizer that was trained on the corpus
"""

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np

from lm_lightning.data import cache as cached
from lm_lightning.data import corpus as corpora
from lm_lightning.data import tokenizer as tokenizers
from lm_lightning.data.source import Source
from lm_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KINDS = {"tokens": None, "documents": "int64", "sentences": "int64", "words": "uint8"}  # files and their types
SPLITS = ("train", "validation", "test")
FORMAT = 3  # part of every fingerprint: increase it when the meaning of the files changes
BATCH_CHARACTERS = 1 << 20  # text tokenized at once: enough for all cores, but little enough to limit memory


@dataclass(frozen=True)
class Layout:
    """How the text of a document is converted to tokens.

    Attributes:
        special: `gpt` adds the end-of-text token after each document, `bert` the tokens that the tokenizer adds around
            a text; a trained tokenizer gets these special tokens.
        sentences: Language (such as `en`, `zh`) whose rules split documents into sentences. The starts of the sentences
            are saved, and the documents get no special tokens. None: no sentences.
        words: Whether to save which tokens follow white space.
    """

    special: tokenizers.SpecialTokens = "gpt"
    sentences: Optional[str] = None
    words: bool = False

    def around(self, tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
        """Token ids before and after each document."""
        if self.sentences is not None:
            return [], []
        return tokenizers.document_ids(tokenizer) if self.special == "gpt" else tokenizers.text_ids(tokenizer)


class Split(NamedTuple):
    """One split of a tokenized corpus.

    Attributes:
        tokens: All token ids, in the corpus's order, memory-mapped, (tokens,) uint16 or uint32.
        documents: Where each document starts in `tokens`, ascending, (documents,) int64.
        bytes: UTF-8 bytes of the text.
        unigram_perplexity: Perplexity of this split's tokens under their frequencies in the training split.
        sentences: Where each sentence starts, ascending, (sentences,) int64; empty if the layout has none.
        words: 1 for tokens that follow white space or begin a document, (tokens,) uint8; empty if the layout has none.
        path: Folder of the shards and name of the split; None for tokens that are in memory.
    """

    tokens: np.ndarray
    documents: np.ndarray
    bytes: int
    unigram_perplexity: float
    sentences: np.ndarray = np.empty(0, np.int64)
    words: np.ndarray = np.empty(0, np.uint8)
    path: Optional[tuple[Path, str]] = None

    def __reduce__(self) -> tuple:
        # A process to which a split of shards is sent maps the files itself, instead of receiving all their tokens.
        return (Split, tuple(self)) if self.path is None else (open_split, self.path)


class Prepared(NamedTuple):
    """A tokenizer and the folder of the corpus tokenized with it."""

    tokenizer: "PreTrainedTokenizerFast"
    folder: Path

    @property
    def info(self) -> dict:
        """The description of the shards: `splits` with their counts, `inputs`, `dtype`."""
        return json.loads((self.folder / "info.json").read_text(encoding="utf-8"))

    def frequencies(self) -> np.ndarray:
        """Number of occurrences of each token in the training split, (vocabulary,) int64."""
        return np.load(self.folder / "frequencies.npy")

    def about_unknown(self, name: str) -> str:
        """The number of unknown tokens of a split, as part of a sentence; prints a warning if there are many."""
        counts = self.info["splits"][name]
        remedy = "use another --data.tokenizer.path, or none to train one on the corpus, or fix its `encoding`"
        numbers = counts["unknown"], counts["tokens"]
        tokenizers.warn_about_unknown(f"the {name} split", *numbers, counts["unknown_example"], remedy)
        return tokenizers.about_unknown(*numbers)

    def split(self, name: str) -> Split:
        """Opens one split: `train`, `validation` or `test`."""
        return open_split(self.folder, name)


def open_split(folder: Path, name: str) -> Split:
    """Opens a split of the shards in a folder."""
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    counts = info["splits"][name]
    paths = {kind: folder / f"{name}.{kind}" for kind in KINDS}
    mapped = {  # an empty file cannot be mapped
        kind: np.memmap(file, KINDS[kind] or info["dtype"], "r")
        if file.stat().st_size
        else np.empty(0, KINDS[kind] or info["dtype"])
        for kind, file in paths.items()
    }
    return Split(bytes=counts["bytes"], unigram_perplexity=counts["unigram_perplexity"], path=(folder, name), **mapped)


def check(folder: Path) -> None:
    """Refuses shards that have changed since they were written, see `cache.check_files`.

    Raises:
        UserError: Names the file, and the folder to remove.
    """
    remedy = f"remove the folder {folder}, so that it is created again"
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        known = {f"{split}.{kind}" for split in SPLITS for kind in KINDS} | {"frequencies.npy"} == info["files"].keys()
        known = known and info["dtype"] in ("uint16", "uint32") and info["splits"].keys() == set(SPLITS)
        numbers = [split[name] for split in info["splits"].values() for name in ("bytes", "unigram_perplexity")]
        known = known and all(isinstance(number, (int, float)) for number in numbers)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"the tokenized corpus has a damaged {folder / 'info.json'} ({error}): {remedy}") from error
    if not known:
        raise UserError(f"{folder / 'info.json'} does not describe a tokenized corpus: {remedy}")
    cached.check_files(folder, info["files"], "the tokenized corpus", remedy)


def prepare(corpus: corpora.Corpus, options: tokenizers.Tokenizer, layout: Layout, cache_dir: str) -> Prepared:
    """Loads or trains the tokenizer and tokenizes the corpus, see `prepare_all`."""
    return prepare_all({"": corpus}, options, layout, cache_dir)[""]


def prepare_all(
    mixed: Mapping[str, corpora.Corpus], options: tokenizers.Tokenizer, layout: Layout, cache_dir: str
) -> dict[str, Prepared]:
    """Loads or trains a tokenizer for some corpora, and tokenizes each of them, unless the cache has all of it.

    A tokenizer is trained on the same amount of text of each corpus, unless a corpus has less. Several processes can
    call this at once: the first one does the work, and the others wait for it.

    Args:
        mixed: The corpora by their names.
        options: Options of the tokenizer.
        layout: How documents are converted to tokens.
        cache_dir: Folder of the cache; `~` is expanded.

    Raises:
        UserError: If a corpus or the tokenizer cannot be used; states the reason.
    """
    cache = cached.folder_of(cache_dir)
    inputs = {name: corpora.inputs(corpus, cache) for name, corpus in mixed.items()}
    sources = {
        name: Source(corpus, cache, cache / "filtered" / fingerprint(inputs[name])) for name, corpus in mixed.items()
    }

    options.check()
    if not options.is_made:
        tokenizer = tokenizers.load(str(options.path))
    else:
        known: list = [list(inputs.values()) if len(inputs) > 1 else next(iter(inputs.values())), vars(options)]
        known.append(layout.special if options.path is None else tokenizers.everything(tokenizers.load(options.path)))
        folder = cache / "tokenizers" / fingerprint(*known)

        def make(unfinished: Path) -> None:
            texts = in_turn([training_texts(source) for source in sources.values()])
            if options.path is not None and layout.sentences is not None:  # which are tokenized one by one
                texts = itertools.chain.from_iterable(map(sentence_splitter(layout.sentences), texts))
            tokenizers.make(options, texts, layout.special).save_pretrained(unfinished)

        what = "training the tokenizer" if options.path is None else "choosing the tokens of the tokenizer"
        cached.make_once(folder, cache, what, make)
        tokenizer = tokenizers.load(str(folder))

    prepared = {}
    for name, source in sources.items():
        folder = cache / "shards" / fingerprint(inputs[name], tokenizers.fingerprint(tokenizer), vars(layout))
        write = partial(tokenize, source, tokenizer, layout, inputs[name])
        cached.make_once(folder, cache, f"tokenizing the corpus {name}".strip(), write)
        check(folder)
        prepared[name] = Prepared(tokenizer, folder)
    return prepared


def training_texts(source: Source) -> Iterator[str]:
    """The texts of the training split of a corpus."""
    return (piece.text for piece in source.read() if piece.split == "train")


def in_turn(sources: Sequence[Iterator[str]]) -> Iterator[str]:
    """The texts of all sources; the next one is always of the source with the fewest characters so far."""
    read = dict.fromkeys(range(len(sources)), 0)
    while read:
        source = min(read, key=read.__getitem__)
        text = next(sources[source], None)
        if text is None:
            del read[source]
        else:
            read[source] += len(text)
            yield text


def fingerprint(*parts: object) -> str:
    """A fingerprint of JSON-serializable `parts`, used as a name: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:16]


def tokenize(
    source: Source,
    tokenizer: "PreTrainedTokenizerFast",
    layout: Layout,
    inputs: dict,
    folder: Path,
) -> None:
    """Reads the corpus once and writes the files of all splits into `folder`."""
    from tqdm import tqdm

    prefix, suffix = layout.around(tokenizer)
    segment = sentence_splitter(layout.sentences) if layout.sentences is not None else lambda text: [text]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # even if the tokenizer was saved with truncation
    backend.no_padding()
    vocabulary = tokenizers.vocabulary(tokenizer)
    dtype = np.dtype("uint16" if vocabulary <= 1 << 16 else "uint32")
    counts: dict[str, dict[str, Any]] = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    frequencies = {split: np.zeros(vocabulary, np.int64) for split in SPLITS}
    unknown = tokenizers.unknown_id(tokenizer)
    examples = dict.fromkeys(SPLITS, "")  # examples of unknown text
    inside = dict.fromkeys(SPLITS, False)  # whether a document has begun whose last piece has not been read yet
    # Offsets, which show white space, cost time.
    encode = backend.encode_batch if layout.words else backend.encode_batch_fast

    total = source.total_bytes()
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", leave=False, disable=None)
        )
        streams = {
            (split, kind): stack.enter_context(open(folder / f"{split}.{kind}", "wb"))
            for split in SPLITS
            for kind in KINDS
        }
        for pieces, parts, encoded in ahead(batches(source.read()), segment, encode):
            encodings = iter(encoded)
            new: dict[tuple[str, str], list[int]] = {key: [] for key in streams}
            for piece, texts in zip(pieces, parts):
                split = piece.split
                ids, words = new[split, "tokens"], new[split, "words"]
                if not inside[split]:
                    new[split, "documents"].append(counts[split]["tokens"] + len(ids))
                    ids += prefix
                    words += [1] * len(prefix)
                for text, encoding in zip(texts, encodings):
                    if layout.sentences is not None and encoding.ids:
                        new[split, "sentences"].append(counts[split]["tokens"] + len(ids))
                    ids += encoding.ids
                    if not examples[split] and unknown in encoding.ids:
                        examples[split] = tokenizers.unknown_word(tokenizer, [text])
                    if layout.words:
                        words += [int(start == 0 or text[start - 1].isspace()) for start, _ in encoding.offsets]
                if piece.last:
                    ids += suffix
                    words += [1] * len(suffix)
                inside[split] = not piece.last
                size = len(piece.text.encode())
                counts[split]["bytes"] += size
                bar.update(size)
            for (split, kind), values in new.items():
                if kind != "words" or layout.words:
                    streams[split, kind].write(np.array(values, KINDS[kind] or dtype).tobytes())
            for split in SPLITS:
                ids = new[split, "tokens"]
                frequencies[split] += np.bincount(ids, minlength=vocabulary)
                counts[split]["tokens"] += len(ids)
                counts[split]["documents"] += len(new[split, "documents"])

    for split in SPLITS:
        counts[split]["unknown"] = 0 if unknown is None else int(frequencies[split][unknown])
        counts[split]["unknown_example"] = examples[split]
        counts[split]["unigram_perplexity"] = unigram_perplexity(frequencies["train"], frequencies[split])
    np.save(folder / "frequencies.npy", frequencies["train"])
    written = cached.described(folder)
    info = source.report()  # first, as reports may be cut
    info |= {"inputs": inputs, "dtype": dtype.name, "vocabulary": vocabulary, "splits": counts, "files": written}
    (folder / "info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")


def sentence_splitter(language: str) -> Callable[[str], list[str]]:
    """A function that splits a text into sentences; joining them gives the text."""
    try:
        from sentencex import segment
    except ImportError as error:
        raise UserError("next-sentence prediction needs a sentence splitter: pip install sentencex") from error
    return lambda text: list(segment(language, text))


def ahead(
    found: Iterator[list[corpora.Piece]],
    segment: Callable[[str], list[str]],
    encode: Callable[..., list],
) -> Iterator[tuple[list[corpora.Piece], list[list[str]], list]]:
    """Encodes batches of pieces in a thread, while the one before is processed and the next one is read.

    Yields:
        The pieces, the parts of each that `segment` returns, and the encodings of all these parts.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting: Optional[tuple[Any, Any, Future]] = None
        for pieces in found:
            parts = [segment(piece.text) for piece in pieces]
            texts = [part for own in parts for part in own]
            started = pool.submit(encode, texts, add_special_tokens=False)
            if waiting is not None:
                yield waiting[0], waiting[1], waiting[2].result()
            waiting = pieces, parts, started
        if waiting is not None:
            yield waiting[0], waiting[1], waiting[2].result()


def batches(pieces: Iterator[corpora.Piece]) -> Iterator[list[corpora.Piece]]:
    """Groups pieces to batches of about `BATCH_CHARACTERS`."""
    batch: list[corpora.Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def unigram_perplexity(training: np.ndarray, counts: np.ndarray) -> float:
    """Perplexity of tokens under a unigram model, which a network must beat if it has learned to use the context.

    Args:
        training: Frequency of each token id in the training split, (vocabulary,) integers; 1 is added to each.
        counts: Frequency of each token id in the tokens to score, (vocabulary,) integers.
    """
    if counts.sum() == 0:
        return math.nan
    log_probability = np.log((training + 1) / (training.sum() + len(training)))
    return float(np.exp(-(counts * log_probability).sum() / counts.sum()))


def require_full_block(split: Split, name: str, block_size: int, remedy: str) -> None:
    """Refuses a split that does not fill one block.

    Raises:
        UserError: If it does not; states the number of tokens.
    """
    if len(split.tokens) <= block_size:
        raise UserError(
            f"the {name} split has {len(split.documents)} documents with {len(split.tokens)} tokens, but one block "
            f"needs {block_size + 1}: {remedy}"
        )
