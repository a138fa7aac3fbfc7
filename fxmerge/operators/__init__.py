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

from fxmerge.operators.base import Activation, Join, Map, Opaque, Operator, Operators, Site, Verdict, channelwise
from fxmerge.operators.convolution import AveragePool, Convolution
from fxmerge.operators.join import add, concat
from fxmerge.operators.pointwise import ACTIVATIONS, BatchNorm, activation, identity
from fxmerge.operators.reading import read_expression, read_maps
from fxmerge.operators.slicing import Slice, ZeroPad

__all__ = [
    "Activation",
    "Join",
    "Map",
    "Opaque",
    "Operator",
    "Operators",
    "Site",
    "Verdict",
    "channelwise",
    "default_operators",
    "read_expression",
    "read_maps",
]


def default_operators() -> Operators:
    """The operators that fxmerge knows; ``.extended(...)`` adds to them."""
    modules: dict[type[nn.Module], Any] = {
        **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), Convolution()),
        **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), AveragePool()),
        **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), BatchNorm()),
        **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad2d), ZeroPad()),
        **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d), channelwise(identity)),
    }
    functions: dict[object, Any] = {
        **dict.fromkeys(ACTIVATIONS, channelwise(activation)),
        operator.add: channelwise(add),
        torch.cat: channelwise(concat),
        operator.getitem: Slice(),
        F.pad: ZeroPad(),
    }
    return Operators(modules, functions)
