"""Tables in the format of the LayerMerge code base, read and written.

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
import csv
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

from fxmerge.analysis.segments import Findings
from fxmerge.core.files import write_csv
from fxmerge.core.geometry import Axis, Geometry
from fxmerge.core.plan import ParetoFront
from fxmerge.core.region import Chain, Unit
from fxmerge.core.segment import Candidate, Proposal
from fxmerge.core.table import ImportanceTable, LatencyTable
from fxmerge.errors import InputError, TableError
from fxmerge.operators import Map
from fxmerge.solve.frontier import MAX_POINTS, solve
from fxmerge.solve.objective import Objective

LATENCY_COLUMNS = ("id", "st", "end", "ker", "str", "is_dw", "time", "stdev")
IMPORTANCE_COLUMNS = ("id", "st", "end", "ker", "str", "is_dw", "conv_comb", "importance")

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


# Reading


@dataclass(frozen=True, slots=True)
class _Row:
    path: str
    line: int
    cells: Mapping[str, str]

    def fault(self, column: str, text: str) -> TableError:
        return TableError(f"{self.path}, line {self.line}, column {column}: {text}", path=self.path, line=self.line, column=column)

    def read(self, column: str, convert: Callable[[str], Any], what: str) -> Any:
        text = self.cells[column]
        try:
            return convert(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError) as cause:
            raise self.fault(column, f"expected {what}, found {text!r}") from cause

    def key(self) -> Key:
        st, end, ker, stride = (self.read(name, _natural, "a whole number from 0 on") for name in ("st", "end", "ker", "str"))
        if end <= st:
            raise self.fault("end", f"a stretch from {st} ends behind it, found {end}")
        if stride < 1:
            raise self.fault("str", f"expected a stride from 1 on, found {stride}")
        return st, end, ker, stride, self.read("is_dw", _truth, "True or False")


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
        milliseconds = row.read("time", _amount, "milliseconds, finite and from 0 on")
        score = scores[key].read("importance", _positive, "a finite number above 0")
        kept = _kept(scores[key], key)
        nanoseconds, loss = math.ceil(Decimal(repr(milliseconds)) * 1_000_000), -math.log(score)  # 1.234567 * 1e6 > 1234567
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


def _by_key(path: str | os.PathLike[str], columns: Sequence[str]) -> dict[Key, _Row]:
    found: dict[Key, _Row] = {}
    for row in _rows(os.fspath(path), columns):
        key = row.key()
        alone = next((k for k in found if k[:2] == key[:2]), None) if key[1] == key[0] + 1 and key[2] else None
        if key in found:
            raise row.fault("st", f"line {found[key].line} has the same st, end, ker, str, is_dw: {key}")
        if alone is not None and alone[2]:
            raise row.fault("ker", f"line {found[alone].line} leaves convolution {key[1]} alone already; a layer has one row")
        found[key] = row
    if not found:
        raise TableError(f"{os.fspath(path)}: no rows", path=os.fspath(path), line=1, column="")
    return found


def _rows(path: str, columns: Sequence[str]) -> Iterator[_Row]:
    line = 1
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                text = f"no such column; found {', '.join(reader.fieldnames or ()) or 'nothing'}"
                raise TableError(f"{path}, line 1, column {missing[0]}: {text}", path=path, line=1, column=missing[0])
            for cells in reader:
                line = reader.line_num
                short = next((name for name in columns if cells[name] is None), None)
                if short is not None or None in cells:
                    text = "the line ends before it" if short is not None else "the line goes on behind the last column"
                    column = short or list(cells)[-2]
                    raise TableError(f"{path}, line {line}, column {column}: {text}", path=path, line=line, column=column)
                yield _Row(path, line, cells)
    except (csv.Error, UnicodeDecodeError) as fault:
        raise TableError(f"{path}, after line {line}: it is not CSV in UTF-8 ({fault})", path=path, line=line, column="") from fault


def _kept(row: _Row, key: Key) -> tuple[int, ...]:
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


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError
    return int(text)


def _truth(text: str) -> bool:
    if text not in ("True", "1", "False", "0"):
        raise ValueError
    return text in ("True", "1")


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def _numbers(text: str) -> tuple[int, ...]:
    value = ast.literal_eval(text)
    if not isinstance(value, tuple) or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
        raise ValueError
    return value


# Writing


def write_published(
    findings: Findings,
    proposals: Sequence[Proposal],
    latency: LatencyTable,
    importance: ImportanceTable,
    latency_path: str | os.PathLike[str],
    importance_path: str | os.PathLike[str],
    *,
    first: int = 1,
) -> None:
    """Write the tables of a network that is a chain in their sense.

    That is: what the candidates replace lies in one chain of single convolutions, with no block around or inside; kernels,
    strides and paddings are square; candidates are composed, or identities. Importance is exp(-loss); 1 for layers left alone.
    Times are those in the network, as the solver takes them: where parts take longer alone, the times measured by ``pace``.

    Args:
        findings, proposals: of the network; candidates missing from either table are left out.
        latency, importance: their tables.
        latency_path, importance_path: the files to write.
        first: the number of the first convolution of the chain. Their classifiers have 0 for the stem, which no row can hold.

    Raises:
        InputError: something cannot be said in their format; nothing is written.
        OSError: a file cannot be written.
    """
    known = [
        (candidate, proposal.segment.convolutions)
        for proposal in proposals
        for candidate in proposal.candidates
        if candidate.id in latency.candidates and candidate.id in importance.candidates
    ]
    chain = _the_chain(findings.region, [candidate for candidate, _ in known])
    geometries = {
        node.name: verdict.geometry
        for node, verdict in findings.verdicts.items()
        if isinstance(verdict, Map) and verdict.role == "convolution"
    }
    numbers, places = _numbered(chain, geometries, [candidate for candidate, _ in known], first)
    entries: dict[Key, tuple[int, str, tuple[int, ...], float]] = {}
    for unit in chain.units:
        convolution = next((name for name in unit.nodes if name in geometries), None)
        if convolution in numbers and unit.end in latency.units:
            number = numbers[convolution]
            key = (number - 1, number, *_square(geometries[convolution], f"convolution {convolution!r}"))
            entries[key] = (latency.unit_ns(unit.end), latency.units[unit.end], (number,), 1.0)
    for candidate, convolutions in known:
        key = _key(candidate, places)
        kept = tuple(numbers[name] for name in convolutions if name not in candidate.removed and candidate.kind != "identity")
        if key in entries:
            raise InputError(
                f"candidate {candidate.id!r}: another row has the same st, end, ker, str, is_dw: {key}. Offer one of them."
            )
        score = _score(importance, candidate)
        entries[key] = (latency.candidate_ns(candidate.id), latency.candidates[candidate.id], kept, score)
    times, scores = [], []
    for index, (key, (nanoseconds, entry, kept, score)) in enumerate(sorted(entries.items())):
        spread_ns = latency.measurements[entry].spread_ns * latency.pace
        times.append((index, *key, repr(nanoseconds / 1e6), repr(spread_ns / 1.349e6)))  # quartiles of a normal
        scores.append((index, *key, str(kept), repr(score)))
    write_csv(latency_path, LATENCY_COLUMNS, times)
    write_csv(importance_path, IMPORTANCE_COLUMNS, scores)


def _score(importance: ImportanceTable, candidate: Candidate) -> float:
    loss = importance.loss(candidate.id)
    if not abs(loss) <= _MOST_LOSS:
        raise InputError(
            f"candidate {candidate.id!r} has a loss of {loss}; its importance, exp(-loss), is no number above 0 that a file can "
            "hold. Leave it out."
        )
    return math.exp(-loss)


_MOST_LOSS = 700.0  # exp(-loss) is a float of full precision up to 708


def _the_chain(root: Unit, candidates: Sequence[Candidate]) -> Chain:
    homes = {unit.end: chain for above in root.walk() for chain in above.children for unit in chain.units}
    chains = {id(homes[c.end]): homes[c.end] for c in candidates if c.end in homes}
    if not chains:
        raise InputError("no candidate is in both tables, and in this network: nothing can be written. Measure these proposals.")
    if len(chains) > 1:
        held = Counter(id(homes[c.end]) for c in candidates if c.end in homes)
        told = [f"{held[key]} from {c.cuts[0]!r} to {c.cuts[-1]!r}" for key, c in chains.items()]
        raise InputError(
            f"candidates lie in {len(chains)} chains: {', '.join(told[:5])}{', ...' if told[5:] else ''}. Blocks have branches; "
            "their format has one chain of layers. Give the proposals whose segments start and end between the same two."
        )
    return next(iter(chains.values()))


def _numbered(
    chain: Chain, geometries: Mapping[str, Geometry], candidates: Sequence[Candidate], first: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Convolution -> number, and cut -> place, for the part of the chain that candidates cover."""
    cuts = {cut: k for k, cut in enumerate(chain.cuts)}
    low, high = min(cuts[c.entry] for c in candidates), max(cuts[c.end] for c in candidates)
    before = sum(name in geometries for unit in chain.units[:low] for name in unit.all_nodes())
    numbers: dict[str, int] = {}
    places = {chain.cuts[low]: before + first - 1}
    if places[chain.cuts[low]] < 0:
        entry = chain.cuts[low]
        raise InputError(
            f"a candidate starts at {entry!r}, before convolution 0; no row can say that. Leave it out, or give first=1."
        )
    for unit in chain.units[low:high]:
        inside = [name for name in unit.nodes if name in geometries]
        if unit.children or len(inside) != 1:
            what = "has branches inside" if unit.children else f"holds {len(inside)} convolutions"
            raise InputError(f"unit {unit.end!r} {what}; a chain in their format has one convolution in each. Leave it out.")
        numbers[inside[0]] = places[unit.end] = before + first + len(numbers)
    return numbers, places


