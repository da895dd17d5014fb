"""`search`: finds the texts nearest to a query in an index that `predict` has written."""

import contextlib
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from lm_lightning import files, hub
from lm_lightning import run as runs
from lm_lightning.compat.transformers import hide_load_report
from lm_lightning.console import printable
from lm_lightning.errors import UserError, one_line

if TYPE_CHECKING:
    import numpy as np

LONGEST_ROW = 1 << 27  # maximum number of bytes of a line of rows.jsonl, as in other files
LONGEST_ABOUT = 1 << 20  # maximum number of bytes of index.json
LONGEST_PROMPT = 10_000  # maximum number of characters
AGAIN = "run `predict` again"


class About(NamedTuple):
    """The content of index.json.

    Attributes:
        model: The model of the embeddings: a folder relative to the folder of the index, another folder or a Hub name.
        pooling: `mean` or `cls`.
        max_length: Maximum number of tokens of a text; longer texts were truncated.
        prompt: Text before a query.
    """

    model: str
    pooling: Any
    max_length: int
    prompt: str = ""


def search(
    index: str,
    query: str,
    top: int = 10,
    approximate: bool = False,
    model: Optional[str] = None,
    cache_dir: str = "~/.cache/lm_lightning",
) -> None:
    """Prints the texts of an index that are nearest to a query, nearest first: cosine similarity, id and text.

    Args:
        index: Run folder of a SentenceEncoder (its newest index is searched), a folder in its `evaluations/`, or an
            `index/` folder.
        query: Text to search for.
        top: Number of texts to print.
        approximate: Search a graph of neighbors (HNSW), which is built at the first search, instead of all rows. This
            is faster for millions of texts, but may miss some. Needs `pip install -e ".[search]"`.
        model: Run folder, `from_pretrained` folder or Hub name of the model that computed the embeddings. Default: the
            one in the index or in its run folder. An index that names any other model needs this option.
        cache_dir: Folder for the graph. A graph is never loaded from the index itself.
    """
    if top < 1:
        raise UserError(f"top is {top}, but must be 1 or more")
    if not query.strip():
        raise UserError("the query is empty: give the text to search for")
    folder = index_folder(index)
    about = read_about(folder)
    source = model_of(folder, about, model)
    embeddings = read_embeddings(folder)
    import numpy as np  # (here, so that a wrong path is reported without waiting for the import)

    neighbours = graph(folder, embeddings, Path(cache_dir).expanduser()) if approximate else None
    vector = embedded(query, source, about)
    if vector.shape != embeddings.shape[1:]:
        raise UserError(
            f"embeddings of {source} have size {vector.size}, but those of the index {folder} have size "
            f"{embeddings.shape[1]}: {AGAIN}"
        )
    if neighbours is not None:
        best = neighbours.search(vector, top).keys.tolist()
    else:
        with np.errstate(all="ignore"):
            cosines = embeddings @ vector
        refuse_infinite(cosines, folder)
        best = np.argsort(-cosines, kind="stable")[:top].tolist()
    rows = read_rows(folder, set(best), len(embeddings))
    for row in best:
        identifier, text = (" ".join(str(rows[row][key]).split()) for key in ("id", "text"))
        print(printable(f"{embeddings[row] @ vector:.3f}\t{identifier}\t{text}"))


def index_folder(index: str) -> Path:
    """The folder of an index.

    Raises:
        UserError: If there is no index.
    """
    given = Path(index).expanduser()
    for folder in (given, given / "index", *sorted(given.glob("evaluations/*/index"), reverse=True)):
        if (folder / "index.json").is_file():
            return folder
    raise UserError(
        f"{index} has no index: if it is the run of a SentenceEncoder, create one with "
        f"`python -m lm_lightning predict {index}`"
    )


def read_about(folder: Path) -> About:
    """Reads the index.json of an index.

    Raises:
        UserError: If it is damaged.
    """
    file = folder / "index.json"
    try:
        with open(file, "rb") as stream:
            found = json.loads(stream.read(LONGEST_ABOUT).decode("utf-8"))
        about = About(found["model"], found["pooling"], found["max_length"], found.get("prompt") or "")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}): {AGAIN}") from error
    length = about.max_length
    for name, value, valid, needs in (
        ("model", about.model, isinstance(about.model, str) and about.model.isprintable() and about.model, "a name"),
        ("pooling", about.pooling, about.pooling in ("mean", "cls"), "mean or cls"),
        ("prompt", about.prompt, isinstance(about.prompt, str) and len(about.prompt) <= LONGEST_PROMPT, "a text"),
        ("max_length", length, type(length) is int and length > 0, "a number of tokens"),
    ):
        if not valid:
            raise UserError(f"{name} of {file} is {shown(value)}, but must be {needs}: {AGAIN}")
    return about


def shown(value: Any) -> str:
    """A value in a file for a message: shortened, and without control characters."""
    return printable(ascii(value)[:100])


def model_of(folder: Path, about: About, given: Optional[str]) -> str:
    """The folder or name from which the model for the query is loaded.

    Args:
        folder: Folder of the index.
        about: The content of its index.json.
        given: The model that the user has given, if any.

    Raises:
        UserError: If the index names a model outside of its folder and its run, and the user has not given a model.
    """
    if given is not None:
        return runs.pretrained_name(given)
    own = folder.resolve()
    evaluation = own.parent  # <run>/evaluations/<time>-predict/index
    run = evaluation.parents[1] if evaluation.parent.name == "evaluations" else evaluation
    root = run if runs.is_run(run) else own
    try:
        found = (own / about.model).resolve()
        inside = found.is_dir() and found != root and found.is_relative_to(root)
    except (OSError, ValueError, RuntimeError):  # raised for invalid paths
        inside = False
    if not inside:
        raise UserError(
            f"the index {folder} names the model {printable(about.model)[:300]}, which is neither in its folder nor in "
            "its run: if you trust this model, give it with --model"
        )
    return str(found)


