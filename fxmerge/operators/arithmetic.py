"""Arithmetic with constants: scales and shifts of channels (frozen and affine norms, LayerScale), and of everything alike."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxmerge.algebra.affine import Affine, scaling
from fxmerge.core.geometry import Geometry
from fxmerge.core.segment import Reason
from fxmerge.graph.constants import constant_value, is_constant
from fxmerge.graph.meta import facts
from fxmerge.graph.query import is_tensor
from fxmerge.operators.base import Join, Map, Opaque, Site, Verdict


class Arithmetic:
    """x + c, x - c, x * c, x / c for a constant c, one number or one for each channel; x + y and x - y for two images.

    And, channels first, x + s for a tensor s that is constant over space: (N, C, 1, 1), or (1, C, 1, 1).
    """

    any_layout = True

    def verdict(self, site: Site) -> Verdict:
        args = site.node.args
        if len(args) != 2 or site.operand is None:
            return Opaque(detail="arithmetic on something that is no image")
        other = args[1]
        if _is_side(site):
            return Map(self._geometry(site), "side", other)  # type: ignore[arg-type]
        if isinstance(other, Node) and is_tensor(other):
            return self._of_two(site, site.operand, other)
        if self._constant(site) is None:
            return Opaque(detail=f"{_NAMES[site.node.target]} with something else than one constant for each channel")
        return Map(self._geometry(site))

    def affine(self, site: Site) -> Affine:
        if _is_side(site):
            return scaling(torch.ones(site.channels), torch.zeros(site.channels), site.dims)
        constant = self._constant(site)
        assert constant is not None
        one, nothing = torch.ones_like(constant), torch.zeros_like(constant)
        target = site.node.target
        if target in (operator.add, operator.sub):
            return scaling(one, constant if target is operator.add else -constant, site.dims)
        return Affine.of(self._geometry(site), scaling(_scale(target, constant), nothing, site.dims).weight)

    def unpad(self, site: Site) -> None:
        return

    def _of_two(self, site: Site, one: Node, two: Node) -> Verdict:
        if site.node.target not in (operator.add, operator.sub):
            return Opaque(detail="product of two tensors: a gate")
        if facts(one).shape != facts(two).shape:
            return Opaque(Reason.SHAPE, "the addition broadcasts")
        return Join("sum" if site.node.target is operator.add else "difference", (one, two))

    def _geometry(self, site: Site) -> Geometry:
        shifts = site.node.target in (operator.add, operator.sub)
        same = Geometry.identity(site.channels, site.dims)
        return Geometry(same.in_channels, same.out_channels, same.axes, same.groups, shifts)

    def _constant(self, site: Site) -> Tensor | None:
        """(C,) in float64, or None where the second operand is no such constant."""
        other: Any = site.node.args[1]
        if isinstance(other, Node) and not is_constant(other):
            return None
        value = constant_value(site.graph, other)
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            return None
        tensor = torch.as_tensor(value, dtype=torch.float64).detach()
        if tensor.numel() == 1 and tensor.dim() <= site.dims + 2:
            return tensor.reshape(1).expand(site.channels)
        ones = 0 if site.channels_last else site.dims
        for_channels = tuple(tensor.shape[-ones - 1 :]) == (site.channels, *(1,) * ones) and tensor.dim() <= site.dims + 2
        return tensor.reshape(-1) if for_channels and tensor.numel() == site.channels else None


def _is_side(site: Site) -> bool:
    """Whether the second operand is no parameter, and one value for each channel of the first, an image."""
    other = site.node.args[1]
    if site.node.target is not operator.add or not isinstance(other, Node) or not is_tensor(other):
        return False
    if site.channels_last:
        return False
    image, side = site.operand_shape, facts(other).shape or ()
    batch = side[0] in (1, image[0]) if side else False
    return batch and len(image) > 2 and math.prod(image[2:]) > 1 and side[1:] == (image[1], *(1,) * site.dims)


def _scale(target: object, constant: Tensor) -> Tensor:
    return constant if target is operator.mul else 1 / constant


_NAMES: Mapping[object, str] = {
    operator.add: "addition",
    operator.sub: "subtraction",
    operator.mul: "product",
    operator.truediv: "division",
}
