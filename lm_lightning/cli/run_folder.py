"""RunFolder: writes the files of a run folder that describe the run."""

import json
import os
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lm_lightning import files, yaml_text
from lm_lightning.cli import saving
from lm_lightning.data import contract
from lm_lightning.environment import environment
from lm_lightning.security.redaction import redact


class RunFolder(SaveConfigCallback):
    """Writes config, environment, tokenizer and a description of the data into the run folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Does nothing: Lightning would write the config here, although the checkpoint may still be refused."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # all checks are done
        if not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        config = run / "config.yaml"
        if config.exists():  # resumed: the previous config is kept under another name
            free = next(p for n in range(1, 10**6) if not os.path.lexists(p := run / f"config.{n}.yaml"))
            files.write_text(free, config.read_text(encoding="utf-8"))
        saving.write(self.parser, self.config, config)
        for logger in trainer.loggers:
            if logger.log_dir is None:  # it writes no files to the run folder
                logger.log_hyperparams(yaml_text.load(config.read_text(encoding="utf-8")))
        files.write_text(run / "environment.json", json.dumps(environment(), indent=2))
        if (info := contract.optional(trainer.datamodule, "info")) is not None:
            files.write_text(run / "data.json", json.dumps(redact(info), indent=2))
        if (tokenizer := contract.tokenizer_of(trainer.datamodule)) is not None:
            with files.replacing_folder(run / "tokenizer") as folder:
                tokenizer.save_pretrained(folder)
