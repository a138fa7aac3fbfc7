"""Published tables are read, solved and written; what is wrong with a file is told by line and column."""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.core.table import Importance, ImportanceTable
from fxmerge.errors import InputError, TableError
from fxmerge.interchange import read_published, write_published
from tests.fakes import PriceTimer

TIMES = """id,st,end,ker,str,is_dw,time,stdev
0,0,1,3,1,False,1.5,0.01
1,0,2,5,1,False,2.0,0.02
2,0,2,3,1,False,1.25,0.01
3,1,2,3,1,False,1.0000001,0.01
4,1,2,0,1,True,0.0,0.0
"""
# As pandas writes it: an index without a name before, scores behind.
SCORES = """,id,st,end,ker,str,is_dw,conv_comb,val_acc,importance
0,0,0,1,3,1,False,"(1,)",0.0,1.0
1,1,0,2,5,1,False,"(1, 2)",-20.0,0.8187307530779818
2,2,0,2,3,1,False,"(2,)",-50.0,0.6065306597126334
3,3,1,2,3,1,False,"(2,)",1.0,1.010050167084168
4,4,1,2,0,1,True,(),-100.0,0.36787944117144233
"""


def put(folder: Path, times: str = TIMES, scores: str = SCORES) -> tuple[Path, Path]:
    (folder / "time.csv").write_text(times)
    (folder / "imp.csv").write_text(scores)
    return folder / "time.csv", folder / "imp.csv"


def test_rows_become_candidates_and_layers_left_alone(tmp_path: Path) -> None:
    tables = read_published(*put(tmp_path))
    assert tables.root.children[0].cuts == ("conv0", "conv1", "conv2")
    assert tables.units_ns == {"conv1": 1_500_000, "conv2": 1_000_001}
    assert tables.units_loss == pytest.approx({"conv1": 0.0, "conv2": -0.01})
    assert [(c.entry, c.end, c.kind, c.geometry.kernel, c.removed) for c in tables.candidates] == [
        ("conv0", "conv2", "composed", (5, 5), ()),
        ("conv0", "conv2", "composed", (3, 3), ("conv1",)),
        ("conv1", "conv2", "identity", (1, 1), ("conv2",)),
    ]
    assert tables.latencies_ns == (2_000_000, 1_250_000, 0)
    assert tables.losses == pytest.approx((0.2, 0.5, 1.0))
    assert tables.candidates[0].activations == ("activation1",)


def test_the_published_objective_is_solved_on_them(tmp_path: Path) -> None:
    """Sums of importances: 2.010 alone, 1.368 with layer 2 dropped (1.5 ms), 0.819 and 0.607 merged."""
    front = read_published(*put(tmp_path)).solve()
    assert front.latencies_ns == (1_250_000, 1_500_000, 2_500_001)
    assert [2 - loss for loss in front.losses] == pytest.approx([math.exp(-0.5), 1 + math.exp(-1), 1 + math.exp(0.01)], abs=1e-8)
    additive = read_published(*put(tmp_path)).solve(objective="additive-loss")
    assert additive.latencies_ns == (1_250_000, 2_000_000, 2_500_001)
    assert additive.losses == pytest.approx((0.5, 0.2, 0.0))


def test_a_random_table_is_solved_as_by_trying_every_path(tmp_path: Path) -> None:
    random = np.random.default_rng(8)
    n = 7
    rows = [(s, e, k) for s in range(n) for e in range(s + 1, min(n, s + 4) + 1) for k in ([3] if e == s + 1 else [1, 3, 5])]
    ms = {row: round(float(random.uniform(0.1, 2)), 4) for row in rows}
    score = {row: float(np.exp(random.uniform(-0.5, 0.02))) for row in rows}
    keys = [f"{i},{s},{e},{k},1,False" for i, (s, e, k) in enumerate(rows)]
    times = [f"{key},{ms[row]},0.0" for key, row in zip(keys, rows, strict=True)]
    scores = [f'{key},"({row[1]},)",{score[row]!r}' for key, row in zip(keys, rows, strict=True)]
    heads = TIMES.splitlines()[0], "id,st,end,ker,str,is_dw,conv_comb,importance"
    front = read_published(*put(tmp_path, "\n".join([heads[0], *times]), "\n".join([heads[1], *scores]))).solve()
    paths = [[]]
    done: list[list[tuple[int, int, int]]] = []
    while paths:
        path = paths.pop()
        at = path[-1][1] if path else 0
        done += [path] if at == n else []
        paths += [[*path, row] for row in rows if row[0] == at]
    for latency_ns, loss in zip(front.latencies_ns, front.losses, strict=True):
        best = max(sum(score[r] for r in p) for p in done if sum(round(ms[r] * 1e6) for r in p) <= latency_ns)
        assert n - loss == pytest.approx(best, abs=1e-7)
    assert front.fastest_ns == min(sum(round(ms[r] * 1e6) for r in p) for p in done)


