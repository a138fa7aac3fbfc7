"""The one key that fxmerge keeps in ``node.meta``, typed.

``node.meta`` is copied with a graph (shallowly) but lost in pickling, in ``fx.Transformer`` and in tracing again; nothing that has
to last is kept here. Facts are frozen and replaced whole, so that two graphs sharing a meta value cannot disturb each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from fxmerge.core.segment import Candidate

KEY = "fxmerge"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one node.

    Args:
        shape: of its output for the example inputs; None where it is not a tensor.
        dtype: of its output.
        target: the qualified module name, or the function, as the user's model has it.
        source: ``file:line`` of the user's code, where known.
        role: what the plan does with the node: ``removed`` (becomes an identity), ``merged`` (kept in the student, part of the
            one convolution), ``replaced`` (gone from the student), ``exit`` (the last of a segment).
        merge: on an exit, the candidate that ends here.
    """

    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    target: str = ""
    source: str = ""
    role: Literal["", "removed", "merged", "replaced", "exit"] = ""
    merge: Candidate | None = None


def facts(node: Node) -> Facts:
    """What is known of this node; all fields empty where nothing was recorded."""
    known = node.meta.get(KEY)
    return known if isinstance(known, Facts) else Facts()


def record(node: Node, **changes: Any) -> None:
    """Replace some of a node's facts."""
    node.meta[KEY] = replace(facts(node), **changes)


def origin(graph: GraphModule) -> str | None:
    """The fingerprint of the graph that this one was made from by linearizing, if it was."""
    value = graph.meta.get(KEY)
    return value if isinstance(value, str) else None


def set_origin(graph: GraphModule, fingerprint: str) -> None:
    graph.meta[KEY] = fingerprint
