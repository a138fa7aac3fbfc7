"""Rewrite a traced graph, in place, into the one dialect that the rest of fxmerge reads.

1. Activations are functions of ``torch.nn.functional``, whichever of their three spellings the model used.
2. Residual adds are ``operator.add``, in every spelling.
3. In-place operations are out of place, and whoever read the overwritten tensor afterwards reads the result: symbolic tracing
   records such a reader under the old name, which is right only while the operation stays in place.
4. Convolutions, norms and linear layers called as functions on a module's parameters are calls of a module under the name of
   those parameters, so that state dicts keep their keys.
5. Asserts on shapes, and what only they read, are gone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxmerge.graph.edit import become_module, free_target
from fxmerge.graph.meta import facts
from fxmerge.graph.query import is_impure, module_of

#: nn.Module type -> (function, attributes that become keyword arguments). Types are matched exactly: a subclass may do more.
ACTIVATION_MODULES: Mapping[type[nn.Module], tuple[Callable[..., Any], tuple[str, ...]]] = {
    nn.ReLU: (F.relu, ()),
    nn.ReLU6: (F.relu6, ()),
    nn.SiLU: (F.silu, ()),
    nn.Hardswish: (F.hardswish, ()),
    nn.GELU: (F.gelu, ("approximate",)),
    nn.LeakyReLU: (F.leaky_relu, ("negative_slope",)),
    nn.ELU: (F.elu, ("alpha",)),
    nn.Mish: (F.mish, ()),
    nn.Softplus: (F.softplus, ("beta", "threshold")),
    nn.Hardtanh: (F.hardtanh, ("min_val", "max_val")),
    nn.Tanh: (torch.tanh, ()),
    nn.Sigmoid: (torch.sigmoid, ()),
    nn.Hardsigmoid: (F.hardsigmoid, ()),
}

#: method name or function -> the function that stands for it.
SPELLINGS: Mapping[object, Callable[..., Any]] = {
    "relu": F.relu,
    "relu_": F.relu,
    "tanh": torch.tanh,
    "tanh_": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sigmoid_": torch.sigmoid,
    "add": operator.add,
    "add_": operator.add,
    "__add__": operator.add,
    "__iadd__": operator.add,
    "__radd__": operator.add,
    torch.add: operator.add,
    operator.iadd: operator.add,
    torch.relu: F.relu,
    torch.relu_: F.relu,
    F.relu_: F.relu,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
    F.hardtanh_: F.hardtanh,
    F.sigmoid: torch.sigmoid,
    F.tanh: torch.tanh,
}

_OPERATORS: Mapping[object, Callable[..., Any]] = {
    operator.imul: operator.mul,
    operator.isub: operator.sub,
    operator.itruediv: operator.truediv,
}

#: Targets that overwrite their first operand, beside methods that end in ``_`` and what is called with ``inplace=True``.
IN_PLACE: frozenset[object] = frozenset(_OPERATORS) | frozenset(
    {
        "relu_",
        "tanh_",
        "sigmoid_",
        "add_",
        "__iadd__",
        operator.iadd,
        torch.relu_,
        F.relu_,
        F.leaky_relu_,
        F.elu_,
        F.hardtanh_,
    }
)


def normalise(graph: GraphModule) -> None:
    """Bring a freshly traced graph into the dialect (see the module's text), in place."""
    for node in list(graph.graph.nodes):
        _drop_assert(node)
    for node in list(graph.graph.nodes):
        overwrites = _overwrites(graph, node)
        _activation_from_module(graph, node)
        _respell(node)
        if overwrites:
            _rename_later_reads(node)
        _module_from_function(graph, node)
    graph.graph.eliminate_dead_code(is_impure)
    graph.graph.lint()
    graph.recompile()


def reads_shapes(graph: GraphModule) -> bool:
    """Whether :func:`normalise` wants shapes recorded before: which kind of norm a function is depends on its operand's rank."""
    return any(node.target is F.batch_norm for node in graph.graph.nodes)


def _drop_assert(node: Node) -> None:
    is_assert = node.op == "call_function" and getattr(node.target, "__name__", "") in ("_assert", "_assert_async")
    if is_assert and not node.users:
        node.graph.erase_node(node)


def _overwrites(graph: GraphModule, node: Node) -> bool:
    if node.op == "call_module":
        module = module_of(graph, node)
        return type(module) in ACTIVATION_MODULES and bool(getattr(module, "inplace", False))
    return node.target in IN_PLACE or node.kwargs.get("inplace") is True or _twin_method(node) is not None


def _twin_method(node: Node) -> str | None:
    """The method that computes what an in-place method computes, and writes elsewhere; None for other nodes."""
    name = str(node.target)
    if node.op != "call_method" or not name.endswith("_") or name.endswith("__") or name == "requires_grad_":
        return None
    return name[:-1] if callable(getattr(torch.Tensor, name[:-1], None)) else None


def _activation_from_module(graph: GraphModule, node: Node) -> None:
    module = module_of(graph, node)
    if module is None or type(module) not in ACTIVATION_MODULES or _has_hooks(module):
        return
    function, attributes = ACTIVATION_MODULES[type(module)]
    operand = node.args[0] if node.args else next(iter(node.kwargs.values()))
    node.op, node.target = "call_function", function
    node.args = (operand,)
    node.kwargs = {name: getattr(module, name) for name in attributes}


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _respell(node: Node) -> None:
    if node.op not in ("call_method", "call_function"):
        return
    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if node.op == "call_function" and node.target in _INPLACE_POSITION and len(node.args) > _INPLACE_POSITION[node.target]:
        node.args = node.args[: _INPLACE_POSITION[node.target]]
    if node.target in _OPERATORS:
        node.target = _OPERATORS[node.target]
    if node.target not in SPELLINGS:
        node.target = _twin_method(node) or node.target
        return
    adds = SPELLINGS[node.target] is operator.add
    if adds and not (len(node.args) == 2 and not node.kwargs):
        if len(node.args) != 1 or set(node.kwargs) != {"other"}:
            return  # alpha=, out=: left as it is, opaque
        node.args, node.kwargs = (node.args[0], node.kwargs["other"]), {}
    node.op, node.target = "call_function", SPELLINGS[node.target]


#: Activations whose last positional argument is ``inplace``, and its position.
_INPLACE_POSITION: Mapping[object, int] = {
    F.relu: 1,
    F.relu6: 1,
    F.silu: 1,
    F.mish: 1,
    F.hardswish: 1,
    F.leaky_relu: 2,
    F.elu: 2,
    F.hardsigmoid: 1,
    F.hardtanh: 3,
}


def _rename_later_reads(node: Node) -> None:
    overwritten = node.args[0]
    if not isinstance(overwritten, Node):
        return
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    for reader in list(overwritten.users):
        if order[reader] > order[node]:
            reader.replace_input_with(overwritten, node)


def _module_from_function(graph: GraphModule, node: Node) -> None:
    if node.op != "call_function" or node.target not in _FUNCTIONAL:
        return
    signature, build = _FUNCTIONAL[node.target]
    values: dict[str, Any] = {**dict(zip(signature, node.args, strict=False)), **node.kwargs}
    operand = values.pop("input", None)
    names = {key: str(v.target) for key, v in values.items() if isinstance(v, Node) and v.op == "get_attr"}
    if not isinstance(operand, Node) or any(isinstance(v, Node) and v.op != "get_attr" for v in values.values()):
        return
    tensors = {key: _attribute(graph, names[key]) if key in names else v for key, v in values.items()}
    module = build({**tensors, "rank": len(facts(operand).shape or ())})
    if module is None:
        return
    home = _home(names)
    taken = {str(other.target) for other in graph.graph.nodes if other.op == "call_module"}
    target = home if home and home not in taken else free_target(graph, f"functional.{node.name}")
    for name, buffer in _other_buffers(graph, target, module):
        module.register_buffer(name, buffer)
    become_module(graph, node, target, module, operand)


def _home(names: Mapping[str, str]) -> str | None:
    """The module whose parameters these are, if they are one module's and bear the usual names."""
    parents = {name.rpartition(".")[0] for name in names.values()}
    usual = all(name.rpartition(".")[2] == key for key, name in names.items())
    return parents.pop() or None if len(parents) == 1 and usual else None


def _other_buffers(graph: GraphModule, target: str, module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Buffers of the module called so far that the new one lacks; they stay in the state dict."""
    try:
        old = graph.get_submodule(target)
    except AttributeError:
        return []
    known = {name for name, _ in (*module.named_buffers(), *module.named_parameters())}
    return [(name, buffer) for name, buffer in old.named_buffers(recurse=False) if name not in known]


def _attribute(graph: GraphModule, target: str) -> Any:
    value: Any = graph
    for atom in target.split("."):
        value = getattr(value, atom)
    return value


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _convolution(kind: type[nn.Module], dims: int) -> Callable[[dict[str, Any]], nn.Module | None]:
    def build(values: dict[str, Any]) -> nn.Module | None:
        weight, bias = values["weight"], values.get("bias")
        groups = values.get("groups", 1)
        padding = values.get("padding", 0)
        module: Any = kind(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            _each(values.get("stride", 1), dims),
            padding if isinstance(padding, str) else _each(padding, dims),
            _each(values.get("dilation", 1), dims),
            groups,
            bias is not None,
            device="meta",
        )
        if not isinstance(weight, nn.Parameter):
            return None  # computed: folding it would freeze what should follow its parameters
        module.weight, module.bias = weight, bias
        return module if isinstance(module, nn.Module) else None

    return build


def _batch_norm(values: dict[str, Any]) -> nn.Module | None:
    mean, variance = values.get("running_mean"), values.get("running_var")
    if mean is None or variance is None or values.get("training", False):
        return None
    weight, bias = values.get("weight"), values.get("bias")
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}.get(values["rank"], nn.BatchNorm2d)
    module: Any = kind(mean.shape[0], values.get("eps", 1e-5), values.get("momentum", 0.1), weight is not None, device="meta")
    module.running_mean, module.running_var = mean, variance
    module.num_batches_tracked = torch.zeros((), dtype=torch.long, device=mean.device)
    if weight is not None:
        module.weight, module.bias = weight, bias
    made: nn.Module = module
    return made


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

#: function -> (names of its positional arguments, what makes the module).
_FUNCTIONAL: Mapping[object, tuple[tuple[str, ...], Callable[[dict[str, Any]], nn.Module | None]]] = {
    F.conv1d: (_CONVOLUTION, _convolution(nn.Conv1d, 1)),
    F.conv2d: (_CONVOLUTION, _convolution(nn.Conv2d, 2)),
    F.conv3d: (_CONVOLUTION, _convolution(nn.Conv3d, 3)),
    F.batch_norm: (_BATCH_NORM, _batch_norm),
}
