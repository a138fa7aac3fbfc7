"""Tables in the format of the depth compression code base, read.

Efficient Latency-Aware CNN Depth Compression via Two-Stage Dynamic Programming (Kim, Jeong, Lee, Song; ICML 2023,
arXiv 2301.12187) keeps two CSV files of a chain; place k is the tensor behind convolution k, and 0 what enters:

    id,st,end,time,stdev                         what lies from st to end as one convolution: milliseconds
    id,st,end,time,stdev,breaks                  ... as its fastest pieces, which meet at the places of "0,1,3"
    id,st,end,st_act,end_act,imp,breaks          what it is worth, if there is an activation (1) at st, at end, or none (0)

The first is T of the paper, the second T_opt, the third I_opt: changes of accuracy, normalised, so that more is better (the raw
table, with ``val_acc``, is normalised by their ``generate_tables.py --mode ext-imp``). Other columns are passed over, and so are
rows from the first place without an activation, which no plan reaches.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import TypeAlias

from fxmerge.errors import InputError, TableError
from fxmerge.interchange.depth import DepthTables, Piece, State
from fxmerge.interchange.rows import Row, finite, natural, rows, truth

#: (st, end)
Stretch: TypeAlias = tuple[int, int]
#: Nanoseconds, and the places where the pieces meet, both ends included.
Time: TypeAlias = tuple[int, tuple[int, ...]]
_RAW = ". A raw table has val_acc; theirs is normalised by `generate_tables.py --mode ext-imp`"


def read_depth_tables(latency: str | os.PathLike[str], importance: str | os.PathLike[str]) -> DepthTables:
    """Read both tables of a network.

    Args:
        latency: the file of times, T or T_opt.
        importance: the file of importances, normalised.

    Raises:
        TableError: a file is damaged, or the two do not belong together; it names file, line and column.
        OSError: a file cannot be read.
    """
    times = _times(latency)
    first, last = min(st for st, _ in times), max(end for _, end in times)
    alone = 0
    for place in range(first + 1, min(last, first + len(times) + 1) + 1):
        if (place - 1, place) not in times:
            text = f"{os.fspath(latency)}: no row of convolution {place} by itself (st {place - 1}, end {place})"
            raise TableError(text, path=os.fspath(latency), line=0, column="")
        alone += times[place - 1, place][0]
    chosen: dict[tuple[State, State], Piece] = {}
    for (start, stop), row in _states(importance).items():
        where = start[0], stop[0]
        if where not in times:
            raise row.fault("st", f"{os.fspath(latency)} has no row of the same st and end: {where}")
        if start == (first, False):
            continue
        piece = Piece(start, stop, times[where][0], row.read("imp", finite, "a finite number"), times[where][1])
        key = start, (last, True) if stop[0] == last else stop
        if key not in chosen or chosen[key].importance < piece.importance:
            chosen[key] = piece
    tables = DepthTables(first, last, tuple(chosen.values()), alone)
    try:
        tables.fastest([0.0] * len(tables.pieces))
    except InputError as fault:
        raise TableError(f"{os.fspath(importance)}: {fault}", path=os.fspath(importance), line=0, column="") from fault
    return tables


def _times(path: str | os.PathLike[str]) -> dict[Stretch, Time]:
    """Nanoseconds and breaks of every stretch as its fastest pieces."""
    found: dict[Stretch, Row] = {}
    given: dict[Stretch, Time] = {}
    for row in rows(path, ("st", "end", "time")):
        where = row.stretch()
        if where in found:
            raise row.fault("st", f"line {found[where].line} has the same st, end: {where}")
        found[where] = row
        given[where] = row.nanoseconds(), _breaks(row, where) if "breaks" in row.cells else where
    if not found:
        raise TableError(f"{os.fspath(path)}: no rows", path=os.fspath(path), line=1, column="")
    return given if "breaks" in next(iter(found.values())).cells else _fastest_pieces(given)


def _fastest_pieces(given: Mapping[Stretch, Time]) -> dict[Stretch, Time]:
    """Stage 1: of every row, the fastest way from its start to its end over any rows."""
    best: dict[Stretch, Time] = {}
    ordered = sorted(given)
    for start in sorted({st for st, _ in given}):
        reached: dict[int, Time] = {start: (0, (start,))}
        for st, end in ordered:  # all that end at a place come before those that start there
            if st in reached:
                time = reached[st][0] + given[st, end][0]
                if end not in reached or time < reached[end][0]:  # of equal ones the one convolution, which comes first
                    reached[end] = time, (*reached[st][1], end)
        best.update({(start, end): time for end, time in reached.items() if (start, end) in given})
    return best


def _breaks(row: Row, where: Stretch) -> tuple[int, ...]:
    found: tuple[int, ...] = row.read("breaks", lambda text: tuple(map(natural, text.split(","))), 'places, such as "0,1,3"')
    if (found[0], found[-1]) != where or any(after <= before for before, after in itertools.pairwise(found)):
        raise row.fault("breaks", f"expected rising places from {where[0]} to {where[1]}, found {found}")
    return found


def _states(path: str | os.PathLike[str]) -> dict[tuple[State, State], Row]:
    found: dict[tuple[State, State], Row] = {}
    for row in rows(path, ("st", "end", "st_act", "end_act", "imp"), _RAW):
        (st, end), (before, behind) = row.stretch(), (row.read(name, truth, "0 or 1") for name in ("st_act", "end_act"))
        key = (st, before), (end, behind)
        if key in found:
            raise row.fault(
                "st", f"line {found[key].line} has the same st, end, st_act, end_act: {(st, end, int(before), int(behind))}"
            )
        found[key] = row
    return found
