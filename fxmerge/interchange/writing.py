"""Tables in the format of the LayerMerge code base, written; the format is told in :mod:`fxmerge.interchange.layermerge`."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence

from fxmerge.analysis.segments import Findings
from fxmerge.core.files import write_csv
from fxmerge.core.geometry import Geometry
from fxmerge.core.region import Chain, Unit
from fxmerge.core.segment import Candidate, Proposal
from fxmerge.core.table import ImportanceTable, LatencyTable
from fxmerge.errors import InputError
from fxmerge.interchange.layermerge import IMPORTANCE_COLUMNS, LATENCY_COLUMNS, Key
from fxmerge.operators import Map


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
        measured = latency.measurements[entry]
        spread_ns = measured.spread_ns * nanoseconds / max(1, measured.median_ns)  # on the scale of the time beside it
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
