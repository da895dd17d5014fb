"""Networks of `transformers`: what we need of them beside their forward pass."""

import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from lm_lightning import hub
from lm_lightning.console import printable
from lm_lightning.data.tokenizer import fingerprint, load
from lm_lightning.data.tokenizer import save as save_tokenizer
from lm_lightning.errors import UserError
from lm_lightning.security import untrusted
from lm_lightning.tasks.embedding import modules as embedding

HEAD_FILE = "head.safetensors"  # in an exported folder: weights of a head that `transformers` has not
# Names that `transformers` has for tables with a row for each absolute position.
POSITION_TABLES = ("position_embeddings", "embed_positions", "positions_embed", "position_embedding", "wpe")


@contextmanager
def headless(network: transformers.PreTrainedModel) -> Iterator[None]:
    """A network whose head gives out, in the place of logits, what goes into it."""
    head = network.get_output_embeddings()
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward


def positions(network: Any) -> Optional[int]:
    """Tokens of the longest text that a network has positions for; None if there is no limit.

    The config may name more of them than can be used: RoBERTa's positions begin after the row of the padding token
    (Longformer's, MPNet's, ESM's, ... as well), and those of BART and OPT after an offset.

    Args:
        network: Of `transformers`.
    """
    named = getattr(network.config, "max_position_embeddings", None)
    limits = [] if named is None else [named]
    for name, module in network.named_modules():
        table = getattr(module, "weight", None)
        if name.rpartition(".")[2] in POSITION_TABLES and isinstance(table, Tensor) and table.ndim == 2:
            padding = getattr(module, "padding_idx", None)
            limits.append(table.shape[0] - (getattr(module, "offset", 0) if padding is None else padding + 1))
    return min(limits, default=None)


def blocks(network: transformers.PreTrainedModel) -> list[nn.Module]:
    """The layers that a network repeats, which `transformers` marks by their class.

    Raises:
        UserError: If it has none.
    """
    found = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise UserError(
            f"networks of type {network.config.model_type} have no layers that transformers marks as repeated: leave "
            "model.activation_checkpointing out, and take --trainer.strategy ddp"
        )
    return found


def linear_layers(network: Any, patterns: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """The linear layers of a network's blocks, GPT-2's `Conv1D` among them, by their names.

    Args:
        network: Of `transformers`.
        patterns: Only those whose names match one, such as `*mlp*`; none for all.

    Raises:
        UserError: If there are none.
    """
    inside = {id(module) for block in blocks(network) for module in block.modules()}
    found = {
        name: module
        for name, module in network.named_modules()
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D))
    }
    chosen = {
        name: m for name, m in found.items() if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)
    }
    if not chosen:
        raise UserError(f"{', '.join(patterns)} is the name of no linear layer, such as {', '.join(list(found)[:3])}")
    return chosen


def by_rows(module: nn.Linear, weight: Tensor) -> Tensor:
    """A view of a weight, or what has its shape, as (outputs, inputs)."""
    return weight.T if isinstance(module, Conv1D) else weight


