"""From what a user has to a GraphModule whose inputs are inputs and whose parameters are attributes.

Four ways in: symbolic tracing, torch.export, a graph that someone else captured (from symbolic tracing or TorchDynamo), an
ExportedProgram. Which of them went into a graph is not visible after :mod:`fxmerge.graph.normalise`.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import dropwhile
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxmerge.graph.edit import free_target, put_module
from fxmerge.graph.guard import require_size, require_step
from fxmerge.graph.names import qualified
from fxmerge.graph.outputs import give_leaves, holds_dataclasses, restore
from fxmerge.graph.query import has_module
from fxmerge.graph.regions import gather_autocast, inline_regions

log = logging.getLogger(__name__)

#: Pixels by which images are made larger to see whether a graph fits other sizes; the model need accept one of them only.
_MORE = ((1, 2), (32, 64))
#: A model that treats some sizes apart (those that do not halve evenly) is captured for sizes that differ by multiples of these.
_STEPS = (2, 4, 8, 16, 32)

_ARGUMENT = re.compile(r"^L\['(\w+)'\]$")


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Collection[type[nn.Module]] = ()) -> None:
        super().__init__()
        self.leaves = leaves
        self.record_stack_traces = True

    def _filter_traceback_frames(self, user_stack_summary: traceback.StackSummary) -> traceback.StackSummary:
        """From the model's code on. What is torch's own is told apart later, without the modules that torch would import for it."""
        inner = dropwhile(lambda frame: frame.name != "forward", user_stack_summary)
        return traceback.StackSummary.from_list(list(inner))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in self.leaves or super().is_leaf_module(m, module_qualified_name)


def symbolically(model: nn.Module, leaves: Collection[type[nn.Module]] = ()) -> GraphModule:
    """By torch.fx's symbolic tracing; modules of these types stay whole."""
    tracer = _Tracer(leaves)
    graph = tracer.trace(model)
    return GraphModule(tracer.root, graph, type(model).__name__)


def by_export(model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any], like: Any) -> GraphModule:
    """By torch.export (strict=False), the model being a copy that may be changed; ``like`` is what it gives."""
    if not holds_dataclasses(like):
        return _by_export(model, arguments, keywords)
    give_leaves(model)
    graph = _by_export(model, arguments, keywords)
    restore(graph, like)
    return graph


def _by_export(model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> GraphModule:
    """Free in the batch, and in the image size where that can be had.

    Image sizes are fixed first, which is quick and makes constants of paddings that the model computes from them. If the graph
    then fails at other sizes that the model accepts, it is captured again with sizes free, unless it pads by computed amounts
    (free, these cannot be merged, and torch.export takes minutes over them). A graph of fixed sizes, or of sizes in steps, checks
    them when it runs.
    """
    program = _exported(model, arguments, keywords, sizes=False)
    graph = of_program(program)
    if _fits_other_sizes(model, graph, arguments, keywords):
        return graph
    if not _pads_by_computed_amounts(model, arguments, keywords):
        try:
            freed = of_program(_exported(model, arguments, keywords, sizes=True))
            if _fits_other_sizes(model, freed, arguments, keywords):
                return freed
            for step in _STEPS:
                if all(_fits(model, freed, arguments, keywords, more) for more in ((step, 2 * step), (2 * step, step))):
                    _require_steps(freed, arguments, keywords, step)
                    return freed
        except Exception as fault:  # torch.export raises whatever the model's code raises on symbolic sizes
            log.info("not captured with free sizes: %s", fault)
    _require_sizes(graph)
    return graph


def _exported(model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any], *, sizes: bool) -> ExportedProgram:
    fault: Exception | None = None
    for args, kwargs, free in _attempts(arguments, keywords):
        shapes = _free_sizes(model, args, kwargs, sizes) if free else None
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as found:  # see by_export
            fault = fault or found
    assert fault is not None
    raise fault


