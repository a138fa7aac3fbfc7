"""The published plan is read off the graph and has the convolutions that were published; its merged network obeys the law."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

import fxmerge
from benchmarks import published_plan
from benchmarks.made_up import MadeUp
from fxmerge.testing import assert_equivalent
from tests.fakes import PriceTimer


@pytest.fixture(scope="module")
def findings() -> fxmerge.Findings:
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(weights=None).eval()
    return fxmerge.find_segments(fxmerge.trace(model, torch.zeros(1, 3, 64, 64)))


def test_the_published_plan_leaves_38_of_52_convolutions(findings: fxmerge.Findings) -> None:
    plan = published_plan.plan_of(findings, published_plan.KEPT, published_plan.PRUNED)
    student = fxmerge.linearize(fxmerge.annotate(findings.graph, plan)).double()
    merged = fxmerge.fuse(student)

    def convolutions(network: nn.Module) -> int:
        return sum(isinstance(module, nn.Conv2d) for module in network.modules())

    assert (convolutions(findings.graph), convolutions(student), convolutions(merged)) == (52, 48, 38)
    assert_equivalent(student, merged, [torch.randn(1, 3, 64, 48, dtype=torch.float64)])


def test_its_merges_are_those_that_were_published(findings: fxmerge.Findings) -> None:
    plan = published_plan.plan_of(findings, published_plan.KEPT, published_plan.PRUNED)
    assert [(str(merge.entry), str(merge.end), merge.geometry.kernel) for merge in plan.merges] == [
        ("features_0_2", "features_2_conv_3", (3, 3)),
        ("features_2_conv_3", "features_3_add", (1, 1)),
        ("features_3_add", "features_4_conv_3", (3, 3)),
        ("features_4_conv_3", "features_5_add", (1, 1)),
        ("features_5_add", "features_6_add", (3, 3)),
        ("features_12_add", "features_13_add", (1, 1)),
    ]
    assert all(merge.added for merge in plan.merges)  # all end in linear bottlenecks
    bare = published_plan.plan_of(findings, published_plan.KEPT, published_plan.PRUNED, space=published_plan.COMPOSED)
    assert [replace(merge, added="") for merge in plan.merges] == list(bare.merges)


def test_what_cannot_be_merged_is_told(findings: fxmerge.Findings) -> None:
    with pytest.raises(LookupError, match="no candidate merges convolutions 1 to 4"):
        published_plan.plan_of(findings, (0, 4, *range(5, 52)), (2,))


@pytest.mark.filterwarnings("ignore:.*too few")
def test_the_benchmark_runs_and_ours_loses_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a timer that counts and losses made up, two small images."""
    timer = PriceTimer()
    monkeypatch.setattr(fxmerge, "compare", timer)
    monkeypatch.setattr(published_plan, "TIMER", timer)
    monkeypatch.setattr(published_plan, "SCORER", MadeUp())
    options = argparse.Namespace(
        weights=None, images=None, count=2, size=32, batch=1, device="cpu", dtype="float32", channels_last=False,
        backends=["eager"], max_kernel=3, store=None, out=None,
    )  # fmt: skip
    report = published_plan.run(options)
    rows = {cells[2].strip(): cells for line in report.splitlines() if (cells := line.split("|"))[0] == "" and len(cells) > 6}
    assert rows["published plan"][6].strip() == "38"
    assert rows["original, folded"][5].strip() == "1.00x"
    losses = re.search(r"Predicted loss: (\S+) of the published plan, (\S+) of ours", report)
    assert losses is not None
    assert float(losses[2]) <= float(losses[1]) == 13.0  # activations that the published plan removes
