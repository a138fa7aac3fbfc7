"""Questions about graphs and their nodes. Nothing here edits."""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils.parametrize import is_parametrized

from fxmerge.graph.guard import require_size, require_step
from fxmerge.graph.meta import facts
from fxmerge.graph.spelling import writes


def module_of(graph: GraphModule, node: Node) -> nn.Module | None:
    """The module that a node calls, or None for other nodes."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def has_module(graph: nn.Module, target: str) -> bool:
    """Whether there is a module of this qualified name."""
    try:
        graph.get_submodule(target)
    except AttributeError:
        return False
    return True


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The layer's own class; that of a parametrized one (weight norm) is made for it alone, below its own."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


_EFFECTS = (operator.setitem, torch._assert, require_size, require_step)


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_impure(node: Node) -> bool:
    """Whether a node does something beside computing its value, so that it stays although nobody reads it."""
    if node.op in ("placeholder", "output") or node.target in _EFFECTS or "out" in node.kwargs:
        return True
    if node.op == "call_module":
        owner = node.graph.owning_module
        return owner is not None and getattr(owner.get_submodule(str(node.target)), "inplace", False) is True
    return writes(node)


def node_named(graph: GraphModule, name: str) -> Node | None:
    """The node of this name, or None."""
    return next((node for node in graph.graph.nodes if node.name == name), None)


def tensor_named(graph: GraphModule, name: str) -> Node | None:
    """What stands for the node of this name in a student: the activation that a merge has put behind it, or the node itself."""
    node = node_named(graph, name)
    readers = () if node is None else tuple(node.users)
    return next((reader for reader in readers if facts(reader).behind == name), node)


def acts_alike(graph: GraphModule, activation: Node) -> bool:
    """Whether an activation reads one tensor and holds none, so that it can stand behind any other tensor."""
    module = module_of(graph, activation)
    held = () if module is None else (*module.parameters(), *module.buffers())
    return len(activation.all_input_nodes) == 1 and not held


def has_sole_user(node: Node) -> bool:
    return len(node.users) == 1


def is_tensor(node: Node) -> bool:
    """Whether the node's value is a tensor that depends on the network's inputs (sizes and parameters do not)."""
    return node.op not in ("get_attr", "output") and facts(node).shape is not None and not facts(node).constant


def is_data(node: Node) -> bool:
    """Whether the node's value is such a tensor, or holds some."""
    return is_tensor(node) or (facts(node).bundle and not facts(node).constant)


def data_operands(node: Node) -> tuple[Node, ...]:
    """The operands that are tensors or hold tensors, and are no parameters, one entry for every use."""
    uses: list[Node] = []
    _collect((node.args, node.kwargs), uses)
    return tuple(operand for operand in uses if is_data(operand))


def _collect(value: object, uses: list[Node]) -> None:
    if isinstance(value, Node):
        uses.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect(item, uses)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, uses)
    elif isinstance(value, slice):
        _collect((value.start, value.stop, value.step), uses)


def fed_by_inputs(graph: GraphModule) -> set[Node]:
    """The nodes whose values depend on a tensor that the network is given: no parameters, nor what has its size alone from one."""
    fed: set[Node] = set()
    for node in graph.graph.nodes:
        if (node.op == "placeholder" and is_data(node)) or any(operand in fed for operand in data_operands(node)):
            fed.add(node)
    return fed


def shared_modules(graph: GraphModule) -> frozenset[str]:
    """Targets of modules that are called more than once, or that hold a parameter which another called module holds too.

    A parameter that the graph reads by itself as well is no hindrance: a merge takes a copy.
    """
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    holders: dict[int, set[str]] = {}
    for target in set(calls):
        for parameter in graph.get_submodule(target).parameters():
            holders.setdefault(id(parameter), set()).add(target)
    tied = {target for group in holders.values() if len(group) > 1 for target in group}
    return frozenset(tied | {target for target, count in Counter(calls).items() if count > 1})


def attribute(graph: nn.Module, target: str) -> object:
    """The attribute of a qualified name."""
    value: object = graph
    for atom in target.split("."):
        value = getattr(value, atom)
    return value


def between(entry: Node, end: Node) -> tuple[Node, ...]:
    """Every node on a path from ``entry`` to ``end``, the end counted and the entry not, in graph order."""
    below = _reached(entry, lambda node: node.users)
    above = _reached(end, lambda node: node.all_input_nodes)
    inside = (below & above) | {end}
    return tuple(node for node in entry.graph.nodes if node in inside and node is not entry)


def _reached(start: Node, step: object) -> set[Node]:
    seen: set[Node] = set()
    waiting = [start]
    while waiting:
        for node in step(waiting.pop()):  # type: ignore[operator]
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen


def fingerprint(graph: GraphModule) -> str:
    """A hash of everything that decides which plans fit a graph: its nodes and its modules' hyper-parameters, not its weights."""
    digest = hashlib.sha256()
    for line in _description(graph):
        digest.update(line.encode())
    return digest.hexdigest()[:32]


def _description(graph: GraphModule) -> Iterator[str]:
    for node in graph.graph.nodes:
        module = module_of(graph, node)
        target = describe_module(module) if module is not None else _name_of(node.target)
        yield f"{node.op} {node.name} {target} {_plain((node.args, node.kwargs))}\n"


def describe_module(module: nn.Module) -> str:
    """Type, hyper-parameters and parameter shapes of a leaf module."""
    shapes = ", ".join(f"{name}{tuple(p.shape)}" for name, p in module.named_parameters())
    kind = "Conv" if isinstance(module, nn.modules.conv._ConvNd) else type(module).__name__
    kind = "ConvTranspose" if isinstance(module, nn.modules.conv._ConvTransposeNd) else kind
    return f"{kind}({module.extra_repr()}; {shapes})"


def _name_of(target: object) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", repr(target))


def _plain(value: object) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, (tuple, list)):
        return f"[{','.join(_plain(v) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{k}:{_plain(v)}' for k, v in value.items())}}}"
    if isinstance(value, slice):
        return f"{_plain(value.start)}:{_plain(value.stop)}:{_plain(value.step)}"
    return repr(value)


def calls(graph: GraphModule) -> Iterable[Node]:
    """The nodes that compute something, in graph order."""
    return (node for node in graph.graph.nodes if node.op.startswith("call_"))
