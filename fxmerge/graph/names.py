"""Names that do not depend on how a graph was captured: where in the model a node stands, and what it does.

Symbolic tracing calls a node after its module or its function, torch.export after its ATen operation, TorchDynamo after the user's
variable. All three note the stack of modules; from it every node gets one name: the path of its layer, or the path of the module
whose code it stands in and the name of its operation.
"""

from __future__ import annotations

import re

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxmerge.graph.spelling import name_of

#: TorchDynamo's paths begin with the name that the model has in the frame: ``L['self'].layer1``.
_FRAME = re.compile(r"^L\['\w+'\]|^L__self__")
_ITEM = re.compile(r"(?:\._(?:modules|parameters|buffers))?\['?([^'\]]*)'?\]")
_CONTAINERS = ("container.", "module.")


def qualified(path: str) -> str:
    """The qualified name that a path of TorchDynamo's stands for.

    >>> qualified("L['self']._modules['layer1']._modules['0']._parameters['weight']")
    'layer1.0.weight'
    """
    return _ITEM.sub(r".\1", _FRAME.sub("", path)).strip(".").partition("@")[0]


def module_path(node: Node) -> str | None:
    """The qualified name of the module whose code a node stands in; "" for the model itself, None where it is not known."""
    if "nn_module_stack" not in node.meta:
        return None
    stack = list((node.meta["nn_module_stack"] or {}).values())
    return qualified(str(stack[-1][0])) if stack else ""


def is_layer(node: Node) -> bool:
    """Whether the module whose code a node stands in is a layer of torch.nn's, no container."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return False
    kind = stack[-1][1]
    name = kind if isinstance(kind, str) else f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"
    room = name.removeprefix("torch.nn.modules.")
    return room != name and not room.startswith(_CONTAINERS)


def rename(graph: GraphModule) -> None:
    """Give every node its name (see the module's text), in place; nodes of unknown origin keep theirs."""
    renamed = Graph()
    renamed._codegen = graph.graph._codegen
    if any("nn_module_stack" in node.meta for node in graph.graph.nodes):
        for node in graph.graph.nodes:  # TorchDynamo notes nothing on what stands in the code of the model itself
            node.meta.setdefault("nn_module_stack", {})
    twins: dict[Node, Node] = {}
    for node in graph.graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), twins.__getitem__)
        twins[node] = renamed.create_node(node.op, node.target, args, kwargs, wanted_name(node), node.type)
        twins[node].meta = dict(node.meta)
    graph.graph = renamed


def wanted_name(node: Node) -> str:
    """The name that a node should have; it may be taken."""
    if node.op in ("call_module", "get_attr", "placeholder"):
        return str(node.target)
    path = module_path(node)
    if path is None or not node.op.startswith("call_"):
        return node.name
    if path and is_layer(node):
        return path
    return f"{path}_{name_of(node)}" if path else name_of(node)
