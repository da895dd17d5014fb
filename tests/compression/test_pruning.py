"""Pruning: as many zeros as were asked for, in the exported file, and the same ones after a resume."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_best import SPOILED, about, lowest, weights_of

from lm_lightning.errors import UserError

CALLBACK = "--trainer.callbacks+=Pruning"


def options(**values: object) -> list[str]:
    values = {"table": "false"} | values
    return [CALLBACK, *(f"--trainer.callbacks.{name}={value}" for name, value in values.items())]


def pruned(run: Path) -> dict[str, torch.Tensor]:
    """The weights of the exported blocks, (inputs, outputs) as GPT-2 has them."""
    weights = load_file(run / "model" / "model.safetensors")
    return {name: w for name, w in weights.items() if ".h." in name and w.ndim == 2}


def zeros(weight: torch.Tensor) -> int:
    return int((weight == 0).sum())


def test_each_layer_has_the_share_of_zeros_that_was_asked_for(fit, cli, recipe: Path):
    """Not that share of what is left, again and again."""
    out = cli("fit", "--config", recipe, *options(sparsity=0.6, frequency=2), "--trainer.max_steps", 12)
    run = Path(out.split("run folder: ")[1].splitlines()[0])
    weights = pruned(run)
    assert len(weights) == 8
    assert all(zeros(weight) == round(0.6 * weight.numel()) for weight in weights.values())
    total = sum(weight.numel() for weight in weights.values())
    assert f"of {total:,} weights in 8 layers are zero (60.0%)" in out


def test_all_layers_together_have_it(fit):
    weights = pruned(fit(*options(sparsity=0.5, scope="global", frequency=3)))
    counts = [zeros(weight) / weight.numel() for weight in weights.values()]
    assert sum(map(zeros, weights.values())) == round(0.5 * sum(weight.numel() for weight in weights.values()))
    assert max(counts) > min(counts)


def test_wanda_makes_as_many_inputs_of_each_output_zero(fit):
    for weight in pruned(fit(*options(sparsity=0.5, method="wanda", frequency=3))).values():
        assert ((weight == 0).sum(0) == weight.shape[0] // 2).all()


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_two_of_four_inputs_are_zero(fit, method: str):
    for weight in pruned(fit(*options(pattern="2:4", method=method))).values():
        assert ((weight.T.unflatten(1, (-1, 4)) == 0).sum(2) == 2).all()


def test_only_the_named_layers_are_pruned_and_after_the_start(fit):
    run = fit(*options(sparsity=0.5, modules='["*.mlp.*"]', start=4, end=6, frequency=1))
    for name, weight in pruned(run).items():
        assert zeros(weight) == (weight.numel() // 2 if ".mlp." in name else 0), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "wanda", "movement"])
def test_run_that_is_resumed_amid_the_schedule_prunes_the_same(fit, recipe: Path, method: str):
    flags = options(sparsity=0.7, method=method, end=10, frequency=2)
    whole = fit(*flags, "--name", "whole")
    # Stopped by an exception after step 7, of which the checkpoint of step 5 is left.
    stop = ("--trainer.callbacks+=test_fit.Stop", "--trainer.callbacks.step", 7)
    with pytest.raises(RuntimeError, match="power failure"):
        fit(*flags, *stop, "--name", "part")
    (cut,) = (recipe.parent / "runs" / "part").iterdir()
    saved = torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)
    (state,) = [state for name, state in saved["callbacks"].items() if "Pruning" in name]
    for name, mask in state["masks"].items():  # after every step, not only at the end
        assert (saved["state_dict"][f"network.{name}.weight"][~mask] == 0).all() and not mask.all()
    part = fit(*flags, "--name", "part", "--ckpt_path", "last")
    first, second = (load_file(run / "model" / "model.safetensors") for run in (whole, part))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for weight in pruned(part).values():
        groups = weight.T if method == "wanda" else weight.flatten()
        assert ((groups == 0).sum(-1) == round(0.7 * groups.shape[-1])).all()


@pytest.mark.slow
def test_a_network_is_exported_only_as_far_as_it_is_pruned(fit, cli):
    flags = (*SPOILED, "--trainer.callbacks+=Pruning", "--trainer.callbacks.table", "false")
    pruned = ("--trainer.callbacks.sparsity", 0.5, "--trainer.callbacks.frequency", 1, "--trainer.callbacks.end")
    run = fit(*flags, *pruned, 20)  # the best step is before
    assert about(run) == {"checkpoint": "last", "step": 24}
    cli("export", run)
    assert about(run)["step"] == 24
    run = fit(*flags, *pruned, 6)
    assert about(run)["step"] == lowest(run) < 13
    matrix = weights_of(run / "model")["transformer.h.0.mlp.c_fc.weight"]
    assert (matrix == 0).float().mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sparsity": 1.5}, "sparsity is 1.5"),
        ({"end": 50}, "the pruning ends at step 50, but the run at step 10"),
        ({"start": 5, "end": 3}, "0 <= start <= end"),
        ({"modules": '["*attention*"]'}, r"\*attention\* matches no linear layer, such as transformer.h.0"),
        ({"pattern": "2:4", "sparsity": 0.6}, "2:4 has a sparsity of 0.5"),
        ({"method": "wanda", "scope": "global"}, "omit scope"),
    ],
)
def test_impossible_prunings_are_refused(fit, flags: dict, message: str):
    with pytest.raises(UserError, match=message):
        fit(*options(**flags))