def _key(candidate: Candidate, places: Mapping[str, int]) -> Key:
    st, end = places[candidate.entry], places[candidate.end]
    name = f"candidate {candidate.id!r}"
    if candidate.kind == "fitted":
        raise InputError(f"{name} is fitted; their format knows kernels composed of convolutions that are kept. Leave it out.")
    if candidate.kind == "identity":
        return st, end, 0, 1, True  # as their scripts write the empty product
    return st, end, *_square(candidate.geometry, name)


def _square(geometry: Geometry, name: str) -> tuple[int, int, bool]:
    axes = set(geometry.axes)
    if len(geometry.axes) != 2 or len(axes) != 1:
        raise InputError(f"{name} is {geometry}; their format has one number for both axes of an image. Leave it out.")
    axis = geometry.axes[0]
    if axis.dilation != 1 or axis.padding != (axis.taps // 2, axis.taps // 2):
        raise InputError(
            f"{name} has dilation {axis.dilation}, padding {axis.padding}; theirs is 1 and half the kernel. Leave it out."
        )
    depthwise = geometry.groups == geometry.out_channels and geometry.groups == geometry.in_channels
    if geometry.groups != 1 and not depthwise:
        raise InputError(f"{name} has {geometry.groups} groups; their format has 1, or depthwise. Leave it out.")
    return axis.taps, axis.stride, depthwise
