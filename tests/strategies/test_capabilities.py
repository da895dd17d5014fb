"""A strategy of one's own states what it can do; nothing else has to know it."""

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy

from lm_lightning.errors import UserError
from lm_lightning.strategies.capabilities import Capabilities, capabilities


class OneDevice(Strategy):
    """Trains on the CPU, without being one of Lightning's strategies for that."""

    root_device = torch.device("cpu")
    is_global_zero = True
    global_rank = local_rank = 0
    world_size = 1

    def model_to_device(self) -> None:
        pass

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        pass

    def all_gather(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor

    reduce = broadcast = all_gather


class Stated(OneDevice):
    averages_gradients = True


def test_strategies_of_lightning_average_gradients_on_one_device_and_in_ddp():
    assert capabilities(SingleDeviceStrategy("cpu")) == Capabilities(averages_gradients=True)
    assert capabilities(DDPStrategy()) == Capabilities(averages_gradients=True)
    assert not capabilities(ModelParallelStrategy()).averages_gradients


def test_strategy_that_states_averages_gradients_trains_by_its_class_path(fit):
    run = fit("--trainer.strategy", "{class_path: test_capabilities.Stated}")
    assert (run / "model" / "config.json").exists()


def test_strategy_that_states_nothing_is_refused(fit):
    with pytest.raises(UserError, match="OneDevice is not supported .* averages_gradients"):
        fit("--trainer.strategy", "{class_path: test_capabilities.OneDevice}")
    with pytest.raises(UserError, match="class_path: test_capabilities.Stated"):
        fit("--trainer.strategy", "test_capabilities.Stated")
