"""Predictions: what `predict` finds, one line of JSON a sample."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Predictions(Callback):
    """Writes the dicts that `predict_step` returns to `predictions.jsonl` in the run folder, in the data's order.

    Each process writes a part; the first one joins them by the samples' `id` (processes of tensor parallelism have the
    same samples).
    """

    def part(self, trainer: Trainer, rank: int) -> Path:
        """The file of a process."""
        return Path(trainer.default_root_dir) / f"predictions.{rank}.jsonl"

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.file = open(self.part(trainer, trainer.global_rank), "w", encoding="utf-8")  # noqa: SIM115 (see the end)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: list[dict], *_: Any, **__: Any
    ) -> None:
        self.file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.file.close()
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        parts = [self.part(trainer, rank) for rank in range(trainer.world_size)]
        lines = {
            json.loads(line)["id"]: line
            for part in parts
            for line in part.read_text(encoding="utf-8").split("\n")
            if line
        }
        file = Path(trainer.default_root_dir) / "predictions.jsonl"
        file.write_text("".join(lines[sample] + "\n" for sample in sorted(lines)), encoding="utf-8")
        for part in parts:
            part.unlink()
        print(f"predictions: {file}")
