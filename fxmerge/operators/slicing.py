"""Operators that pick or add pixels and channels: strided slices, zero padding. Deltas, in the language of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from fxmerge.algebra.affine import Affine
from fxmerge.core.geometry import Axis, Geometry, in_pad_order
from fxmerge.core.segment import Reason
from fxmerge.operators.base import Map, Opaque, Site, Verdict


class Slice:
    """x[:, :, ::2, ::2] and the like: constant starts and steps on space, and whole or constant ranges of channels.

    In either layout.
    """

    any_layout = True

    def verdict(self, site: Site) -> Verdict:
        if len(site.operand_shape) < 3 or self._slices(site) is None:
            return Opaque(detail="indexing other than by constant slices of space and channels")
        return Map(self._geometry(site))

    def affine(self, site: Site) -> Affine:
        geometry = self._geometry(site)
        if geometry.groups > 1:
            return replace(Affine.identity(geometry.in_channels, len(geometry.axes)), geometry=geometry)
        index = self._slices(site)
        assert index is not None
        return selection(geometry, range(geometry.in_channels)[index[1]])

    def unpad(self, site: Site) -> None:
        index = self._slices(site)
        assert index is not None
        steps = [slice(None, None, s.step) for s in index[2:]]
        parts = (*steps, index[1]) if site.channels_last else (index[1], *steps)
        site.node.args = (site.node.args[0], (slice(None), *parts))

    def _slices(self, site: Site) -> tuple[slice, ...] | None:
        """Of (N, C, *space), whatever the layout; None where the node is no such slice."""
        index = site.node.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(p, slice) and _constant(p) for p in parts) or len(parts) > len(site.operand_shape):
            return None
        whole = tuple(parts) + (slice(None),) * (len(site.operand_shape) - len(parts))
        whole = (whole[0], whole[-1], *whole[1:-1]) if site.channels_last else whole
        sound = _is_whole(whole[0]) and all((s.start or 0) >= 0 and (s.stop is None or s.stop < 0) for s in whole[2:])
        return whole if sound else None

    def _geometry(self, site: Site) -> Geometry:
        index = self._slices(site)
        assert index is not None
        axes = tuple(Axis(1, s.step or 1, s.start or 0, 1, (s.stop or 0) - (s.start or 0) - 1) for s in index[2:])
        channels = len(range(site.channels)[index[1]])
        groups = site.channels if _is_whole(index[1]) else 1
        return Geometry(site.channels, channels, axes, groups)


class ZeroPad:
    """F.pad with zeros, of space or of channels (option A shortcuts, TensorFlow's "same"), and nn.ZeroPad2d.

    In either layout.
    """

    any_layout = True

    def verdict(self, site: Site) -> Verdict:
        pads = self._pads(site)
        if pads is None or len(site.operand_shape) < 3:
            return Opaque(Reason.PADDING_MODE, "padding with something else than zeros, or by computed amounts")
        return Map(self._geometry(site))

    def affine(self, site: Site) -> Affine:
        geometry = self._geometry(site)
        if geometry.groups > 1:
            return replace(Affine.identity(geometry.in_channels, len(geometry.axes)), geometry=geometry)
        before, _ = self._required(site)[1]
        return selection(geometry, range(-before, geometry.out_channels - before))

    def unpad(self, site: Site) -> None:
        pads = self._required(site)
        space = [(0, 0)] * site.dims
        parts = [pads[0], *space, pads[1]] if site.channels_last else [pads[0], pads[1], *space]
        node = site.node
        node.op, node.target, node.args, node.kwargs = "call_function", F.pad, (node.args[0], in_pad_order(parts)), {}

    def _required(self, site: Site) -> list[tuple[int, int]]:
        pads = self._pads(site)
        assert pads is not None
        return pads

    def _pads(self, site: Site) -> list[tuple[int, int]] | None:
        """(before, after) on (N, C, *space), whatever the layout, or None where that is not constant zero padding."""
        amounts = _pad_arguments(site)
        rank = len(site.operand_shape)
        if amounts is None or len(amounts) % 2 or len(amounts) > 2 * rank:
            return None
        pairs = [(amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)]
        pads = list(reversed(pairs + [(0, 0)] * (rank - len(pairs))))
        pads = [pads[0], pads[-1], *pads[1:-1]] if site.channels_last else pads
        return pads if pads[0] == (0, 0) and min(*pads[1], 0) == 0 else None

    def _geometry(self, site: Site) -> Geometry:
        pads = self._required(site)
        axes = tuple(Axis(1, 1, -before, 1, before + after - 1) for before, after in pads[2:])
        groups = site.channels if pads[1] == (0, 0) else 1
        return Geometry(site.channels, site.channels + sum(pads[1]), axes, groups)


def _pad_arguments(site: Site) -> Sequence[int] | None:
    if site.module is not None:
        amounts: object = site.module.padding
        constant = isinstance(site.module, (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)) or site.module.value == 0
    else:
        values = {**dict(zip(("input", "pad", "mode", "value"), site.node.args, strict=False)), **site.node.kwargs}
        amounts = values.get("pad")
        constant = values.get("mode", "constant") == "constant" and values.get("value") in (None, 0, 0.0)
    if not constant or not isinstance(amounts, (tuple, list)) or not all(isinstance(a, int) for a in amounts):
        return None
    return tuple(amounts)


def selection(geometry: Geometry, sources: Sequence[int]) -> Affine:
    """Output channel i is input channel ``sources[i]``, or zero where that is no channel."""
    weight = torch.zeros(geometry.weight_shape, dtype=torch.float64)
    for out, source in enumerate(sources):
        if 0 <= source < geometry.in_channels:
            weight[out, source] = 1.0
    return Affine.of(geometry, weight)


def _constant(part: slice) -> bool:
    return all(value is None or isinstance(value, int) for value in (part.start, part.stop, part.step))


def _is_whole(part: slice) -> bool:
    return part.start in (None, 0) and part.stop is None and part.step in (None, 1)
