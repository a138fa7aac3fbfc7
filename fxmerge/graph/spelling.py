"""Which operation a node calls, however it is spelt: one name, and its arguments by their names.

An operation has up to five spellings: a function of ``torch.nn.functional`` or ``torch``, a method of a tensor, a Python operator,
an ATen overload (as in graphs of torch.export), each in place or not. :func:`read_call` brings all of them to one name, that of
``torch.nn.functional`` where there is one, and binds the arguments: by the schema for ATen, by :data:`PARAMETERS` for the others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload
from torch.fx import Node

#: Spellings that differ in more than a trailing underscore.
_ALIASES: Mapping[str, str] = {
    "iadd": "add",
    "radd": "add",
    "isub": "sub",
    "subtract": "sub",
    "imul": "mul",
    "rmul": "mul",
    "multiply": "mul",
    "truediv": "div",
    "itruediv": "div",
    "true_divide": "div",
    "divide": "div",
    "negative": "neg",
    "concat": "cat",
    "concatenate": "cat",
    "view": "reshape",
    "_unsafe_view": "reshape",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "constant_pad_nd": "pad",
    "split_with_sizes": "split",
    "log_sigmoid": "logsigmoid",
    "clip": "clamp",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "feature_dropout": "dropout2d",
    **{f"{name}{n}d": "interpolate" for name in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)},
}

_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_CONVOLUTION = ("weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_DROPOUT = ("p", "training", "inplace")

#: Names of the parameters behind the first, in the order of the function and of the method.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("add", "sub"), ("other", "alpha")),
    **dict.fromkeys(("mul", "div"), ("other",)),
    **dict.fromkeys(("relu", "relu6", "silu", "mish", "selu", "hardswish", "hardsigmoid"), ("inplace",)),
    "leaky_relu": ("negative_slope", "inplace"),
    **dict.fromkeys(("elu", "celu"), ("alpha", "inplace")),
    "gelu": ("approximate",),
    "softplus": ("beta", "threshold"),
    "hardtanh": ("min_val", "max_val", "inplace"),
    **dict.fromkeys(("hardshrink", "softshrink"), ("lambd",)),
    "threshold": ("threshold", "value", "inplace"),
    "rrelu": ("lower", "upper", "training", "inplace"),
    "prelu": ("weight",),
    "clamp": ("min", "max"),
    "cat": ("dim",),
    "interpolate": ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"),
    "pad": ("pad", "mode", "value"),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _POOL),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _CONVOLUTION),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _TRANSPOSED),
    "linear": ("weight", "bias"),
    "batch_norm": ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "instance_norm": ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    "group_norm": ("num_groups", "weight", "bias", "eps"),
    "layer_norm": ("normalized_shape", "weight", "bias", "eps"),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"), _DROPOUT),
    "stochastic_depth": ("p", "mode", "training"),
    "pixel_shuffle": ("upscale_factor",),
    "pixel_unshuffle": ("downscale_factor",),
    "channel_shuffle": ("groups",),
    "transpose": ("dim0", "dim1"),
    "split": ("split_size_or_sections", "dim"),
    "chunk": ("chunks", "dim"),
    "flatten": ("start_dim", "end_dim"),
    "narrow": ("dim", "start", "length"),
    "getitem": ("index",),
    "contiguous": ("memory_format",),
    **dict.fromkeys(("reshape", "permute", "expand"), ("sizes",)),
    **dict.fromkeys(("tanh", "sigmoid", "tanhshrink", "softsign", "logsigmoid", "neg", "clone", "detach", "alias"), ()),
}

#: ATen's names for parameters, where they differ.
_RENAMED: Mapping[str, str] = {
    "split_size": "split_size_or_sections",
    "split_sizes": "split_size_or_sections",
    "train": "training",
    "dims": "sizes",
    "shape": "sizes",
    "size": "sizes",
    "tensors": "input",
    "self": "input",
    "x": "input",
}

#: Methods whose last parameter may be spread: ``x.view(2, 3)``.
_SPREAD = frozenset(("reshape", "permute", "expand"))

_OPERATOR_ROOMS = (F, torch, torch._C._nn, operator, torch.Tensor)


@dataclass(frozen=True)
class Call:
    """One call.

    Args:
        name: of the operation, whatever its spelling.
        arguments: by name, defaults left out; the first is ``input``.
        writes: whether it writes over its first operand.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    writes: bool = False


