"""The one key that fxmerge keeps in ``node.meta``, typed.

``node.meta`` is copied with a graph (shallowly) but lost in pickling, in ``fx.Transformer`` and in tracing again; nothing that has
to last is kept here. Facts are frozen and replaced whole, so that two graphs sharing a meta value cannot disturb each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from fxmerge.core.segment import Candidate

KEY = "fxmerge"
_FRONT_END = "fxmerge_front_end"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one node.

    Args:
        shape: of its output for the example inputs; None where it is not a tensor.
        dtype: of its output.
        channels_last: whether its channels are the last dimension; else they are taken to be dimension 1.
        bundle: whether its output is a tuple, list or other structure that holds tensors.
        target: the qualified module name, or the function, as the user's model has it.
        source: ``file:line`` of the user's code, where known.
        constant: whether it is computed from parameters alone.
        role: what the plan does with the node: ``removed`` (becomes an identity), ``merged`` (kept in the student, part of the
            one convolution), ``replaced`` (gone from the student).
        merge: on an exit, the candidate that ends here.
        behind: of an activation that a merge has put there, the exit that it stands behind, and stands for to all other merges.
    """

    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    channels_last: bool = False
    bundle: bool = False
    target: str = ""
    source: str = ""
    constant: bool = False
    role: Literal["", "removed", "merged", "replaced"] = ""
    merge: Candidate | None = None
    behind: str = ""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(N, C, *space) wherever the channels are; () where the shape is not known.

        >>> Facts(shape=(2, 7, 5, 3), channels_last=True).image_shape
        (2, 3, 7, 5)
        """
        shape = self.shape or ()
        return (shape[0], shape[-1], *shape[1:-1]) if self.channels_last else shape

    def shape_of(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape, in this layout, of an image of (N, C, *space)."""
        batch, channels, *space = image_shape
        return (batch, *space, channels) if self.channels_last else (batch, channels, *space)


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


def front_end(graph: GraphModule) -> str:
    """How the graph was captured: ``symbolic_trace``, ``export`` or ``given``; empty where fxmerge did not trace it."""
    return str(graph.meta.get(_FRONT_END, ""))


def set_front_end(graph: GraphModule, name: str) -> None:
    graph.meta[_FRONT_END] = name


def set_origin(graph: GraphModule, fingerprint: str) -> None:
    graph.meta[KEY] = fingerprint
