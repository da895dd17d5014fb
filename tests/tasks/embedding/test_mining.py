"""Hard negatives that the network finds itself: which they are, when, and that all processes find the same ones."""

from pathlib import Path

import pytest
import torch
from conftest import command
from test_pairs import logged, recipe, tokenizer  # noqa: F401 (fixtures)

from lm_lightning.checkpoints.loading import load_checkpoint
from lm_lightning.tasks.embedding.mining import NONE, Mining, select


def test_the_nearest_passages_below_the_margin_are_negatives():
    cosines = torch.tensor([[0.9, 0.7, -torch.inf, 0.78, 0.1], [0.2, -torch.inf, 0.9, 0.95, 0.97]])
    limit = torch.tensor([0.76, 0.5])
    assert select(cosines, limit, Mining(negatives=2)).tolist() == [[1, 4], [0, NONE]]
    assert select(cosines, limit, Mining(negatives=1, skip=3)).tolist() == [[4], [0]]
    assert select(cosines, limit, Mining(negatives=6)).tolist()[0] == [1, 4, NONE, NONE, NONE, NONE]


def test_they_are_searched_after_some_epochs():
    options = Mining(every_n_epochs=2, first_epoch=1)
    assert [options.due(epoch) for epoch in range(6)] == [None, 1, 1, 3, 3, 5]
    assert Mining().due(3) is None


@pytest.mark.slow
def test_two_processes_find_the_same(fit, recipe: Path):  # noqa: F811
    flags = ("--model.mining.every_n_epochs", 1, "--model.mining.first_epoch", 0, "--model.mining.negatives", 2)
    flags += ("--model.mining.margin", 0)  # a new network ranks nothing well
    one = fit("--name", "one", "--model.gather_across_devices", "true", *flags)
    two_flags = ("--trainer.strategy", "ddp", "--trainer.devices", 2, "--data.batch_size", 8, "--name", "two")
    result = command("fit", "--config", recipe, "--model.gather_across_devices", "true", *flags, *two_flags)
    assert result.returncode == 0 and "hard negatives: " in result.stdout, result.stderr
    (two,) = (recipe.parent / "runs" / "two").iterdir()
    assert logged(one, "train/loss") == pytest.approx(logged(two, "train/loss"), rel=1e-3)
    both = [load_checkpoint(run / "checkpoints" / "last.ckpt")["mined"]["rows"] for run in (one, two)]
    assert torch.equal(*both) and (both[0] != NONE).any()
