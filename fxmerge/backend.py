"""``torch.compile(model, backend="fxmerge")``: exact merges that pay, then inductor.

Registered under the entry point group ``torch_dynamo_backends``; nothing need be imported. Weights are merged as they are when
the model is compiled. Where they change afterwards (an optimiser step, a loaded state dict), the unmerged graph runs instead; where
gradients are wanted nothing is merged in the first place. Whatever cannot be merged is compiled as it is.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxmerge.compress import compress
from fxmerge.errors import FxMergeError

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]


def fxmerge(graph: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Compiled:
    """A backend for torch.compile.

    Args:
        graph: from TorchDynamo, parameters as attributes or as inputs.
        example_inputs: of the graph.
        options: ``inner``: the backend that compiles what comes out; ``inductor`` if none is given.

    Returns:
        A callable that takes what the graph takes.
    """
    inner = _backend(str(options.get("inner", "inductor")))
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in _held(graph, example_inputs)):
        log.info("gradients are wanted: nothing is merged; compile under torch.no_grad() or torch.inference_mode()")
        return inner(graph, list(example_inputs))
    lifted = {i for i, node in enumerate(_placeholders(graph)) if _is_lifted(node, example_inputs[i])}
    free = [value for i, value in enumerate(example_inputs) if i not in lifted]
    if not all(isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter) for value in example_inputs):
        log.info("sizes are symbolic or tensors are fake: nothing is merged; compile with dynamic=False")
        return inner(graph, list(example_inputs))
    try:
        bound = _bound(graph, example_inputs, lifted)
        result = compress(bound, tuple(free), exact=True)
    except FxMergeError as refusal:
        log.info("nothing is merged: %s", refusal)
        return inner(graph, list(example_inputs))
    if not result.plan.merges:
        log.info("no exact merge pays here; the graph is compiled as it is")
        return inner(graph, list(example_inputs))
    log.info("%d exact merges, %.3fx in eager mode", len(result.plan.merges), result.speedup)
    return _guarded(graph, example_inputs, lifted, inner(result.model, free), inner)


def _backend(name: str) -> Callable[[GraphModule, list[Any]], Compiled]:
    from torch._dynamo.backends.registry import lookup_backend

    found: Callable[[GraphModule, list[Any]], Compiled] = lookup_backend(name)
    return found


def _placeholders(graph: GraphModule) -> list[Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _is_lifted(node: Node, value: Any) -> bool:
    """Whether an input is really a parameter or buffer of a module, which TorchDynamo hands in."""
    held = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None
    return isinstance(value, nn.Parameter) or (held and isinstance(value, Tensor))


def _held(graph: GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    return [*graph.parameters(), *example_inputs]


def _bound(graph: GraphModule, example_inputs: Sequence[Any], lifted: set[int]) -> GraphModule:
    """The graph with lifted parameters as attributes."""
    bound = GraphModule(graph, copy.deepcopy(graph.graph))
    for index, node in enumerate(_placeholders(bound)):
        if index not in lifted:
            continue
        value = example_inputs[index]
        name = f"lifted_{index}"
        if isinstance(value, nn.Parameter):
            bound.register_parameter(name, value)
        else:
            bound.register_buffer(name, value)
        with bound.graph.inserting_before(node):
            attribute = bound.graph.get_attr(name)
        node.replace_all_uses_with(attribute)
        bound.graph.erase_node(node)
    bound.recompile()
    return bound.eval()


def _guarded(
    graph: GraphModule,
    example_inputs: Sequence[Any],
    lifted: set[int],
    merged: Compiled,
    inner: Callable[[GraphModule, list[Any]], Compiled],
) -> Compiled:
    """Run the merged network while the weights are those that were merged, else the graph as it came."""
    held = [(i, example_inputs[i]._version) for i in sorted(lifted)]
    own = [(tensor, tensor._version) for tensor in (*graph.parameters(), *graph.buffers())]
    whole: Compiled | None = None

    def run(*arguments: Any) -> Any:
        nonlocal whole
        fresh = all(arguments[i]._version == version for i, version in held) and all(t._version == v for t, v in own)
        if fresh:
            return merged(*(value for i, value in enumerate(arguments) if i not in lifted))
        if whole is None:
            log.warning("weights changed after compiling: the unmerged graph runs from now on; compile again to merge")
            whole = inner(graph, list(arguments))
        return whole(*arguments)

    return run
