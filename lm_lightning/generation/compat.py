"""PyTorch: graphs of operations, and oneDNN's layout of matrices. transformers: the cache and its argument."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, fx
from transformers.cache_utils import StaticLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

aten = torch.ops.aten


class Slots(StaticLayer):
    """The cache of a layer: keys and values in a fixed number of slots.

    `StaticLayer` counts the slots itself, in a tensor that the network reads. Here, the caller states in which slots
    the next tokens are, so that a recorded step has them as an input.

    Attributes:
        where: The slots of the next tokens, (T,) int64.
        end: Number of slots to attend to; None for all.
    """

    where: Tensor
    end: Optional[int] = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.index_copy_(2, self.where, key_states)
        self.values.index_copy_(2, self.where, value_states)
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]

    def get_seq_length(self, *args: Any) -> int:
        return 0  # positions and masks are given


def cache_argument(network: "PreTrainedModel") -> str:
    """The name of the argument for the cache, which newer versions of transformers call `cache`."""
    return "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"


def has_plain_steps(network: "PreTrainedModel") -> bool:
    """Whether a network's operations depend only on the shapes of its inputs, and it has one kind of attention.

    transformers knows of the first for its own networks. Alternative: none.
    """
    inputs = inspect.signature(network.forward).parameters
    kinds = getattr(network.config, "layer_types", None) or []
    return (
        bool(getattr(network, "_can_compile_fullgraph", False))
        and network.config._attn_implementation == "sdpa"
        and {"position_ids", "logits_to_keep"} <= inputs.keys()
        and set(kinds) <= {"full_attention"}
        and not getattr(network.config, "is_encoder_decoder", False)
        and isinstance(getattr(network.config, "num_hidden_layers", None), int)
    )


def record(function: Callable, *inputs: Any) -> fx.GraphModule:
    """The operations of a call as a graph, which runs without the Python code of modules."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def call(*given: Any) -> Any:  # it would count the `self` of a method as an input
        return function(*given)

    return make_fx(call)(*inputs)


def pack(graph: fx.GraphModule, rows: int, limit: int) -> None:
    """Copies float32 matrices of linear layers of a graph to a layout from which a CPU multiplies few rows faster.

    For one row, this is the transposed matrix; for more, the layout of oneDNN. The function for it is private, and used
    by `torch.compile`; alternative: `torch.compile` itself, which takes a minute.

    Args:
        graph: Of `record`; changed in place.
        rows: Rows of the input of each layer.
        limit: Maximum size of all copies in bytes.
    """
    for node in list(graph.graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default):
            continue
        *bias, inputs, factor = node.args
        transposed = factor.target is aten.t.default
        source = factor.args[0] if transposed else factor
        if source.op != "get_attr" or node.kwargs:
            continue
        matrix = getattr(graph, source.target).detach()
        matrix = matrix if transposed else matrix.t()  # (outputs, inputs)
        limit -= matrix.numel() * matrix.element_size()
        if matrix.dtype != torch.float32 or limit < 0 or (rows == 1 and not transposed):
            continue
        if rows > 1 and not torch.backends.mkldnn.is_available():
            continue
        name = f"packed_{node.name}"
        with graph.graph.inserting_before(node):
            if rows == 1:
                graph.register_buffer(name, matrix.t().contiguous())
                new = graph.graph.call_function(node.target, (*bias, inputs, graph.graph.get_attr(name)))
            else:
                graph.register_buffer(name, torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), rows))
                places: Any = (inputs, graph.graph.get_attr(name), bias[0] if bias else None, "none", [], "")
                new = graph.graph.call_function(torch.ops.mkldnn._linear_pointwise.default, places)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
