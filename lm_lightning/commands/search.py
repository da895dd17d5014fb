"""`search`: an index that `predict` has written and a query in, the nearest texts out."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_lightning import hub
from lm_lightning.console import printable
from lm_lightning.errors import UserError

if TYPE_CHECKING:
    import numpy as np


def search(index: str, query: str, top: int = 10, approximate: bool = False) -> None:
    """Prints the texts of an index that are nearest to a query: cosine, id and text, the nearest first.

    Args:
        index: Run folder of a SentenceEncoder, of which the newest index is searched, or the folder of one of its
            `evaluations/`, or the `index/` in that.
        query: What to look for.
        top: How many texts to print.
        approximate: Look through a graph of neighbours (HNSW), made at the first time, instead of through all rows:
            quicker in an index of millions, and may miss some. Needs `pip install -e ".[search]"`.
    """
    if top < 1:
        raise UserError(f"top is {top}, but must be 1 or more")
    if not query.strip():
        raise UserError("the query is empty: say what to look for")
    folder, about = opened(index)
    import numpy as np  # (here, so that a wrong path needs no wait for the imports)

    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r")
    rows = (folder / "rows.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if len(rows) != len(embeddings):
        raise UserError(f"{folder} has {len(embeddings)} embeddings of {len(rows)} texts: run `predict` again")
    neighbours = graph(folder, embeddings) if approximate else None
    vector = embedded(query, str(folder / about["model"]) if about["model"] == "model" else about["model"], about)
    if vector.shape != embeddings.shape[1:]:
        raise UserError(
            f"{about['model']} gives embeddings of {vector.size} numbers, the index {folder} has "
            f"{embeddings.shape[1]}: run `predict` again"
        )
    if neighbours is not None:
        best = neighbours.search(vector, top).keys
    else:
        cosines = embeddings @ vector
        best = np.argsort(-cosines, kind="stable")[:top]
    for row in best.tolist():
        found = json.loads(rows[row])
        print(printable(f"{embeddings[row] @ vector:.3f}\t{found['id']}\t{' '.join(found['text'].split())}"))


def opened(index: str) -> tuple[Path, dict[str, Any]]:
    """The folder of an index and what it tells of its model."""
    given = Path(index).expanduser()
    for folder in (given, given / "index", *sorted(given.glob("evaluations/*/index"), reverse=True)):
        if (folder / "index.json").is_file():
            return folder, json.loads((folder / "index.json").read_text(encoding="utf-8"))
    raise UserError(
        f"{index} has no index: make one with `python -m lm_lightning predict {index}`, if it is the run of a "
        "SentenceEncoder"
    )


def embedded(query: str, model: str, about: dict[str, Any]) -> "np.ndarray":
    """The embedding of a query by a model, (D,) float32."""
    from transformers import AutoModel

    from lm_lightning.data import tokenizer as tokenizers
    from lm_lightning.embedding import embed

    hub.quiet()
    network = hub.load(AutoModel, model, unused=("pooler.",)).eval()
    tokenizer = tokenizers.load(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # as GPT's published ones
    return embed(network, tokenizer, [query], about["pooling"], about["max_length"])[0].numpy()


def graph(folder: Path, embeddings: "np.ndarray") -> Any:
    """The graph of neighbours of an index, from `graph.usearch`, which is made if it is older than the embeddings."""
    try:
        from usearch.index import Index
    except ImportError as error:
        raise UserError('--approximate needs usearch: pip install -e ".[search]", or leave it out') from error

    import numpy as np

    file = folder / "graph.usearch"
    if file.is_file() and file.stat().st_mtime >= (folder / "embeddings.npy").stat().st_mtime:
        return Index.restore(str(file), view=True)
    made = Index(ndim=embeddings.shape[1], metric="cos", dtype="f32")
    made.add(np.arange(len(embeddings)), embeddings)
    partial = file.with_suffix(".partial")
    made.save(str(partial))
    partial.replace(file)
    return made


def main() -> None:
    """Reads the command line."""
    from jsonargparse import auto_cli

    from lm_lightning.explain import program
    from lm_lightning.settings import Parser

    auto_cli(search, args=sys.argv[2:], prog=program("search"), parser_class=Parser)
