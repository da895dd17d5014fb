"""Decoding on a CPU with a cache of fixed size, whose steps are recorded.

For small networks, most of the time of a decoding step on a CPU is Python code of modules, and multiplications of a few
rows by matrices in a layout that suits many rows. After a number of steps, the operations of a step are recorded, with
the matrices in another layout, and are then repeated without modules. Prompts that begin with the same tokens share
their beginning, which is processed once.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.cache_utils import Cache

from lm_lightning.generation import compat

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

SLOTS = 128  # sizes of the cache are multiples of it, so that a recorded step serves prompts of several lengths
PATIENCE = 100  # steps before a recording, which pays off after 80 to 340 further steps: short generations have none
SHARED = 16  # least number of tokens at the beginning of all prompts for which sharing them pays
KEPT = 4  # kinds of steps of a network that are kept
COPIES = 2 << 30  # maximum size in bytes of the copies of a network's matrices for one kind of step


def supports(network: "PreTrainedModel") -> bool:
    """Whether `decode` can be used: with plain weights on a CPU, and a network whose operations never change."""
    return (
        all(type(p.data) is Tensor and p.device.type == "cpu" and p.is_floating_point() for p in network.parameters())
        and not torch.is_autocast_enabled("cpu")
        and compat.has_plain_steps(network)
    )


class Step:
    """A forward pass of a network with a cache of a fixed size.

    Args:
        network: In evaluation mode.
        rows: B, number of texts.
        slots: S, maximum number of tokens of each.
    """

    def __init__(self, network: "PreTrainedModel", rows: int, slots: int) -> None:
        self.network, self.rows, self.slots = network, rows, slots
        self.layers = [compat.Slots(slots) for _ in range(network.config.num_hidden_layers)]
        self.cache, self.argument = Cache(layers=self.layers), compat.cache_argument(network)
        self.runs = 0
        self.recorded: Any = None

    def prefill(self, input_ids: Tensor, valid: Tensor, positions: Tensor, start: int) -> Tensor:
        """Processes prompts.

        Args:
            input_ids: The tokens, (B, T) int64.
            valid: Whether a slot has a token of the text, not padding: (B, S) bool.
            positions: Position of each token in its text, (B, T) int64.
            start: The slot of the first token.

        Returns:
            Logits of the last token, (B, V).
        """
        end = start + input_ids.shape[1]
        where, slots = torch.arange(start, end).unsqueeze(1), torch.arange(end)
        # (padding sees itself, as the softmax of nothing is not a number)
        mask = valid[:, None, None, :end] & (slots <= where) | (slots == where)
        return self.forward(input_ids, mask, positions, where.squeeze(1), None, None)

    def __call__(self, input_ids: Tensor, valid: Tensor, positions: Tensor, start: int) -> Tensor:
        """Processes one token of each text, (B, 1) int64; arguments and results are those of `prefill`."""
        keys, values = [layer.keys for layer in self.layers], [layer.values for layer in self.layers]
        inputs = (input_ids, valid[:, None, None], positions, torch.tensor([start]), keys, values)
        self.runs += 1
        if self.runs == PATIENCE:
            self.recorded = self.record(*inputs)
        return (self.recorded or self.forward)(*inputs)

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        where: Tensor,
        keys: Optional[list[Tensor]],
        values: Optional[list[Tensor]],
    ) -> Tensor:
        """The pass through the modules of the network."""
        for i, layer in enumerate(self.layers):
            layer.where, layer.end = where, None if keys is not None else mask.shape[-1]
            if keys is not None and values is not None:  # inputs of a recording
                layer.keys, layer.values = keys[i], values[i]
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": 1}
        return self.network(**inputs, **{self.argument: self.cache}, use_cache=True).logits[:, -1]

    def record(self, *inputs: Any) -> Any:
        """A function that computes the same as `forward`, or None if that cannot be recorded."""
        try:
            graph = compat.record(self.forward, *inputs)
            compat.pack(graph, self.rows, COPIES)
            found = graph(*inputs)
        except Exception:  # an operation that cannot be recorded; the network itself is still there
            return None
        finally:
            for layer, keys, values in zip(self.layers, *inputs[-2:]):
                layer.keys, layer.values = keys, values
        return graph if torch.allclose(found, self.forward(*inputs), rtol=1e-3, atol=1e-3) else None

    def copy_prefix(self, other: "Step", size: int) -> None:
        """Copies the first slots of a step with one row to all rows."""
        for layer, single in zip(self.layers, other.layers):
            if not layer.is_initialized:
                layer.lazy_initialization(*(x.expand(self.rows, -1, -1, -1) for x in (single.keys, single.values)))
            layer.keys[:, :, :size] = single.keys[:, :, :size]
            layer.values[:, :, :size] = single.values[:, :, :size]


class Steps:
    """The latest steps of a network; copies of the network have none."""

    def __init__(self) -> None:
        self.weights: Any = None
        self.known: OrderedDict[tuple[int, int], Step] = OrderedDict()

    def get(self, network: "PreTrainedModel", rows: int, slots: int) -> Step:
        """The step for a number of texts and slots, a new one if the weights have changed."""
        weights = [(p.data_ptr(), p._version) for p in network.parameters()]
        weights += [torch.is_inference_mode_enabled()]  # type: ignore[list-item]  # the cache is bound to it
        if weights != self.weights:
            self.weights = weights
            self.known.clear()
        step = self.known.pop((rows, slots), None) or Step(network, rows, slots)
        self.known[rows, slots] = step
        while len(self.known) > KEPT:
            self.known.popitem(last=False)
        return step

    def __reduce__(self) -> tuple:
        return (Steps, ())


@torch.no_grad()
def decode(
    network: "PreTrainedModel",
    prompts: list[list[int]],
    max_new_tokens: int,
    ends: Sequence[int],
    processors: LogitsProcessorList,
    streamer: "Optional[BaseStreamer]",
) -> list[list[int]]:
    """Continues prompts with the tokens that have the highest scores; `network.generate` returns the same.

    Args:
        network: A network for which `supports` is true, in evaluation mode.
        prompts: Token ids of each prompt, one or more.
        max_new_tokens: Maximum number of tokens of a continuation.
        ends: Tokens that end a text.
        processors: Convert logits, (B, V) float32, to scores.
        streamer: Gets the tokens of a single prompt.

    Returns:
        The new tokens of each prompt, with the end token if there is one.
    """
    rows, shared = len(prompts), shared_beginning(prompts)
    width = max(map(len, prompts))
    slots = -(-(width + max_new_tokens) // SLOTS) * SLOTS
    steps = network.__dict__.setdefault("_decoding_steps", Steps())
    step = steps.get(network, rows, slots)
    input_ids = torch.full((rows, width - shared), ends[0])
    valid = torch.zeros(rows, slots, dtype=torch.bool)
    valid[:, :shared] = True
    positions = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):  # padding is between the shared beginning and the rest
        rest = len(prompt) - shared
        input_ids[i, -rest:] = torch.tensor(prompt[shared:])
        valid[i, width - rest : width] = True
        positions[i, -rest:] = torch.arange(shared, len(prompt))
    if shared:
        single = steps.get(network, 1, slots)
        beginning = torch.tensor([prompts[0][:shared]])
        single.prefill(beginning, valid[:1], torch.arange(shared).unsqueeze(0), 0)
        step.copy_prefix(single, shared)
    if streamer is not None:
        streamer.put(input_ids)
    logits, answers = step.prefill(input_ids, valid, positions, shared), [list[int]() for _ in prompts]
    last, running = positions[:, -1:], set(range(rows))
    for slot in range(width, width + max_new_tokens):
        chosen = processors(input_ids, logits.float()).argmax(-1, keepdim=True)
        for i, token in enumerate(chosen.flatten().tolist()):
            if i in running:
                answers[i].append(token)
                running -= {i} if token in ends else set()
        if streamer is not None:
            streamer.put(chosen)
        if not running or slot == width + max_new_tokens - 1:
            break
        last = last + 1
        valid[:, slot] = True
        logits = step(chosen, valid, last, slot)
    if streamer is not None:
        streamer.end()
    return answers


def shared_beginning(prompts: list[list[int]]) -> int:
    """Number of tokens with which all prompts begin; at least one token of each remains. 0 if sharing does not pay."""
    size = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    return size if len(prompts) > 1 and size >= SHARED else 0
