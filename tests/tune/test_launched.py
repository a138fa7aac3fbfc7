"""Two processes share the data out, end with one student, and judge it on all of the validation data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

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
    assert [step for step, _ in about(killed, 0)["told"]] == [6]  # the first epoch was not again
    for rank in (0, 1):
        one, two = (load_file(folder / f"{rank}.safetensors") for folder in (whole, killed))
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["loader", "list"])
def test_two_processes_train_one_student(kind: str, tmp_path: Path) -> None:
    trained(kind, tmp_path)
    told, silent = (about(tmp_path, rank)["told"] for rank in (0, 1))
    assert [step for step, _ in told] == [0, 3, 6]
    assert silent == []
    assert all(abs(metric * 48 - round(metric * 48)) < 1e-4 for _, metric in told)  # each image counts, once


def test_two_processes_train_one_student_in_bfloat16(tmp_path: Path) -> None:
    given, last = trained("bf16", tmp_path)
    assert {name for name in last if not torch.equal(last[name], given[name])} >= {
        name for name in last if name.endswith(("weight", "running_mean"))
    }
    assert all(about(tmp_path, rank)["ran in"] == ["torch.bfloat16"] for rank in (0, 1))
    told, silent = (about(tmp_path, rank)["told"] for rank in (0, 1))
    assert told == [[3, None], [6, None]]
    assert silent == []


def trained(kind: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was given, and what both processes got."""
    done = launched(RUN, str(folder), kind)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two, given = (load_file(folder / f"{name}.safetensors") for name in (0, 1, "given"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    return given, one


def about(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{rank}.json").read_text(encoding="utf-8"))
    return found
