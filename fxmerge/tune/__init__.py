"""Getting accuracy back: the student trained for a while."""

from __future__ import annotations

from fxmerge.tune.recipe import calibrate_norms, distillation_loss, fine_tune

__all__ = ["calibrate_norms", "distillation_loss", "fine_tune"]
