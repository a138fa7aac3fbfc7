"""What is written in the published format is read back; what it cannot say is refused, and nothing is written."""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.core.table import Importance, ImportanceTable
from fxmerge.errors import InputError
from fxmerge.interchange import read_published, write_published
from tests.fakes import PriceTimer


def chain_of(*layers: nn.Module) -> tuple[fxmerge.Findings, tuple[fxmerge.Proposal, ...], fxmerge.LatencyTable, ImportanceTable]:
    model, example = nn.Sequential(*layers).eval(), torch.randn(1, 4, 16, 16)
    findings = fxmerge.find_segments(fxmerge.trace(model, example))
    proposals = fxmerge.propose(findings, fxmerge.Space(fitted=False))
    latency = fxmerge.measure_latency(findings, proposals, (example,), timer=PriceTimer())
    names = [c.id for p in proposals for c in p.candidates]
    return findings, proposals, latency, ImportanceTable({n: Importance(0.01 * k, 8, "x") for k, n in enumerate(names)})


def three() -> list[nn.Module]:
    one, two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
    return [one, nn.BatchNorm2d(4), nn.ReLU(), two, nn.ReLU(), nn.Conv2d(4, 8, 1), nn.ReLU()]


@pytest.mark.parametrize("first", [1, 4])
def test_what_is_written_is_read_back_and_gives_the_same_front(first: int, tmp_path: Path) -> None:
    tables = chain_of(*three())
    paths = tmp_path / "time.csv", tmp_path / "imp.csv"
    write_published(*tables, *paths, first=first)
    findings, proposals, latency, importance = tables
    candidates = [c for p in proposals for c in p.candidates]
    ours = fxmerge.solve(findings.region, candidates, latency, importance, "", objective="layermerge")
    theirs = read_published(*paths)
    outside = latency.network.median_ns - sum(theirs.units_ns.values())
    assert [ns + outside for ns in theirs.solve().latencies_ns] == list(ours.latencies_ns)
    assert theirs.solve().losses == pytest.approx(ours.losses, abs=1e-8)
    assert len(ours) > 2
    with paths[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {
        (r["st"], r["end"], r["conv_comb"]) for r in rows if r["importance"] == "1.0" and int(r["end"]) == int(r["st"]) + 1
    } >= {(str(first + k - 1), str(first + k), f"({first + k},)") for k in range(3)}
    pairs = {row["conv_comb"] for row in rows if row["st"] == str(first - 1) and row["end"] == str(first + 1)}
    assert pairs == {f"({first}, {first + 1})", f"({first},)", f"({first + 1},)", "()"}
    assert list(itertools.islice(rows[0], 8)) == ["id", "st", "end", "ker", "str", "is_dw", "conv_comb", "importance"]


def test_where_parts_take_longer_alone_the_front_is_that_of_what_they_take_in_the_network(tmp_path: Path) -> None:
    findings, proposals, latency, importance = chain_of(*three())
    latency = replace(latency, network=replace(latency.network, median_ns=latency.network.median_ns // 3))
    assert latency.pace < 0.4
    paths = tmp_path / "time.csv", tmp_path / "imp.csv"
    write_published(findings, proposals, latency, importance, *paths)
    ours = fxmerge.solve(findings.region, [c for p in proposals for c in p.candidates], latency, importance, "")
    theirs = read_published(*paths)
    outside = latency.network.median_ns - sum(theirs.units_ns.values())
    assert [ns + outside for ns in theirs.solve(objective="additive-loss").latencies_ns] == list(ours.latencies_ns)


@pytest.mark.parametrize("loss", [746.0, math.inf, math.nan])
def test_a_loss_whose_importance_is_0_is_refused_and_nothing_is_written(loss: float, tmp_path: Path) -> None:
    findings, proposals, latency, importance = chain_of(*three())
    name = next(iter(importance.candidates))
    worse = ImportanceTable({**importance.candidates, name: Importance(loss, 8, "x")})
    with pytest.raises(InputError, match=rf"candidate '{name}' has a loss of {loss}; its importance, .* Leave it out"):
        write_published(findings, proposals, latency, worse, tmp_path / "time.csv", tmp_path / "imp.csv")
    assert not list(tmp_path.iterdir())


def test_what_their_format_cannot_say_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    paths = tmp_path / "time.csv", tmp_path / "imp.csv"

    def refused(message: str, *layers: nn.Module, **options: int) -> None:
        with pytest.raises(InputError, match=message):
            write_published(*chain_of(*layers), *paths, **options)
        assert not list(tmp_path.iterdir())

    refused("starts at 'input.*', before convolution 0; no row can say that", *three(), first=0)
    wide = nn.Conv2d(4, 4, (1, 3), padding=(0, 1))
    refused("their format has one number for both axes", wide, nn.ReLU(), nn.Conv2d(4, 4, 1))
    refused(
        "has 2 groups; their format has 1, or depthwise", nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 1)
    )
    refused("has dilation 2, padding", nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(4, 4, 1))
    refused("padding .0, 0.; theirs is 1 and half", nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))

    findings, *_ = chain_of(*three())
    fitted = fxmerge.propose(findings, fxmerge.Space(composed=False, prune=False, identity=False))
    latency = fxmerge.measure_latency(findings, fitted, (torch.randn(1, 4, 16, 16),), timer=PriceTimer())
    scores = ImportanceTable({c.id: Importance(0.1, 1, "") for p in fitted for c in p.candidates})
    with pytest.raises(InputError, match=r"is fitted; their format knows kernels composed"):
        write_published(findings, fitted, latency, scores, *paths)


def test_a_network_with_branches_is_no_chain_of_theirs(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(torch.relu(self.a(x)))

    message = (
        r"lie in 2 chains: [0-9]+ from 'input_1' to '_1_add', [0-9]+ from '_0' to '_1_b'\. Blocks have branches; .*"
        r"Give the proposals whose segments start and end between the same two"
    )
    with pytest.raises(InputError, match=message):
        write_published(*chain_of(nn.Conv2d(4, 4, 3, padding=1), Block()), tmp_path / "a", tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_without_a_candidate_in_both_tables_it_is_said_that_nothing_can_be_written(tmp_path: Path) -> None:
    findings, proposals, latency, _ = chain_of(*three())
    with pytest.raises(InputError, match="no candidate is in both tables, and in this network: nothing can be written"):
        write_published(findings, proposals, latency, ImportanceTable({}), tmp_path / "a", tmp_path / "b")
