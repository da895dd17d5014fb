"""Report: a page to look at what came of the run."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lm_lightning.reports import report


class Report(Callback):
    """Leaves `report.html` in the run folder when training has ended; see `python -m lm_lightning report`."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        run = Path(trainer.default_root_dir)
        try:
            report.write([run], run / "report.html")
        except Exception as error:  # the model is trained, whatever is wrong with its report
            print(f"no report is made: {type(error).__name__}: {error}")
        else:
            print(f"report: {run / 'report.html'}")