def edited(text: str, line: int, old: str, new: str) -> str:
    lines = text.splitlines()
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("which", "line", "old", "new", "column", "message"),
    [
        ("time", 1, "is_dw", "dw", "is_dw", "no such column; found id, st, end, ker, str, dw, time, stdev"),
        ("time", 3, "2.0", "nan", "time", "expected milliseconds, finite and from 0 on, found 'nan'"),
        ("time", 3, "2.0", "-2.0", "time", "expected milliseconds"),
        ("time", 3, "2.0", "", "time", "expected milliseconds, .* found ''"),
        ("time", 4, "False", "maybe", "is_dw", "expected True or False, found 'maybe'"),
        ("time", 4, ",3,", ",3.5,", "ker", "expected a whole number from 0 on, found '3.5'"),
        ("time", 4, "0,2", "2,2", "end", "a stretch from 2 ends behind it, found 2"),
        ("time", 4, ",1,False", ",0,False", "str", "expected a stride from 1 on, found 0"),
        ("time", 4, "3,1,False", "5,1,False", "st", "line 3 has the same st, end, ker, str, is_dw"),
        ("time", 4, "3,1,False", "7,1,False", "st", "imp.csv has no row of the same st, end, ker, str, is_dw"),
        ("time", 5, ",1.0000001,0.01", "", "time", "the line ends before it"),
        ("time", 5, "0.01", "0.01,7", "stdev", "the line goes on behind the last column"),
        ("imp", 3, '"(1, 2)"', '"(1, 3)"', "conv_comb", "convolutions 1 to 2 can be kept, each once, found .1, 3."),
        ("imp", 3, '"(1, 2)"', '"(1, 1)"', "conv_comb", "each once"),
        ("imp", 3, '"(1, 2)"', "()", "conv_comb", "kernel 0 keeps no convolution"),
        ("imp", 3, '"(1, 2)"', '"[1, 2]"', "conv_comb", "expected numbers of convolutions, such as .3, 5."),
        ("imp", 3, '"(1, 2)"', '"__import__(""os"")"', "conv_comb", "expected numbers of convolutions"),
        ("imp", 6, "0.36787944117144233", "0.0", "importance", "expected a finite number above 0, found '0.0'"),
        ("imp", 6, "0.36787944117144233", "inf", "importance", "expected a finite number above 0"),
        ("imp", 1, "importance", "imp", "importance", "no such column"),
    ],
)
def test_a_damaged_file_is_told_by_line_and_column(
    which: str, line: int, old: str, new: str, column: str, message: str, tmp_path: Path
) -> None:
    files = put(
        tmp_path,
        edited(TIMES, line, old, new) if which == "time" else TIMES,
        edited(SCORES, line, old, new) if which == "imp" else SCORES,
    )
    with pytest.raises(TableError, match=rf"{which}\.csv, line {line}, column {column}: .*{message}") as told:
        read_published(*files)
    assert (Path(told.value.path).name, told.value.line, told.value.column) == (f"{which}.csv", line, column)


def test_an_end_that_no_network_has_is_told_at_once(tmp_path: Path) -> None:
    times, scores = (edited(text, 5, "1,2,", "1,1000000000000,") for text in (TIMES, SCORES))
    message = r"time\.csv, line 5, column end: 5 rows cannot leave each of convolutions 1 to 1000000000000 alone; each needs one"
    with pytest.raises(TableError, match=message):
        read_published(*put(tmp_path, times, scores))


def test_times_are_whole_nanoseconds_as_they_were_written(tmp_path: Path) -> None:
    assert math.ceil(1.000007 * 1e6) == 1_000_008
    assert read_published(*put(tmp_path, edited(TIMES, 2, "1.5", "1.000007"))).units_ns["conv1"] == 1_000_007


def test_a_file_that_is_no_text_or_empty_is_told(tmp_path: Path) -> None:
    files = put(tmp_path)
    files[0].write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TableError, match=r"time\.csv, after line 1: it is not CSV in UTF-8"):
        read_published(*files)
    files[0].write_text("")
    with pytest.raises(TableError, match=r"line 1, column st: no such column; found nothing"):
        read_published(*files)
    files[0].write_text(TIMES.splitlines()[0])
    with pytest.raises(TableError, match=r"time\.csv: no rows"):
        read_published(*files)


def test_a_layer_needs_exactly_one_row_that_leaves_it_alone(tmp_path: Path) -> None:
    times, scores = ("\n".join(text.splitlines()[:4] + text.splitlines()[5:]) for text in (TIMES, SCORES))
    with pytest.raises(TableError, match=r"time\.csv: no row leaves convolution 2 alone .st 1, end 2, kept."):
        read_published(*put(tmp_path, times, scores))
    with pytest.raises(TableError, match=r"time\.csv, line 7, column ker: line 5 leaves convolution 2 alone already"):
        read_published(*put(tmp_path, TIMES + "5,1,2,5,1,False,1.0,0.0\n"))


# Writing


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
