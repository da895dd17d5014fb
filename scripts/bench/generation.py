"""Measurement of text generation: `generate`."""

from functools import partial
from typing import Any, Optional

import harness


def generate(
    model: Optional[str] = None,
    network: dict[str, Any] = {"model_type": "gpt2", "n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 50257},  # noqa: B006
    batch_sizes: list[int] = [1, 8, 32],  # noqa: B006
    prompt: int = 64,
    shared: int = 0,
    new: int = 64,
    repeats: int = 3,
) -> None:
    """Tokens per second of prompts (prefill) and of new tokens (decode), compared with `generate` of transformers.

    Both use the same network with the same weights, and greedy decoding; it is checked that they write the same tokens.

    Args:
        model: Folder of a network. Default: one with random weights.
        network: Its settings.
        batch_sizes: Numbers of prompts that are continued at once.
        prompt: Tokens of a prompt.
        shared: Tokens with which all prompts begin.
        new: New tokens of each prompt.
        repeats: Runs of each contestant, after those that record a step.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from lm_lightning.generation import generation, recording
    from lm_lightning.generation.sampling import Sampling

    torch.manual_seed(0)
    if model is not None:
        net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    else:
        net = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**network | {"bos_token_id": None, "eos_token_id": None})
        )
    net.eval()
    net.config.pad_token_id, net.generation_config = None, GenerationConfig()
    start = torch.randint(net.config.vocab_size, (1, shared))
    prompts = {
        size: torch.cat([start.expand(size, -1), torch.randint(net.config.vocab_size, (size, prompt - shared))], 1)
        for size in batch_sizes
    }
    never = -1  # an end token that no network predicts

    def ours(ids: Any, count: int) -> list[list[int]]:
        return generation.answers(net, ids.tolist(), count, Sampling(greedy=True), [never], None, None)

    def theirs(ids: Any, count: int) -> list[list[int]]:
        with torch.no_grad():
            mask = torch.ones_like(ids)
            found = net.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
        return found[:, ids.shape[1] :].tolist()

    def measure(contestant: Any) -> harness.Measurement:
        figures = {}
        for size, ids in prompts.items():
            first, all_tokens = (harness.seconds(partial(contestant, ids, count)) for count in (1, new))
            figures[f"prefill, batch {size} tokens/s"] = ids.numel() / first
            figures[f"decode, batch {size} tokens/s"] = size * (new - 1) / max(all_tokens - first, 1e-9)
        return figures

    same = {}
    for size, ids in prompts.items():
        for _ in range(2 + recording.PATIENCE // new):
            found = ours(ids, new)
        same[size] = sum(a == b for a, b in zip(found, theirs(ids, new)))
    results = harness.take_turns({"ours": lambda: measure(ours), "transformers": lambda: measure(theirs)}, repeats)
    settings = {"model": model, "network": network, "prompt": prompt, "shared": shared, "new": new}
    settings["texts with the same tokens"] = {f"batch {size}": f"{count} of {size}" for size, count in same.items()}
    harness.report("generate", settings, results, "transformers")