def _fits_other_sizes(model: nn.Module, graph: GraphModule, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Whether the graph computes what the model does at an image size that both have not seen; False where none can be had."""
    found = (_fits(model, graph, arguments, keywords, more) for more in _MORE)
    return next((fits for fits in found if fits is not None), False)


def _fits(
    model: nn.Module, graph: GraphModule, arguments: Sequence[Any], keywords: Mapping[str, Any], more: tuple[int, int]
) -> bool | None:
    """Whether the graph computes what the model does where images are larger by so much; None where the model rejects that."""
    args, kwargs = _map_images(arguments, more), {k: _map_images((v,), more)[0] for k, v in keywords.items()}
    try:
        with torch.no_grad():
            expected = pytree.tree_leaves(model(*_copies(args), **kwargs))
    except Exception as fault:  # the model's own code, on a size it was perhaps not made for
        log.debug("the model rejects images larger by %s: %s", more, fault)
        return None
    return _gives(graph, args, kwargs, expected)


def _gives(graph: GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any], expected: Sequence[Any]) -> bool:
    try:
        with torch.no_grad():
            found = pytree.tree_leaves(graph(*_copies(args), **kwargs))
    except Exception as fault:  # a size that is fixed in the graph
        log.debug("the graph fails at another image size: %s", fault)
        return False
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if isinstance(a, Tensor)]
    return all(a.shape == b.shape and _close(a, b) for a, b in pairs)


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()), equal_nan=True)


def _copies(args: Sequence[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, Tensor) else value for value in args]


def _map_images(args: Sequence[Any], more: tuple[int, int]) -> tuple[Any, ...]:
    """The arguments with images (tensors of rank 4 or more) larger by so many pixels, what is there repeated."""
    return tuple(_enlarged(v, more) if isinstance(v, Tensor) and v.dim() > 3 else v for v in args)


def _enlarged(image: Tensor, more: tuple[int, int]) -> Tensor:
    height, width = image.shape[-2] + more[0], image.shape[-1] + more[1]
    times = -(-height // image.shape[-2]), -(-width // image.shape[-1])
    return image.repeat(*(1,) * (image.dim() - 2), *times)[..., :height, :width].contiguous()


def _pads_by_computed_amounts(model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Whether another image size leads to other paddings."""
    here = _paddings(model, arguments, keywords)
    for more in _MORE:
        args, kwargs = _map_images(arguments, more), {k: _map_images((v,), more)[0] for k, v in keywords.items()}
        try:
            return _paddings(model, args, kwargs) != here
        except Exception as fault:  # see by_export
            log.debug("the model rejects images larger by %s: %s", more, fault)
    return True


class _Paddings(TorchFunctionMode):
    """Notes by how much the calls under it pad; running a model tells that a hundred times as fast as exporting it does."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__name__", "") in ("pad", "constant_pad_nd"):
            self.found.append(tuple(given["pad"] if "pad" in given else args[1]))
        return func(*args, **given)


def _paddings(model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> list[Any]:
    paddings = _Paddings()
    with torch.no_grad(), paddings:
        model(*_copies(arguments), **keywords)
    return paddings.found


def _require_sizes(graph: GraphModule) -> None:
    """Put a check of its sizes behind every input, of those that torch.export did not leave free."""
    last = None
    for node in graph.graph.nodes:
        last = node if node.op == "placeholder" else last
    for node in [n for n in graph.graph.nodes if n.op == "placeholder"]:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() < 2:
            continue
        sizes = tuple(size if isinstance(size, int) else None for size in value.shape)
        with graph.graph.inserting_after(last):
            graph.graph.call_function(require_size, (node, sizes))
    graph.recompile()


def _require_steps(graph: GraphModule, arguments: Sequence[Any], keywords: Mapping[str, Any], step: int) -> None:
    """Put a check behind every image that its size is that of the example, or differs by multiples of a step."""
    holders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, value in zip(holders, pytree.tree_leaves((tuple(arguments), dict(keywords))), strict=True):
        if isinstance(value, Tensor) and value.dim() > 3:
            with graph.graph.inserting_after(holders[-1]):
                graph.graph.call_function(require_step, (node, tuple(value.shape[-2:]), step))
    graph.recompile()


def of_program(program: ExportedProgram) -> GraphModule:
    """The graph of an exported program, its parameters as attributes under their qualified names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unlifted = program.module()
    assert isinstance(unlifted, GraphModule)
    graph = GraphModule(unlifted, copy.deepcopy(unlifted.graph), "GraphModule")
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and not node.users:  # torch.export's guards, which ask for more than the network needs
            graph.graph.erase_node(node)
    inline_regions(graph)
    return graph


def of_graph(graph: GraphModule, sources: Sequence[str], arguments: Sequence[Any]) -> tuple[GraphModule, tuple[Any, ...]]:
    """A copy of somebody's graph, and the arguments that are inputs: parameters that TorchDynamo hands in become attributes.

    Args:
        graph: from symbolic tracing, TorchDynamo, or by hand.
        sources: from :func:`input_sources`, of the same graph before it was copied.
        arguments: for all placeholders, in order.
    """
    bound = gather_autocast(GraphModule(graph, copy.deepcopy(graph.graph)))
    holders = [node for node in bound.graph.nodes if node.op == "placeholder"]
    free = []
    for node, value, source in zip(holders, arguments, sources, strict=False):
        if is_lifted(node, value):
            _bind(bound, node, value, source)
            continue
        free.append(value)
        argument = _ARGUMENT.match(source)
        if argument is not None:
            node.target = argument[1]
    free += arguments[len(holders) :]
    inline_regions(bound)
    return bound, tuple(free)


def input_sources(graph: GraphModule) -> list[str]:
    """Where TorchDynamo found the value of each placeholder, in its own language; empty texts for graphs of others."""
    sources = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            name = getattr(getattr(node, "_dynamo_source", None), "name", "")
            sources.append(str(name() if callable(name) else name))  # a method up to torch 2.9
    return sources


def is_lifted(node: Node, value: Any) -> bool:
    """Whether an input is really a parameter or buffer of a module, which TorchDynamo hands in: its value or its notes say so."""
    held = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") is not None
    return isinstance(value, nn.Parameter) or (held and isinstance(value, Tensor))


def _bind(graph: GraphModule, node: Node, value: Tensor, path: str) -> None:
    wanted = qualified(path) if path else ""
    home, _, name = free_target(graph, wanted if "." in wanted else f"lifted.{wanted or node.name}").rpartition(".")
    if not has_module(graph, home):
        put_module(graph, home, nn.Module())
    owner = graph.get_submodule(home)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    else:
        owner.register_buffer(name, value)
    with graph.graph.inserting_before(node):
        attribute = graph.graph.get_attr(f"{home}.{name}")
    node.replace_all_uses_with(attribute)
    graph.graph.erase_node(node)


def _attempts(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], bool]]:
    """What to export with: a batch of one would be frozen, so two of it first."""
    args, kwargs = tuple(arguments), dict(keywords)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
    if tensors and all(value.shape[0] == 1 for value in tensors):
        yield tuple(map(_doubled, args)), {key: _doubled(value) for key, value in kwargs.items()}, True
    yield args, kwargs, True
    yield args, kwargs, False


def _doubled(value: Any) -> Any:
    return value.repeat(2, *(1,) * (value.dim() - 1)) if isinstance(value, Tensor) and value.dim() else value


def _free_sizes(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], sizes: bool) -> dict[str, Any]:
    """The batch, and the image size if asked, may change; torch.export fixes what the model's code needs fixed."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return {name: _free(value, sizes) for name, value in bound.arguments.items()}


def _free(value: Any, sizes: bool) -> Any:
    if isinstance(value, Tensor):
        return {i: Dim.AUTO for i in range(value.dim()) if i == 0 or (sizes and i > 1)}
    if isinstance(value, (tuple, list)):
        return type(value)(_free(item, sizes) for item in value)
    return {key: _free(item, sizes) for key, item in value.items()} if isinstance(value, dict) else None
