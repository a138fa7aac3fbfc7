"""What all tests share: one thread (two wait for each other on small tensors), and nothing random."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("fxmerge", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fxmerge")


@pytest.fixture(autouse=True)
def _quiet_torch() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
