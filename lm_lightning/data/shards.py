"""Shards: a corpus, tokenized once into memory-mapped integers.

Documents flow in, are cut into tokens and appended to one file a split; the files are keyed by a fingerprint of all
that decides their content, so that the next run finds them and a change of anything makes new ones:

    <cache>/shards/<fingerprint>/info.json              counts, token type, unigram perplexity
                                 <split>.tokens         token ids, uint16 where the vocabulary allows, else uint32
                                 <split>.documents      int64, where each document starts in <split>.tokens
    <cache>/tokenizers/<fingerprint>/tokenizer.json     a tokenizer that was trained on the corpus
"""

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np

from lm_lightning.data import corpus as corpora
from lm_lightning.data import tokenizer as tokenizers
from lm_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "validation", "test")
FORMAT = 1  # part of every fingerprint: raise it when the meaning of the files changes
BATCH_CHARACTERS = 1 << 22  # text tokenized at once: enough for all cores, little enough for flat memory


class Split(NamedTuple):
    """One split of a tokenized corpus.

    Attributes:
        tokens: All token ids, in the corpus's order, memory-mapped, (tokens,) uint16 or uint32.
        documents: Where each document starts in `tokens`, ascending, (documents,) int64.
        bytes: UTF-8 bytes of the text.
        unigram_perplexity: Of this split's tokens, under their frequencies in the training split.
        path: Folder of the shards and name of the split, None for tokens that are in memory.
    """

    tokens: np.ndarray
    documents: np.ndarray
    bytes: int
    unigram_perplexity: float
    path: Optional[tuple[Path, str]] = None

    def __reduce__(self) -> tuple:
        # A process that gets a split of shards maps the files itself, instead of getting all their tokens.
        return (Split, tuple(self)) if self.path is None else (open_split, self.path)


class Prepared(NamedTuple):
    """A tokenizer and the folder of the corpus tokenized with it."""

    tokenizer: "PreTrainedTokenizerFast"
    folder: Path

    @property
    def info(self) -> dict:
        """What is known about the shards: `splits` with their counts, `inputs`, `dtype`."""
        return json.loads((self.folder / "info.json").read_text())

    def split(self, name: str) -> Split:
        """Opens one split: `train`, `validation` or `test`."""
        return open_split(self.folder, name)


def open_split(folder: Path, name: str) -> Split:
    """Opens a split of the shards in a folder."""
    info = json.loads((folder / "info.json").read_text())
    counts = info["splits"][name]

    def mapped(kind: str, dtype: str, length: int) -> np.ndarray:
        # an empty file cannot be mapped
        return np.memmap(folder / f"{name}.{kind}", dtype, "r") if length else np.empty(0, dtype)

    return Split(
        mapped("tokens", info["dtype"], counts["tokens"]),
        mapped("documents", "int64", counts["documents"]),
        counts["bytes"],
        counts["unigram_perplexity"],
        (folder, name),
    )


def prepare(
    corpus: corpora.Corpus, options: tokenizers.Tokenizer, special: tokenizers.SpecialTokens, cache_dir: str
) -> Prepared:
    """Loads or trains the tokenizer and tokenizes the corpus, unless the cache has both.

    Safe when several processes do it at once: the first works, the others wait for it.

    Args:
        corpus: What to read.
        options: Which tokenizer.
        special: Which special tokens a trained tokenizer gets.
        cache_dir: Folder of the cache; `~` is expanded.

    Raises:
        UserError: A corpus or tokenizer that cannot be used, with the reason.
    """
    from filelock import FileLock

    cache = Path(cache_dir).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    inputs = corpora.inputs(corpus, cache)

    if options.path is not None:
        tokenizer = tokenizers.load(options.path)
    else:
        folder = cache / "tokenizers" / fingerprint(inputs, vars(options), special)
        with FileLock(f"{lock_folder(cache)}/{folder.name}.lock"):
            if not folder.exists():
                texts = (piece.text for piece in corpora.read(corpus, cache) if piece.split == "train")
                trained = tokenizers.train(options, texts, special)
                with written_whole(folder) as partial:
                    trained.save_pretrained(partial)
        tokenizer = tokenizers.load(str(folder))

    folder = cache / "shards" / fingerprint(inputs, tokenizers.fingerprint(tokenizer))
    with FileLock(f"{lock_folder(cache)}/{folder.name}.lock"):
        if not folder.exists():
            with written_whole(folder) as partial:
                tokenize(corpus, tokenizer, inputs, cache, partial)
    return Prepared(tokenizer, folder)


