"""Ways to merge a segment: which convolutions to prune, which kernel to end with.

*Composed* candidates are LayerMerge's (Kim, El Halabi, Ji, Song; ICML 2024, section 3.2): every geometry that some subset of the
segment's prunable convolutions composes to, and of the subsets that give one geometry the one that keeps the largest sum of L1
norms. Subsets are not enumerated: unit by unit, the best subset for every geometry reached so far is kept.
*Fitted* candidates are one convolution of any kernel up to the composed one, also in groups if asked for, its weights to be
fitted to data. *Identity* drops the segment altogether.

A norm that depends on its input (group, layer, instance) is taken out as an activation is: in a composed candidate a scale and a
shift of every channel, fitted to data, stand for it; a fitted one does without, or has one norm of the same kind behind its
convolution (*moved*). That it stays where it is, is another segment's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from fxmerge.algebra.affine import vanishing
from fxmerge.analysis.segments import Findings
from fxmerge.core.expression import Expression, Step
from fxmerge.core.geometry import Geometry
from fxmerge.core.options import require_whole
from fxmerge.core.segment import Candidate, Proposal, Segment, narrowed
from fxmerge.errors import InputError
from fxmerge.graph.meta import facts
from fxmerge.graph.query import acts_alike, node_named
from fxmerge.operators import Activation, Site, read_maps
from fxmerge.solve.space import restrict

#: geometry -> (sum of the L1 norms kept, names removed)
_Choices: TypeAlias = dict[Geometry, tuple[float, frozenset[str]]]


@dataclass(frozen=True, kw_only=True)
class Space:
    """Which candidates are offered.

    Args:
        composed: offer composed kernels.
        prune: offer to prune convolutions inside segments.
        fitted: offer fitted kernels.
        identity: offer to drop a segment whose output has the shape of its input.
        norms: offer to take out norms that depend on their input.
        added: offer every merge of a segment that no activation is behind (a linear bottleneck) also with the last of those that it
            removes put there, as was published. What was negative is lost by that, so it is for students that are trained.
        groups: offer fitted kernels also with their channels in so many groups, wherever both numbers of channels can be divided
            so; 0 stands for as many groups as there are channels that enter (depthwise).
        merge: offer to merge several layers; without it, layers are only pruned, one at a time.
        exact: offer only what keeps the function, whatever else is asked for.
        max_kernel: largest kernel offered, in taps on an axis; where the image becomes larger by u, each output reads a u-th.
        max_unknowns: fitted kernels are offered up to so many weights a filter (C_in/groups times taps); fitting takes memory by
            the square, and time by the cube, of that.

    Raises:
        InputError: one of the last two, or of ``groups``, is no such number.
    """

    composed: bool = True
    prune: bool = True
    fitted: bool = True
    identity: bool = True
    norms: bool = True
    added: bool = False
    groups: Sequence[int] = ()
    merge: bool = True
    exact: bool = False
    max_kernel: int = 7
    max_unknowns: int = 4800

    def __post_init__(self) -> None:
        require_whole("max_kernel", self.max_kernel, 1)
        require_whole("max_unknowns", self.max_unknowns, 0)
        if not isinstance(self.groups, Sequence) or isinstance(self.groups, str):
            raise InputError(f"groups must be whole numbers, such as (2, 0), found {self.groups!r:.80}")
        object.__setattr__(self, "groups", tuple(self.groups))
        for number in self.groups:
            require_whole("each of groups", number, 0)

    @classmethod
    def named(cls, name: Literal["joint", "composed", "activations", "layers", "exact"]) -> Space:
        """The spaces with a name: everything, and the baselines; InputError for another name.

        ``joint`` is everything; ``composed`` the published candidates; ``activations`` removes activations only (Kim et al.
        2023); ``layers`` prunes single convolutions only; ``exact`` keeps the function.
        """
        spaces = {
            "joint": cls(),
            "composed": cls(fitted=False),
            "activations": cls(fitted=False, prune=False, identity=False),
            "layers": cls(fitted=False, composed=False, prune=False, merge=False),
            "exact": cls(fitted=False, prune=False, identity=False, exact=True),
        }
        if not isinstance(name, str) or name not in spaces:
            *names, last = spaces
            raise InputError(f"space must be an fxmerge.Space or one of {', '.join(names)} or {last}, found {name!r:.80}")
        return spaces[name]


def propose(findings: Findings, space: Space | None = None) -> tuple[Proposal, ...]:
    """Every candidate of every segment.

    Args:
        findings: segments of a traced graph.
        space: which candidates to offer; None for all.

    Returns:
        One proposal for every segment that has a candidate, in the order of the segments.
    """
    space = space or Space()
    norms = _l1_norms(findings)
    proposals = []
    prunings = _Prunings(norms)
    for segment in findings.segments:
        size = _entry_size(findings, segment)
        offered = [c for c in _candidates(findings, segment, space, prunings) if c.exact or not space.exact]
        offered += _with_activation(findings, segment, offered) if space.added and not space.exact else []
        unique = {candidate.id: candidate for candidate in offered if _leaves_pixels(candidate.geometry, size)}
        if unique and (space.norms or not segment.norms):
            proposals.append(Proposal(segment, tuple(unique.values())))
    if space.merge:
        return tuple(proposals)
    alone = set(restrict(findings.region, [c for p in proposals for c in p.candidates], "layers"))
    return narrowed(proposals, alone.__contains__)


def _l1_norms(findings: Findings) -> dict[str, float]:
    norms: dict[str, float] = {}
    for name in {name for segment in findings.segments for name in segment.convolutions}:
        node = node_named(findings.graph, name)
        assert node is not None
        operator = findings.operators.find(findings.graph, node)
        assert operator is not None
        norms[name] = float(operator.affine(Site(findings.graph, node)).weight.abs().sum())
    return norms


def _candidates(findings: Findings, segment: Segment, space: Space, prunings: _Prunings) -> Iterator[Candidate]:
    whole = segment.expression.geometry
    several = (
        len(segment.convolutions) > 1
        or bool(segment.activations or segment.norms)
        or _joins(segment.expression)
        or _resizes(segment)
    )
    offer, exact = _Offer(segment), _is_exact(findings, segment)
    if space.identity and whole.preserves_shape:
        yield offer("identity", Geometry.identity(whole.in_channels, len(whole.axes)))
    if not space.merge:
        return
    if space.composed and several and not whole.phased and _allowed(whole, space) and (exact or not space.exact):
        yield offer("composed", whole, exact=exact)
    if space.prune and several:
        for geometry, (_, removed) in prunings(segment).items():
            if removed and not geometry.phased and _allowed(geometry, space):
                yield offer("composed", geometry, removed=removed)
    movable = _movable(findings, segment)
    lone = bool(segment.norms) and len(segment.expression.steps) == 2  # what stands for it is fitted in the composed one, too
    if space.fitted and not lone and not (segment.expression.sides and whole.enlarges):
        for geometry in (some for one in _smaller(whole) for some in _in_groups(one, space.groups)):
            small = math.prod(geometry.weight_shape[1:]) <= space.max_unknowns
            if small and _allowed(geometry, space) and (several or geometry.weight_shape != whole.weight_shape):
                yield offer("fitted", geometry)
                if movable:
                    yield offer("fitted", geometry, moved=movable)


def _with_activation(findings: Findings, segment: Segment, offered: Sequence[Candidate]) -> list[Candidate]:
    """The same merges with an activation behind them, where there is none."""
    exit_node = node_named(findings.graph, segment.exit)
    assert exit_node is not None
    behind = segment.end != segment.exit or any(isinstance(findings.verdicts.get(n), Activation) for n in exit_node.users)
    last = node_named(findings.graph, segment.activations[-1]) if segment.activations else None
    if behind or last is None or not acts_alike(findings.graph, last):
        return []
    merged = (candidate for candidate in offered if candidate.kind != "identity" and not candidate.moved)
    return [replace(candidate, added=last.name) for candidate in merged]


def _entry_size(findings: Findings, segment: Segment) -> tuple[int, ...]:
    entry = node_named(findings.graph, segment.entry)
    return facts(entry).image_shape[2:] if entry is not None else ()


def _leaves_pixels(geometry: Geometry, size: Sequence[int]) -> bool:
    """Whether a kernel reads something else than padding: a small one off its centre may crop a narrow image altogether."""
    return all(min(pads) > -pixels for pads, pixels in zip(geometry.padding, size, strict=True))


def _is_exact(findings: Findings, segment: Segment) -> bool:
    """Whether multiplying a segment out keeps the function, borders included: told by sizes where they tell, else by numbers."""
    expression = segment.expression
    if segment.activations or segment.norms or expression.geometry.phased:
        return False
    if expression.keeps_borders():
        return True
    nodes = [node for name in segment.nodes if (node := node_named(findings.graph, name)) is not None]
    return expression.keeps_borders(vanishing(expression, read_maps(findings.graph, nodes, findings.verdicts, findings.operators)))


def _movable(findings: Findings, segment: Segment) -> str:
    """The last norm inside a segment, if it can stand behind the convolution, which gives channels first; or nothing.

    One that is the segment's exit need not move: that it stays is another segment's.
    """
    name = segment.norms[-1] if segment.norms else segment.exit
    norm, exit_node = node_named(findings.graph, name), node_named(findings.graph, segment.exit)
    assert norm is not None
    assert exit_node is not None
    return "" if name == segment.exit or facts(norm).channels_last or facts(exit_node).channels_last else name


@dataclass(frozen=True)
class _Offer:
    segment: Segment

    def __call__(
        self,
        kind: Literal["composed", "fitted", "identity"],
        geometry: Geometry,
        *,
        removed: Collection[str] = (),
        exact: bool = False,
        moved: str = "",
    ) -> Candidate:
        s = self.segment
        inside = tuple(name for name in s.nodes if name in removed)
        sides = s.expression.sides if kind == "fitted" else ()
        return Candidate(s.entry, s.exit, s.end, kind, geometry, s.activations, inside, exact, s.norms, moved, sides)


def _joins(expression: Expression) -> bool:
    return any(step.kind in ("sum", "difference", "concat") for step in expression.steps)


def _resizes(segment: Segment) -> bool:
    """Whether there is, beside a convolution, something that makes the image larger: both are one convolution."""
    others = (step.geometry for step in segment.expression.steps if step.role == "other" and step.geometry is not None)
    return bool(segment.convolutions) and any(geometry.enlarges for geometry in others)


def _allowed(geometry: Geometry, space: Space) -> bool:
    return all(-(-axis.taps // axis.up) <= space.max_kernel for axis in geometry.axes)


def _smaller(whole: Geometry) -> Iterator[Geometry]:
    """The geometry itself and those of fewer taps, two fewer on every longer axis at a time so that the centre stays.

    Where a pixel becomes u, there are u taps fewer at a time, and at least u, so that each of the u pixels still reads one.
    """
    taps = whole.kernel
    while True:
        axes = tuple(axis.shrunk(n) for axis, n in zip(whole.axes, taps, strict=True))
        yield replace(whole, axes=axes, bias=True, even=not whole.enlarges, phased=False)
        fewer = tuple(
            n - max(2, axis.up) if n - max(2, axis.up) >= axis.up else n for n, axis in zip(taps, whole.axes, strict=True)
        )
        if fewer == taps:
            return
        taps = fewer


def _in_groups(geometry: Geometry, numbers: Sequence[int]) -> Iterator[Geometry]:
    """The geometry itself, and those with more groups, none twice; a number that does not divide the channels is left out."""
    channels = math.gcd(geometry.in_channels, geometry.out_channels)
    wanted = dict.fromkeys(number or geometry.in_channels for number in numbers)
    yield geometry
    for number in wanted:
        if number > geometry.groups and channels % number == 0 and number % geometry.groups == 0:
            yield replace(geometry, groups=number)


class _Prunings:
    """For every geometry that pruning can reach in a segment, the subset of convolutions that keeps most.

    Segments that start at one tensor share their first parts, and what was found for those is kept.
    """

    def __init__(self, norms: Mapping[str, float]) -> None:
        self.norms = norms
        self._of_part: dict[tuple[str, ...], _Choices] = {}
        self._of_row: dict[tuple[str, ...], _Choices] = {}

    def __call__(self, segment: Segment) -> _Choices:
        everything = frozenset(segment.convolutions)
        reached = self._row(_in_series(segment.expression))
        return {geometry: choice for geometry, choice in reached.items() if not everything <= choice[1]}

    def _row(self, parts: Sequence[Expression]) -> _Choices:
        """For parts in series."""
        key = (parts[0].steps[0].name, *(part.steps[-1].name for part in parts))
        if key not in self._of_row:
            last = self._part(parts[-1])
            self._of_row[key] = _in_turn(self._row(parts[:-1]), last) if len(parts) > 1 else last
        return self._of_row[key]

    def _part(self, part: Expression) -> _Choices:
        key = tuple(step.name for step in part.steps)
        if key not in self._of_part:
            self._of_part[key] = _part_choices(part, self.norms)
        return self._of_part[key]


def _in_turn(first: _Choices, second: _Choices) -> _Choices:
    joined: _Choices = {}
    for before, (kept, removed) in first.items():
        for geometry, (more, also) in second.items():
            _keep_best(joined, before.then(geometry), kept + more, removed | also)
    return joined


def _keep_best(choices: _Choices, geometry: Geometry, norm: float, removed: frozenset[str]) -> None:
    if geometry not in choices or norm > choices[geometry][0]:
        choices[geometry] = (norm, removed)


def _in_series(expression: Expression) -> list[Expression]:
    """The expression cut at every step that all later ones depend on: layers, and whole blocks."""
    steps = expression.steps
    reach = 0  # the last reader of anything computed so far, the current step left out
    readers: list[int] = [0] * len(steps)
    for index, step in enumerate(steps):
        for operand in step.operands:
            readers[operand] = max(readers[operand], index)
    cuts = [0]
    for index in range(1, len(steps)):
        reach = max(reach, readers[index - 1])
        if reach <= index and not _norm_follows(steps, index):
            cuts.append(index)
    geometries = expression.geometries()
    parts = []
    for start, stop in itertools.pairwise(cuts):
        geometry = geometries[start]
        entry = Step(steps[start].name, "entry", (), Geometry.identity(geometry.out_channels, len(geometry.axes)))
        inner = (replace(s, operands=tuple(i - start for i in s.operands)) for s in steps[start + 1 : stop + 1])
        parts.append(Expression((entry, *inner)))
    return parts


def _norm_follows(steps: Sequence[Step], index: int) -> bool:
    """Whether all that reads a step is a norm; a layer and its norm are one part."""
    readers = [step for step in steps[index + 1 :] for operand in step.operands if operand == index]
    return len(readers) == 1 and readers[0].role == "norm"


def _part_choices(part: Expression, norms: Mapping[str, float]) -> _Choices:
    """The choices for one layer, or for one block; a convolution goes together with the norm behind it."""
    readers = [sum(index in step.operands for step in part.steps) for index in range(len(part.steps))]
    tangled = any(count > 1 for count in readers[1:])
    norm_behind = {
        part.steps[step.operands[0]].name: step.name
        for step in part.steps
        if step.role == "norm" and readers[step.operands[0]] == 1
    }
    gone_with = {norm: convolution for convolution, norm in norm_behind.items()}

    def apply(step: Step, before: _Choices) -> _Choices:
        after: _Choices = {}
        assert step.geometry is not None
        prunable = step.role == "convolution" and step.geometry.preserves_shape and not tangled
        for geometry, (kept, removed) in before.items():
            if gone_with.get(step.name) in removed:
                _keep_best(after, geometry, kept, removed | {step.name})
                continue
            _keep_best(after, geometry.then(step.geometry), kept + norms.get(step.name, 0.0), removed)
            if prunable:
                _keep_best(after, geometry, kept, removed | {step.name})
        return after

    values: tuple[_Choices, ...] = part.fold(
        entry=lambda step: {step.geometry: (0.0, frozenset())} if step.geometry else {},
        apply=apply,
        add=lambda one, two: _meet(one, two, Geometry.plus),
        concat=lambda one, two: _meet(one, two, Geometry.concat),
    )
    return values[-1]


def _meet(one: _Choices, two: _Choices, how: Callable[[Geometry, Geometry], Geometry]) -> _Choices:
    joined: _Choices = {}
    for a, (kept_a, removed_a) in one.items():
        for b, (kept_b, removed_b) in two.items():
            _keep_best(joined, how(a, b), kept_a + kept_b, removed_a | removed_b)
    return joined
