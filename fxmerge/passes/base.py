"""The contract of a pass, and passes in a row.

A pass is a frozen value: a function from a graph to a new one that says whether it is exact. Called, it returns torch's
``PassResult``, so it runs in ``torch.fx.passes.infra.pass_manager.PassManager`` beside anybody's. Unlike torch's ``PassBase`` it
hands ``ensures`` the result, not the input. No pass changes its input; the result shares its modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxmerge.errors import FxMergeError, InputError, PassError


@dataclass(frozen=True)
class Pass:
    """Base of all passes: subclasses define :meth:`call`, and what they need and promise."""

    #: Whether the result computes what the input computes.
    exact: ClassVar[bool]

    def requires(self, graph: GraphModule) -> None:
        """Raise PassError where the graph is not what this pass needs."""

    def call(self, graph: GraphModule) -> GraphModule:
        """The work; returns a new graph, or the same object if there is nothing to do."""
        raise NotImplementedError

    def ensures(self, result: GraphModule) -> None:
        """Raise PassError where the result is not what this pass promises."""

    def __call__(self, graph: GraphModule) -> PassResult:
        """Check, work, check.

        Raises:
            InputError: not a GraphModule.
            FxMergeError: what the pass raises.
        """
        if not isinstance(graph, GraphModule):
            raise InputError(f"{self.name} works on a torch.fx.GraphModule, found {type(graph).__name__}; trace it first")
        self.requires(graph)
        result = self.call(graph)
        self.ensures(result)
        return PassResult(result, result is not graph)

    def apply(self, graph: GraphModule) -> GraphModule:
        """The result alone."""
        result: GraphModule = self(graph).graph_module
        return result

    @property
    def name(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class Sequential(Pass):
    """Passes one after the other; exact if all are."""

    passes: Sequence[Pass] = ()

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return all(step.exact for step in self.passes)

    def call(self, graph: GraphModule) -> GraphModule:
        done: list[str] = []
        for step in self.passes:
            try:
                graph = step.apply(graph)
            except FxMergeError as fault:
                if not done:
                    raise
                raise PassError(f"{step.name}, after {', '.join(done)}: {fault}") from fault
            done.append(step.name)
        return graph
