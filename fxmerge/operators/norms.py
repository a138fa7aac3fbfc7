"""Norms whose statistics depend on what they see, and the scale and shift of every channel that may stand for one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

from torch import nn
from torch.fx import GraphModule, Node

from fxmerge.algebra.affine import Affine, scaling
from fxmerge.core.geometry import Geometry
from fxmerge.core.segment import Reason
from fxmerge.graph.query import module_of
from fxmerge.operators.base import Map, Norm, NormOperator, Opaque, Operators, Site, Verdict


def norm_behind(graph: GraphModule, node: Node, table: Operators, channels: int) -> nn.Module:
    """A new norm of the kind of the one that a node calls, for tensors of so many channels, which scales by 1 and shifts by 0.

    Raises:
        ValueError: the node is no norm that can be moved.
    """
    operator, module = table.find(graph, node), module_of(graph, node)
    if module is None or not hasattr(operator, "behind"):
        raise ValueError(f"{node.name} is no norm that can stand elsewhere")
    return cast(NormOperator, operator).behind(module, channels)


_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class InputNorm:
    """Group and instance norms on channels first, layer norms over the channels of channels last."""

    any_layout = True

    def verdict(self, site: Site) -> Verdict:
        module, name = site.module, type(site.module).__name__
        if isinstance(module, nn.LayerNorm):
            sound = site.channels_last and tuple(module.normalized_shape) == (site.channels,)
        elif isinstance(module, _INSTANCE_NORMS):
            sound = not module.track_running_stats and len(site.operand_shape) == 2 + 1 + _INSTANCE_NORMS.index(type(module))
        else:
            sound = not site.channels_last and len(site.operand_shape) > 2
        if not sound:
            return Opaque(Reason.BATCH_STATISTICS, name, "a norm over channels, or one with running statistics, can be taken out")
        return Norm(_scaling_geometry(site.channels, site.dims), name)

    def affine(self, site: Site) -> Affine:
        raise TypeError(f"{type(site.module).__name__} is no affine map")

    def unpad(self, site: Site) -> None:
        return

    def behind(self, module: Any, channels: int) -> nn.Module:
        """Group norms keep their number of groups where it divides the channels, else as many as divide both."""
        if isinstance(module, nn.GroupNorm):
            return nn.GroupNorm(math.gcd(module.num_groups, channels), channels, module.eps)
        if isinstance(module, nn.LayerNorm):
            return nn.LayerNorm(channels, module.eps)
        kind: Any = type(module)
        made: nn.Module = kind(channels, module.eps, affine=True)
        return made


class ScaleAndShift:
    """:class:`fxmerge.algebra.module.Scaling`, which stands for a norm in a student."""

    any_layout = True

    def verdict(self, site: Site) -> Verdict:
        return Map(_scaling_geometry(site.channels, site.dims))

    def affine(self, site: Site) -> Affine:
        return scaling(site.module.weight.detach().double(), site.module.bias.detach().double(), site.dims)

    def unpad(self, site: Site) -> None:
        return


def _scaling_geometry(channels: int, dims: int) -> Geometry:
    return replace(Geometry.identity(channels, dims), bias=True)
