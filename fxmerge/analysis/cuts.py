"""The region tree of a graph: which tensors every path crosses, nested.

Two edges of a graph enclose a single-entry single-exit region iff, once the exit is joined to the entry, every cycle through one
passes through the other (Johnson, Pearson, Pingali 1994, "The program structure tree"). Cycle equivalence is found in linear time
by sampling the cycle space (Pritchard, Thurimella 2011): give every edge outside a spanning tree a random label, every tree edge
the exclusive or of the labels of the cycles it lies on; edges are equivalent iff their labels are equal (with 128 bits, wrong
with probability below 1e-30). Every tensor is an edge, from where it is computed to where it is handed out; every use is one too;
readers that meet before the others do (:mod:`fxmerge.analysis.forks`) share one.

A class of equivalent edges, in graph order, is a chain of cuts. A block that is no series-parallel graph needs no care: it is a
unit, and the chains inside it are classes of their own.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from torch.fx import GraphModule, Node

from fxmerge.analysis.forks import Group, group_readers
from fxmerge.core.region import Chain, Unit
from fxmerge.graph.query import data_operands, fed_by_inputs

#: A tensor's two ends are (node, "in") and (node, "out"), its groups of readers (node, "out.0") and so on.
Vertex = tuple[Node | None, str]
_SOURCE: Vertex = (None, "out")
_SINK: Vertex = (None, "in")


def region_tree(
    graph: GraphModule, attaches: Callable[[Node, Node], bool], side: Callable[[Node], Node | None] = lambda node: None
) -> Unit:
    """The tree of chains and units of a whole graph.

    Args:
        graph: traced, with shapes recorded.
        attaches: whether a node (the second) belongs into the unit that ends at the node before it (the first), as a norm and
            an activation belong to their convolution.
        side: the operand of a node that is only added to all pixels alike, if there is one. It does not keep what it is added
            to from being a chain; it counts as something that leaves the graph.

    Returns:
        A unit named ``""`` that stands for the whole graph; its children are the top-level chains.
    """
    nodes = _dataflow(graph)
    sides = {node: operand for node in nodes if (operand := side(node)) is not None}
    edges = _edges(nodes, sides)
    chains = [cuts for cuts in _classes(edges) if len(cuts) > 1]
    return _Nesting(nodes, sides, chains, attaches).tree()


def _dataflow(graph: GraphModule) -> list[Node]:
    """Tensors that lie on a path from an input to an output, in graph order, the output node last."""
    output = next(iter(reversed(graph.graph.nodes)))
    needed = {output}
    for node in reversed(graph.graph.nodes):
        if node in needed:
            needed.update(data_operands(node))
    fed = fed_by_inputs(graph)
    return [node for node in graph.graph.nodes if node in needed and node in fed]


def _operands(node: Node, sides: Mapping[Node, Node]) -> list[Node]:
    return [operand for operand in data_operands(node) if operand is not sides.get(node)]


def _edges(nodes: Sequence[Node], sides: Mapping[Node, Node]) -> list[tuple[Vertex, Vertex]]:
    """Tensors and uses in graph order; an edge from the sink to the source closes the graph."""
    inside = set(nodes)
    origins = _origins(nodes, sides)
    edges: list[tuple[Vertex, Vertex]] = []
    for node in nodes:
        sources = [operand for operand in _operands(node, sides) if operand in inside]
        if sides.get(node) in inside:
            edges.append(((sides[node], "out"), _SINK))
        for operand in sources:
            *forks, last = origins.get((operand, node), [(operand, "out")])
            edges += [fork for fork in itertools.pairwise((*forks, last)) if fork not in edges]
            edges.append((last, (node, "in")))
        if not sources:
            edges.append((_SOURCE, (node, "in")))
        edges.append(((node, "in"), _SINK if node.op == "output" else (node, "out")))
    return [*edges, (_SINK, _SOURCE)]


def _origins(nodes: Sequence[Node], sides: Mapping[Node, Node]) -> dict[tuple[Node, Node], list[Vertex]]:
    """For a tensor and its reader the vertices that lead from the one to the other: the tensor's end, then those of groups."""
    readers: dict[Node, list[Node]] = {node: [] for node in nodes}
    uses = Counter((operand, node) for node in nodes for operand in _operands(node, sides) if operand in readers)
    for operand, node in uses:
        readers[operand].append(node)
    origins: dict[tuple[Node, Node], list[Vertex]] = {}

    def follow(tensor: Node, items: Sequence[Node | Group], path: list[Vertex]) -> None:
        for number, item in enumerate(items):
            deeper: list[Vertex] = [*path, (tensor, f"{path[-1][1]}.{number}")]
            if isinstance(item, Group):
                follow(tensor, item.members, deeper)
            else:
                origins[tensor, item] = deeper if uses[tensor, item] > 1 else path

    for tensor, items in group_readers(nodes, readers).items():
        follow(tensor, items, [(tensor, "out")])
    return origins