def read_embeddings(folder: Path) -> "np.ndarray":
    """The embeddings of an index, (rows, D) float32, which stay on disk until they are used.

    Raises:
        UserError: If they are damaged or missing.
    """
    import numpy as np

    file = folder / "embeddings.npy"
    if not file.is_file():
        raise UserError(f"the index {folder} has no file embeddings.npy: {AGAIN}")
    try:
        found = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # numpy raises any type of error for damaged files
        reason = one_line(error, 200)
        raise UserError(f"{file} is damaged ({printable(reason)}): {AGAIN}") from error
    if found.dtype != np.float32 or found.ndim != 2 or 0 in found.shape:
        raise UserError(
            f"{file} has dtype {shown(str(found.dtype))} and shape {shown(found.shape)}, but must have dtype float32 "
            f"and a row for each text: {AGAIN}"
        )
    return found


def refuse_infinite(values: "np.ndarray", folder: Path) -> None:
    """Refuses an index whose embeddings are not finite."""
    import numpy as np

    if not np.isfinite(values).all():
        raise UserError(f"{folder / 'embeddings.npy'} has numbers that are not finite, so it is damaged: {AGAIN}")


def read_rows(folder: Path, wanted: set[int], number: int) -> dict[int, dict[str, Any]]:
    """Reads some rows of an index; the others are skipped, and not kept in memory.

    Args:
        folder: Folder of the index.
        wanted: Numbers of the rows to read.
        number: Number of rows that the index must have.

    Raises:
        UserError: If the number of rows is wrong, or a row is damaged; names the line.
    """
    file = folder / "rows.jsonl"
    if not file.is_file():
        raise UserError(f"the index {folder} has no file rows.jsonl: {AGAIN}")
    rows, count = {}, 0
    with open(file, "rb") as stream:
        while line := stream.readline(LONGEST_ROW):
            if len(line) == LONGEST_ROW:
                raise UserError(f"{file}:{count + 1}: the line has more than {LONGEST_ROW:,} bytes: {AGAIN}")
            if count in wanted:
                try:
                    row = json.loads(line)
                    right = isinstance(row["text"], str) and isinstance(row["id"], (str, int))
                except (ValueError, TypeError, KeyError, RecursionError):
                    right = False
                if not right:
                    raise UserError(f"{file}:{count + 1}: this row has no id and text, so it is damaged: {AGAIN}")
                rows[count] = row
            count += 1
    if count != number:
        raise UserError(f"{folder} has {number:,} embeddings but {count:,} texts: {AGAIN}")
    return rows


def embedded(query: str, model: str, about: About) -> "np.ndarray":
    """The embedding of a query by a model, (D,) float32."""
    from transformers import AutoModel

    from lm_lightning.data import tokenizer as tokenizers
    from lm_lightning.networks import positions
    from lm_lightning.tasks.embedding.modules import embed

    hide_load_report()
    network = hub.load(AutoModel, model, unused=("pooler.",)).eval()
    tokenizer = tokenizers.load(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # as GPT's published ones
    least, most = tokenizer.num_special_tokens_to_add() + 1, positions(network) or 1 << 20
    if not least <= about.max_length <= most:
        raise UserError(
            f"the index has a max_length of {about.max_length:,}, but {model} allows {least} to {most:,}: {AGAIN}"
        )
    try:
        return embed(network, tokenizer, [about.prompt + query], about.pooling, about.max_length)[0].numpy()
    except Exception as error:  # raised if a config does not match its weights or tokenizer
        reason = one_line(error, 200)
        raise UserError(f"{model} cannot embed a text ({printable(reason)}): {AGAIN}") from error


def graph(folder: Path, embeddings: "np.ndarray", cache: Path) -> Any:
    """The graph of neighbors of an index, from the user's cache, where it is created if necessary.

    A graph inside of an index is never loaded, as usearch does not protect its reader against malicious files.
    """
    try:
        from usearch.index import Index
    except ImportError as error:
        raise UserError('--approximate needs usearch: pip install -e ".[search]", or omit the option') from error

    import numpy as np

    file = (folder / "embeddings.npy").resolve()
    status = file.stat()
    path, content = (
        hashlib.sha256(repr(key).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        for key in (str(file), (status.st_size, status.st_mtime_ns, embeddings.shape))
    )
    place = cache / "graphs" / f"{path}-{content}.usearch"
    if place.is_file():
        with contextlib.suppress(Exception):  # if it is damaged, it is created again
            if (kept := Index.restore(str(place), view=True)) is not None and len(kept) == len(embeddings):
                return kept
    for start in range(0, len(embeddings), 1 << 16):
        refuse_infinite(embeddings[start : start + (1 << 16)], folder)
    made = Index(ndim=embeddings.shape[1], metric="cos", dtype="f32")
    made.add(np.arange(len(embeddings)), embeddings)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for old in place.parent.glob(f"{path}-*.usearch"):
            old.unlink(missing_ok=True)
        partial = files.temporary(place)
        made.save(str(partial))
        files.put(partial, place)
    except (OSError, RuntimeError) as error:
        print(f"the graph cannot be saved in {cache}, so each search creates it again: {error}", file=sys.stderr)
    return made


def main() -> None:
    """Reads the command line."""
    from lm_lightning.cli import command

    command.run(search)
