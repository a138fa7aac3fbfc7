"""Operators that move pixels into channels, or channels among themselves: kernels of ones and zeros."""

from __future__ import annotations

import torch

from fxmerge.algebra.affine import Affine
from fxmerge.core.geometry import Axis, Geometry
from fxmerge.core.segment import Reason
from fxmerge.operators.base import Map, Opaque, Site, Verdict
from fxmerge.operators.slicing import selection


class PixelUnshuffle:
    """F.pixel_unshuffle: out[c*r*r + i*r + j] at (p, q) is in[c] at (r*p + i, r*q + j)."""

    def verdict(self, site: Site) -> Verdict:
        if site.dims != 2:
            return Opaque(Reason.SHAPE, f"operand of shape {site.operand_shape}")
        return Map(self._geometry(site))

    def affine(self, site: Site) -> Affine:
        geometry, factor = self._geometry(site), _option(site, "downscale_factor")
        taps = torch.eye(factor * factor, dtype=torch.float64).view(factor * factor, 1, factor, factor)
        return Affine.of(geometry, taps.repeat(site.channels, 1, 1, 1))

    def unpad(self, site: Site) -> None:
        return

    def _geometry(self, site: Site) -> Geometry:
        factor = _option(site, "downscale_factor")
        axis = Axis.convolution(factor, factor, (0, 0), 1)
        return Geometry(site.channels, site.channels * factor * factor, (axis, axis), site.channels)


class ChannelShuffle:
    """F.channel_shuffle: channels as a table of ``groups`` rows, read by columns."""

    def verdict(self, site: Site) -> Verdict:
        return Map(self._geometry(site)) if site.operand is not None else Opaque()

    def affine(self, site: Site) -> Affine:
        order = torch.arange(site.channels).view(_option(site, "groups"), -1).t().flatten()
        return selection(self._geometry(site), order.tolist())

    def unpad(self, site: Site) -> None:
        return

    def _geometry(self, site: Site) -> Geometry:
        return Geometry(site.channels, site.channels, (Axis(),) * site.dims)


def _option(site: Site, name: str) -> int:
    args, kwargs = site.node.args, site.node.kwargs
    value = args[1] if len(args) > 1 else kwargs[name]
    assert isinstance(value, int)
    return value
