"""Embeds texts as vectors of length 1, in the same way for training, for an index and for a query.

An embedding pools the last hidden states of a network over the tokens of a text, by the settings in the files that
sentence-transformers adds to a model folder.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_lightning.errors import UserError
from lm_lightning.security.untrusted import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Pooling = Literal["mean", "cls"]


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Pools hidden states to embeddings of length 1.

    Args:
        states: Last hidden states, (B, T, D).
        mask: 1 for tokens, 0 for padding, which follows them, (B, T).
        pooling: `mean` of the tokens, or the first token, `cls`.

    Returns:
        (B, D) float32.
    """
    states = states.float()
    if pooling == "cls":
        return F.normalize(states[:, 0], dim=-1)
    weights = mask.unsqueeze(-1).float()
    return F.normalize((states * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)


def pooling_of(folder: str) -> Optional[Pooling]:
    """The pooling of a model; None if its folder has no such setting.

    Raises:
        UserError: If the pooling is not supported.
    """
    file = Path(folder) / "1_Pooling" / "config.json"
    if not file.is_file():
        return None
    settings = json.loads(file.read_text(encoding="utf-8"))
    modes = [
        name.removeprefix("pooling_mode_") for name, on in settings.items() if name.startswith("pooling_mode_") and on
    ]
    kinds: dict[Any, Pooling] = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}
    modes = modes or [settings.get("pooling_mode")]
    if len(modes) != 1 or modes[0] not in kinds:
        raise UserError(
            f"{file} has the pooling {', '.join(map(str, modes))}, which is not supported: give --model.pooling mean "
            "or cls"
        )
    return kinds[modes[0]]


def prompts_of(folder: str) -> dict[str, str]:
    """The prompts of a model by name, `query` and `document`; empty if its folder has none.

    Raises:
        UserError: If the prompts are not texts.
    """
    file = Path(folder) / "config_sentence_transformers.json"
    if not file.is_file():
        return {}
    settings = read_json(file)
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise UserError(f"{file} is damaged, as its prompts are not texts: fix it, or give --data.prompts")
    for name in ("passage", "corpus"):  # other names for documents
        if name in prompts:
            prompts.setdefault("document", prompts[name])
    return {name: prompts[name] for name in ("query", "document") if name in prompts}


@torch.no_grad()
def embed(
    network: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    texts: list[str],
    pooling: Pooling,
    max_length: int,
) -> Tensor:
    """Embeddings of texts, in one batch: (texts, D) float32, each of length 1."""
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=max_length,
        padding=True,
        padding_side="right",
        return_token_type_ids=False,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(network.device)
    return pool(network(**encoded)[0], encoded["attention_mask"], pooling)