def _classes(edges: Sequence[tuple[Vertex, Vertex]]) -> list[list[Node]]:
    """The cuts of every class of equivalent edges, in graph order."""
    classes: defaultdict[int, list[Node]] = defaultdict(list)
    for ((cut, _), head), label in zip(edges, _labels(edges), strict=True):
        cuts = classes[label]
        if cut is not None and head is not _SINK and (not cuts or cuts[-1] is not cut):
            cuts.append(cut)
    return list(classes.values())


def _labels(edges: Sequence[tuple[Vertex, Vertex]]) -> list[int]:
    """A label for every edge; equal labels, equivalent edges."""
    incident: defaultdict[Vertex, list[tuple[int, Vertex]]] = defaultdict(list)
    for index, (tail, head) in enumerate(edges):
        incident[tail].append((index, head))
        incident[head].append((index, tail))
    generator = random.Random(0)
    labels = [0] * len(edges)
    parent_edge: dict[Vertex, int] = {_SOURCE: -1}
    order, waiting = [], [_SOURCE]
    while waiting:
        vertex = waiting.pop()
        order.append(vertex)
        for index, other in incident[vertex]:
            if other not in parent_edge:
                parent_edge[other] = index
                waiting.append(other)
    gathered: defaultdict[Vertex, int] = defaultdict(int)
    tree = set(parent_edge.values())
    for index, (tail, head) in enumerate(edges):
        if index not in tree:
            labels[index] = generator.getrandbits(128)
            gathered[tail] ^= labels[index]
            gathered[head] ^= labels[index]
    for vertex in reversed(order[1:]):
        index = parent_edge[vertex]
        labels[index] = gathered[vertex]
        tail, head = edges[index]
        gathered[head if tail == vertex else tail] ^= gathered[vertex]
    return labels


class _Nesting:
    """From chains of cuts to a tree: which nodes lie in which unit, and which chain in which unit."""

    def __init__(
        self,
        nodes: Sequence[Node],
        sides: Mapping[Node, Node],
        chains: list[list[Node]],
        attaches: Callable[[Node, Node], bool],
    ) -> None:
        self.sides = sides
        self.position = {node: index for index, node in enumerate(nodes)}
        self.chains, self.attaches = chains, attaches
        self.inside = [self._interiors(cuts) for cuts in chains]
        sizes = [sum(map(len, interiors)) for interiors in self.inside]
        self.homes: defaultdict[Node, list[tuple[int, int, int]]] = defaultdict(list)
        for chain, interiors in enumerate(self.inside):
            for unit, members in enumerate(interiors):
                for node in members:
                    self.homes[node].append((sizes[chain], chain, unit))
        for homes in self.homes.values():
            homes.sort()

    def _interiors(self, cuts: Sequence[Node]) -> list[list[Node]]:
        """The nodes of every unit of a chain, its closing cut counted: all that lies on a path between its two cuts."""
        return [self._interior(entry, end) for entry, end in itertools.pairwise(cuts)]

    def _interior(self, entry: Node, end: Node) -> list[Node]:
        seen, waiting = {end}, [end]
        while waiting:
            for operand in _operands(waiting.pop(), self.sides):
                if operand is not entry and operand in self.position and operand not in seen:
                    seen.add(operand)
                    waiting.append(operand)
        return sorted(seen, key=self.position.__getitem__)

    def tree(self) -> Unit:
        children: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for chain, cuts in enumerate(self.chains):
            homes = self.homes[cuts[1]]
            above = homes[next(i for i, home in enumerate(homes) if home[1] == chain) + 1 :]
            children[above[0][1:] if above else (-1, -1)].append(chain)
        self.children = children
        claimed = {node for cuts in self.chains for node in self.homes if self.homes[node]}
        loose = tuple(node.name for node in self.position if node not in claimed and node.op == "call_function")
        return Unit("", loose, tuple(self._chain(c) for c in children[-1, -1]))

    def _chain(self, chain: int) -> Chain:
        cuts = self.chains[chain]
        groups: list[list[int]] = []
        for unit, end in enumerate(cuts[1:]):
            single = len(self.inside[chain][unit]) == 1
            if groups and single and self.attaches(cuts[unit], end):
                groups[-1].append(unit)
            else:
                groups.append([unit])
        units = tuple(self._unit(chain, group) for group in groups)
        return Chain((cuts[0].name, *(unit.end for unit in units)), units)

    def _unit(self, chain: int, group: Sequence[int]) -> Unit:
        below = tuple(child for unit in group for child in self.children[chain, unit])
        claimed = {node for child in below for interior in self.inside[child] for node in interior}
        members = [node for unit in group for node in self.inside[chain][unit] if node not in claimed]
        end = self.chains[chain][group[-1] + 1]
        return Unit(end.name, tuple(node.name for node in members), tuple(self._chain(child) for child in below))
