"""Convolutions, norms, linear layers and dropout that are called as functions become calls of a module under the name of their
parameters, so that state dicts keep their keys, training works, and ``train()`` and ``eval()`` do what they should.

A weight that is computed from parameters alone (weight standardisation, weight norm in an exported graph) is computed once and
becomes a parameter itself; a weight that is computed from the input stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torchvision.ops import StochasticDepth

from fxmerge.graph.constants import constant_value, is_constant, leaves
from fxmerge.graph.edit import become_module, free_target
from fxmerge.graph.meta import facts
from fxmerge.graph.names import is_layer, module_path, wanted_name
from fxmerge.graph.query import describe_module, is_impure
from fxmerge.graph.spelling import Call

#: What makes a module of a call's arguments, tensors in place of nodes; None where it cannot.
Builder = Callable[[Mapping[str, Any], int], nn.Module | None]


class Layers:
    """The layers found in a graph so far. They are put in together, at the end: until then parameters stand where they stood."""

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self._there = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
        self._made: dict[str, nn.Module] = {}
        self._calls: list[tuple[Node, str, Node]] = []

    def find(self, node: Node, call: Call) -> None:
        """Note a function node on constant tensors as the call of the module that it is; pass over any other."""
        build = _BUILDERS.get(call.name)
        operand = call.arguments.get("input")
        if build is None or not isinstance(operand, Node) or is_constant(operand):
            return
        rest = {key: value for key, value in call.arguments.items() if key != "input"}
        if any(isinstance(value, Node) and not is_constant(value) for value in rest.values()):
            return
        values = {key: constant_value(self.graph, value) for key, value in rest.items()}
        if values.get("training", False) is not False:
            return
        module = build(values, len(facts(operand).shape or ()))
        if module is not None:
            tensors = [value for value in rest.values() if isinstance(value, Node)]
            self._calls.append((node, self._target(node, _home(node, tensors), module), operand))

    def _target(self, node: Node, home: str | None, module: nn.Module) -> str:
        """Where the new module goes, or where one stands that is the same."""
        if home is None or home in self._there or (home in self._made and not _same(self._made[home], module)):
            wanted = f"functional.{wanted_name(node).replace('.', '_')}"
            home = free_target(self.graph, wanted)
            while home in self._made:
                home += "_"
        self._made.setdefault(home, module)
        return home

    def place(self) -> None:
        """Put all layers found into the graph."""
        there = {target: _there(self.graph, target) for target in self._made}
        for node, target, operand in self._calls:
            become_module(self.graph, node, target, self._made[target], operand)
        _erase_unread_constants(self.graph)
        read = [str(node.target) for node in self.graph.graph.nodes if node.op in ("call_module", "get_attr")]
        for target, old in there.items():
            if old is not None:
                below = [name.removeprefix(f"{target}.") for name in read if name.startswith(f"{target}.")]
                _take_over(old, self._made[target], below)
        self.graph.graph.eliminate_dead_code(is_impure)


def _home(node: Node, tensors: Sequence[Node]) -> str | None:
    """The module that these parameters belong to, if it is one module."""
    names = [name for tensor in tensors for name in leaves(tensor)]
    path = module_path(node)
    if path and (is_layer(node) or (names and all(name.startswith(f"{path}.") for name in names))):
        return path
    parents = {name.rpartition(".")[0] for name in names}
    usual = all(name.rpartition(".")[2] in _USUAL for name in names)
    return parents.pop() or None if len(parents) == 1 and usual else None


def _same(there: nn.Module, made: nn.Module) -> bool:
    tensors = [dict(m.named_parameters(recurse=False)) for m in (there, made)]
    alike = tensors[0].keys() == tensors[1].keys() and all(tensors[0][key] is tensors[1][key] for key in tensors[0])
    return alike and describe_module(there) == describe_module(made)


def _there(graph: GraphModule, target: str) -> nn.Module | None:
    try:
        return graph.get_submodule(target)
    except AttributeError:
        return None


def _erase_unread_constants(graph: GraphModule) -> None:
    for node in reversed(graph.graph.nodes):
        if not node.users and (node.op == "get_attr" or is_constant(node)):
            graph.graph.erase_node(node)


def _take_over(old: nn.Module, module: nn.Module, read: Sequence[str]) -> None:
    """Buffers, which stay in the state dict, and whatever else of the module called so far the graph still reads."""
    known = {name for name, _ in (*module.named_buffers(), *module.named_parameters())}
    for name, buffer in old.named_buffers(recurse=False):
        if name not in known or name == "num_batches_tracked":
            module.register_buffer(name, buffer)
    for name, parameter in old.named_parameters(recurse=False):
        if name not in known and name in read:
            module.register_parameter(name, parameter)
    for name, child in old.named_children():
        if any(other.partition(".")[0] == name for other in read):
            module.add_module(name, child)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _as_parameter(value: Any) -> nn.Parameter | None:
    if value is None or isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value.detach().clone(), requires_grad=bool(value.requires_grad))


_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def _convolution(values: Mapping[str, Any], rank: int) -> nn.Module | None:
    weight, bias = values.get("weight"), _as_parameter(values.get("bias"))
    if not isinstance(weight, torch.Tensor) or not _all_constant(values):
        return None
    dims, groups, padding = weight.dim() - 2, values.get("groups", 1), values.get("padding", 0)
    transposed = bool(values.get("transposed", False))
    across, out = weight.shape[:2] if transposed else (weight.shape[1] * groups, weight.shape[0])
    kind: Any = (_TRANSPOSED if transposed else _CONVOLUTIONS)[dims]
    settings = {
        "stride": _each(values.get("stride", 1), dims),
        "padding": padding if isinstance(padding, str) else _each(padding, dims),
        "dilation": _each(values.get("dilation", 1), dims),
        "groups": groups,
    }
    if transposed:
        out *= groups
        settings["output_padding"] = _each(values.get("output_padding", 0), dims)
    module: Any = kind(across, out, tuple(weight.shape[2:]), bias=bias is not None, device="meta", **settings)
    module.weight, module.bias = _as_parameter(weight), bias
    made: nn.Module = module
    return made


def _transposed(values: Mapping[str, Any], rank: int) -> nn.Module | None:
    return _convolution({**values, "transposed": True}, rank)


def _linear(values: Mapping[str, Any], rank: int) -> nn.Module | None:
    weight, bias = values.get("weight"), _as_parameter(values.get("bias"))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    module.weight, module.bias = _as_parameter(weight), bias  # type: ignore[assignment]
    return module


_BATCH_NORMS: Mapping[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}
_INSTANCE_NORMS: Mapping[int, type[nn.Module]] = {3: nn.InstanceNorm1d, 5: nn.InstanceNorm3d}


def _batch_norm(values: Mapping[str, Any], rank: int) -> nn.Module | None:
    mean, variance = values.get("running_mean"), values.get("running_var")
    if mean is None or variance is None:
        return None
    kind: Any = _BATCH_NORMS.get(rank, nn.BatchNorm2d)
    module = kind(mean.shape[0], values.get("eps", 1e-5), values.get("momentum", 0.1), device="meta")
    module.running_mean, module.running_var = mean, variance
    module.num_batches_tracked = torch.zeros((), dtype=torch.long, device=mean.device)
    module.weight, module.bias = _as_parameter(values.get("weight")), _as_parameter(values.get("bias"))
    module.affine = module.weight is not None
    made: nn.Module = module
    return made


def _instance_norm(values: Mapping[str, Any], rank: int) -> nn.Module | None:
    weight, bias = _as_parameter(values.get("weight")), _as_parameter(values.get("bias"))
    if weight is None or bias is None or values.get("running_mean") is not None or not values.get("use_input_stats", True):
        return None
    kind: Any = _INSTANCE_NORMS.get(rank, nn.InstanceNorm2d)
    module = kind(weight.shape[0], values.get("eps", 1e-5), values.get("momentum", 0.1), True, device="meta")
    module.weight, module.bias = weight, bias
    made: nn.Module = module
    return made


def _group_norm(values: Mapping[str, Any], rank: int) -> nn.Module | None:
    weight, bias = _as_parameter(values.get("weight")), _as_parameter(values.get("bias"))
    if weight is None or bias is None:
        return None
    module = nn.GroupNorm(values["num_groups"], weight.shape[0], values.get("eps", 1e-5), device="meta")
    module.weight, module.bias = weight, bias
    return module


def _layer_norm(values: Mapping[str, Any], rank: int) -> nn.Module | None:
    weight, bias, shape = _as_parameter(values.get("weight")), _as_parameter(values.get("bias")), values["normalized_shape"]
    if weight is None or not _all_constant({"shape": shape}):
        return None
    module = nn.LayerNorm(list(shape), values.get("eps", 1e-5), bias=bias is not None, device="meta")
    module.weight, module.bias = weight, bias  # type: ignore[assignment]
    return module


def _prelu(values: Mapping[str, Any], rank: int) -> nn.Module | None:
    weight = _as_parameter(values.get("weight"))
    if weight is None:
        return None
    module = nn.PReLU(weight.numel(), device="meta")
    module.weight = weight
    return module


def _dropout(kind: type[nn.Module]) -> Builder:
    def build(values: Mapping[str, Any], rank: int) -> nn.Module | None:
        known = isinstance(values.get("p", 0.5), float | int) and "training" in values
        return kind(values.get("p", 0.5)) if known else None

    return build


def _stochastic_depth(values: Mapping[str, Any], rank: int) -> nn.Module | None:
    return StochasticDepth(values["p"], values["mode"]) if "training" in values else None


def _all_constant(values: Mapping[str, Any]) -> bool:
    """Whether no size among these is itself computed in the graph."""
    sizes = [v for value in values.values() for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return not any(isinstance(v, Node) for v in sizes)


_USUAL = frozenset(("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))

_BUILDERS: Mapping[str, Builder] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    "linear": _linear,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "prelu": _prelu,
    "dropout": _dropout(nn.Dropout),
    "dropout1d": _dropout(nn.Dropout1d),
    "dropout2d": _dropout(nn.Dropout2d),
    "dropout3d": _dropout(nn.Dropout3d),
    "alpha_dropout": _dropout(nn.AlphaDropout),
    "stochastic_depth": _stochastic_depth,
}
#: Operations that a convolution, a linear layer, a norm or an activation with weights is called by.
LAYERS = frozenset(name for name in _BUILDERS if "drop" not in name and name != "stochastic_depth")
