"""Tensor parallelism: how each type of network is split over processes that compute it together.

The first matrix of a pair is split by columns (outputs), the second by rows (inputs), so that a block needs only one
sum over the processes for its attention and one for its feed-forward part (Shoeybi et al., 2019, arXiv:1909.08053). The
embedding and the head are also split, by tokens.

The configs of many networks in `transformers` contain a plan (`base_model_tp_plan`); `PLANS` has plans for others.
Types of networks without a plan are refused: with a wrong plan, a network would train, but with wrong results.
"""

import fnmatch
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel, SequenceParallel, parallelize_module
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lm_lightning.errors import UserError

# For encoders like BERT: patterns of the names of modules, and how the modules are split; see `STYLES`.
ENCODER = {
    "*.attention.self.query": "colwise",
    "*.attention.self.key": "colwise",
    "*.attention.self.value": "colwise",
    "*.attention.output.dense": "rowwise",
    "*.intermediate.dense": "colwise",
    "*layer.*.output.dense": "rowwise",
}
# Encoder-decoders like BART; their vocabulary is not split, as both parts have an embedding of it.
ENCODER_DECODER = {
    "*.layers.*.q_proj": "colwise",
    "*.layers.*.k_proj": "colwise",
    "*.layers.*.v_proj": "colwise",
    "*.layers.*.out_proj": "rowwise",
    "*.layers.*.fc1": "colwise",
    "*.layers.*.fc2": "rowwise",
}
# If query, key and value (or gate and input) are a single matrix, its output is gathered, and each process computes all
# heads (or all units).
PLANS: dict[str, dict[str, str]] = {
    "gpt2": {
        "h.*.attn.c_attn": "colwise_gather_output",
        "h.*.attn.c_proj": "rowwise_split_input",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
    "modernbert": {
        "layers.*.attn.Wqkv": "colwise_gather_output",
        "layers.*.attn.Wo": "rowwise_split_input",
        "layers.*.mlp.Wi": "colwise_gather_output",
        "layers.*.mlp.Wo": "rowwise_split_input",
    },
    "distilbert": {
        "*.attention.q_lin": "colwise",
        "*.attention.k_lin": "colwise",
        "*.attention.v_lin": "colwise",
        "*.attention.out_lin": "rowwise",
        "*.ffn.lin1": "colwise",
        "*.ffn.lin2": "rowwise",
    },
    **dict.fromkeys(("bart", "mbart", "marian", "m2m_100"), ENCODER_DECODER),
    **dict.fromkeys(("bert", "roberta", "electra", "xlm-roberta", "camembert"), ENCODER),
}


class Projection(ParallelStyle):
    """Splits the matrix of a linear layer, or of GPT-2's `Conv1D`, whose matrix is transposed.

    Args:
        by: The dimension of the matrix that is split: `columns`, its outputs, or `rows`, its inputs.
        inputs: Placement of the inputs: `Replicate()` if each process has all of them, or `Shard(-1)`.
        outputs: Placement of the outputs, in the same form.
    """

    def __init__(self, by: str, inputs: Placement, outputs: Placement) -> None:
        super().__init__()
        self.by, self.inputs, self.outputs = by, inputs, outputs

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:  # PyTorch's name of the hook
        columns = self.by == "columns"
        dimension = int(columns == isinstance(module, Conv1D))

        def split(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
            placements: dict[str, Placement] = {
                "weight": Shard(dimension),
                "bias": Shard(0) if columns else Replicate(),
            }
            for key, _ in list(module.named_parameters(recurse=False)):
                distribute(module, key, mesh, placements[key])

        def prepare_inputs(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            local = DTensor.from_local(inputs[0], mesh, [self.inputs], run_check=False)
            return local.redistribute(placements=[Replicate() if columns else Shard(-1)])

        def prepare_outputs(module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Any:
            return output.redistribute(placements=[self.outputs]).to_local()

        return distribute_module(module, device_mesh, split, prepare_inputs, prepare_outputs)


STYLES: dict[str, ParallelStyle] = {
    "colwise": Projection("columns", Replicate(), Shard(-1)),
    "rowwise": Projection("rows", Shard(-1), Replicate()),
    "colwise_gather_output": Projection("columns", Replicate(), Replicate()),
    "rowwise_split_input": Projection("rows", Replicate(), Replicate()),
    # A norm of each head: its small weights are replicated, and their gradients are summed over the processes
    "replicated_with_grad_allreduce": SequenceParallel(sequence_dim=2, use_local_output=True),
}


def split(network: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Splits a network in place over the processes of a mesh; its config must have been accepted by `check`."""
    plan = {
        name: style
        for name, _ in network.base_model.named_modules()
        for pattern, style in patterns(network.config).items()
        if fnmatch.fnmatchcase(name, pattern)
    }
    ties = tied(network)
    parallelize_module(network.base_model, mesh, {name: STYLES[style] for name, style in plan.items()})
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    whole = network.config.is_encoder_decoder
    if head is not None and not whole and len(head.weight) % mesh.size() == 0:
        parallelize_module(head, mesh, STYLES["colwise_gather_output"])
        parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate()))
    for places in ties:  # after the split, each place has its own tensor
        parameters = [getattr(module, name) for module, name in places]
        one = next((p for p in parameters if isinstance(p, DTensor)), parameters[0])
        for module, name in places:
            setattr(module, name, one)


def patterns(config: PreTrainedConfig) -> dict[str, str]:
    """How the modules of a network without its head are split: patterns of their names, and names in `STYLES`."""
    known = PLANS.get(config.model_type) or getattr(config, "base_model_tp_plan", None) or {}
    return {pattern: style for pattern, style in known.items() if not pattern.startswith("embed")}


def check(config: PreTrainedConfig, size: int) -> None:
    """Refuses networks that cannot be split over `size` processes.

    Raises:
        UserError: If there is no plan for their type, or a dimension is not divisible.
    """
    plan = patterns(config)
    strange = set(plan.values()) - STYLES.keys()
    if strange or not plan:
        raise UserError(
            f"tensor parallelism does not support networks of type {config.model_type}"
            + (f" ({', '.join(sorted(strange))})" if strange else "")
            + f": use --trainer.strategy fsdp2, or one of {', '.join(PLANS)}, llama, mistral, qwen2, qwen3 and gemma2"
        )
    names = ["num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"]
    names += ["decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim"]
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value % size:
            raise UserError(
                f"tensor parallelism over {size} processes needs a network whose {name} is divisible by {size}, but it "
                f"is {value}: use another number of processes (--trainer.devices) or --trainer.strategy fsdp2"
            )


def tied(network: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """For each parameter that is used in several places, the modules and the names that it has in them."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def distribute(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    """Replaces a parameter that each process has in full by its shards."""
    parameter = getattr(module, name)
    shards = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(shards, parameter.requires_grad))
