"""The benchmark of diffusion U-Nets from one end to the other, tiny; and the published plan in the graph's own names."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")
pytest.importorskip("accelerate")

import fxmerge
from benchmarks.ddpm import __main__ as ddpm
from benchmarks.ddpm import configuration, small
from benchmarks.ddpm.networks import cifar_unet, small_unet
from benchmarks.ddpm.sampling import Ratio, noise, seconds_in_turn
from benchmarks.ddpm.sampling import ddim as sampled
from fxmerge.testing import assert_equivalent
from tests.fakes import PriceTimer

TINY = [
    *("--widths", "8", "16", "--layers", "1", "--train-steps", "4", "--train-batch", "4", "--classifier-steps", "2"),
    *("--tune-steps", "2", "--speedups", "1.1", "50", "--batch", "2", "--sampling-steps", "2", "--rounds", "2", "--samples", "70"),
    *("--frechet-steps", "2", "--calibration", "16", "--score-images", "8", "--trials", "1", "--spaces", "joint", "layers"),
    *("--max-kernel", "3"),
]


def cells(report: str) -> list[list[str]]:
    """Of the first table."""
    lines = [line for line in report.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.filterwarnings("ignore:.*too few")
@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
def test_the_small_benchmark_runs_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "TIMER", PriceTimer())
    command = ["small", *TINY, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "report.md")]
    report = ddpm.main(command)
    rows = cells(report)
    assert [row[0] for row in rows if row[0]][:2] == ["(images held out, not samples)", "original, folded"]
    assert [row[1] for row in rows[2:] if row[1]] == ["1.10x", "50.00x"] * 2
    compressed = next(row for row in rows if row[0] == "all candidates")
    assert compressed[4] == "none"
    assert rows[rows.index(compressed) + 1][4] == "2 steps"
    assert all(row[2].startswith("cannot; at most") for row in rows if row[1] == "50.00x")
    assert (tmp_path / "report.png").stat().st_size < 200_000
    assert "original; all candidates at 1.1 untrained; all candidates at 1.1 trained" in report

    def not_again(*args: object, **kwargs: object) -> None:
        raise AssertionError("it is there already")

    for name in ("tuned", "ddim"):
        monkeypatch.setattr(small, name, not_again)
    assert ddpm.main(command) == report


def test_samples_are_the_same_whatever_the_outputs_are_wrapped_in() -> None:
    model = small_unet((8, 16), 1, 1)
    start = noise((2, 1, 16, 16), 0)
    made = sampled(model, start, 3)
    assert torch.equal(made, sampled(lambda x, t: (model(x, t).sample,), start, 3))
    assert float(made.abs().max()) <= 1
    seconds = seconds_in_turn([model, model], start, 2, 3)
    assert [len(found) for found in seconds] == [3, 3]
    assert Ratio.of([4.0], [2.0]).median == 2.0


@cache
def searched() -> fxmerge.Findings:
    """The CIFAR-10 configuration with a sixteenth of its channels; its graph is that of the whole."""
    return fxmerge.find_segments(fxmerge.trace(cifar_unet(8), configuration.inputs(2, "cpu")))


def test_the_configuration_is_the_published_one() -> None:
    with torch.device("meta"):
        model = cifar_unet()
    assert sum(p.numel() for p in model.parameters()) == 35_746_307


def test_the_published_plan_is_that_of_the_numbers() -> None:
    findings = searched()
    plan, refused = configuration.published_plan(findings)
    assert refused == ()
    kinds = [(merge.kind, merge.geometry.kernel, bool(merge.moved)) for merge in plan.merges]
    alone, pair, whole = ("identity", (1, 1), False), ("fitted", (3, 3), True), ("fitted", (5, 5), True)
    assert kinds == [pair, pair, whole, alone, alone, pair, pair, pair, alone, pair, pair, pair]


def test_its_student_is_its_merged_network() -> None:
    findings = searched()
    plan, _ = configuration.published_plan(findings)
    student = fxmerge.linearize(fxmerge.annotate(findings.graph, plan))
    merged = fxmerge.fuse(student)
    large = [
        sum(isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1) for layer in network.modules())
        for network in (findings.graph, merged)
    ]
    assert large == [52, 52 - 9 - 3]
    assert_equivalent(student, merged, [configuration.inputs(2, "cpu")])


def test_what_the_published_plan_asks_for_and_cannot_have_is_told() -> None:
    plan, refused = configuration.published_plan(searched(), fxmerge.Space(max_kernel=3))
    assert len(plan.merges) == 11
    assert refused == ("no candidate merges convolutions 7 to 8 without pruning",)


@pytest.mark.filterwarnings("ignore:.*too few")
@pytest.mark.parametrize(
    ("losses", "max_kernel", "told"),
    [("made-up", 5, "Nothing of it is refused."), ("reconstruction", 3, "- refused: no candidate merges convolutions 7 to 8")],
)
def test_the_configuration_is_timed_beside_the_published_plan(
    losses: str, max_kernel: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configuration, "TIMER", PriceTimer())
    monkeypatch.setattr(configuration, "searched", lambda model, example: searched())
    command = [
        *(
            "cifar-configuration",
            "--width",
            "8",
            "--losses",
            losses,
            "--max-kernel",
            str(max_kernel),
            "--images",
            "4",
            "--score-images",
            "2",
            "--speedups",
            "1.1",
        ),
        *("--sampling-steps", "2", "--rounds", "1", "--store", str(tmp_path / "tables.db"), "--out", str(tmp_path / "report.md")),
    ]
    report = ddpm.main(command)
    assert told in report
    rows = {match[1].strip(): match[0].split("|") for match in re.finditer(r"^\| eager +\|([^|]*)\|.*$", report, re.MULTILINE)}
    theirs, ours = rows["published plan"], rows["our plan of its predicted loss"]
    assert float(ours[3]) <= float(theirs[3])
    assert float(ours[5].strip(" x")) >= float(theirs[5].strip(" x"))