def name_of(node: Node) -> str:
    """The name of the operation that a function or method node calls, in place or not."""
    raw = _raw_name(node)
    bare = raw.strip("_") if raw.startswith("__") else raw.removesuffix("_")
    return _ALIASES.get(bare, bare)


def read_call(node: Node) -> Call | None:
    """The call of a function or method node, or None where its arguments are not known by name."""
    if node.op not in ("call_function", "call_method"):
        return None
    if isinstance(node.target, OpOverload):
        names = [argument.name for argument in node.target._schema.arguments]
    elif node.op == "call_method" or _is_torchs(node.target):
        parameters = PARAMETERS.get(name_of(node))
        if parameters is None:
            return None
        names = ["input", *parameters]
    else:
        return None
    args = _gathered(node, len(names)) if name_of(node) in _SPREAD else node.args
    if len(args) > len(names):
        return None
    bound = {_RENAMED.get(key, key): value for key, value in (*zip(names, args, strict=False), *node.kwargs.items())}
    if names and isinstance(node.target, OpOverload) and "input" not in bound:
        return None
    return Call(name_of(node), bound, writes(node))


def writes(node: Node) -> bool:
    """Whether a function or method node writes over its first operand."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, OpOverload):
        return bool(node.target._schema.is_mutable)
    if node.kwargs.get("inplace") is True or node.target in _OPERATORS_IN_PLACE:
        return True
    raw = _raw_name(node)
    if node.op == "call_method":
        return raw in ("__iadd__", "__imul__", "__isub__", "__itruediv__") or (_ends_in_place(raw) and raw != "requires_grad_")
    if not _is_torchs(node.target):
        return False
    parameters = PARAMETERS.get(name_of(node), ())
    at = parameters.index("inplace") + 1 if "inplace" in parameters else len(node.args)
    return _ends_in_place(raw) or (len(node.args) > at and node.args[at] is True)


def functional_twin(node: Node) -> Any:
    """The target that computes what an in-place one does, and writes elsewhere; None where there is none."""
    raw = _raw_name(node)
    if isinstance(node.target, OpOverload):
        packet = getattr(torch.ops.aten, raw.removesuffix("_"), None)
        return getattr(packet, node.target._overloadname, None)
    if node.op == "call_method":
        bare = raw.removesuffix("_")
        return bare if callable(getattr(torch.Tensor, bare, None)) else None
    bare = _OPERATORS_IN_PLACE.get(node.target) or raw.removesuffix("_")
    rooms: tuple[ModuleType, ...] = (operator,) if node.target in _OPERATORS_IN_PLACE else (F, torch)
    return next((getattr(room, bare) for room in rooms if callable(getattr(room, bare, None))), None)


_OPERATORS_IN_PLACE: Mapping[Any, str] = {
    getattr(operator, f"i{name}"): name
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
}  # fmt: skip


def _ends_in_place(raw: str) -> bool:
    return raw.endswith("_") and not raw.endswith("__")


def _raw_name(node: Node) -> str:
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def _is_torchs(target: Callable[..., Any] | str) -> bool:
    """Whether a function is torch's own: a user's function may bear the name of one."""
    name = str(getattr(target, "__name__", ""))
    if getattr(target, "__module__", "") == "torchvision.ops.stochastic_depth":
        return True
    return any(getattr(room, name, None) is target for room in _OPERATOR_ROOMS)


def _gathered(node: Node, most: int) -> tuple[Any, ...]:
    """``(x, 2, 3)`` as ``(x, (2, 3))``."""
    if node.op == "call_method" and len(node.args) >= most and not isinstance(node.args[1], (tuple, list, torch.Size)):
        return node.args[0], tuple(node.args[1:])
    return node.args
