"""From a model to the graph that everything else works on: traced, in one dialect, with shapes, checked against the model."""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx import GraphModule, Node
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fxmerge.errors import InputError, NotFiniteError, TraceError
from fxmerge.graph.meta import facts, record
from fxmerge.graph.normalise import normalise, reads_shapes

_HERE = Path(__file__).resolve().parents[1]
_TORCH = Path(torch.__file__).resolve().parent


def trace(model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> GraphModule:
    """Trace a model, as it is in eval mode, into a GraphModule that owns a copy of its weights.

    Args:
        model: any nn.Module, or a GraphModule that someone else traced. It is not changed.
        example_inputs: one tensor, or the tuple of positional arguments. Batch and image size may differ later.
        example_kwargs: keyword arguments for ``forward``.

    Returns:
        A graph in one dialect (:mod:`fxmerge.graph.normalise`), in eval mode, with the shape of every tensor recorded.

    Raises:
        TraceError: not a module, or its control flow cannot be traced; names the line of the model's code.
        InputError: the model rejects the example inputs, or the graph does not compute what the model does.
        NotFiniteError: a weight is NaN or infinite.

    >>> from torch import nn
    >>> graph = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.zeros(1, 3, 8, 8))
    >>> [node.name for node in graph.graph.nodes]
    ['input_1', '_0', '_1', 'output']
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"expected a torch.nn.Module to trace, found {type(model).__name__}: {model!r:.80}")
    arguments = as_arguments(example_inputs)
    keywords = dict(example_kwargs or {})
    check_finite(model)
    twin = _copied(model).eval()
    expected = _reference(twin, arguments, keywords)
    graph = _captured(twin)
    _note_sources(graph)
    if reads_shapes(graph):
        propagate_shapes(graph, arguments, keywords)
    normalise(graph)
    found = propagate_shapes(graph, arguments, keywords)
    _check_same(expected, found)
    return graph


def as_arguments(inputs: Any) -> tuple[Any, ...]:
    """Positional arguments from what a user may give: a tensor, or a tuple or list of arguments.

    Raises:
        InputError: neither.
    """
    if isinstance(inputs, torch.Tensor):
        return (inputs,)
    if isinstance(inputs, (tuple, list)) and len(inputs):
        return tuple(inputs)
    raise InputError(f"example inputs must be a tensor or a tuple of arguments, found {type(inputs).__name__}")


def check_finite(model: nn.Module) -> None:
    """Raise NotFiniteError naming the first parameter or buffer that holds a NaN or an infinity."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise InputError(f"{name} is uninitialized: run the model once on an input before giving it to fxmerge")
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NotFiniteError(
                f"{bad} of {tensor.numel()} values of {name} are NaN or infinite; repair or retrain the weights first",
                where=name,
            )


def propagate_shapes(graph: GraphModule, arguments: Sequence[Any], keywords: Mapping[str, Any] | None = None) -> Any:
    """Run a graph once, recording every tensor's shape and dtype on its node; returns the graph's output.

    Raises:
        InputError: the graph rejects the inputs.
    """
    recorder = _ShapeRecorder(graph)
    try:
        with torch.no_grad():
            return recorder.run(*_placed(graph, _fresh(arguments), keywords or {}))
    except Exception as fault:
        raise InputError(f"the graph rejects inputs of {_sizes(arguments)}: {_first_line(fault)}") from fault


def require_shapes(graph: GraphModule) -> None:
    """Raise InputError if no shapes were recorded on this graph: it was not traced by fxmerge."""
    if not any(facts(node).shape for node in graph.graph.nodes):
        raise InputError("this graph carries no shapes of fxmerge's; pass it through fxmerge.trace(graph, example_inputs) first")


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.extra_traceback = False

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            record(n, shape=tuple(value.shape), dtype=value.dtype)
        else:
            record(n, shape=None, dtype=None)
        return value


def _placed(graph: GraphModule, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> list[Any]:
    """Arguments in the order of the graph's placeholders, keywords and defaults in their places."""
    holders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    placed: list[Any] = list(arguments[: len(holders)])
    for holder in holders[len(placed) :]:
        name = str(holder.target)
        if name in keywords:
            placed.append(keywords[name])
        elif holder.args:
            placed.append(holder.args[0])
        else:
            raise TypeError(f"argument {name!r} is missing")
    return placed


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as fault:
        raise TraceError(f"the model cannot be copied, so it cannot be traced without changing it: {fault}") from fault


def _reference(model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    try:
        with torch.no_grad():
            return model(*_fresh(arguments), **keywords)
    except Exception as fault:
        raise InputError(
            f"the model rejects the example inputs of {_sizes(arguments)}{_user_line(fault)}: {_first_line(fault)}"
        ) from fault


def _fresh(arguments: Sequence[Any]) -> list[Any]:
    """Copies, so that a model that writes into its input writes into ours."""
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


def _captured(model: nn.Module) -> GraphModule:
    tracer = fx.Tracer()
    tracer.record_stack_traces = True
    try:
        if isinstance(model, GraphModule):
            return GraphModule(model, copy.deepcopy(model.graph))
        graph = tracer.trace(model)
        return GraphModule(tracer.root, graph, type(model).__name__)
    except Exception as fault:
        raise TraceError(
            f"{type(model).__name__} cannot be traced{_user_line(fault)}: {_first_line(fault)}. Control flow that depends on "
            "tensor values or sizes has no graph; rewrite that line, or trace the part of the model around it."
        ) from fault


def _user_line(fault: BaseException) -> str:
    """`` at file:line (code)`` for the innermost frame that is neither torch's nor ours; empty where there is none."""
    for frame in reversed(traceback.extract_tb(fault.__traceback__)):
        path = Path(frame.filename)
        if path.exists() and not any(root in path.resolve().parents for root in (_HERE, _TORCH)):
            return f" at {frame.filename}:{frame.lineno} ({frame.line})"
    return ""


def _note_sources(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        where = _last_user_frame(node.stack_trace) if node.stack_trace else ""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        record(node, target=name, source=where)


def _last_user_frame(stack: str) -> str:
    for line in reversed(stack.splitlines()):
        parts = line.strip().split('"')
        if len(parts) == 3 and parts[0] == "File ":
            if any(str(root) in parts[1] for root in (_HERE, _TORCH)):
                continue
            number = parts[2].removeprefix(", line ").split(",")[0]
            return f"{parts[1]}:{number}"
    return ""


def _check_same(expected: Any, found: Any) -> None:
    """The graph must compute what the model does; a trace that froze a branch or an alias is caught here."""
    for a, b in zip(_tensors(expected), _tensors(found), strict=False):
        if a.shape != b.shape:
            raise InputError(f"the traced graph gives shape {tuple(b.shape)} where the model gives {tuple(a.shape)}")
        if not a.is_floating_point() or not a.numel():
            continue
        scale = float(a.abs().max())
        error = float((a - b).abs().max())
        tolerance = math.sqrt(torch.finfo(a.dtype).eps) * max(scale, torch.finfo(a.dtype).tiny)
        if not error <= tolerance:
            raise TraceError(
                f"the traced graph does not compute what the model does (largest difference {error:.3g} of {scale:.3g}): the "
                "model writes into tensors that it reads under another name, is random in eval mode, or gives NaN"
            )


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _sizes(arguments: Sequence[Any]) -> str:
    return ", ".join(
        f"size {tuple(a.shape)} ({str(a.dtype).removeprefix('torch.')})" if isinstance(a, torch.Tensor) else type(a).__name__
        for a in arguments
    )


def _first_line(fault: BaseException) -> str:
    text = str(fault).strip().splitlines()
    return text[0] if text else type(fault).__name__
