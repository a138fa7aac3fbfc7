"""Published tables are read and solved; what is wrong with a file is told by line and column."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from fxmerge.errors import TableError
from fxmerge.interchange import read_published
from tests.interchange.texts import edited

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
