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
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def launched(folder: Path, kind: str) -> subprocess.CompletedProcess[str]:
    """A run of two processes, with what it wrote to standard error."""
    launch = "torch.distributed.run --standalone --nproc_per_node 2 -m tests.tune.launched_run"
    return subprocess.run(
        [sys.executable, "-m", *launch.split(), str(folder), kind],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_go_on_where_one_was_killed_to_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    done = launched(whole, "no validation")
    assert done.returncode == 0, done.stderr[-2000:]
    assert launched(killed, "killed").returncode != 0
    assert not (killed / "0.safetensors").exists()
    with safe_open(killed / "checkpoints" / "training.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["about"])["position"]["step"] == 5
    done = launched(killed, "no validation")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [step for step, _ in json.loads((killed / "0.json").read_text(encoding="utf-8"))] == [6]  # the first epoch was not again
    for rank in (0, 1):
        one, two = (load_file(folder / f"{rank}.safetensors") for folder in (whole, killed))
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["loader", "list", "bf16"])
def test_two_processes_train_one_student(kind: str, tmp_path: Path) -> None:
    done = launched(tmp_path, kind)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two, given = (load_file(tmp_path / f"{name}.safetensors") for name in (0, 1, "given"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], given[name])}
    if kind == "bf16":  # the last; else the best, which may be the one given
        assert changed >= {name for name in one if name.endswith(("weight", "running_mean"))}
    told, silent = (json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert [step for step, _ in told] == ([3, 6] if kind == "bf16" else [0, 3, 6])
    assert silent == []
    if kind == "bf16":
        assert [metric for _, metric in told] == [None, None]
        return
    assert all(abs(metric * 48 - round(metric * 48)) < 1e-4 for _, metric in told)  # each image counts, once
