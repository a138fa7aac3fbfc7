"""Find what can be merged in a graph, and say of everything else why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from fxmerge.analysis.cuts import region_tree
from fxmerge.core.expression import Expression
from fxmerge.core.region import Chain, Unit
from fxmerge.core.segment import Reason, Refusal, Segment
from fxmerge.graph.meta import facts
from fxmerge.graph.portable import Portable, pack
from fxmerge.graph.query import between, fed_by_inputs, fingerprint, is_data
from fxmerge.graph.regions import layers_inside
from fxmerge.graph.trace import require_shapes
from fxmerge.operators import Activation, Join, Map, Norm, Opaque, Operators, Verdict, default_operators, read_expression


@dataclass(frozen=True)
class Findings:
    """What :func:`find_segments` found.

    Args:
        graph: the graph that was searched; not changed.
        region: its tree of chains and units.
        segments: every stretch that could become one convolution, by chain, then start, then end.
        refusals: every convolution, activation and norm that depends on its input which is in no segment, and every stretch given
            up, with the reason.
        operators: the table that was used.
        verdicts: what it said of every node.
    """

    graph: GraphModule
    region: Unit
    segments: tuple[Segment, ...]
    refusals: tuple[Refusal, ...]
    operators: Operators = field(repr=False)
    verdicts: Mapping[Node, Verdict] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.graph)

    def __reduce__(self) -> tuple[Any, ...]:
        return _put_together, (pack(self.graph), self.region, self.segments, self.refusals, self.operators)


def _put_together(
    graph: Portable, region: Unit, segments: tuple[Segment, ...], refusals: tuple[Refusal, ...], operators: Operators
) -> Findings:
    """Findings in another process."""
    unpacked = graph.unpack()
    return Findings(unpacked, region, segments, refusals, operators, _on_inputs(unpacked, operators.verdicts(unpacked)))


def find_segments(graph: GraphModule, *, operators: Operators | None = None, max_units: int = 8, max_extent: int = 63) -> Findings:
    """Find every segment of a graph, and a refusal for whatever is in none.

    Args:
        graph: from :func:`fxmerge.trace`, or anybody's GraphModule whose tensors' shapes fxmerge has recorded.
        operators: what is known of operators; None for :func:`fxmerge.operators.default_operators`.
        max_units: how many units (layers, or whole blocks) a segment may span.
        max_extent: how many pixels the composed kernel may cover on an axis.

    Returns:
        Segments and refusals.

    Raises:
        InputError: shapes were not recorded.
    """
    require_shapes(graph)
    table = operators or default_operators()
    verdicts = _on_inputs(graph, table.verdicts(graph))
    region = region_tree(
        graph, lambda before, node: _attaches(verdicts[before], verdicts[node]), lambda node: _side(verdicts[node])
    )
    nodes = {node.name: node for node in graph.graph.nodes}
    search = _Search(nodes, {name: index for index, name in enumerate(nodes)}, verdicts, max_units, max_extent)
    segments: list[Segment] = []
    refusals: list[Refusal] = []
    for chain in _chains(region):
        for found in search.chain(chain):
            (segments if isinstance(found, Segment) else refusals).append(found)  # type: ignore[arg-type]
    covered = {name for segment in segments for name in segment.nodes}
    refusals = [*_leftovers(graph, verdicts, covered), *refusals]
    return Findings(graph, region, tuple(segments), tuple(refusals), table, verdicts)


def _on_inputs(graph: GraphModule, verdicts: Mapping[Node, Verdict]) -> dict[Node, Verdict]:
    """What joins an image with a tensor that no input leads to (a class token, repeated for the batch) is opaque."""
    fed = fed_by_inputs(graph)
    strangers = Opaque(detail="joins an image and a tensor that does not come from the input")
    return {
        node: strangers if isinstance(verdict, Join) and not fed.issuperset(verdict.operands) else verdict
        for node, verdict in verdicts.items()
    }


def _attaches(before: Verdict, verdict: Verdict) -> bool:
    """Norms, identities and activations belong to the layer before them, but nothing follows an activation."""
    if isinstance(before, (Activation, Opaque)):
        return False
    if isinstance(verdict, Map):
        return verdict.geometry.pointwise and verdict.geometry.groups == verdict.geometry.in_channels
    return isinstance(verdict, (Activation, Norm))


def _side(verdict: Verdict) -> Node | None:
    return verdict.side if isinstance(verdict, Map) else None


def _chains(unit: Unit) -> Iterator[Chain]:
    for child in unit.children:
        yield child
        for below in child.units:
            yield from _chains(below)


@dataclass(frozen=True)
class _Search:
    nodes: Mapping[str, Node]
    order: Mapping[str, int]
    verdicts: Mapping[Node, Verdict]
    max_units: int
    max_extent: int

    def chain(self, chain: Chain) -> Iterator[Segment | Refusal]:
        for start in range(len(chain.units)):
            for stop in range(start + 1, min(start + self.max_units, len(chain.units)) + 1):
                found = self.stretches(chain.cuts[start], chain.units[start:stop])
                yield from found
                if any(isinstance(one, Refusal) for one in found) or self._blocked(chain.units[stop - 1]):
                    break

    def _blocked(self, unit: Unit) -> bool:
        return any(isinstance(self.verdicts[self.nodes[name]], Opaque) for name in unit.all_nodes())

    def stretches(self, entry_name: str, units: Sequence[Unit]) -> tuple[Segment | Refusal, ...]:
        """The segments over these units, or a refusal; none where there is nothing to merge.

        There are two where a norm that depends on its input stands at the end: it is kept behind the merge, as an activation is,
        or it is part of it.
        """
        if any(map(self._blocked, units)):
            return ()  # its opaque nodes are refused one by one
        names = sorted((name for unit in units for name in unit.all_nodes()), key=self.order.__getitem__)
        end = self.nodes[units[-1].end]
        found = [self.stretch(entry_name, end, names, kept) for kept in self._closings(end, names)]
        refusals = [one for one in found if isinstance(one, Refusal)]
        return (*refusals[:1],) if refusals else tuple(one for one in found if one is not None)

    def stretch(self, entry_name: str, end: Node, names: Sequence[str], kept: Set[str]) -> Segment | Refusal | None:
        """The segment over these nodes, of which some at the end are kept."""
        inner = [name for name in names if name not in kept]
        if not self._worthwhile(inner):
            return None
        outside = self._read_outside(names, end)
        if outside is not None:
            return outside
        exit_node = self.nodes[inner[-1]]
        entry = self.nodes[entry_name]
        expression = read_expression(entry, [self.nodes[name] for name in inner], self.verdicts)
        refusal = self._check(expression, exit_node) or self._check_sides(expression, entry, inner, exit_node)
        if refusal is not None:
            return refusal
        removed, norms = (
            tuple(name for name in inner if isinstance(self.verdicts[self.nodes[name]], kind)) for kind in (Activation, Norm)
        )
        return Segment(entry_name, exit_node.name, end.name, tuple(names), removed, expression, norms)

    def _closings(self, end: Node, names: Sequence[str]) -> Iterator[Set[str]]:
        """What may be kept at the end of a segment: its closing activations, and those with the norm before them."""
        kept = self._closing_activations(end, names)
        yield kept
        while end.name in kept:
            end = end.args[0]  # type: ignore[assignment]
        if isinstance(self.verdicts[end], Norm) and end.name in names:
            yield {end.name, *kept, *self._closing_activations(end.args[0], names)}  # type: ignore[arg-type]

    def _closing_activations(self, end: Node, names: Sequence[str]) -> set[str]:
        """The activations that a segment ends in; they are kept."""
        kept: set[str] = set()
        while isinstance(self.verdicts[end], Activation) and end.name in names:
            kept.add(end.name)
            end = end.args[0]  # type: ignore[assignment]
        return kept

    def _read_outside(self, names: Sequence[str], end: Node) -> Refusal | None:
        inside = set(names)
        for name in names:
            node = self.nodes[name]
            reader = next((user for user in node.users if node is not end and user.name not in inside), None)
            if reader is not None:
                return self._refusal(node, Reason.USED_OUTSIDE, f"{reader.name} reads it", "")
        return None

    def _worthwhile(self, names: Sequence[str]) -> bool:
        """Whether there is a convolution, a norm that depends on its input, or more than one map, to do something about."""
        verdicts = [self.verdicts[self.nodes[name]] for name in names]
        return any(isinstance(v, Norm) or (isinstance(v, Map) and v.role == "convolution") for v in verdicts) or (
            sum(isinstance(v, (Map, Join)) for v in verdicts) > 1
        )

    def _check(self, expression: Expression, exit_node: Node) -> Refusal | None:
        try:
            geometry = expression.geometry
        except ValueError as fault:
            reasons = (("strides", Reason.STRIDES), ("larger", Reason.UPSAMPLING), ("", Reason.CHANNELS))
            reason = next(reason for word, reason in reasons if word in str(fault))
            return self._refusal(exit_node, reason, str(fault), "")
        if max((axis.extent for axis in geometry.axes), default=1) > self.max_extent:
            detail = f"{'x'.join(str(a.extent) for a in geometry.axes)} pixels, from {expression.steps[0].name}"
            return self._refusal(exit_node, Reason.TOO_LARGE, detail, "raise max_extent to have it offered")
        return None

    def _check_sides(self, expression: Expression, entry: Node, names: Sequence[str], exit_node: Node) -> Refusal | None:
        """A side input must not be made of the very tensor that enters."""
        if not expression.sides or {node.name for node in between(entry, exit_node)} <= set(names):
            return None
        return self._refusal(exit_node, Reason.USED_OUTSIDE, f"{expression.sides[0]} is computed from {entry.name}, too", "")

    def _refusal(self, node: Node, reason: Reason, detail: str, advice: str) -> Refusal:
        return Refusal(node.name, reason, detail, advice, facts(node).target, facts(node).source)


def _leftovers(graph: GraphModule, verdicts: Mapping[Node, Verdict], covered: set[str]) -> Iterator[Refusal]:
    """Opaque layers, what regions hold, and convolutions and activations that no segment holds."""
    for node, verdict in verdicts.items():
        known = facts(node)
        if node.name in covered or not is_data(node) or not node.op.startswith("call_"):
            continue
        if isinstance(verdict, Opaque):
            yield Refusal(node.name, verdict.reason, verdict.detail, verdict.advice, known.target, known.source)
            for inner, name in layers_inside(graph, node):
                yield Refusal(node.name, Reason.REGION, name, "", name, facts(inner).source)
        elif isinstance(verdict, (Activation, Norm)) or (isinstance(verdict, Map) and verdict.role == "convolution"):
            yield Refusal(node.name, Reason.SOLE, "no neighbour that is affine or an activation", "", known.target, known.source)


__all__ = ["Findings", "find_segments"]
