"""Rewrite a traced graph, in place, into the one dialect that the rest of fxmerge reads, however it was captured.

1. Every operation is spelt one way (:mod:`fxmerge.graph.spelling`): activations are functions of ``torch.nn.functional``, residual
   adds ``operator.add``, average pooling, padding and concats the functions of torch.
2. In-place operations are out of place, and whoever read the overwritten tensor afterwards reads the result: symbolic tracing
   records such a reader under the old name, which is right only while the operation stays in place.
3. Convolutions, norms, linear layers and dropout called as functions on a module's parameters are calls of a module under the name
   of those parameters, so that state dicts keep their keys (:mod:`fxmerge.graph.modules`).
4. Splits, chunks and slices are slices, channel shuffles are one node (:mod:`fxmerge.graph.slices`).
5. Nearest upsampling by whole factors is one function (:mod:`fxmerge.graph.resizing`).
6. A pad with other constants than zero is shift, zero pad, shift back (:mod:`fxmerge.graph.borders`).
7. Identities, asserts on shapes, and what nobody reads, are gone.
8. Nodes bear names that do not depend on how the graph was captured (:mod:`fxmerge.graph.names`).
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxmerge.graph.activations import ACTIVATIONS, call_of_module, respell
from fxmerge.graph.borders import shift_pads
from fxmerge.graph.constants import is_constant, mark_constants
from fxmerge.graph.edit import bypass
from fxmerge.graph.meta import facts
from fxmerge.graph.modules import Layers
from fxmerge.graph.names import rename
from fxmerge.graph.query import has_hooks, is_impure, module_of
from fxmerge.graph.resizing import become_nearest, module_becomes_nearest
from fxmerge.graph.slices import become_shuffle, become_slice
from fxmerge.graph.spelling import Call, functional_twin, read_call, writes

_BINARY: Mapping[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}

#: Functions that keep their arguments as keywords.
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "avg_pool1d": F.avg_pool1d,
    "avg_pool2d": F.avg_pool2d,
    "avg_pool3d": F.avg_pool3d,
    "pixel_unshuffle": F.pixel_unshuffle,
    "pixel_shuffle": F.pixel_shuffle,
    "channel_shuffle": F.channel_shuffle,
}

_POOLS: Mapping[type[nn.Module], str] = {nn.AvgPool1d: "avg_pool1d", nn.AvgPool2d: "avg_pool2d", nn.AvgPool3d: "avg_pool3d"}

_ASSERTS = ("assert", "sym_constrain_range", "check", "log_api_usage_once")


def normalise(graph: GraphModule) -> None:
    """Bring a freshly captured graph, shapes recorded, into the dialect (see the module's text), in place."""
    for node in list(graph.graph.nodes):
        _drop_assert(node)
    graph.graph.eliminate_dead_code(is_impure)
    for node in list(graph.graph.nodes):
        _one_output(node)
    mark_constants(graph)
    shift_pads(graph)
    layers = Layers(graph)
    for node in list(graph.graph.nodes):
        _normalise_node(graph, node, layers)
    layers.place()
    rename(graph)
    mark_constants(graph)
    graph.graph.lint()
    graph.recompile()


def _normalise_node(graph: GraphModule, node: Node, layers: Layers) -> None:
    _operand_by_position(graph, node)
    if _bypass_identity(graph, node):
        return
    _module_to_function(graph, node)
    module_becomes_nearest(graph, node)
    call = call_of_module(graph, node) or read_call(node)
    if (call is not None and call.writes) or writes(node):
        _write_elsewhere(node, call)
        _rename_later_reads(node)
    if call is None or "input" not in call.arguments:
        return
    if _is_identity(call):
        bypass(node, call.arguments["input"])
    elif call.name in _RULES:
        _RULES[call.name](node, call)
    else:
        layers.find(node, call)


def _drop_assert(node: Node) -> None:
    name = getattr(node.target, "__name__", str(node.target)).partition(".")[0].strip("_")
    if node.op in ("call_function", "call_method") and name.startswith(_ASSERTS) and not node.users:
        node.graph.erase_node(node)


def _one_output(node: Node) -> None:
    """A decomposed batch norm gives its statistics, too, which nobody reads in eval mode."""
    items = list(node.users)
    if node.target is torch.ops.aten._native_batch_norm_legit_no_training.default and all(
        user.target is operator.getitem and user.args[1] == 0 for user in items
    ):
        for item in items:
            bypass(item, node)


def _operand_by_position(graph: GraphModule, node: Node) -> None:
    """Of a module of torch's; hooks see what is given by position, so a module with hooks is called as it was."""
    module = module_of(graph, node)
    if module is not None and not node.args and _is_torchs(module) and not has_hooks(module):
        first = next(iter(inspect.signature(module.forward).parameters), None)
        if first in node.kwargs:
            operand, rest = node.kwargs[first], {key: value for key, value in node.kwargs.items() if key != first}
            node.args, node.kwargs = (operand,), rest


def _bypass_identity(graph: GraphModule, node: Node) -> bool:
    module, operand = module_of(graph, node), node.args[0] if node.args else None
    if type(module) is not nn.Identity or has_hooks(module) or operand is None:
        return False
    bypass(node, operand)
    return True


def _module_to_function(graph: GraphModule, node: Node) -> None:
    """Pooling becomes a function, and a module that writes over its operand does so no more."""
    module: Any = module_of(graph, node)
    if module is None or has_hooks(module):
        return
    if type(module) in _POOLS:
        settings = {k: getattr(module, k) for k in ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")}
        divisor = {"divisor_override": module.divisor_override} if getattr(module, "divisor_override", None) else {}
        operand = node.args[0]
        node.op, node.target = "call_function", _FUNCTIONS[_POOLS[type(module)]]
        node.args, node.kwargs = (operand,), {**settings, **divisor}
    elif getattr(module, "inplace", False) is True and _is_torchs(module) and call_of_module(graph, node) is None:
        module.inplace = False  # the graph's own copy
        _rename_later_reads(node)


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")


def _write_elsewhere(node: Node, call: Call | None) -> None:
    """Make an in-place function or method its functional twin."""
    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if node.op == "call_module" or not writes(node):
        return
    twin = functional_twin(node)
    if call is not None and node.args and node.args[-1] is True and "inplace" in call.arguments:
        node.args = node.args[:-1]
    elif twin is not None:
        node.target = twin


def _rename_later_reads(node: Node) -> None:
    overwritten = node.args[0] if node.args else None
    if not isinstance(overwritten, Node) or writes(node):
        return
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    for reader in list(overwritten.users):
        if order[reader] > order[node]:
            reader.replace_input_with(overwritten, node)


def _is_identity(call: Call) -> bool:
    plain = call.name in ("clone", "alias", "contiguous") and not call.arguments.keys() - {"input"}
    return plain and isinstance(call.arguments["input"], Node)


def _binary(node: Node, call: Call) -> None:
    """a + b and its like; the image first where the other is a constant or is broadcast."""
    values = dict(call.arguments)
    if values.pop("alpha", 1) != 1 or values.keys() != {"input", "other"}:
        return
    first, second = values["input"], values["other"]
    if call.name in ("add", "mul") and (_fixed(first) or _is_smaller(first, second)) and not _fixed(second):
        first, second = second, first
    if isinstance(first, Node):
        node.op, node.target, node.args, node.kwargs = "call_function", _BINARY[call.name], (first, second), {}


def _is_smaller(first: object, second: object) -> bool:
    """Whether the second is an image that the first is broadcast over."""
    shapes = [facts(value).shape if isinstance(value, Node) else None for value in (first, second)]
    return None not in shapes and math.prod(shapes[0] or ()) < math.prod(shapes[1] or ())


def _fixed(value: object) -> bool:
    return not isinstance(value, Node) or is_constant(value)


def _negative(node: Node, call: Call) -> None:
    node.op, node.target, node.args, node.kwargs = "call_function", operator.mul, (call.arguments["input"], -1), {}


def _concat(node: Node, call: Call) -> None:
    parts = call.arguments["input"]
    if isinstance(parts, (tuple, list)) and call.arguments.keys() <= {"input", "dim"}:
        node.op, node.target, node.kwargs = "call_function", torch.cat, {}
        node.args = (list(parts), call.arguments.get("dim", 0))


def _pad(node: Node, call: Call) -> None:
    values = dict(call.arguments)
    operand, amounts = values.pop("input"), values.pop("pad")
    options = {k: v for k, v in values.items() if v is not None and (k, v) != ("mode", "constant") and (k, v) != ("value", 0)}
    if isinstance(amounts, (tuple, list)):
        node.op, node.target, node.args, node.kwargs = "call_function", F.pad, (operand, tuple(amounts)), options


def _function(node: Node, call: Call) -> None:
    rest = {key: value for key, value in call.arguments.items() if key != "input"}
    node.op, node.target, node.kwargs = "call_function", _FUNCTIONS[call.name], rest
    node.args = (call.arguments["input"],)


def _reshape(node: Node, call: Call) -> None:
    """A channel shuffle, or a reshape: a view would not stand that copies made for it alone are gone."""
    become_shuffle(node, call)
    if node.op == "call_method" and node.target == "view" and isinstance(call.arguments.get("sizes"), (tuple, list, Node)):
        node.target = "reshape"
    elif node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        node.target = torch.ops.aten.reshape.default


def _permute(node: Node, call: Call) -> None:
    """``transpose`` and ``permute`` as ``torch.permute(x, dims)``, no dimension counted from the end."""
    rank, values = len(facts(node).shape or ()), call.arguments
    if call.name == "permute":
        dims = list(values.get("sizes", ()))
    else:
        dims, swapped = list(range(rank)), [values.get("dim0"), values.get("dim1")]
        if not rank or not all(isinstance(d, int) for d in swapped):
            return
        a, b = (d % rank for d in swapped if isinstance(d, int))
        dims[a], dims[b] = dims[b], dims[a]
    if rank and len(dims) == rank and all(isinstance(d, int) for d in dims):
        node.op, node.target, node.kwargs = "call_function", torch.permute, {}
        node.args = (values["input"], tuple(d % rank for d in dims))


#: name -> what the node becomes. Functions on parameters, which are not here, become modules.
_RULES: Mapping[str, Callable[[Node, Call], None]] = {
    **dict.fromkeys(ACTIVATIONS, respell),
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_FUNCTIONS, _function),
    **dict.fromkeys(("getitem", "narrow", "slice"), become_slice),
    "reshape": _reshape,
    "flatten": become_shuffle,
    **dict.fromkeys(("transpose", "permute"), _permute),
    "neg": _negative,
    "cat": _concat,
    "pad": _pad,
    "interpolate": become_nearest,
}
