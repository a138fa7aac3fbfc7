"""What candidates and units left alone take beside time; counted, not measured.

- ``parameters``: numbers in the modules that are called, each counted where it is first called; norms are folded. A candidate
  takes C_out * C_in/groups * taps weights, C_out biases if it has any, a matrix for every side input, and what the layers hold
  that are kept behind it.
- ``multiply_adds``: of convolutions and linear layers, for one image of the size traced. A map takes its weights times its output
  pixels; where it makes the image larger by u, a u-th of that, for so many taps fall on zeros between pixels
  (:meth:`Geometry.multiply_adds`). A candidate takes as many as its map, and a matrix for every side input.
- ``peak_bytes``: the most bytes of tensors alive at any step, for the batch traced; weights and the workspace of a kernel are
  not among them. The steps are the nodes of the folded network in graph order. Alive at a step are its operands, its output, and
  every tensor computed before that is read after it. An activation that torch does in place writes over its operand where nobody
  reads that later. A candidate is one step, at its exit: alive are its entry, its side inputs, its output, a padded copy of the
  entry where it cannot pad by itself, and what others computed before and read later; an identity has no output of its own. A norm
  behind it, or an activation that is not done in place, is one step more. The peak of a plan is the largest of its parts'. It is
  never below the truth where branches run one after the other, as code is written; where their nodes alternate in graph order it is
  an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn
from torch.fx import GraphModule, Node

from fxmerge.algebra.module import separate_padding
from fxmerge.analysis.segments import Findings
from fxmerge.core.resource import Name, Resource
from fxmerge.core.segment import Candidate, Proposal
from fxmerge.errors import InputError
from fxmerge.graph.meta import facts
from fxmerge.graph.query import attribute, data_operands, is_tensor, module_of, node_named
from fxmerge.operators import Activation, Map, Norm
from fxmerge.passes.fold_batchnorm import FoldBatchNorm
from fxmerge.passes.reuse_memory import IN_PLACE


def count_resource(findings: Findings, proposals: Sequence[Proposal], name: Name) -> Resource:
    """What every candidate, and every unit left alone, takes of a resource; to be given to the solver.

    Args:
        findings: of the traced graph.
        proposals: candidates to count.
        name: ``parameters``, ``multiply_adds`` or ``peak_bytes``; see the module's text.

    Raises:
        InputError: there is no such resource.
    """
    counts: dict[str, Callable[[Findings, Sequence[Proposal]], Resource]] = {
        "parameters": _parameters,
        "multiply_adds": _multiply_adds,
        "peak_bytes": _peak_bytes,
    }
    if name not in counts:
        raise InputError(f"resource is {name!r}; give one of {', '.join(counts)}.")
    return counts[name](findings, proposals)


def _parameters(findings: Findings, proposals: Sequence[Proposal]) -> Resource:
    folded = FoldBatchNorm(findings.operators).apply(findings.graph)
    counted: set[int] = set()
    of_node = {node.name: _own_parameters(folded, node, counted) for node in folded.graph.nodes}

    def of_map(candidate: Candidate) -> int:
        weights = math.prod(candidate.geometry.weight_shape) + candidate.geometry.out_channels * candidate.geometry.bias
        return weights + 2 * candidate.geometry.out_channels * bool(candidate.moved)

    shapes, kept = _shapes(findings), partial(_kept_parameters, findings)
    candidates = {c.id: _with_sides(shapes, p, c, of_map) + kept(c) for p, c in _each(proposals)}
    return _summed("parameters", findings, of_node, candidates)


def _kept_parameters(findings: Findings, candidate: Candidate) -> int:
    """Numbers in the layers between the exit of a candidate and its end."""
    total, node = 0, node_named(findings.graph, candidate.end)
    while node is not None and node.name != candidate.exit:
        total += _own_parameters(findings.graph, node, set())
        node = data_operands(node)[0]
    return total


def _own_parameters(graph: GraphModule, node: Node, counted: set[int]) -> int:
    module = module_of(graph, node)
    if module is None:
        found = attribute(graph, str(node.target)) if node.op == "get_attr" else None
        parameters = [found] if isinstance(found, nn.Parameter) else []
    else:
        parameters = list(module.parameters())
    fresh = {id(p): p.numel() for p in parameters if id(p) not in counted}
    counted.update(fresh)
    return sum(fresh.values())


def _multiply_adds(findings: Findings, proposals: Sequence[Proposal]) -> Resource:
    of_node = {node.name: _own_multiply_adds(findings, node) for node in findings.graph.graph.nodes}
    shapes = _shapes(findings)

    def of_map(candidate: Candidate) -> int:
        return candidate.geometry.multiply_adds(shapes[candidate.entry][2:])

    candidates = {c.id: _with_sides(shapes, p, c, of_map) for p, c in _each(proposals)}
    return _summed("multiply_adds", findings, of_node, candidates)


def _own_multiply_adds(findings: Findings, node: Node) -> int:
    verdict, shape = findings.verdicts.get(node), facts(node).shape
    if shape is None:
        return 0
    if isinstance(verdict, Map) and verdict.role == "convolution":
        return verdict.geometry.multiply_adds(facts(data_operands(node)[0]).image_shape[2:])
    module = module_of(findings.graph, node)
    if isinstance(module, nn.Linear):
        return module.in_features * math.prod(shape[1:])
    if isinstance(module, nn.modules.conv._ConvNd):
        images = facts(data_operands(node)[0]).shape if module.transposed else shape
        return math.prod((images or ())[1:]) * math.prod(module.weight.shape[1:])
    return 0


def _with_sides(
    shapes: Mapping[str, tuple[int, ...]], proposal: Proposal, candidate: Candidate, of_map: Callable[[Candidate], int]
) -> int:
    """What the one convolution takes, and the matrices for its side inputs, which have one pixel."""
    if candidate.kind == "identity":
        return 0
    sides = sum(shapes[side][1] * candidate.geometry.out_channels for side in proposal.segment.expression.sides)
    return of_map(candidate) + sides


def _summed(name: Name, findings: Findings, of_node: Mapping[str, int], candidates: Mapping[str, int]) -> Resource:
    units = {unit.end: sum(of_node.get(node, 0) for node in unit.nodes) for unit in findings.region.walk()}
    return Resource(name, candidates, units, sum(of_node.values()) - sum(units.values()))


def _each(proposals: Sequence[Proposal]) -> list[tuple[Proposal, Candidate]]:
    return [(proposal, candidate) for proposal in proposals for candidate in proposal.candidates]


def _shapes(findings: Findings) -> dict[str, tuple[int, ...]]:
    """(N, C, *space) of every tensor."""
    return {node.name: facts(node).image_shape for node in findings.graph.graph.nodes}


def _peak_bytes(findings: Findings, proposals: Sequence[Proposal]) -> Resource:
    entries = frozenset(proposal.segment.entry for proposal in proposals)
    steps = _Steps(findings, FoldBatchNorm(findings.operators, entries).apply(findings.graph))
    candidates = {c.id: steps.of_candidate(p, c) for p, c in _each(proposals)}
    units = {unit.end: max(map(steps.of_node, unit.nodes), default=0) for unit in findings.region.walk()}
    inside = {name for unit in findings.region.walk() for name in unit.nodes}
    rest = max((steps.of_node(name) for name in steps.place if name not in inside), default=0)
    return Resource("peak_bytes", candidates, units, rest, largest=True)


class _Steps:
    """The bytes alive at each step of the folded network."""

    def __init__(self, findings: Findings, folded: GraphModule) -> None:
        recorded = {node.name: facts(node) for node in findings.graph.graph.nodes}
        self.nodes = {node.name: node for node in folded.graph.nodes}
        self.place = {name: k for k, name in enumerate(self.nodes)}
        self.readers = {name: [user.name for user in node.users] for name, node in self.nodes.items()}
        self.in_place = {name for name, node in self.nodes.items() if node.target in IN_PLACE}
        self.activations = {node.name: node for node, verdict in findings.verdicts.items() if isinstance(verdict, Activation)}
        self.norms = {node.name for node, verdict in findings.verdicts.items() if isinstance(verdict, Norm)}
        self.size: dict[str, int] = {}
        for name, node in self.nodes.items():
            known = recorded.get(name, facts(node))
            whole = is_tensor(node) and known.shape is not None and known.dtype is not None
            self.size[name] = math.prod(known.shape or ()) * known.dtype.itemsize if whole and known.dtype else 0

    def _alive(self, place: int, outside: frozenset[str] = frozenset()) -> int:
        """Bytes computed before a place and read at it or after it, by others than these nodes."""
        return sum(
            size
            for name, size in self.size.items()
            if self.place[name] < place
            and any(self.place[reader] >= place and reader not in outside for reader in self.readers[name])
        )

    def of_node(self, name: str) -> int:
        node = self.nodes.get(name)
        if node is None or node.op in ("output", "get_attr"):
            return 0
        return self._alive(self.place[name]) + (0 if self._writes_over(node) else self.size[name])

    def _writes_over(self, node: Node) -> bool:
        operand = next(iter(data_operands(node)), None)
        later = partial(self._read_after, self.place[node.name])
        return node.name in self.in_place and operand is not None and operand.op != "placeholder" and not later(operand.name)

    def _read_after(self, place: int, name: str) -> bool:
        return any(self.place[reader] > place for reader in self.readers[name])

    def of_candidate(self, proposal: Proposal, candidate: Candidate) -> int:
        inside = frozenset(proposal.segment.nodes)
        place = self.place[candidate.exit]
        own = [candidate.entry, *proposal.segment.expression.sides]
        held = sum(self.size[n] for n in dict.fromkeys(own) if not self._read_by_others(n, place, inside))
        alive, output = self._alive(place, inside), self.size[candidate.exit]
        normed = bool(candidate.moved) or not self.norms.isdisjoint(inside.intersection(self.readers[candidate.exit]))
        normed |= bool(candidate.added) and self.activations[candidate.added].target not in IN_PLACE
        behind = alive + (held if candidate.kind == "identity" else output) + output if normed else 0
        if candidate.kind == "identity":
            return max(alive + held, behind)
        return max(alive + held + output + self._padded(candidate), behind)

    def _read_by_others(self, name: str, place: int, inside: frozenset[str]) -> bool:
        """Whether it is alive for another's sake as well."""
        return any(self.place[reader] >= place and reader not in inside for reader in self.readers[name])

    def _padded(self, candidate: Candidate) -> int:
        amounts = separate_padding(candidate.geometry)
        space = facts(self.nodes[candidate.entry]).image_shape[2:]
        if not amounts or not space:
            return 0
        padded = (n + before + after for n, before, after in zip(reversed(space), amounts[::2], amounts[1::2], strict=True))
        return self.size[candidate.entry] // math.prod(space) * math.prod(padded)
