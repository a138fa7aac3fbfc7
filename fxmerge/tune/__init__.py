"""Getting accuracy back: the student trained for a while."""

from __future__ import annotations

from fxmerge.tune.calibrated import calibration_tune
from fxmerge.tune.features import shared_cuts, with_features
from fxmerge.tune.recipe import calibrate_norms, distillation_loss, fine_tune

__all__ = ["calibrate_norms", "calibration_tune", "distillation_loss", "fine_tune", "shared_cuts", "with_features"]
