"""Concats on channels."""

from __future__ import annotations

from torch.fx import Node

from fxmerge.graph.meta import facts
from fxmerge.graph.query import is_tensor
from fxmerge.operators.base import Join, Opaque, Site, Verdict


def concat(site: Site) -> Verdict:
    """torch.cat on channels."""
    parts, dimension = _arguments(site.node)
    rank = len(facts(site.node).shape or ())
    channels = rank - 1 if facts(site.node).channels_last else 1
    if dimension not in (channels, channels - rank) or not all(isinstance(p, Node) and is_tensor(p) for p in parts):
        return Opaque(detail=f"concatenation on dimension {dimension}")
    return Join("concat", tuple(parts))


def _arguments(node: Node) -> tuple[tuple[Node, ...], object]:
    values = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
    parts = values.get("tensors", ())
    return tuple(parts) if isinstance(parts, (tuple, list)) else (), values.get("dim", 0)
