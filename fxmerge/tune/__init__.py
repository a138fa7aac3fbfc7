"""Getting accuracy back: on calibration images alone, or by training."""

from __future__ import annotations

from fxmerge.tune.calibrated import calibration_tune
from fxmerge.tune.checkpoints import Epoch
from fxmerge.tune.distillation import Distillation
from fxmerge.tune.features import shared_cuts, with_features
from fxmerge.tune.norms import calibrate_norms
from fxmerge.tune.recipe import Recipe, top1
from fxmerge.tune.students import already_merged
from fxmerge.tune.training import fine_tune

__all__ = [
    "Distillation",
    "Epoch",
    "Recipe",
    "already_merged",
    "calibrate_norms",
    "calibration_tune",
    "fine_tune",
    "shared_cuts",
    "top1",
    "with_features",
]
