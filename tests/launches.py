"""A module run by several processes: torchrun is what ``accelerate launch --multi_gpu`` starts; here on the CPU, by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launched(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes, each with one thread; how they ended, and what they wrote."""
    launch = "torch.distributed.run --standalone --nproc_per_node 2 -m"
    return subprocess.run(
        [sys.executable, "-m", *launch.split(), module, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
