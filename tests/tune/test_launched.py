"""Two processes share the data out, end with one student, and judge it on all of the validation data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.launches import launched

RUN = "tests.tune.launched_run"


def test_two_processes_go_on_where_one_was_killed_to_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    done = launched(RUN, str(whole), "no validation")
    assert done.returncode == 0, done.stderr[-2000:]
    assert launched(RUN, str(killed), "killed").returncode != 0
    assert not (killed / "0.safetensors").exists()
    with safe_open(killed / "checkpoints" / "training.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["about"])["position"]["step"] == 5
    done = launched(RUN, str(killed), "no validation")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [step for step, _ in json.loads((killed / "0.json").read_text(encoding="utf-8"))] == [6]  # the first epoch was not again
    for rank in (0, 1):
        one, two = (load_file(folder / f"{rank}.safetensors") for folder in (whole, killed))
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["loader", "list", "bf16"])
def test_two_processes_train_one_student(kind: str, tmp_path: Path) -> None:
    done = launched(RUN, str(tmp_path), kind)
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