def smallest(scores: Tensor, share: float) -> Tensor:
    """Which elements of the last dimension are the share with the smallest scores, exactly as many: bool."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    number = round(share * scores.shape[-1])
    return chosen.scatter_(-1, scores.topk(number, dim=-1, largest=False, sorted=False).indices, True)


def zeros_of(layers: dict[str, nn.Linear]) -> tuple[int, int]:
    """How many weights of some layers are zero, and how many there are."""
    weights = [layer.weight for layer in layers.values()]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The global norm of the gradients, () float32, on all processes, however each of them is sharded."""
    kinds: dict[Any, list[Tensor]] = {}
    for gradient in (p.grad for p in parameters if p.grad is not None):
        mesh: Any = None
        placements: tuple = ()
        if isinstance(gradient, DTensor):
            if any(isinstance(placement, Partial) for placement in gradient.placements):  # still to be summed
                gradient = gradient.redistribute(placements=[Replicate()] * gradient.device_mesh.ndim)
            mesh, placements, gradient = gradient.device_mesh, gradient.placements, gradient.to_local()
        kinds.setdefault((mesh, placements), []).append(gradient)
    squares = []
    for (mesh, placements), gradients in kinds.items():
        square = local_norm(gradients).square()
        if mesh is not None:
            parts = [Replicate() if isinstance(placement, Replicate) else Partial() for placement in placements]
            square = DTensor.from_local(square, mesh, parts).full_tensor()
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def local_norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all elements of some tensors, () float32."""
    if tensors[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(tensors)
    # PyTorch adds up the squares of a whole tensor one after the other on a CPU: of five million, the norm is off by
    # 1e-4. Row by row, it is not.
    norms = [torch.linalg.vector_norm(torch.linalg.vector_norm(tensor, dim=-1)) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


def generation_config(settings: dict[str, Any]) -> tuple[transformers.GenerationConfig, list[str]]:
    """The generation config of some settings, without those that `transformers` refuses to save.

    Published models have contradictory ones, such as a temperature although nothing is sampled, which have no effect.

    Returns:
        The config; what it lacks of the settings, such as `temperature 0.7`.
    """
    kept, removed = dict(settings), list[str]()
    while True:
        try:
            config = transformers.GenerationConfig.from_dict(kept)
            config.validate(strict=True)
            return config, removed
        except ValueError as error:
            named = re.findall(r"^- `(\w+)`", str(error), re.MULTILINE) or re.findall(r"`(\w+)`", str(error))[:1]
            refused = [name for name in named if kept.get(name) is not None]
            if not refused and not (refused := [name for name in kept if not name.endswith("_token_id")]):
                raise
            removed += [f"{name} {kept.pop(name)}" for name in refused]


def check_export(description: dict[str, Any], tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes all but the weights of an export, so that whatever is wrong with it is found before training.

    Args:
        description: Of the network; see `LanguageModule.description`.
        tokenizer: That is exported with it.
        folder: To write into, which is there.

    Raises:
        UserError: If the network or its tokenizer could not be exported, or not be read again.
    """
    name = str(description["class"])
    network_class = getattr(transformers, name, None)
    if network_class is None:
        raise UserError(
            f"the network's class {name} is not one of transformers, which therefore could not load model/: use a "
            "network of transformers, or switch the export off with --trainer.enable_checkpointing false"
        )
    save_network(description, None, folder)
    save_tokenizer(tokenizer, folder)
    hub.config(str(folder))
    if fingerprint(load(str(folder))) != fingerprint(tokenizer):
        raise UserError(
            "the tokenizer, saved beside this network, would be read as another one: give the network's own tokenizer "
            "(data.tokenizer.path)"
        )


def save_network(
    description: dict[str, Any], weights: Optional[dict[str, Any]], folder: Path, max_shard_size: Optional[str] = None
) -> None:
    """Writes weights as a `from_pretrained` folder.

    Args:
        description: Of the network to write; see `LanguageModule.description`.
        weights: State dict of the network, whose vocabulary may have more rows: these are padding and are left out.
            What its class does not have is a head of ours and goes into a file of its own. None: all but the weights is
            written.
        folder: Is made if it does not exist.
        max_shard_size: Largest file of weights, such as `5GB`; larger ones are written in parts. Default: that of
            `transformers`.

    Raises:
        UserError: If `max_shard_size` is no size.
    """
    network_class = untrusted.network_class(description["class"])
    with torch.device("meta"):  # the tensors come from `weights`
        network = network_class(network_class.config_class.from_dict(description["config"]))
    if description["generation"] is not None:
        network.generation_config, removed = generation_config(description["generation"])
        if removed:
            names = printable(", ".join(removed))
            print(f"generation_config.json is written without {names}: not valid with its other settings")
    head: dict[str, Any] = {}
    if weights is not None:
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        head = {key.partition(".")[2]: weights.pop(key) for key in list(weights) if key not in shapes}
        weights = {key: w if w.shape == shapes[key] else w[: shapes[key][0]].clone() for key, w in weights.items()}
        network.load_state_dict(weights, assign=True)
        network.tie_weights()
    files = embedding.files(**description["embedding"]) if "embedding" in description else {}
    try:
        options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        network.save_pretrained(folder, **options | ({"state_dict": {}} if weights is None else {}))
    except ValueError as error:
        raise UserError(f"the model cannot be written: {error}") from error
    if head:
        safetensors.torch.save_file(head, folder / HEAD_FILE)
    for name, content in files.items():  # whose names never come from the checkpoint
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
