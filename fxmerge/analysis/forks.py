"""Which readers of a tensor belong together: those whose paths meet again before they meet those of the others.

The input of a residual block that is kept for later as well (a U-Net's skip) has three readers, and only two are the block's. The
block is a region of its own once these two read the tensor through one edge. Post-dominators say which: node p post-dominates a
reader if every path from it to the outputs crosses p; readers whose nearest common post-dominator lies before that of all are a
group, and groups nest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node


@dataclass(frozen=True)
class Group:
    """Readers of one tensor, single ones and groups, that meet at one node."""

    members: tuple[Node | Group, ...]


def group_readers(nodes: Sequence[Node], readers: Mapping[Node, Sequence[Node]]) -> dict[Node, tuple[Node | Group, ...]]:
    """For every node that has several readers, these in groups; a reader alone where it belongs with no other.

    Args:
        nodes: in graph order.
        readers: of each node, each once, in graph order; a node without any leads out of the graph.
    """
    above: dict[Node, tuple[Node, ...]] = {}  # a node, then its post-dominators, from the nearest on
    for node in reversed(nodes):
        paths = [above[reader] for reader in readers[node]]
        above[node] = (node, *_common(paths))
    return {node: _grouped([(r, above[r]) for r in readers[node]]) for node in nodes if len(readers[node]) > 1}


def _common(paths: Sequence[tuple[Node, ...]]) -> tuple[Node, ...]:
    """What all these have in common; it is the end of each of them."""
    if not paths:
        return ()
    shared = set(paths[0]).intersection(*paths[1:])
    return tuple(node for node in paths[0] if node in shared)


def _grouped(items: list[tuple[Node | Group, tuple[Node, ...]]]) -> tuple[Node | Group, ...]:
    """Put together those that meet first, until all that is left meets at one node, or nowhere."""
    while True:
        everywhere = set(_common([path for _, path in items]))
        meeting = [node for _, path in items for node in path if node not in everywhere]
        twice = [node for node in meeting if sum(node in path for _, path in items) > 1]
        if not twice:
            return tuple(item for item, _ in items)
        # The nearest: none of the others that some of these meet at comes before it.
        first = min(twice, key=lambda node: max(path.index(node) for _, path in items if node in path))
        members = [(item, path) for item, path in items if first in path]
        path = _common([path for _, path in members])
        place = items.index(members[0])
        items = [entry for entry in items if entry not in members]
        items.insert(place, (Group(tuple(item for item, _ in members)), path))
