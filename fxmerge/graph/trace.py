"""From a model to the graph that everything else works on: traced, in one dialect, with shapes, checked against the model."""

from __future__ import annotations

import copy
import logging
import math
import os
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fxmerge.core.leaves import leaves
from fxmerge.errors import FxMergeError, InputError, NotFiniteError, TraceError
from fxmerge.graph.capture import by_export, input_sources, of_graph, of_program, symbolically
from fxmerge.graph.layout import mark_layouts
from fxmerge.graph.meta import facts, record, set_front_end
from fxmerge.graph.normalise import normalise
from fxmerge.graph.regions import bodies
from fxmerge.graph.spelling import name_of, read_call

log = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parents[1]
_TORCH = Path(torch.__file__).resolve().parent


def trace(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    front_end: Literal["any", "symbolic_trace", "export"] = "any",
    leaves: Collection[type[nn.Module]] = (),
) -> GraphModule:
    """Trace a model, as it is in eval mode, into a GraphModule that owns a copy of its weights.

    Args:
        model: any nn.Module; a GraphModule that someone else traced (of TorchDynamo's, the example inputs are all it takes, and
            the parameters among them become attributes); or an ExportedProgram. It is not changed.
        example_inputs: one tensor, or the tuple of positional arguments. Batch and image size may differ later.
        example_kwargs: keyword arguments for ``forward``.
        front_end: how a module is captured: by torch.fx's symbolic tracing, by torch.export, or by the first that works.
        leaves: types of modules that stay whole, because an operator of yours reads them; with symbolic tracing only.

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
    arguments = as_arguments(example_inputs)
    keywords = dict(example_kwargs or {})
    if isinstance(model, ExportedProgram):
        return _of_program(model, arguments, keywords)
    if not isinstance(model, nn.Module):
        raise TraceError(f"expected a torch.nn.Module to trace, found {type(model).__name__}: {model!r:.80}")
    check_finite(model)
    twin, expected = _run_copy(model, arguments, keywords)
    if isinstance(twin, GraphModule):
        assert isinstance(model, GraphModule)
        graph, free = of_graph(twin, input_sources(model), arguments)
        return _finished(graph, "given", expected, free, keywords)
    captures = {
        "symbolic_trace": lambda: symbolically(twin, leaves),
        "export": lambda: by_export(_run_copy(model, arguments, keywords)[0], _fresh(arguments), keywords, expected),
    }
    wanted = {name: capture for name, capture in captures.items() if front_end in ("any", name)}
    return _of_module(twin, wanted, expected, arguments, keywords)


def _of_program(program: ExportedProgram, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> GraphModule:
    graph = _copied(of_program(program))
    assert isinstance(graph, GraphModule)
    if any(call.arguments.get("training") is True for node in graph.graph.nodes if (call := read_call(node)) is not None):
        raise TraceError("this program was exported in train mode: call model.eval() before torch.export.export")
    check_finite(graph)
    return _finished(graph, "given", _reference(graph, arguments, keywords), arguments, keywords)


def _of_module(
    model: nn.Module,
    captures: Mapping[str, Callable[[], GraphModule]],
    expected: Any,
    arguments: Sequence[Any],
    keywords: Mapping[str, Any],
) -> GraphModule:
    """By the first front end whose graph computes what the model does."""
    faults: list[FxMergeError] = []
    for name, capture in captures.items():
        try:
            return _finished(_captured(model, capture), name, expected, arguments, keywords)
        except FxMergeError as fault:  # noqa: PERF203 - there are two of them
            log.info("%s: %s", name, fault)
            faults.append(fault)
    if not faults:
        raise InputError("front_end must be 'any', 'symbolic_trace' or 'export'")
    if len(faults) == 1:
        raise faults[0]
    raise type(faults[0])(f"{faults[0]} torch.export fails too: {_first_line(faults[1])}") from faults[1]


def _captured(model: nn.Module, capture: Callable[[], GraphModule]) -> GraphModule:
    try:
        return capture()
    except Exception as fault:
        raise TraceError(
            f"{type(model).__name__} cannot be traced{_user_line(fault)}: {_first_line(fault)}. Control flow that depends on "
            "tensor values or sizes has no graph; rewrite that line, or trace the part of the model around it."
        ) from fault


def _finished(graph: GraphModule, name: str, expected: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> GraphModule:
    """The captured graph in the dialect, with shapes, checked."""
    graph.eval()
    for part in (graph, *bodies(graph)):
        _note_sources(part)
        _drop_unread_types(part)
    propagate_shapes(graph, arguments, keywords)
    normalise(graph)
    found = propagate_shapes(graph, arguments, keywords)
    mark_layouts(graph)
    _check_same(expected, found)
    set_front_end(graph, name)
    return graph


def _drop_unread_types(graph: GraphModule) -> None:
    """Annotations that are text (``from __future__ import annotations``): a graph that has them cannot be pickled by torch 2.11."""
    for node in graph.graph.nodes:
        if isinstance(node.type, str):
            node.type = None


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
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor.detach()).all()):
            bad = int((~torch.isfinite(tensor.detach())).sum())
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
            return recorder.run(*_placed(graph, _fresh(arguments), keywords or {}), enable_io_processing=False)
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
            record(n, shape=tuple(value.shape), dtype=value.dtype, bundle=False)
        else:
            record(n, shape=None, dtype=None, bundle=n.op != "output" and bool(_tensors(value)))
        return value


def _placed(graph: GraphModule, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> list[Any]:
    """Arguments in the order of the graph's placeholders, keywords and defaults in their places."""
    holders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if isinstance(graph.graph._codegen, _PyTreeCodeGen):
        return pytree.tree_leaves((tuple(arguments), dict(keywords)))
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


def _run_copy(model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """A copy in eval mode that has run once, for what is built when it runs; and what it gave."""
    twin = _copied(model).eval()
    return twin, _reference(twin, arguments, keywords)


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
        name = name_of(node) if node.op in ("call_function", "call_method") else str(node.target)
        record(node, target=name, source=where)


def _last_user_frame(stack: str) -> str:
    for line in reversed(stack.splitlines()):
        parts = line.strip().split('"')
        if len(parts) == 3 and parts[0] == "File ":
            if any(f"{root}{os.sep}" in parts[1] for root in (_HERE, _TORCH)):  # .../torch/, not .../torchvision/
                continue
            number = parts[2].removeprefix(", line ").split(",")[0]
            return f"{parts[1]}:{number}"
    return ""


def _check_same(expected: Any, found: Any) -> None:
    """The graph must compute what the model does; a trace that froze a branch or an alias is caught here."""
    wanted, given = _tensors(expected), _tensors(found)
    if len(wanted) != len(given):
        raise TraceError(f"the traced graph gives {len(given)} tensors where the model gives {len(wanted)}")
    for a, b in zip(wanted, given, strict=True):
        if a.shape != b.shape:
            raise InputError(f"the traced graph gives shape {tuple(b.shape)} where the model gives {tuple(a.shape)}")
        if a.dtype != b.dtype:
            raise TraceError(f"the traced graph gives {b.dtype} where the model gives {a.dtype}")
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
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def _sizes(arguments: Sequence[Any]) -> str:
    return ", ".join(
        f"size {tuple(a.shape)} ({str(a.dtype).removeprefix('torch.')})" if isinstance(a, torch.Tensor) else type(a).__name__
        for a in arguments
    )


def _first_line(fault: BaseException) -> str:
    text = str(fault).strip().splitlines()
    return text[0] if text else type(fault).__name__
