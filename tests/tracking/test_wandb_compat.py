"""What `lm_lightning.tracking.compat` uses of Lightning's WandbLogger is there."""

import inspect

import pytest
from lightning.pytorch.loggers import WandbLogger

from lm_lightning.tracking import compat


def test_the_logger_has_the_options_and_the_run(tmp_path):
    pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=tmp_path, name="a name")
    options = compat.init_options(logger)
    assert options["name"] == "a name" and {"id", "anonymous"} <= options.keys()
    assert "wandb.init(**self._wandb_init)" in inspect.getsource(WandbLogger)
    assert not compat.is_started(logger) and "_attach_id" in inspect.getsource(WandbLogger)
    logger._experiment = object()
    assert compat.is_started(logger) and compat.current_run(logger) is logger._experiment
    compat.forget_run(logger)
    assert not compat.is_started(logger)
