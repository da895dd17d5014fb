"""Diagnoses of training: samples that cause spikes of the loss, and histograms of gradients."""

from lm_lightning.features import Feature

FEATURE = Feature(
    classes=("lm_lightning.diagnostics.gradients",),
    callbacks=("lm_lightning.diagnostics.spikes.Spikes",),
)
