"""Linear layers on channels, which are the last dimension, and the permutations from and to channels first."""

from __future__ import annotations

from typing import Any

from fxmerge.algebra.affine import Affine, pointwise
from fxmerge.core.geometry import Axis, Geometry
from fxmerge.core.segment import Reason
from fxmerge.graph.layout import turns
from fxmerge.operators.base import Map, Opaque, Site, Verdict


class Linear:
    """nn.Linear on (N, *space, C) with one to three dimensions of space: a convolution of one tap."""

    any_layout = True

    def verdict(self, site: Site) -> Verdict:
        if not site.channels_last:
            return Opaque(Reason.LAYOUT, "Linear on a dimension that is not channels")
        return Map(self._geometry(site), "convolution")

    def affine(self, site: Site) -> Affine:
        module: Any = site.module
        return Affine.of(self._geometry(site), pointwise(module.weight.detach(), site.dims).weight, module.bias)

    def unpad(self, site: Site) -> None:
        return

    def _geometry(self, site: Site) -> Geometry:
        module: Any = site.module
        return Geometry(module.in_features, module.out_features, (Axis(),) * site.dims, bias=module.bias is not None)


def turned(site: Site) -> Verdict:
    """torch.permute from channels first to channels last, or back: an identity, for layouts are seen to elsewhere."""
    if site.operand is None or not turns(site.node):
        return Opaque(detail="permutation other than of channels first to channels last, or back")
    return Map(Geometry.identity(site.channels, site.dims))
