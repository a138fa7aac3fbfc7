"""Tables in the format of the LayerMerge code base, read.

Two CSV files, as LayerMerge (Kim, El Halabi, Ji, Song; ICML 2024, arXiv 2406.12837) keeps them:

    id,st,end,ker,str,is_dw,time,stdev              latency: time and stdev in milliseconds
    id,st,end,ker,str,is_dw,conv_comb,importance    importance: exp(change), and which convolutions are kept

The network is a chain. Convolutions are numbered in the order they run; place k is the tensor behind convolution k. A row is one
way to replace what lies from place st to place end, convolutions st+1 to end, by a convolution of kernel ``ker`` (0 for none at
all) and stride ``str``, depthwise or not; ``conv_comb`` is the tuple of those that are kept, ``"(3, 5)"``. The row of a single
convolution that is kept, (end-1, end), is that layer left alone. In their networks convolution 0 is the stem, which no row holds.
Other columns, as their scripts leave them, are passed over.
"""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fxmerge.core.geometry import Axis, Geometry
from fxmerge.core.plan import ParetoFront
from fxmerge.core.region import Chain, Unit
from fxmerge.core.segment import Candidate
from fxmerge.errors import TableError
from fxmerge.interchange.rows import Row, natural, positive, rows, truth
from fxmerge.solve.frontier import MAX_POINTS, solve
from fxmerge.solve.objective import Objective

LATENCY_COLUMNS = ("id", "st", "end", "ker", "str", "is_dw", "time", "stdev")
IMPORTANCE_COLUMNS = ("id", "st", "end", "ker", "str", "is_dw", "conv_comb", "importance")

_OLDER = ". Tables of depth compression (st_act, end_act, no ker) are read by fxmerge.read_depth_tables()"

#: (st, end, ker, str, is_dw)
Key: TypeAlias = tuple[int, int, int, int, bool]


@dataclass(frozen=True, slots=True)
class PublishedTables:
    """Two published tables as :func:`fxmerge.solve.frontier.solve` takes them.

    The tables hold no channels; all geometries have two, one group for each where ``is_dw``. Losses are -ln(importance).

    Args:
        root: a network that is one chain, from the first place that a row starts at; place k is called ``conv{k}``.
        candidates, latencies_ns, losses: the rows that are not a layer left alone.
        units_ns, units_loss: the rows that are.
    """

    root: Unit
    candidates: tuple[Candidate, ...]
    latencies_ns: tuple[int, ...]
    losses: tuple[float, ...]
    units_ns: Mapping[str, int]
    units_loss: Mapping[str, float]

    def solve(self, *, objective: Objective = "layermerge", max_points: int | None = MAX_POINTS) -> ParetoFront:
        """The front of these tables; under ``additive-loss`` what is better than the original counts as equal to it."""
        lift = 0.0 if objective == "additive-loss" else -math.inf
        return solve(
            self.root,
            self.candidates,
            self.latencies_ns,
            [max(lift, loss) for loss in self.losses],
            units_ns=self.units_ns,
            units_loss={end: max(lift, loss) for end, loss in self.units_loss.items()},
            remainder_ns=0,
            original_ns=sum(self.units_ns.values()),
            fingerprint="",
            objective=objective,
            max_points=max_points,
        )


