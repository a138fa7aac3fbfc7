"""What fxmerge knows of torch's operators, one file per kind; nothing outside this package names one.

>>> import torch
>>> default_operators().find(None, torch.fx.Graph().placeholder("x")) is None
True
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from fxmerge.algebra.module import Scaling
from fxmerge.graph.activations import ACTIVATIONS
from fxmerge.operators.arithmetic import Arithmetic
from fxmerge.operators.base import (
    Activation,
    Join,
    Map,
    Norm,
    NormOperator,
    Opaque,
    Operator,
    Operators,
    Site,
    Verdict,
    channelwise,
)
from fxmerge.operators.convolution import AveragePool, Convolution, Nearest, TransposedConvolution
from fxmerge.operators.join import concat
from fxmerge.operators.linear import Linear, turned
from fxmerge.operators.norms import InputNorm, ScaleAndShift, norm_behind
from fxmerge.operators.pointwise import BatchNorm, activation, identity
from fxmerge.operators.reading import read_expression, read_maps
from fxmerge.operators.rearranging import ChannelShuffle, PixelUnshuffle
from fxmerge.operators.slicing import Slice, ZeroPad
from fxmerge.operators.writing import is_linear, write_map

__all__ = [
    "Activation",
    "Join",
    "Map",
    "Norm",
    "NormOperator",
    "Opaque",
    "Operator",
    "Operators",
    "Site",
    "Verdict",
    "channelwise",
    "default_operators",
    "is_linear",
    "norm_behind",
    "read_expression",
    "read_maps",
    "write_map",
]


def default_operators() -> Operators:
    """The operators that fxmerge knows; ``.extended(...)`` adds to them."""
    modules: dict[type[nn.Module], Any] = {
        **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), Convolution()),
        **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), TransposedConvolution()),
        **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), BatchNorm()),
        nn.Linear: Linear(),
        **dict.fromkeys(_INPUT_NORMS, InputNorm()),
        Scaling: ScaleAndShift(),
        **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad2d), ZeroPad()),
        **dict.fromkeys((nn.PReLU, nn.RReLU), channelwise(activation, any_layout=True)),
        **dict.fromkeys(_IDENTITIES, channelwise(identity, any_layout=True)),
    }
    functions: dict[object, Any] = {
        **dict.fromkeys((function for function, _ in ACTIVATIONS.values()), channelwise(activation, any_layout=True)),
        **dict.fromkeys((operator.add, operator.sub, operator.mul, operator.truediv), Arithmetic()),
        **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), AveragePool()),
        F.interpolate: Nearest(),
        torch.cat: channelwise(concat, any_layout=True),
        torch.permute: channelwise(turned, any_layout=True),
        operator.getitem: Slice(),
        F.pad: ZeroPad(),
        F.pixel_unshuffle: PixelUnshuffle(),
        F.channel_shuffle: ChannelShuffle(),
        **dict.fromkeys(("contiguous", torch.ops.aten.contiguous.default), channelwise(identity, any_layout=True)),
    }
    return Operators(modules, functions)


_INPUT_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, StochasticDepth)
