"""Tables of depth compression are solved as by trying every path; what is wrong with a file is told by line and column."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import fxmerge
from fxmerge.errors import InputError, TableError
from fxmerge.interchange import read_depth_tables, read_published
from tests.interchange.texts import edited

# As their scripts write them; place 2 may lose its activation at the end of a row or at the start of one.
TIMES = """id,st,end,time,stdev,breaks
0,0,1,1.5,0.01,"0,1"
1,0,2,1.25,0.02,"0,2"
2,1,2,1.0000001,0.01,"1,2"
3,0,3,1.9,0.01,"0,2,3"
4,1,3,1.6,0.01,"1,3"
5,2,3,0.65,0.01,"2,3"
"""
WORTH = """,id,st,end,st_act,end_act,imp,breaks
0,0,0,1,1,1,0.5,"0,1"
1,1,0,2,1,1,-3.0,"0,2"
2,2,0,2,1,0,-2.5,"0,2"
3,3,1,2,1,1,1.0,"1,2"
4,4,1,2,1,0,1.5,"1,2"
5,5,0,3,1,1,-9.0,"0,3"
6,6,1,3,1,1,-4.0,"1,3"
7,7,2,3,1,1,0.25,"2,3"
8,8,2,3,0,1,0.75,"2,3"
"""
RAW_TIMES = "\n".join(line.partition(',"')[0].replace(",breaks", "") for line in TIMES.splitlines()).replace("0,3,1.9", "0,3,7.9")


def put(folder: Path, times: str = TIMES, worth: str = WORTH) -> tuple[Path, Path]:
    (folder / "time.csv").write_text(times)
    (folder / "imp.csv").write_text(worth)
    return folder / "time.csv", folder / "imp.csv"


def test_rows_that_meet_with_the_same_activation_become_plans(tmp_path: Path) -> None:
    """The fastest plans are the row over all, then 0-2-3 and 0-1-2-3 with no activation at 2, where both rows are worth more."""
    tables = fxmerge.read_depth_tables(*put(tmp_path))
    front = tables.solve()
    assert front.latencies_ns == (1_900_000, 3_150_001)
    assert front.losses == pytest.approx((2.5 - 0.75, -(0.5 + 1.5 + 0.75)))
    assert front.original_ns == 3_150_001
    assert tables.positions(front.plan(0)) == (frozenset({3}), frozenset({2, 3}))
    assert tables.positions(front.plan(1)) == (frozenset({1, 3}), frozenset({1, 2, 3}))
    assert [(merge.entry, merge.end, merge.activations) for merge in front.plan(1).merges] == [
        ("conv0", "conv1", ()),
        ("conv1", "conv2 linear", ("activation2",)),
        ("conv2 linear", "conv3", ()),
    ]


def test_where_times_are_of_single_convolutions_the_first_stage_is_done_here(tmp_path: Path) -> None:
    """0 to 3 as one takes 7.9 ms, as 0-2 and 2-3 it takes 1.9."""
    given, made = (read_depth_tables(*put(tmp_path, times)) for times in (TIMES, RAW_TIMES))
    assert given == made
    assert next(piece for piece in made.pieces if piece.length == 3).breaks == (0, 2, 3)


@pytest.mark.parametrize("seed", range(20))
def test_random_tables_are_solved_as_by_trying_every_path(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    n = 6
    spans = [(s, e) for s in range(n) for e in range(s + 1, n + 1) if e == s + 1 or random.random() < 0.6]
    ms = {span: round(float(random.uniform(0.1, 2)), 3) for span in spans}
    bends = [k for k in range(1, n + 1) if random.random() < 0.6]
    states = [(s, e, a, b) for s, e in spans for a in ((1, 0) if s in bends else (1,)) for b in ((1, 0) if e in bends else (1,))]
    worth = {state: round(float(random.normal(seed % 3 - 1, 1)), 3) for state in states if random.random() < 0.9 or not seed % 5}
    times = ["id,st,end,time,stdev", *(f"{k},{s},{e},{ms[s, e]},0.0" for k, (s, e) in enumerate(spans))]
    rows = ["id,st,end,st_act,end_act,imp,breaks"]
    rows += [f'{k},{s},{e},{a},{b},{w},"{s},{e}"' for k, ((s, e, a, b), w) in enumerate(worth.items())]
    every = list(plans(n, ms, worth))
    files = put(tmp_path, "\n".join(times), "\n".join(rows))
    if not every:
        with pytest.raises(TableError, match=r"no rows lead from place 0 to 6"):
            read_depth_tables(*files)
        return
    tables = read_depth_tables(*files)
    front = tables.solve()
    best = sorted(every)
    unbeaten = [(ns, loss) for k, (ns, loss) in enumerate(best) if all(loss < before - 1e-12 for _, before in best[:k])]
    assert list(front.latencies_ns) == [ns for ns, _ in unbeaten]
    assert front.losses == pytest.approx([loss for _, loss in unbeaten], abs=1e-7)
    for point in range(len(front)):
        kept, ends = tables.positions(front.plan(point))
        assert kept <= ends <= set(range(1, n + 1))
        assert n in ends


def plans(n: int, ms: dict[tuple[int, int], float], worth: dict[tuple[int, int, int, int], float]) -> Iterator[tuple[int, float]]:
    """(nanoseconds, minus the sum of importances) of every sequence of rows that meet, each row in every set of pieces."""

    def pieces(s: int, e: int) -> Iterator[int]:
        for middle in range(s + 1, e + 1):
            if (s, middle) in ms:
                yield from (round(ms[s, middle] * 1e6) + behind for behind in (pieces(middle, e) if middle < e else iter((0,))))

    fastest = {span: min(pieces(*span)) for span in ms}
    paths = [(0, 1, 0, 0.0)]
    while paths:
        place, act, ns, loss = paths.pop()
        if place == n:
            yield ns, loss
        paths += [(e, b, ns + fastest[s, e], loss - w) for (s, e, a, b), w in worth.items() if (s, a) == (place, act)]


@pytest.mark.parametrize(
    ("which", "line", "old", "new", "column", "message"),
    [
        ("time", 1, "time", "ms", "time", "no such column; found id, st, end, ms, stdev, breaks"),
        ("time", 1, "stdev", "st", "st", "there are two columns of this name"),
        ("time", 3, "1.25", "-1", "time", "expected milliseconds"),
        ("time", 3, "0,2,", "2,2,", "end", "a stretch from 2 ends behind it, found 2"),
        ("time", 3, "0,2,", "0,1,", "st", "line 2 has the same st, end: .0, 1."),
        ("time", 5, '"0,2,3"', '"0,2"', "breaks", "expected rising places from 0 to 3, found .0, 2."),
        ("time", 5, '"0,2,3"', '"0,2,2,3"', "breaks", "expected rising places from 0 to 3"),
        ("time", 5, '"0,2,3"', '"0,x,3"', "breaks", "expected places, such as"),
        ("time", 5, '"0,2,3"', f'"0,{"9" * 5000}"', "breaks", "expected places, such as"),
        ("imp", 1, "imp", "val_acc", "imp", "no such column; .* A raw table has val_acc; .*--mode ext-imp"),
        ("imp", 3, "-3.0", "nan", "imp", "expected a finite number, found 'nan'"),
        ("imp", 3, "1,1,-3.0", "2,1,-3.0", "st_act", "expected 0 or 1, found '2'"),
        ("imp", 4, "1,0,-2.5", "1,1,-2.5", "st", r"line 3 has the same st, end, st_act, end_act: \(0, 2, 1, 1\)"),
        ("imp", 4, "0,2,1,0", "0,4,1,0", "st", r"time.csv has no row of the same st and end: \(0, 4\)"),
    ],
)
def test_a_damaged_file_is_told_by_line_and_column(
    which: str, line: int, old: str, new: str, column: str, message: str, tmp_path: Path
) -> None:
    times = edited(TIMES, line, old, new) if which == "time" else TIMES
    worth = edited(WORTH, line, old, new) if which == "imp" else WORTH
    with pytest.raises(TableError, match=rf"{which}\.csv, line {line}, column {column}: .*{message}") as told:
        read_depth_tables(*put(tmp_path, times, worth))
    assert len(str(told.value)) < 500


def test_a_convolution_without_a_row_of_its_own_is_told(tmp_path: Path) -> None:
    without = "\n".join(line for line in TIMES.splitlines() if not line.startswith("2,"))
    with pytest.raises(TableError, match=r"time\.csv: no row of convolution 2 by itself .st 1, end 2"):
        read_depth_tables(*put(tmp_path, without))
    with pytest.raises(TableError, match=r"time\.csv: no row of convolution 4 by itself"):
        read_depth_tables(*put(tmp_path, TIMES + '6,0,99999999999999,1.0,0.0,"0,99999999999999"\n'))
    with pytest.raises(TableError, match=r"time\.csv: no rows"):
        read_depth_tables(*put(tmp_path, TIMES.splitlines()[0]))


def test_rows_whose_activations_never_meet_are_told(tmp_path: Path) -> None:
    apart = "id,st,end,st_act,end_act,imp\n0,0,2,1,0,1.0\n1,2,3,1,1,1.0\n2,0,1,0,1,1.0\n"
    with pytest.raises(TableError, match=r"imp\.csv: no rows lead from place 0 to 3: the activations where they meet do not agree"):
        read_depth_tables(*put(tmp_path, worth=apart))


def test_each_of_the_two_formats_says_who_reads_the_other(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"no such column; found .* are read by fxmerge\.read_depth_tables\(\)"):
        read_published(*put(tmp_path))


def test_positions_of_another_plan_are_refused(tmp_path: Path) -> None:
    tables = read_depth_tables(*put(tmp_path))
    other = read_depth_tables(*put(tmp_path, worth=WORTH.replace("2,3,0,1,0.75", "0,1,0,1,0.75").replace("1,1,0.25", "1,1,9.25")))
    plan = tables.solve().plan(1)
    with pytest.raises(InputError, match="'conv2 linear->conv3 composed .*' is no row of these tables; give a plan of their own"):
        other.positions(plan)


def test_a_place_far_away_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "time.csv").write_text("st,end,time\n0,1,1\n1,2,1\n2,1000000000000,1\n")
    (tmp_path / "importance.csv").write_text("st,end,st_act,end_act,imp\n0,1,1,1,0\n")
    with pytest.raises(fxmerge.FxMergeError, match="no row of convolution 3 by itself"):
        fxmerge.read_depth_tables(tmp_path / "time.csv", tmp_path / "importance.csv")


def test_the_fastest_pieces_meet_wherever_there_are_rows(tmp_path: Path) -> None:
    (tmp_path / "time.csv").write_text("st,end,time\n0,1,1\n1,2,1\n2,3,1\n0,3,9\n")
    (tmp_path / "importance.csv").write_text("st,end,st_act,end_act,imp\n0,3,1,1,0\n")
    front = fxmerge.read_depth_tables(tmp_path / "time.csv", tmp_path / "importance.csv").solve()
    assert [front.plan(index).latency_ns for index in range(len(front))] == [3_000_000]
