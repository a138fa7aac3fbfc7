"""What is in a graph: counts, residual blocks, and what keeps them from being spanned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from torch import nn
from torch.fx import GraphModule, Node

import fxmerge
from fxmerge.core.expression import Expression
from fxmerge.graph.meta import facts
from fxmerge.operators import Activation, Opaque

Row: TypeAlias = dict[str, Any]


def found(findings: fxmerge.Findings) -> Row:
    """Counts of nodes, and of refusals by reason; opaque ones by what they are."""
    graph, verdicts = findings.graph, findings.verdicts
    layers = {node.name for node in graph.graph.nodes if _is_convolution(graph, node)}
    activations = {node.name for node, verdict in verdicts.items() if isinstance(verdict, Activation)}
    told = {name for s in findings.segments for name in s.nodes} | {refusal.node for refusal in findings.refusals}
    opaque = [r for r in findings.refusals if r.reason is fxmerge.Reason.OPAQUE]
    return {
        "nodes": len(graph.graph.nodes),
        "convolutions": len(layers),
        "activations": len(activations),
        "segments": len(findings.segments),
        "refusals": Counter(refusal.reason.name.lower() for refusal in findings.refusals),
        "opaque": Counter(refusal.detail for refusal in opaque),
        "untold": sorted((layers | activations) - told),
    }


def blocks(findings: fxmerge.Findings, proposals: Sequence[fxmerge.Proposal]) -> Row:
    """Residual adds, those within a candidate, what stands in the others, and whether there is attention."""
    paths = _Paths(findings.graph, findings.verdicts)
    residual = {node.name: block for node in findings.graph.graph.nodes if (block := paths.residual_block(node)) is not None}
    merging = [p for p in proposals if any(c.kind != "identity" for c in p.candidates)]
    spanned = {name for p in merging for name in _sums_over_convolutions(p.segment.expression)}
    obstacles = Counter(what for name in residual.keys() - spanned for what in paths.obstacles(residual[name]))
    return {
        "residual_adds": len(residual),
        "residual_adds_spanned": len(residual.keys() & spanned),
        "spans_block": bool(spanned),
        "attention": sorted(paths.attention()),
        "gated": any(paths.is_gate(node) for block in residual.values() for node in block),
        "obstacles": dict(obstacles.most_common(4)),
    }


def _sums_over_convolutions(expression: Expression) -> Iterator[str]:
    """The sums of an expression with a convolution that only one of the operands has behind it."""
    behind: list[set[int]] = []
    for index, step in enumerate(expression.steps):
        sets = [behind[i] for i in step.operands]
        behind.append(set().union(*sets) | ({index} if step.role == "convolution" else set()))
        if step.kind == "sum" and set().union(*sets) != set.intersection(*sets):
            yield step.name


@dataclass(frozen=True)
class _Paths:
    """The paths of a graph from its inputs on; parameters, and what is computed from them alone, are not on them."""

    graph: GraphModule
    verdicts: Mapping[Node, object]

    @cached_property
    def operands(self) -> dict[Node, list[Node]]:
        """For every node that depends on an input, its operands that do. Sizes do not."""
        found: dict[Node, list[Node]] = {}
        for node in self.graph.graph.nodes:
            before = [n for n in node.all_input_nodes if n in found]
            if (before or node.op == "placeholder") and not _is_size(self.graph, node):
                found[node] = before
        return found

    def residual_block(self, node: Node) -> set[Node] | None:
        """The nodes between the fork and a residual add; None for other nodes."""
        operands = self.operands.get(node, [])
        shapes = {facts(n).shape for n in operands}
        if _kind(self.graph, node) not in ("add", "iadd", "add_relu") or len(operands) != 2:
            return None
        if len(shapes) != 1 or len(next(iter(shapes)) or ()) < 3:
            return None
        for shortcut, other in (operands, operands[::-1]):
            fork = self._fork(shortcut, self._before(other))
            branch = self._between(fork, other) if fork is not None else set()
            if fork is not None and any(_is_convolution(self.graph, n) for n in branch):
                block = branch | self._between(fork, shortcut)
                return None if any(_kind(self.graph, n) in _ENLARGING for n in block) else block
        return None

    def _fork(self, node: Node, before_other: set[Node]) -> Node | None:
        """The first node, going back in a row of layers without an activation or maximum, that the other operand comes from."""
        while node not in before_other:
            operands = self.operands[node]
            maximum = "maxpool" in _kind(self.graph, node).replace("_", "").lower()
            if maximum or isinstance(self.verdicts.get(node), Activation) or len(operands) != 1:
                return None
            node = operands[0]
        return node

    def _before(self, end: Node) -> set[Node]:
        """Everything that a node is computed from."""
        seen: set[Node] = set()
        waiting = [*self.operands[end]]
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting.extend(self.operands[node])
        return seen

    def _between(self, fork: Node, end: Node) -> set[Node]:
        """The nodes on a path from the fork to a node, that node counted and the fork not."""
        behind = {fork}
        for node in self.graph.graph.nodes:
            if not behind.isdisjoint(self.operands.get(node, ())):
                behind.add(node)
        return (behind & (self._before(end) | {end})) - {fork}

    def attention(self) -> set[str]:
        """Kinds of nodes that are attention."""
        kinds = {node: _kind(self.graph, node) for node in self.operands}
        named = {kind for kind in kinds.values() if "attention" in kind.lower()}
        return named | {kind for node, kind in kinds.items() if kind in _PRODUCTS and self._multiplies(node)}

    def is_gate(self, node: Node) -> bool:
        """Whether a node multiplies two tensors, pixel by pixel, that both depend on the input."""
        return _kind(self.graph, node) in ("mul", "imul") and self._multiplies(node)

    def _multiplies(self, node: Node) -> bool:
        return len(self.operands[node]) > 1

    def obstacles(self, block: set[Node]) -> set[str]:
        """What is opaque in a block; its sum where nothing is."""
        verdicts = [self.verdicts.get(node) for node in block]
        return {v.detail or v.reason.value for v in verdicts if isinstance(v, Opaque)} or {"nothing opaque"}


_ENLARGING = {"interpolate", "upsample", "Upsample", "pixel_shuffle", "PixelShuffle"} | {
    f"{name}{n}d" for name in ("conv_transpose", "ConvTranspose", "upsample_nearest", "upsample_bilinear") for n in (1, 2, 3)
}
_PRODUCTS = {"matmul", "bmm", "mm", "einsum", "baddbmm", "rmatmul"}


def _is_size(graph: GraphModule, node: Node) -> bool:
    """Whether a node reads a size, not values."""
    kind = _kind(graph, node)
    return kind in ("size", "sym_size", "dim", "len") or (kind == "getattr" and "T" not in node.args)


def _kind(graph: GraphModule, node: Node) -> str:
    """The type of module, or the name of the function, without underscores and overloads: conv2d for aten.conv2d.default."""
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))).__name__
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.partition(".")[0].strip("_")


def _is_convolution(graph: GraphModule, node: Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return node.op.startswith("call_") and _kind(graph, node) in ("conv1d", "conv2d", "conv3d", "convolution")