def fingerprint(*parts: object) -> str:
    """A name for whatever is made from JSON-able `parts`: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:16]


def lock_folder(cache: Path) -> Path:
    """Where the locks of a cache lie."""
    (cache / "locks").mkdir(exist_ok=True)
    return cache / "locks"


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into and names it `folder` at the end, or removes it on an error."""
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():  # of a run that was killed: whoever writes holds the folder's lock
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.rename(folder)


def tokenize(
    corpus: corpora.Corpus, tokenizer: "PreTrainedTokenizerFast", inputs: dict, cache: Path, folder: Path
) -> None:
    """Reads the corpus once and writes the files of all splits into `folder`."""
    from tqdm import tqdm

    prefix, suffix = tokenizers.document_ids(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # whatever the tokenizer was saved with: a document is taken whole
    backend.no_padding()
    vocabulary = tokenizers.vocabulary(tokenizer)
    dtype = np.dtype("uint16" if vocabulary <= 1 << 16 else "uint32")
    counts: dict[str, dict[str, Any]] = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    frequencies = {split: np.zeros(vocabulary, np.int64) for split in SPLITS}
    inside: dict[str, bool] = dict.fromkeys(SPLITS, False)  # has a document begun whose last piece is still to come?

    total = corpora.total_bytes(corpus, cache)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", leave=False, disable=None)
        )
        files = {
            (split, kind): stack.enter_context(open(folder / f"{split}.{kind}", "wb"))
            for split in SPLITS
            for kind in ("tokens", "documents")
        }
        for pieces in batches(corpora.read(corpus, cache)):
            encodings = backend.encode_batch_fast([piece.text for piece in pieces], add_special_tokens=False)
            ids: dict[str, list[int]] = {split: [] for split in SPLITS}
            starts: dict[str, list[int]] = {split: [] for split in SPLITS}
            for piece, encoding in zip(pieces, encodings):
                split = piece.split
                if not inside[split]:
                    starts[split].append(counts[split]["tokens"] + len(ids[split]))
                    ids[split] += prefix
                ids[split] += encoding.ids
                if piece.last:
                    ids[split] += suffix
                inside[split] = not piece.last
                size = len(piece.text.encode())
                counts[split]["bytes"] += size
                bar.update(size)
            for split in SPLITS:
                array = np.array(ids[split], dtype)
                files[split, "tokens"].write(array.tobytes())
                files[split, "documents"].write(np.array(starts[split], np.int64).tobytes())
                frequencies[split] += np.bincount(array, minlength=vocabulary)
                counts[split]["tokens"] += len(array)
                counts[split]["documents"] += len(starts[split])

    for split in SPLITS:
        counts[split]["unigram_perplexity"] = unigram_perplexity(frequencies["train"], frequencies[split])
    info = {"inputs": inputs, "dtype": dtype.name, "vocabulary": vocabulary, "splits": counts}
    (folder / "info.json").write_text(json.dumps(info, indent=2))


def batches(pieces: Iterator[corpora.Piece]) -> Iterator[list[corpora.Piece]]:
    """Groups pieces until they have about `BATCH_CHARACTERS`."""
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
    """Perplexity of tokens under a unigram model: what a network must beat to have learned any context.

    Args:
        training: Frequency of each token id in the training split, (vocabulary,) integers; one is added to each.
        counts: Frequency of each token id in the tokens to score, (vocabulary,) integers.
    """
    if counts.sum() == 0:
        return math.nan
    log_probability = np.log((training + 1) / (training.sum() + len(training)))
    return float(np.exp(-(counts * log_probability).sum() / counts.sum()))


def need(split: Split, name: str, block_size: int, remedy: str) -> None:
    """Refuses a split that does not fill one block.

    Raises:
        UserError: With the number of tokens there are.
    """
    if len(split.tokens) <= block_size:
        raise UserError(
            f"the {name} split has {len(split.documents)} documents with {len(split.tokens)} tokens, but one block "
            f"takes {block_size + 1}: {remedy}"
        )
