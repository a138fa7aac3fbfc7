"""Saving and loading: what comes back is what was written, and damage is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fxmerge
from fxmerge.testing import assert_equivalent
from tests.fakes import PriceTimer
from tests.small import images, network


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, fxmerge.Result]:
    result = fxmerge.compress(network(), images(4), speedup=1.4, calibration=images(64), timer=PriceTimer())
    folder = tmp_path_factory.mktemp("saved") / "out"
    result.save(folder)
    return folder, result


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_what_is_loaded_computes_what_was_saved(saved: tuple[Path, fxmerge.Result]) -> None:
    folder, result = saved
    loaded = fxmerge.load(folder, model=network(seed=7))
    assert loaded.plan == result.plan
    assert_equivalent(result.model, loaded.model, [images(3)], tolerance=1e-6)
    assert {file.name for file in folder.iterdir()} == {"plan.json", "student.safetensors", "about.json", "report.txt"}


def test_a_trained_student_with_norms_comes_back_too(saved: tuple[Path, fxmerge.Result], tmp_path: Path) -> None:
    _, result = saved
    student = result.student_with_norms()
    fxmerge.tune.calibrate_norms(student, [(images(32),)])
    fxmerge.save_student(student, result.plan, result.example_inputs, tmp_path / "out")
    loaded = fxmerge.load(tmp_path / "out", model=network())
    assert_equivalent(student, loaded.student, [images(3)], tolerance=1e-6)


def test_another_model_is_a_mismatch(saved: tuple[Path, fxmerge.Result]) -> None:
    with pytest.raises(fxmerge.PlanMismatchError, match="made for a graph with fingerprint"):
        fxmerge.load(saved[0], model=network(blocks=2))


def test_a_damaged_plan_is_told(saved: tuple[Path, fxmerge.Result], tmp_path: Path) -> None:
    folder = copied(saved[0], tmp_path / "x")
    (folder / "plan.json").write_text((folder / "plan.json").read_text()[:-40])
    with pytest.raises(fxmerge.PlanError, match=r"plan\.json is damaged: it is not JSON"):
        fxmerge.load(folder, model=network())


def test_a_plan_that_names_a_node_which_is_not_there_is_a_mismatch(saved: tuple[Path, fxmerge.Result], tmp_path: Path) -> None:
    folder = copied(saved[0], tmp_path / "x")
    plan = json.loads((folder / "plan.json").read_text())
    plan["merges"][0]["exit"] = "nowhere"
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(fxmerge.PlanMismatchError, match="names node 'nowhere'"):
        fxmerge.load(folder, model=network())


def test_damaged_weights_are_told(saved: tuple[Path, fxmerge.Result], tmp_path: Path) -> None:
    folder = copied(saved[0], tmp_path / "x")
    (folder / "student.safetensors").write_bytes((folder / "student.safetensors").read_bytes()[:100])
    with pytest.raises(fxmerge.PlanError, match=r"student\.safetensors is damaged"):
        fxmerge.load(folder, model=network())


@pytest.mark.parametrize("name", ["plan.json", "about.json", "student.safetensors"])
def test_a_missing_file_is_named(saved: tuple[Path, fxmerge.Result], tmp_path: Path, name: str) -> None:
    folder = copied(saved[0], tmp_path / "x")
    (folder / name).unlink()
    with pytest.raises(fxmerge.PlanError, match=name.replace(".", r"\.") + " is missing"):
        fxmerge.load(folder, model=network())


def test_a_plan_is_annotated_again_on_a_trained_student(saved: tuple[Path, fxmerge.Result]) -> None:
    _, result = saved
    with torch.no_grad():
        for parameter in result.student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    student = result.student.double()
    for node in student.graph.nodes:
        node.meta["fxmerge"] = fxmerge.graph.meta.replace(fxmerge.graph.meta.facts(node), role="", merge=None)  # type: ignore[attr-defined]
    merged = fxmerge.fuse(fxmerge.annotate(student, result.plan))
    assert_equivalent(student, merged, [images(3).double()])
    assert len(list(merged.graph.nodes)) < len(list(student.graph.nodes))
