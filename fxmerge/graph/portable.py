"""A graph as a value that pickle can carry to a worker, with all that is known of its nodes.

Pickling a GraphModule writes its code and traces it again on the other side, where everything recorded in ``node.meta`` is lost.
Here its nodes go as plain rows. This is for messages between processes of one program; no file of a user is ever read so.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.utils.parametrize import is_parametrized

from fxmerge.errors import InputError
from fxmerge.graph.edit import sharing_copy
from fxmerge.graph.meta import KEY, Facts, facts
from fxmerge.graph.query import attribute, kind_of


@dataclass(frozen=True, slots=True)
class _Operand:
    """A node as an argument: its place among the rows."""

    place: int


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any
    facts: Facts


@dataclass(frozen=True, slots=True)
class Portable:
    """A graph taken apart by :func:`pack`; :meth:`unpack` puts it together.

    Args:
        rows: its nodes, in order.
        parts: the modules, parameters and buffers that it uses, by qualified name, each object once.
        meta: of the whole graph.
        training: whether it was in train mode.
    """

    rows: tuple[_Row, ...]
    parts: Mapping[str, Any]
    meta: Mapping[str, Any]
    training: bool

    def unpack(self) -> GraphModule:
        """The graph, its nodes named as they were, every fact in its place."""
        graph, made = Graph(), list[Node]()
        for row in self.rows:
            args, kwargs = (
                _mapped(value, lambda o: made[o.place] if isinstance(o, _Operand) else o) for value in (row.args, row.kwargs)
            )
            node = graph.create_node(row.op, found(row.target), args, kwargs, row.name)
            node.meta[KEY] = row.facts
            made.append(node)
        module = GraphModule(dict(self.parts), graph)
        for old, new in zip(self.rows, module.graph.nodes, strict=True):
            new.name = old.name
        module.meta.update(self.meta)
        module.training = self.training
        return module


def pack(graph: GraphModule) -> Portable:
    """Take a graph apart; modules and tensors are shared with it until they are pickled."""
    place = {node: _Operand(index) for index, node in enumerate(graph.graph.nodes)}
    rows = tuple(
        _Row(node.name, node.op, named(node.target), _placed(node.args, place), _placed(node.kwargs, place), facts(node))
        for node in graph.graph.nodes
    )
    targets = {str(node.target) for node in graph.graph.nodes if node.op in ("call_module", "get_attr")}
    meta = {key: value for key, value in graph.meta.items() if isinstance(value, (str, int, bool, tuple, type(None)))}
    return Portable(rows, {target: _plain(attribute(graph, target)) for target in sorted(targets)}, meta, graph.training)


def _plain(part: Any) -> Any:
    """A part as it is; where weights are computed from others (weight norm), which cannot be pickled, a copy that has them.

    The copy is made by hand: ``remove_parametrizations`` edits the class, which a deep copy shares with the original.
    """
    if not isinstance(part, nn.Module) or not any(map(is_parametrized, part.modules())):
        return part
    computed = list(getattr(part, "parametrizations", ())) if is_parametrized(part) else []
    plain = sharing_copy(part, kind_of(part))
    plain._parameters |= {name: nn.Parameter(getattr(part, name).detach().clone()) for name in computed}
    plain._modules = {name: _plain(child) for name, child in part._modules.items() if name != "parametrizations"}
    if computed:
        plain._load_state_dict_pre_hooks = OrderedDict()  # weight_norm's is a local function, which pickle refuses
    return plain


def message(value: object) -> bytes:
    """A pickle of anything.

    Raises:
        InputError: something in it cannot be pickled.
    """
    try:
        return pickle.dumps(value)
    except Exception as fault:  # what pickle raises depends on what it met
        raise InputError(
            f"this cannot be sent to another process: {fault}. Functions and classes must be of a module, not local or lambdas"
        ) from fault


@dataclass(frozen=True, slots=True)
class _Overload:
    """One of torch's own operators, by name: they say themselves that they cannot be pickled."""

    namespace: str
    name: str
    overload: str


def named(target: Any) -> Any:
    """What stands for a function in a pickle: itself, or the name of an operator of torch's."""
    if not isinstance(target, torch._ops.OpOverload):
        return target
    namespace, _, name = target._schema.name.partition("::")
    return _Overload(namespace, name, target._overloadname)


def found(target: Any) -> Any:
    """The function that :func:`named` named."""
    if not isinstance(target, _Overload):
        return target
    return getattr(getattr(getattr(torch.ops, target.namespace), target.name), target.overload)


def _placed(value: Any, place: Mapping[Node, _Operand]) -> Any:
    return _mapped(value, lambda item: place[item] if isinstance(item, Node) else item)


def _mapped(value: Any, function: Any) -> Any:
    """Lists, tuples, dicts and slices gone into; what else there is, put through a function."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, function) for item in value))
    if isinstance(value, tuple):
        return tuple(_mapped(item, function) for item in value)
    if isinstance(value, list):
        return [_mapped(item, function) for item in value]
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(item, function) for item in (value.start, value.stop, value.step)))
    return function(value)
