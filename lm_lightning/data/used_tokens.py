"""A tokenizer with a smaller vocabulary: the tokens that a text needs."""

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_CHARACTERS = 1 << 22  # text that is tokenized at once
KEPT = ["chat_template", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "model_input_names"]
KEPT += ["extra_special_tokens"]


def keep_used(tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str], min_count: int) -> "PreTrainedTokenizerFast":
    """A tokenizer without the tokens that are rare in the texts.

    With `min_count` 1, both tokenizers divide these texts into the same tokens, and any other text into tokens that
    give the same text. Tokens are numbered again.

    Args:
        tokenizer: The tokenizer, which is not changed.
        texts: Texts, which are read once.
        min_count: How often a token must occur in them. Also kept are special tokens, single characters and bytes, so
            that no text becomes unknown, and the parts from which kept tokens are merged.

    Raises:
        UserError: If the tokenizer has another algorithm than BPE, WordPiece and Unigram.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None
    model = state["model"]
    if model["type"] not in ("BPE", "WordPiece", "Unigram"):
        raise UserError(f"--data.tokenizer.min_count is not possible for a tokenizer of type {model['type']}: omit it")
    backend = Tokenizer.from_str(json.dumps(state))
    backend.encode_special_tokens = tokenizer.split_special_tokens
    counts = count(backend, texts)
    ids = tokenizer.get_vocab()
    unknown = model.get("unk_token")
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    special = {token["content"] for token in state["added_tokens"]} | {unknown}
    prefix, suffix = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    kept = {
        token
        for token, id in ids.items()
        if counts[id] >= min_count or token in special or is_character(token.removeprefix(prefix).removesuffix(suffix))
    }
    if model["type"] == "BPE":
        model["merges"] = merges_of(kept, model["merges"], prefix)
    # The library numbers the tokens of the model first, then the added ones that the model lacks, in their order.
    if model["type"] == "Unigram":
        model["vocab"] = [piece for piece in model["vocab"] if piece[0] in kept]
        order = [piece for piece, _ in model["vocab"]]
        if unknown is not None:
            model["unk_id"] = order.index(unknown)
    else:
        order = sorted((token for token in model["vocab"] if token in kept), key=model["vocab"].__getitem__)
        model["vocab"] = {token: number for number, token in enumerate(order)}
    known = set(order)
    order += [token["content"] for token in state["added_tokens"] if token["content"] not in known]
    new = {token: number for number, token in enumerate(order)}
    for token in state["added_tokens"]:
        token["id"] = new[token["content"]]
    renumber(state["post_processor"], {id: new[token] for token, id in ids.items() if token in new})
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        split_special_tokens=tokenizer.split_special_tokens,
        **settings_of(tokenizer),
        **tokenizer.special_tokens_map,
    )


def count(backend: Any, texts: Iterable[str]) -> np.ndarray:
    """How often each token occurs in some texts, (ids,) int64."""
    from tqdm import tqdm

    counts = np.zeros(max(backend.get_vocab().values()) + 1, np.int64)
    with tqdm(unit="B", unit_scale=True, desc="count tokens", leave=False, disable=not sys.stderr.isatty()) as bar:
        for batch in batches(texts):
            encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
            ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int64)
            counts += np.bincount(ids, minlength=len(counts))
            bar.update(sum(map(len, batch)))
    return counts


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Groups texts to batches of about `BATCH_CHARACTERS`."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def settings_of(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """The settings of a tokenizer that are not in its backend, and which the smaller one gets."""
    return {name: getattr(tokenizer, name) for name in KEPT if getattr(tokenizer, name, None) is not None}


def is_character(token: str) -> bool:
    """Whether a token is a single character, or a byte such as `<0x0A>`."""
    return len(token) <= 1 or (len(token) == 6 and token.startswith("<0x") and token.endswith(">"))


def merges_of(kept: set[str], merges: list[Any], prefix: str) -> list[Any]:
    """The merges of byte-pair encoding whose results are kept; adds the tokens that these merge to `kept`."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for merge in merges:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        pairs.setdefault(first + second.removeprefix(prefix), []).append((first, second))
    open_tokens = list(kept)
    while open_tokens:
        for part in chain.from_iterable(pairs.get(open_tokens.pop(), ())):
            if part not in kept:
                kept.add(part)
                open_tokens.append(part)
    found = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return [merge for merge in found if merge[0] + merge[1].removeprefix(prefix) in kept]


def renumber(part: Any, new: dict[int, int]) -> None:
    """Replaces the ids in a post-processor, which adds special tokens."""
    if isinstance(part, list):
        for item in part:
            renumber(item, new)
    elif isinstance(part, dict):
        for name in ("cls", "sep"):
            if isinstance(part.get(name), list):  # [token, id]
                part[name][1] = new[part[name][1]]
        for special in part.get("special_tokens", {}).values():
            special["ids"] = [new[id] for id in special["ids"]]
        for item in part.get("processors", ()):
            renumber(item, new)
