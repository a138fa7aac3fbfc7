"""Run a network with parts of it replaced, without building anything: from stored tensors, only what comes after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxmerge.graph.query import attribute

#: The names of the tensors that a replaced stretch reads, its entry first, and what it computes from them.
Replacement: TypeAlias = tuple[tuple[str, ...], Callable[..., torch.Tensor]]


class Replay:
    """The values of a graph for one batch at a time.

    Args:
        graph: in eval mode, nothing in place.
    """

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self.nodes: tuple[Node, ...] = tuple(graph.graph.nodes)
        self.named = {node.name: node for node in self.nodes}
        self.output = self.nodes[-1]
        self._below: dict[Node, tuple[Node, ...]] = {}
        self._modules = dict(graph.named_modules(remove_duplicate=False))

    def values(
        self, arguments: Sequence[Any], *, replaced: Mapping[str, Replacement] | None = None, last: str | None = None
    ) -> dict[Node, Any]:
        """The value of every node, up to and including ``last``.

        Args:
            arguments: the network's inputs.
            replaced: exit name -> what to compute instead.
            last: name of the node to stop at; None for the whole network.
        """
        env: dict[Node, Any] = {}
        inputs = iter(arguments)
        replaced = replaced or {}
        stop = self.named[last] if last is not None else None
        needed = self.needed(stop, replaced) if stop is not None or replaced else None
        for node in self.nodes:
            if node.op == "placeholder":
                env[node] = next(inputs, node.args[0] if node.args else None)
            elif needed is not None and node not in needed:
                continue
            elif node.name in replaced:
                env[node] = self.computed(replaced[node.name], env)
            else:
                env[node] = self.run(node, env)
            if node is stop:
                break
        return env

    def needed(self, stop: Node | None, replaced: Mapping[str, Replacement]) -> set[Node]:
        """Nodes that the stop (or the output) depends on when replaced exits read their entries only."""
        needed: set[Node] = set()
        waiting = [stop if stop is not None else self.output]
        while waiting:
            node = waiting.pop()
            if node in needed:
                continue
            needed.add(node)
            inputs = replaced[node.name][0] if node.name in replaced else ()
            waiting.extend([self.named[name] for name in inputs] or node.all_input_nodes)
        return needed

    def computed(self, replacement: Replacement, env: Mapping[Node, Any]) -> torch.Tensor:
        """What a replacement makes of stored tensors."""
        names, function = replacement
        return function(*(env[self.named[name]] for name in names))

    def output_with(self, env: Mapping[Node, Any], changed: str, value: torch.Tensor) -> Any:
        """The network's output when one node's value is another, all it does not depend on as stored."""
        start = self.named[changed]
        overlay: dict[Node, Any] = {start: value}
        for node in self._downstream(start):
            arguments = _Overlaid(env, overlay)
            overlay[node] = self.run(node, arguments)
        return overlay[self.output]

    def _downstream(self, start: Node) -> tuple[Node, ...]:
        if start not in self._below:
            seen = {start}
            for node in self.nodes[self.nodes.index(start) + 1 :]:
                if any(operand in seen for operand in node.all_input_nodes):
                    seen.add(node)
            self._below[start] = tuple(node for node in self.nodes if node in seen and node is not start)
        return self._below[start]

    def run(self, node: Node, env: Any) -> Any:
        """The value of one node, from those of its operands."""
        args = map_arg(node.args, env.__getitem__)
        kwargs = map_arg(node.kwargs, env.__getitem__)
        if node.op == "call_module":
            return self._modules[str(node.target)](*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return attribute(self.graph, str(node.target))
        return args[0]


class _Overlaid:
    def __init__(self, below: Mapping[Node, Any], above: Mapping[Node, Any]) -> None:
        self.below, self.above = below, above

    def __getitem__(self, node: Node) -> Any:
        return self.above[node] if node in self.above else self.below[node]
