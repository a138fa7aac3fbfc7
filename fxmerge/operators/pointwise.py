"""Operators that treat every pixel alike: norms with running statistics, identities, activations."""

from __future__ import annotations

import torch

from fxmerge.algebra.affine import Affine, scaling
from fxmerge.core.geometry import Geometry
from fxmerge.core.segment import Reason
from fxmerge.operators.base import Activation, Map, Opaque, Site, Verdict


class BatchNorm:
    """Batch norm in eval mode: a scale and a shift for every channel."""

    def verdict(self, site: Site) -> Verdict:
        module = site.module
        if module.running_mean is None or module.running_var is None:
            return Opaque(Reason.BATCH_STATISTICS, "no running statistics", "train it with track_running_stats=True")
        geometry = Geometry.identity(module.num_features, site.dims)
        return Map(Geometry(geometry.in_channels, geometry.out_channels, geometry.axes, geometry.groups, True), "norm")

    def affine(self, site: Site) -> Affine:
        module = site.module
        mean, variance = module.running_mean.double(), module.running_var.double()
        scale = torch.rsqrt(variance + module.eps)
        shift = -mean * scale
        if module.weight is not None:
            scale, shift = scale * module.weight.double(), shift * module.weight.double()
        if module.bias is not None:
            shift = shift + module.bias.double()
        return scaling(scale, shift, site.dims)

    def unpad(self, site: Site) -> None:
        return


def identity(site: Site) -> Verdict:
    """Dropout in eval mode, nn.Identity."""
    return Map(Geometry.identity(site.channels, site.dims)) if len(site.operand_shape) > 2 else Opaque(Reason.SHAPE)


def activation(site: Site) -> Verdict:
    """A pointwise non-linearity of one operand."""
    if site.operand is None:
        return Opaque(detail="activation of something that is no image")
    function = getattr(site.node.target, "__name__", str(site.node.target))
    return Activation(type(site.module).__name__.lower() if site.module is not None else function)