def read_published(latency: str | os.PathLike[str], importance: str | os.PathLike[str]) -> PublishedTables:
    """Read both tables of a network.

    Args:
        latency: the file of times.
        importance: the file of importances, normalised (their ``--mode normalize``).

    Raises:
        TableError: a file is damaged, or the two do not belong together; it names file, line and column.
        OSError: a file cannot be read.
    """
    times = _by_key(latency, LATENCY_COLUMNS[1:7])
    scores = _by_key(importance, IMPORTANCE_COLUMNS[1:])
    for found, other, there in ((times, scores, importance), (scores, times, latency)):
        for key, row in found.items():
            if key not in other:
                raise row.fault("st", f"{os.fspath(there)} has no row of the same st, end, ker, str, is_dw: {key}")
    low, high = min(st for st, *_ in times), max(end for _, end, *_ in times)
    if high - low > len(times):
        last = next(row for (_, end, *_), row in times.items() if end == high)
        raise last.fault("end", f"{len(times)} rows cannot leave each of convolutions {low + 1} to {high} alone; each needs one")
    names = {place: f"conv{place}" for place in range(low, high + 1)}
    cuts = tuple(names.values())
    root = Unit("output", (), (Chain(cuts, tuple(Unit(name, (name,)) for name in cuts[1:])),))
    candidates: list[Candidate] = []
    latencies_ns: list[int] = []
    losses: list[float] = []
    units_ns: dict[str, int] = {}
    units_loss: dict[str, float] = {}
    for key, row in times.items():
        score = scores[key].read("importance", positive, "a finite number above 0")
        kept = _kept(scores[key], key)
        nanoseconds, loss = row.nanoseconds(), -math.log(score)
        if key[1] == key[0] + 1 and kept:
            units_ns[names[key[1]]], units_loss[names[key[1]]] = nanoseconds, loss
            continue
        candidates.append(_candidate(key, kept, names))
        latencies_ns.append(nanoseconds)
        losses.append(loss)
    for place in range(low + 1, high + 1):
        if names[place] not in units_ns:
            text = f"{os.fspath(latency)}: no row leaves convolution {place} alone (st {place - 1}, end {place}, kept)"
            raise TableError(text, path=os.fspath(latency), line=0, column="")
    return PublishedTables(root, tuple(candidates), tuple(latencies_ns), tuple(losses), units_ns, units_loss)


def _by_key(path: str | os.PathLike[str], columns: Sequence[str]) -> dict[Key, Row]:
    found: dict[Key, Row] = {}
    for row in rows(path, columns, _OLDER):
        key = _key(row)
        alone = next((k for k in found if k[:2] == key[:2]), None) if key[1] == key[0] + 1 and key[2] else None
        if key in found:
            raise row.fault("st", f"line {found[key].line} has the same st, end, ker, str, is_dw: {key}")
        if alone is not None and alone[2]:
            raise row.fault("ker", f"line {found[alone].line} leaves convolution {key[1]} alone already; a layer has one row")
        found[key] = row
    if not found:
        raise TableError(f"{os.fspath(path)}: no rows", path=os.fspath(path), line=1, column="")
    return found


def _kept(row: Row, key: Key) -> tuple[int, ...]:
    kept = row.read("conv_comb", _numbers, "numbers of convolutions, such as (3, 5)")
    st, end, ker, *_ = key
    if not all(st < number <= end for number in kept) or len(set(kept)) < len(kept):
        raise row.fault("conv_comb", f"of ({st}, {end}) convolutions {st + 1} to {end} can be kept, each once, found {kept}")
    if bool(kept) != bool(ker):
        raise row.fault("conv_comb", f"kernel 0 keeps no convolution, any other one at least; found {kept} with kernel {ker}")
    return tuple(sorted(kept))


def _candidate(key: Key, kept: Sequence[int], names: Mapping[int, str]) -> Candidate:
    st, end, ker, stride, depthwise = key
    gone = tuple(names[k] for k in range(st + 1, end + 1) if k not in kept)
    activations = tuple(f"activation{k}" for k in range(st + 1, end))
    if ker == 0:
        return Candidate(names[st], names[end], names[end], "identity", Geometry.identity(2, 2), activations, gone)
    axis = Axis.convolution(ker, stride, (ker // 2, ker // 2), 1)
    geometry = Geometry(2, 2, (axis, axis), 2 if depthwise else 1, bias=True)
    return Candidate(names[st], names[end], names[end], "composed", geometry, activations, gone)


def _key(row: Row) -> Key:
    st, end = row.stretch()
    ker, stride = (row.read(name, natural, "a whole number from 0 on") for name in ("ker", "str"))
    if stride < 1:
        raise row.fault("str", f"expected a stride from 1 on, found {stride}")
    return st, end, ker, stride, row.read("is_dw", truth, "True or False")


def _numbers(text: str) -> tuple[int, ...]:
    value = ast.literal_eval(text)
    if not isinstance(value, tuple) or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
        raise ValueError
    return value
