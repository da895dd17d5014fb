"""What a sharded strategy states, and which processes and names it refuses."""

import pytest

from lm_lightning.errors import UserError
from lm_lightning.sharding.strategy import FSDP2, TensorParallel
from lm_lightning.strategies.capabilities import Capabilities, capabilities


def test_sharded_strategies_state_what_a_process_holds():
    fsdp, tp = capabilities(FSDP2()), capabilities(TensorParallel())
    assert fsdp == Capabilities(averages_gradients=True, shards_parameters=True, quantized_weights=False)
    assert tp.averages_gradients and tp.shards_parameters and tp.splits_matrices and not tp.quantized_weights


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("fsdp",), "use --trainer.strategy fsdp2"),
        (("deepspeed_stage_3",), "use --trainer.strategy fsdp2"),
        (("fsdp2",), "there is only one"),
        (("tp",), "there is only one"),
        (("lm_lightning.sharding.strategy.FSDP2", "--trainer.strategy.cpu_offload", "true"), "there is no GPU"),
        (("FSDP2", "--trainer.strategy.cpu_offload", "true"), "there is no GPU"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(fit, flags: tuple, reason: str):
    with pytest.raises(UserError, match=reason) as refused:
        fit("--trainer.strategy", *flags)
    assert "\n" not in str(refused.value)
