"""Nearest upsampling by whole factors, in all spellings, becomes ``F.interpolate(x, scale_factor=(2.0, 2.0), mode="nearest")``.

Rules: 1. ``F.interpolate`` and ATen's ``upsample_nearest`` with a factor for every axis, or one for all;
2. ``nn.Upsample``. A size, computed or constant, stays as it is: it is a whole factor for some images only.

Torch takes pixel floor(p * (1 / factor)) for output p, in float32. That is p // factor for all factors and positions that occur:
checked up to factor 32 and 640,000 outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxmerge.graph.meta import facts
from fxmerge.graph.query import has_hooks, module_of
from fxmerge.graph.spelling import Call

_NEAREST = ("nearest", "nearest-exact")
_LARGEST = 32

#: ATen's operations, one for every number of dimensions -> mode.
_MODES: Mapping[str, str] = {
    **{f"upsample_nearest{n}d": "nearest" for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": "nearest-exact" for n in (1, 2, 3)},
}


def become_nearest(node: Node, call: Call) -> None:
    """Turn an upsampling into the dialect's, if it is by nearest neighbours and whole factors; leave any other as it is."""
    values = call.arguments
    name = getattr(getattr(node.target, "_schema", None), "name", "").rpartition("::")[2]
    mode = _MODES[name] if name in _MODES else values.get("mode", "nearest")
    sizes = values.get("output_size") if name in _MODES else values.get("size")
    given = values.get("scale_factors") if name in _MODES else values.get("scale_factor")
    if sizes is None and not values.get("recompute_scale_factor"):
        _become(node, values["input"], mode, given)


def module_becomes_nearest(graph: GraphModule, node: Node) -> None:
    """Turn the call of an ``nn.Upsample`` into the dialect's, likewise."""
    module: Any = module_of(graph, node)
    if type(module) in (nn.Upsample, nn.UpsamplingNearest2d) and not has_hooks(module):
        operand = node.args[0] if node.args else next(iter(node.kwargs.values()))
        if module.size is None and not module.recompute_scale_factor:
            _become(node, operand, module.mode, module.scale_factor)


def nearest_factors(node: Node) -> tuple[int, ...] | None:
    """The factors of a node in the dialect's form; None for any other."""
    factors = node.kwargs.get("scale_factor")
    if node.target is not F.interpolate or node.kwargs.keys() != {"scale_factor", "mode"} or node.kwargs["mode"] not in _NEAREST:
        return None
    found = _factors(factors, len(factors)) if isinstance(factors, tuple) else None
    return tuple(map(int, found)) if found is not None else None


def _become(node: Node, operand: Any, mode: object, given: object) -> None:
    factors = _factors(given, len(facts(operand).shape or ()) - 2 if isinstance(operand, Node) else 0)
    if mode in _NEAREST and factors is not None:
        node.op, node.target, node.args = "call_function", F.interpolate, (operand,)
        node.kwargs = {"scale_factor": factors, "mode": str(mode)}


def _factors(given: object, dims: int) -> tuple[float, ...] | None:
    """A factor for every axis, where they are whole."""
    factors: tuple[Any, ...] = tuple(given) if isinstance(given, (tuple, list)) else (given,) * dims
    whole = all(isinstance(f, (int, float)) and f == int(f) and 1 <= f <= _LARGEST for f in factors)
    return tuple(map(float, factors)) if whole and dims > 0 and len(factors) == dims else None
