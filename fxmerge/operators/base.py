"""What fxmerge wants to know of an operator, and the table in which it looks it up.

An operator answers three questions about one node of a graph: what it is (:data:`Verdict`), which numbers it holds
(:meth:`Operator.affine`), and how it runs where all padding has been moved to the entry of its segment
(:meth:`Operator.unpad`). A new operator comes in as an argument: ``default_operators().extended(...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias

from torch import nn
from torch.fx import GraphModule, Node

from fxmerge.algebra.affine import Affine
from fxmerge.core.geometry import Geometry
from fxmerge.core.segment import Reason
from fxmerge.graph.layout import turns
from fxmerge.graph.meta import facts
from fxmerge.graph.portable import found, named
from fxmerge.graph.query import data_operands, has_hooks, is_tensor, kind_of, module_of, shared_modules


@dataclass(frozen=True, slots=True)
class Map:
    """An affine map of one operand, the node's first argument.

    Args:
        geometry: sizes.
        role: a ``side`` adds a tensor that is constant over space.
        side: the node that gives that tensor.
    """

    geometry: Geometry
    role: Literal["convolution", "norm", "side", "other"] = "other"
    side: Node | None = None


@dataclass(frozen=True, slots=True)
class Join:
    """Several operands are added, subtracted from the first, or put one after the other on channels."""

    kind: Literal["sum", "difference", "concat"]
    operands: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Activation:
    """A pointwise non-linearity."""

    name: str


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm whose statistics depend on its input. It is no map, but a scale and a shift of every channel may stand for it.

    Args:
        geometry: of that scale and shift.
        name: of its kind.
    """

    geometry: Geometry
    name: str


@dataclass(frozen=True, slots=True)
class Opaque:
    """Anything else; it stays, and this is why it cannot be merged."""

    reason: Reason = Reason.OPAQUE
    detail: str = ""
    advice: str = ""


Verdict: TypeAlias = Map | Join | Activation | Norm | Opaque


@dataclass(frozen=True, slots=True)
class Site:
    """One node in its graph, with what every operator asks of it."""

    graph: GraphModule
    node: Node
    shared: frozenset[str] = frozenset()

    @property
    def module(self) -> Any:
        """The module that the node calls; None for other nodes."""
        return module_of(self.graph, self.node)

    @property
    def operand(self) -> Node | None:
        """The first argument, if it is a tensor that depends on the network's inputs."""
        first = self.node.args[0] if self.node.args else None
        return first if isinstance(first, Node) and is_tensor(first) else None

    @property
    def channels(self) -> int:
        """Channels of the operand."""
        return self.operand_shape[1]

    @property
    def dims(self) -> int:
        """Spatial dimensions of the operand."""
        return len(self.operand_shape) - 2

    @property
    def operand_shape(self) -> tuple[int, ...]:
        """(N, C, *space) of the operand for the example inputs, whatever its layout; () where it is not known."""
        return facts(self.operand).image_shape if self.operand is not None else ()

    @property
    def channels_last(self) -> bool:
        """Whether the operand's channels are its last dimension: only an operator with ``any_layout`` sees such a site."""
        return self.operand is not None and facts(self.operand).channels_last


class Operator(Protocol):
    """How one kind of node is read, multiplied out, and run without padding.

    An operator is asked about tensors with channels first alone, unless it has an attribute ``any_layout`` that is true.
    """

    def verdict(self, site: Site) -> Verdict:
        """What the node is."""

    def affine(self, site: Site) -> Affine:
        """The numbers of a node whose verdict is a :class:`Map`."""

    def unpad(self, site: Site) -> None:
        """Edit a node whose verdict is a :class:`Map` so that it reads its operand from pixel 0 on and pads nothing.

        The graph is a copy made for this; its modules are shared with others, so a module is replaced, not changed.
        """


@dataclass(frozen=True)
class Operators:
    """Which operator reads which node.

    Args:
        modules: by exact type of the module called. (A subclass may compute something else.)
        functions: by function, or by name for methods.
    """

    modules: Mapping[type[nn.Module], Operator]
    functions: Mapping[object, Operator]

    def __reduce__(self) -> tuple[Any, ...]:
        return _table, (dict(self.modules), {named(function): operator for function, operator in self.functions.items()})

    def extended(
        self,
        *,
        modules: Mapping[type[nn.Module], Operator] | None = None,
        functions: Mapping[object, Operator] | None = None,
    ) -> Operators:
        """A table with more operators, or other ones; this one stays as it is."""
        return replace(self, modules={**self.modules, **(modules or {})}, functions={**self.functions, **(functions or {})})

    def find(self, graph: GraphModule, node: Node) -> Operator | None:
        """The operator for a node, or None."""
        if node.op == "call_module":
            module = module_of(graph, node)
            return self.modules.get(kind_of(module)) if module is not None else None
        return self.functions.get(node.target) if node.op in ("call_function", "call_method") else None

    def verdicts(self, graph: GraphModule) -> dict[Node, Verdict]:
        """What every node of a graph is. Sizes, parameters and inputs are opaque."""
        shared = shared_modules(graph)
        return {node: self.verdict(Site(graph, node, shared)) for node in graph.graph.nodes}

    def verdict(self, site: Site) -> Verdict:
        """What one node is."""
        node, module = site.node, site.module
        operator = self.find(site.graph, node)
        if operator is None:
            return Opaque(detail=_describe(site))
        if module is not None:
            if has_hooks(module):
                return Opaque(Reason.HOOKED, advice="remove the hooks before tracing; they cannot run in a merged layer")
            if str(node.target) in site.shared:
                return Opaque(Reason.SHARED, advice="give each call a module of its own, if they need not share weights")
        shape = facts(node).shape
        if shape is None or len(shape) < 3:
            return Opaque(Reason.SHAPE, f"shape {shape}")
        last = [facts(value).channels_last for value in (node, *data_operands(node))]
        if any(last) and not getattr(operator, "any_layout", False):
            return Opaque(Reason.LAYOUT, f"{_describe(site)} on channels last", "permute to channels first before it")
        if any(last) and not all(last) and not turns(node):
            return Opaque(Reason.LAYOUT, f"{_describe(site)} of tensors of two layouts")
        return operator.verdict(site)


class NormOperator(Operator, Protocol):
    """What is asked of an operator that gives :class:`Norm` for a verdict, besides."""

    def behind(self, module: nn.Module, channels: int) -> nn.Module:
        """A new norm of the same kind for tensors of so many channels, which scales by 1 and shifts by 0."""


def _table(modules: Mapping[type[nn.Module], Operator], functions: Mapping[object, Operator]) -> Operators:
    """A table in another process."""
    return Operators(modules, {found(function): operator for function, operator in functions.items()})


def _describe(site: Site) -> str:
    return type(site.module).__name__ if site.module is not None else facts(site.node).target or str(site.node.target)


def channelwise(function: Callable[[Site], Verdict], *, any_layout: bool = False) -> Operator:
    """An operator that holds no numbers and needs no care for padding: an activation, a join, an identity.

    Args:
        function: from a site to what the node is.
        any_layout: whether it is right where the channels are the last dimension, too.
    """
    return _Plain(function, any_layout)


@dataclass(frozen=True)
class _Plain:
    function: Callable[[Site], Verdict]
    any_layout: bool = False

    def verdict(self, site: Site) -> Verdict:
        return self.function(site)

    def affine(self, site: Site) -> Affine:
        return Affine.identity(site.channels, site.dims)

    def unpad(self, site: Site) -> None:
        return
