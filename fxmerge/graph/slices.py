"""Splits, chunks and slices in all spellings become ``x[:, 2:4, ...]``: ``operator.getitem`` with a slice for every dimension.

Rules: 1. an item of a split or chunk of constant sizes; 2. ``narrow`` and ATen's ``slice``, of one dimension each; 3. a slice of a
slice of other dimensions; 4. a slice of everything is dropped; 5. reshape, transpose, reshape that shuffles channels.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch.fx import Node

from fxmerge.graph.edit import bypass
from fxmerge.graph.meta import facts, record
from fxmerge.graph.spelling import Call, read_call

_WHOLE = slice(None, None, None)


def become_slice(node: Node, call: Call) -> None:
    """Turn a slice in any spelling into the dialect's, if its bounds are constant; leave any other node as it is."""
    source, slices = _of_item(call) if call.name == "getitem" else _of_one_dimension(call)
    if source is None or slices is None:
        return
    source, slices = _joined(source, slices)
    if all(part == _WHOLE for part in slices):
        bypass(node, source)
        return
    node.op, node.target, node.args, node.kwargs = "call_function", operator.getitem, (source, tuple(slices)), {}


def _of_item(call: Call) -> tuple[Node | None, list[slice] | None]:
    source, index = call.arguments["input"], call.arguments.get("index")
    if not isinstance(source, Node):
        return None, None
    rank = len(facts(source).shape or ())
    if rank:
        return source, _expanded(index, rank)
    parts = read_call(source)
    if parts is None or not isinstance(index, int) or parts.name not in ("split", "chunk"):
        return None, None
    return _of_part(parts, index)


def _expanded(index: Any, rank: int) -> list[slice] | None:
    """One slice for every dimension, the ellipsis written out; None where something else than constant slices is there."""
    parts = list(index) if isinstance(index, tuple) else [index]
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    if dots:
        parts[dots[0] : dots[0] + 1] = [_WHOLE] * (rank - len(parts) + 1)
    if len(parts) > rank or not all(isinstance(part, slice) and _constant(part) for part in parts):
        return None
    return [_tidy(part) for part in parts] + [_WHOLE] * (rank - len(parts))


def _of_part(parts: Call, index: int) -> tuple[Node | None, list[slice] | None]:
    source, dim = parts.arguments["input"], parts.arguments.get("dim", 0)
    shape = facts(source).shape if isinstance(source, Node) else None
    if shape is None or not isinstance(dim, int):
        return None, None
    size = shape[dim % len(shape)]
    bounds = _bounds(parts, size)
    if bounds is None or not -len(bounds) <= index < len(bounds):
        return None, None
    start, stop = bounds[index]
    return source, _one(len(shape), dim, slice(start, stop))


def _bounds(parts: Call, size: int) -> list[tuple[int, int]] | None:
    """(start, stop) of every part."""
    if parts.name == "chunk":
        count = parts.arguments.get("chunks")
        step: Any = -(-size // count) if isinstance(count, int) else None
    else:
        step = parts.arguments.get("split_size_or_sections")
    if isinstance(step, (tuple, list)) and all(isinstance(n, int) for n in step):
        edges = [sum(step[:i]) for i in range(len(step) + 1)]
        return list(itertools.pairwise(edges))
    if not isinstance(step, int):
        return None
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _of_one_dimension(call: Call) -> tuple[Node | None, list[slice] | None]:
    source, values = call.arguments["input"], call.arguments
    shape = facts(source).shape if isinstance(source, Node) else None
    dim, start = values.get("dim", 0), values.get("start")
    if shape is None or not isinstance(dim, int):
        return None, None
    if call.name == "narrow":
        length = values.get("length")
        stop = start + length if isinstance(start, int) and isinstance(length, int) else Ellipsis
        part: Any = slice(start, stop, None)
    else:
        part = slice(start, values.get("end"), values.get("step"))
    return (source, _one(len(shape), dim, _tidy(part))) if _constant(part) else (None, None)


def _one(rank: int, dim: int, part: slice) -> list[slice]:
    return [part if i == dim % rank else _WHOLE for i in range(rank)]


def _constant(part: slice) -> bool:
    return all(value is None or isinstance(value, int) for value in (part.start, part.stop, part.step))


def _tidy(part: slice) -> slice:
    """The same slice, bounds that say nothing left out."""
    start = None if part.start == 0 else part.start
    stop = None if part.stop is not None and part.stop >= sys.maxsize // 2 else part.stop
    return slice(start, stop, None if part.step == 1 else part.step)


def _joined(source: Node, slices: Sequence[slice]) -> tuple[Node, list[slice]]:
    """A slice of a slice that only it reads, of other dimensions, as one slice of the tensor itself."""
    before = source.args[1] if source.target is operator.getitem and len(source.users) == 1 else None
    operand = source.args[0] if before is not None else None
    if (
        isinstance(before, tuple)
        and isinstance(operand, Node)
        and len(before) == len(slices)
        and all(isinstance(part, slice) for part in before)
        and all(_WHOLE in (a, b) for a, b in zip(before, slices, strict=True))
    ):
        return operand, [b if a == _WHOLE else a for a, b in zip(before, slices, strict=True)]
    return source, list(slices)


def become_shuffle(node: Node, call: Call) -> None:
    """Turn the last node of a channel shuffle written as reshape, transpose, reshape into ``F.channel_shuffle``."""
    swapped = call.arguments.get("input")
    if not isinstance(swapped, Node):
        return
    swap = read_call(swapped)
    split = swap.arguments.get("input") if swap is not None and swap.name in ("transpose", "permute") else None
    before = read_call(split) if isinstance(split, Node) else None
    source = before.arguments.get("input") if before is not None and before.name == "reshape" else None
    if not isinstance(source, Node) or not isinstance(split, Node):
        return
    shape, parts, turned = (facts(n).shape or () for n in (source, split, swapped))
    if len(shape) < 3 or facts(node).shape != shape or len(parts) != len(shape) + 1:
        return
    batch, groups, each, *space = parts
    shuffles = turned == (batch, each, groups, *space) and (batch, groups * each, *space) == shape
    if shuffles and _swaps_one_and_two(swap, len(parts)):
        node.op, node.target, node.args, node.kwargs = "call_function", F.channel_shuffle, (source, groups), {}
        record(node, target="channel_shuffle")


def _swaps_one_and_two(swap: Call | None, rank: int) -> bool:
    if swap is None:
        return False
    if swap.name == "permute":
        return list(swap.arguments.get("sizes", ())) == [0, 2, 1, *range(3, rank)]
    dims = (swap.arguments.get("dim0"), swap.arguments.get("dim1"))
    return all(isinstance(d, int) for d in dims) and {d % rank for d in dims if isinstance(d, int)} == {1, 2}
