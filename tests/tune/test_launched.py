"""Two processes (torchrun is what `accelerate launch --multi_gpu` starts; here on the CPU, by gloo) share the data out,
end with one student, and judge it on all of the validation data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", ["loader", "list", "no validation"])
def test_two_processes_train_one_student(kind: str, tmp_path: Path) -> None:
    launch = "torch.distributed.run --standalone --nproc_per_node 2 -m tests.tune.launched_run"
    command = [sys.executable, "-m", *launch.split(), str(tmp_path), kind]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two, given = (load_file(tmp_path / f"{name}.safetensors") for name in (0, 1, "given"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], given[name])}
    if kind == "no validation":  # the last; else the best, which may be the one given
        assert changed >= {name for name in one if name.endswith(("weight", "running_mean"))}
    told, silent = (json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert [step for step, _ in told] == ([3, 6] if kind == "no validation" else [0, 3, 6])
    assert silent == []
    if kind == "no validation":
        assert [metric for _, metric in told] == [None, None]
        return
    assert all(abs(metric * 48 - round(metric * 48)) < 1e-4 for _, metric in told)  # each image counts, once
