"""Reports: HTML pages of runs."""

from lm_lightning.features import Feature

FEATURE = Feature(
    commands={
        "report": ("lm_lightning.reports.report", "write an HTML page about runs: curves, samples, differences"),
    },
    callbacks=("lm_lightning.reports.callback.Report",),
)
