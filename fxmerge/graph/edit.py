"""Edits of graphs, each once: copy, put a module in, take a stretch out, tidy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, map_arg

from fxmerge.graph.layout import turn
from fxmerge.graph.meta import facts, record
from fxmerge.graph.query import has_module, is_impure


def copied(graph: GraphModule) -> GraphModule:
    """A new GraphModule with a graph of its own that shares the leaf modules; editing it leaves the original intact."""
    twin = GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)
    twin.meta.update(graph.meta)
    return twin


def put_module(graph: GraphModule, target: str, module: nn.Module) -> None:
    """Store a module under a qualified name, in this graph only, creating the modules above it."""
    parent: nn.Module = graph
    *path, leaf = target.split(".")
    for atom in path:
        if not isinstance(getattr(parent, atom, None), nn.Module):
            parent.add_module(atom, nn.Module())
        parent = parent.get_submodule(atom)
    setattr(parent, leaf, module)


def free_target(graph: GraphModule, wanted: str) -> str:
    """A qualified module name like the one wanted that is not taken, nor lies below a layer of the model."""
    root, _, rest = wanted.partition(".")
    number = 0
    while rest and type(getattr(graph, root, None)) not in (nn.Module, type(None)):
        number += 1
        root = f"{wanted.partition('.')[0]}_{number}"
    wanted, number = f"{root}.{rest}" if rest else wanted, 0
    while has_module(graph, name := f"{wanted}_{number}" if number else wanted):
        number += 1
    return name


def sharing_copy(module: nn.Module, kind: type[nn.Module] | None = None) -> nn.Module:
    """A second module with the same parameters, whose settings and parameter slots are its own; of another class if given."""
    kind = kind or type(module)
    twin = kind.__new__(kind)  # copy.copy refuses parametrized modules
    twin.__dict__.update(module.__dict__)
    for slot in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[slot] = dict(module.__dict__[slot])
    return twin


def add_module(graph: GraphModule, wanted: str, module: nn.Module) -> str:
    """Store a new module, in the graph's mode, under a name like the one wanted; returns the name."""
    target = free_target(graph, wanted)
    put_module(graph, target, module.train(graph.training))
    return target


def become_module(graph: GraphModule, node: Node, target: str, module: nn.Module, operand: Node) -> None:
    """Turn a node into the call of a new module; its name, its readers and the rest of its facts stay."""
    put_module(graph, target, module.train(graph.training))
    _retarget(node, "call_module", target, (operand,))
    record(node, target=target)


def insert_pad(operand: Node, reader: Node, amounts: tuple[int, ...]) -> Node:
    """Pad (or, negative, crop) the space of a tensor with zeros, amounts in the order of ``F.pad``, just before a reader."""
    if facts(operand).channels_last:
        amounts = (0, 0, *amounts)
    with operand.graph.inserting_before(reader):
        padded = operand.graph.call_function(F.pad, (operand, amounts))
    note_pad(padded, source=facts(reader).source)
    return padded


def note_pad(padded: Node, *, source: str = "") -> None:
    """Record what is known of a tensor just padded."""
    operand, amounts = padded.all_input_nodes[0], cast(tuple[int, ...], padded.args[1])
    known = facts(operand)
    shape = list(known.shape or ())
    for axis in range(min(len(shape), len(amounts) // 2)):
        shape[-1 - axis] += amounts[2 * axis] + amounts[2 * axis + 1]
    record(padded, shape=tuple(shape), dtype=known.dtype, channels_last=known.channels_last, target="pad", source=source)


def become_turned(node: Node, operand: Node) -> None:
    """Turn a node into the permutation that gives a tensor its other layout; its name, its readers, the rest of its facts stay."""
    _retarget(node, "call_function", torch.permute, turn(operand))
    record(node, target="permute")


def take_place(node: Node, made: Node) -> None:
    """Turn a node into another, which nobody reads and which goes; its name, its readers and the rest of its facts stay."""
    _retarget(node, made.op, made.target, made.args)
    record(node, target=facts(made).target)
    node.graph.erase_node(made)


def _retarget(node: Node, op: str, target: Any, args: tuple[Argument, ...]) -> None:
    node.op, node.target, node.args, node.kwargs = op, target, args, {}
    node.meta.pop("is_wrapped", None)  # torch.fx would wrap the new target when the graph's code runs


def bypass(node: Node, operand: Argument) -> None:
    """Take a node out: its readers read the operand instead, be it a node or a structure of nodes."""
    for reader in list(node.users):
        reader.args = map_arg(reader.args, lambda n: operand if n is node else n)
        reader.kwargs = map_arg(reader.kwargs, lambda n: operand if n is node else n)
    node.graph.erase_node(node)


def erase(nodes: Sequence[Node]) -> None:
    """Erase nodes, in graph order, that only each other read."""
    for node in reversed(nodes):
        node.graph.erase_node(node)


def like_of(graph: GraphModule, entry: Node, nodes: Sequence[Node]) -> torch.Tensor:
    """A tensor whose dtype, device and layout new weights in place of these nodes should have: a weight of theirs.

    Where they have none, an empty one like the tensor that enters.
    """
    modules = [graph.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]
    held = [p for module in modules for p in module.parameters() if p.is_floating_point()]
    others = [p for p in graph.parameters() if p.is_floating_point()]
    dtype = facts(entry).dtype
    if held:
        return max(held, key=torch.Tensor.dim)
    return next((p for p in others if p.dtype == dtype), torch.empty(0, dtype=dtype))


def tidy(graph: GraphModule) -> GraphModule:
    """Remove dead code and modules that nothing calls, check the graph and recompile it; returns the same object."""
    graph.graph.eliminate_dead_code(is_impure)
    _delete_unused_modules(graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def _delete_unused_modules(graph: GraphModule) -> None:
    """As torch.fx's own, which takes what is in a module that is an operand (the graph of a region) for unused."""
    used = {str(node.target) for node in graph.graph.nodes if node.op in ("call_module", "get_attr")}
    above = {part for target in used for part in _paths(target)}
    for name, _ in list(graph.named_modules(remove_duplicate=False)):
        if name and name not in above and used.isdisjoint(_paths(name)):
            graph.delete_submodule(name)


def _paths(target: str) -> Iterator[str]:
    """A qualified name, and those of all that it lies in."""
    return accumulate(target.split("."), "{}.{}".format)


def shape_after(node: Node) -> tuple[int, ...]:
    """The recorded shape of a node's output.

    Raises:
        ValueError: none was recorded.
    """
    shape = facts(node).shape
    if shape is None:
        raise ValueError(f"no shape was recorded for {node.name}")
    return shape
