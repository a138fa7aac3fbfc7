"""Outputs in dataclasses that torch does not know: taken apart for torch.export, put together again in the graph.

torch.export opens what is registered with torch's pytrees, which is for the whole process, and refuses other classes. So the copy
of a model that is exported gives the bare list of what lies in its output (:func:`give_leaves`), and the graph makes the structure
around it (:func:`restore`), as symbolic tracing writes it: by a call of the class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from fxmerge.core.leaves import leaves
from fxmerge.errors import TraceError


def holds_dataclasses(value: Any) -> bool:
    """Whether a dataclass that torch does not open is in this."""
    return any(map(_is_dataclass, pytree.tree_leaves(value)))


def give_leaves(model: nn.Module) -> None:
    """Make a model, in place, give the list of what lies in its output."""
    model.register_forward_hook(lambda module, inputs, output: leaves(output))


def restore(graph: GraphModule, like: Any) -> None:
    """Make the graph of such a model, in place, give the structure that the model gave before.

    Raises:
        TraceError: a container in it is none of Python's own, or a dataclass has fields that its constructor does not take.
    """
    output = next(node for node in graph.graph.nodes if node.op == "output")
    with graph.graph.inserting_before(output):
        output.args = (_structured(graph.graph, like, iter(pytree.tree_leaves(output.args[0]))),)
    codegen = graph.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=None)
    graph.recompile()


def _structured(graph: Graph, like: Any, given: Iterator[Any]) -> Any:
    """The same structure as another, of what is given in turn."""
    if _is_dataclass(like) and type(like) not in pytree.SUPPORTED_NODES and all(part.init for part in fields(like)):
        parts = {part.name: _structured(graph, getattr(like, part.name), given) for part in fields(like)}
        return graph.call_function(type(like), (), parts)
    if type(like) is dict:
        return {key: _structured(graph, value, given) for key, value in like.items()}
    if type(like) in (tuple, list):
        return type(like)(_structured(graph, value, given) for value in like)
    if hasattr(like, "_fields"):
        return type(like)(*(_structured(graph, value, given) for value in like))
    if [id(leaf) for leaf in leaves(like)] != [id(like)]:
        raise TraceError(
            f"an output in a {type(like).__name__} cannot be put together again; of containers around and in dataclasses, give "
            "lists, tuples, dicts, and dataclasses whose constructor takes all fields"
        )
    return next(given)


def _is_dataclass(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)
