"""``torch.compile(model, backend="fxmerge")``: exact merges that pay, then inductor.

Registered under the entry point group ``torch_dynamo_backends``; nothing need be imported. Weights are merged as they are when
the model is compiled. The merged network runs for exactly these weights: where they have changed since (an optimiser step, a
loaded state dict), or another model comes through the same compiled code, the unmerged graph runs. One change cannot be seen: a
write through ``.data`` (``p.data.mul_(2)``), which torch does not count; compile again after it. Where gradients are wanted, or the
graph writes into buffers or inputs, nothing is merged in the first place. Whatever cannot be merged is compiled as it is.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxmerge.compress import compress
from fxmerge.errors import FxMergeError, InputError
from fxmerge.graph.capture import input_sources, is_lifted, of_graph

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
Backend = Callable[[GraphModule, list[Any]], Compiled]


def fxmerge(
    graph: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Compiled:
    """A backend for torch.compile.

    Args:
        graph: from TorchDynamo, parameters as attributes or as inputs.
        example_inputs: of the graph.
        options: as given to torch.compile. ``inner``: the backend that compiles what comes out, by name or itself; inductor if
            none is given.
        mode: as given to torch.compile; none is known.

    Returns:
        A callable that takes what the graph takes.

    Raises:
        InputError: an option or a mode is unknown.
    """
    inner = _inner(options or {}, mode)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    lifted = [i for i, node in enumerate(placeholders) if is_lifted(node, example_inputs[i])]
    obstacle = _obstacle(graph, example_inputs, lifted)
    if obstacle:
        log.info("nothing is merged: %s", obstacle)
        return inner(graph, list(example_inputs))
    try:
        bound, free = of_graph(graph, input_sources(graph), example_inputs)
        if _writes(bound, free):
            raise InputError("the graph writes into its inputs or buffers")
        result = compress(bound, free, exact=True)
    except FxMergeError as refusal:
        log.info("nothing is merged: %s", refusal)
        return inner(graph, list(example_inputs))
    if not result.plan.merges:
        log.info("no exact merge pays here; the graph is compiled as it is")
        return inner(graph, list(example_inputs))
    log.info("%d exact merges, %.3fx in eager mode", len(result.plan.merges), result.speedup)
    return _guarded(graph, example_inputs, lifted, inner(result.model, list(free)), inner)


def _inner(options: Mapping[str, Any], mode: str | None) -> Backend:
    """The backend behind this one."""
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.exc import InvalidBackend

    unknown = sorted(set(options) - {"inner"})
    if unknown:
        raise InputError(f"the back end fxmerge knows the option 'inner' only, found {', '.join(map(repr, unknown))}")
    if mode is not None:
        raise InputError(f"the back end fxmerge knows no modes, found {mode!r}; give options={{'inner': a back end in that mode}}")
    inner = options.get("inner", "inductor")
    try:
        found: Backend = inner if callable(inner) else lookup_backend(inner)
    except InvalidBackend as fault:
        raise InputError(f"there is no back end {inner!r}; torch._dynamo.list_backends() names those there are") from fault
    return found


def _obstacle(graph: GraphModule, example_inputs: Sequence[Any], lifted: Sequence[int]) -> str:
    """Why nothing can be merged; empty where something might."""
    if not all(type(value) in (Tensor, nn.Parameter) for value in example_inputs):
        return "sizes are symbolic or tensors are fake; compile with dynamic=False"
    if torch.is_grad_enabled() and any(value.requires_grad for value in (*graph.parameters(), *example_inputs)):
        return "gradients are wanted; compile under torch.no_grad() or torch.inference_mode()"
    if any(module.training for module in graph.modules() if module is not graph):
        return "modules are in train mode"
    held = _held(graph, example_inputs, lifted)
    if len({t.device for t in held}) > 1:
        return "weights lie on several devices"
    if any(t.is_inference() or t.layout != torch.strided for t in held):
        return "weights that are sparse, or were made under torch.inference_mode(), cannot be watched for changes"
    return ""


def _held(graph: GraphModule, arguments: Sequence[Any], lifted: Sequence[int]) -> list[Tensor]:
    """All weights and buffers: those of the graph, and those that are handed in."""
    return [*graph.parameters(), *graph.buffers(), *(arguments[i] for i in lifted)]


def _writes(graph: GraphModule, inputs: Sequence[Tensor]) -> bool:
    """Whether the graph writes into its inputs, parameters or buffers; seen by running a copy of it on copies."""
    with torch.inference_mode(False), torch.no_grad():
        twin = copy.deepcopy(graph)
        values = [value.detach().clone() for value in inputs]
        watched = [(t, t._version, t.clone()) for t in (*values, *twin.parameters(), *twin.buffers())]
        try:
            twin(*values)
        except Exception as fault:  # whatever the graph's operations raise
            raise InputError(f"the graph cannot be run on copies: {fault}") from fault
        # Both: a write may leave the values as they were, and batch norms write their statistics uncounted.
        return any(t._version != version or not torch.equal(t, before) for t, version, before in watched)


@dataclass(frozen=True)
class _Weights:
    """Which tensors were merged, and enough of their state to see that they have changed.

    Args:
        seen: each tensor (not kept alive), where its numbers lie, and how often torch has counted a write.
        statistics: the values of all buffers with one axis: batch norms in train mode write theirs uncounted.
    """

    seen: tuple[tuple[weakref.ref[Tensor], int, int], ...]
    statistics: Tensor

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> _Weights:
        return cls(tuple((weakref.ref(t), t.data_ptr(), t._version) for t in tensors), _statistics(tensors))

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, unchanged."""
        return (
            len(tensors) == len(self.seen)
            and all(
                known() is tensor and tensor.data_ptr() == place and tensor._version == version
                for tensor, (known, place, version) in zip(tensors, self.seen, strict=True)
            )
            and torch.equal(_statistics(tensors), self.statistics)
        )


def _statistics(tensors: Sequence[Tensor]) -> Tensor:
    found = [t.detach() for t in tensors if t.dim() == 1 and not isinstance(t, nn.Parameter)]
    return torch.cat(found) if found else torch.empty(0)


def _guarded(
    graph: GraphModule, example_inputs: Sequence[Any], lifted: Sequence[int], merged: Compiled, inner: Backend
) -> Compiled:
    """Run the merged network for the weights that were merged, as they were; for all others the graph as it came."""
    weights = _Weights.of(_held(graph, example_inputs, lifted))
    free = [i for i in range(len(example_inputs)) if i not in lifted]
    whole: Compiled | None = None

    def run(*arguments: Any) -> Any:
        nonlocal whole
        if weights.are(_held(graph, arguments, lifted)):
            return merged(*(arguments[i] for i in free))
        if whole is None:
            log.warning("weights changed after compiling, or are another model's: the unmerged graph runs for them")
            whole = inner(graph, list(arguments))
        return whole(*arguments)

    return run
