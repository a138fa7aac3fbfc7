"""The dialect's activations: one function of torch each, with the options that are not the default as keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxmerge.graph.query import has_hooks, module_of
from fxmerge.graph.spelling import Call

#: name -> (function, its options and their defaults)
ACTIVATIONS: Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
    "relu": (F.relu, {}),
    "relu6": (F.relu6, {}),
    "silu": (F.silu, {}),
    "mish": (F.mish, {}),
    "selu": (F.selu, {}),
    "hardswish": (F.hardswish, {}),
    "hardsigmoid": (F.hardsigmoid, {}),
    "leaky_relu": (F.leaky_relu, {"negative_slope": 0.01}),
    "elu": (F.elu, {"alpha": 1.0}),
    "celu": (F.celu, {"alpha": 1.0}),
    "gelu": (F.gelu, {"approximate": "none"}),
    "softplus": (F.softplus, {"beta": 1.0, "threshold": 20.0}),
    "hardtanh": (F.hardtanh, {"min_val": -1.0, "max_val": 1.0}),
    "hardshrink": (F.hardshrink, {"lambd": 0.5}),
    "softshrink": (F.softshrink, {"lambd": 0.5}),
    "threshold": (F.threshold, {"threshold": None, "value": None}),
    "clamp": (torch.clamp, {"min": None, "max": None}),
    "tanh": (torch.tanh, {}),
    "sigmoid": (torch.sigmoid, {}),
    "tanhshrink": (F.tanhshrink, {}),
    "softsign": (F.softsign, {}),
    "logsigmoid": (F.logsigmoid, {}),
}

#: nn.Module type -> name. Types are matched exactly: a subclass may do more.
ACTIVATION_MODULES: Mapping[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.SELU: "selu",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.CELU: "celu",
    nn.GELU: "gelu",
    nn.Softplus: "softplus",
    nn.Hardtanh: "hardtanh",
    nn.Hardshrink: "hardshrink",
    nn.Softshrink: "softshrink",
    nn.Threshold: "threshold",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Tanhshrink: "tanhshrink",
    nn.Softsign: "softsign",
    nn.LogSigmoid: "logsigmoid",
}

_RELU6 = (("hardtanh", {"min_val": 0.0, "max_val": 6.0}), ("clamp", {"min": 0.0, "max": 6.0}))


def call_of_module(graph: GraphModule, node: Node) -> Call | None:
    """The call that an activation module makes, or None for other nodes and for modules with hooks."""
    module = module_of(graph, node)
    name = ACTIVATION_MODULES.get(type(module))  # type: ignore[arg-type]
    if module is None or name is None or has_hooks(module):
        return None
    operand = node.args[0] if node.args else next(iter(node.kwargs.values()))
    options = {key: getattr(module, key) for key in ACTIVATIONS[name][1]}
    return Call(name, {"input": operand, **options}, bool(getattr(module, "inplace", False)))


def respell(node: Node, call: Call) -> None:
    """Make the node the dialect's spelling of this activation, if it is one with constant options."""
    if call.name not in ACTIVATIONS:
        return
    function, defaults = ACTIVATIONS[call.name]
    options = {key: value for key, value in call.arguments.items() if key not in ("input", "inplace")}
    operand = call.arguments["input"]
    if {key: value for key, value in options.items() if key in ("scale", "input_scale")} in ({"scale": 1, "input_scale": 1},):
        options = {key: value for key, value in options.items() if key == "alpha"}
    constant = all(isinstance(value, (int, float, str)) or value is None for value in options.values())
    if not isinstance(operand, Node) or not constant or not options.keys() <= defaults.keys():
        return
    options = {key: value for key, value in options.items() if value != defaults[key]}
    if (call.name, options) in _RELU6:
        function, options = F.relu6, {}
    node.op, node.target, node.args, node.kwargs = "call_function", function, (operand,), options
