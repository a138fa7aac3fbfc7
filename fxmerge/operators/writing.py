"""From a map back to nodes: what a merge becomes, for timing and for rewriting."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.fx import Node

from fxmerge.algebra.module import separate_padding
from fxmerge.core.geometry import Geometry
from fxmerge.graph.edit import note_pad
from fxmerge.graph.layout import turn
from fxmerge.graph.meta import Facts, facts, record


def is_linear(geometry: Geometry, entry: Facts, exit_: Facts) -> bool:
    """Whether a merge between tensors of these layouts is a linear layer: channels last on both sides, one tap, no groups."""
    return entry.channels_last and exit_.channels_last and geometry.pointwise and geometry.groups == 1


def write_map(
    operand: Node,
    target: str,
    geometry: Geometry,
    *,
    linear: bool,
    channels_last: bool,
    sides: Sequence[tuple[Node, str]] = (),
    norm: str = "",
) -> tuple[Node, ...]:
    """Write the nodes of a merge at its graph's insertion point: a convolution, and what it takes around it.

    Args:
        operand: the tensor that enters.
        target: name of the module that convolves; it is put into the graph by the caller, as the others.
        geometry: of the map.
        linear: whether the module is a linear layer, which reads and gives channels last.
        channels_last: whether the result has channels last.
        sides: tensors that are constant over space, channels first, and names of the modules they go through, to be added.
        norm: name of a norm behind the convolution.

    Returns:
        The nodes in graph order, what is known of them recorded; the last one computes the merge.
    """
    graph, image = operand.graph, operand
    made: list[Node] = []

    def note(node: Node, image_shape: Sequence[int], last: bool, name: str) -> Node:
        record(node, channels_last=last)
        shape = facts(node).shape_of(image_shape) if image_shape else None
        record(node, shape=shape, dtype=facts(operand).dtype, target=name)
        made.append(node)
        return node

    before = facts(operand).image_shape
    after = (before[0], geometry.out_channels, *geometry.outputs(before[2:])) if before else ()
    if facts(image).channels_last and not linear:
        image = note(graph.call_function(torch.permute, turn(image)), before, False, "permute")
    amounts = separate_padding(geometry)
    if amounts:
        image = graph.call_function(F.pad, (image, amounts))
        note_pad(image)
        made.append(image)
    image = note(graph.call_module(target, (image,)), after, linear, target)
    for side, name in sides:
        known = facts(side).image_shape
        shape = (known[0], geometry.out_channels, *known[2:]) if known else ()
        term = note(graph.call_module(name, (side,)), shape, False, name)
        image = note(graph.call_function(operator.add, (image, term)), after, linear, "add")
    if norm:
        image = note(graph.call_module(norm, (image,)), after, linear, norm)
    if channels_last and not linear:
        note(graph.call_function(torch.permute, turn(image)), after, True, "permute")
    return tuple(made)
