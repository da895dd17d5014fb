"""The callback that writes the report of a run when its training has ended."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning.reports import page


class Report(Callback):
    """Writes `report.html` into the run folder when training has ended; see `python -m lm_lightning report`."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        run = Path(trainer.default_root_dir)
        try:
            page.write([run], run / "report.html")
        except Exception as error:  # a failed report must not fail a finished training
            print(f"the report could not be written: {type(error).__name__}: {error}")
        else:
            print(f"report: {run / 'report.html'}")
