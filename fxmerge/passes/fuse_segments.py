"""One convolution for every annotated segment of a student; exact."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn
from torch.fx import GraphModule, Node

from fxmerge.algebra.affine import evaluate
from fxmerge.algebra.module import convolution_with, separate_padding
from fxmerge.core.segment import Candidate
from fxmerge.errors import PassError
from fxmerge.graph.edit import become_module, bypass, copied, erase, free_target, insert_pad, like_of, tidy
from fxmerge.graph.meta import origin, record
from fxmerge.graph.query import module_of
from fxmerge.operators import Operators, Verdict, default_operators, read_expression, read_maps
from fxmerge.passes.annotate import merges, stretch
from fxmerge.passes.base import Pass, Sequential
from fxmerge.passes.drop_repeated import DropRepeated
from fxmerge.passes.fold_batchnorm import FoldBatchNorm
from fxmerge.passes.reuse_memory import ReuseMemory


@dataclass(frozen=True)
class FuseSegments(Pass):
    """Multiply out every segment of a student (from :class:`Linearize`, annotated)."""

    operators: Operators = field(default_factory=default_operators, repr=False)
    exact: ClassVar[bool] = True

    def requires(self, graph: GraphModule) -> None:
        if origin(graph) is None and any(True for _ in merges(graph)):
            raise PassError("this graph is annotated but not linearized: fuse the student that linearize() returns")

    def call(self, graph: GraphModule) -> GraphModule:
        merged = copied(graph)
        if not any(True for _ in merges(graph)):
            return merged
        verdicts = self.operators.verdicts(merged)
        found = list(merges(merged))
        for exit_node, merge in found:
            if merge.kind != "identity":
                self._fuse(merged, exit_node, merge, verdicts)
        for exit_node, merge in found:
            record(exit_node, merge=None, role="")  # done; nothing is left to fuse
            if merge.kind == "identity":
                bypass(exit_node, exit_node.args[0])  # type: ignore[arg-type]
        return tidy(merged)

    def _fuse(self, graph: GraphModule, exit_node: Node, merge: Candidate, verdicts: Mapping[Node, Verdict]) -> None:
        entry, nodes = stretch(graph, exit_node, merge)
        if len(nodes) == 1 and isinstance(module_of(graph, exit_node), nn.modules.conv._ConvNd):
            return  # one convolution already
        expression = read_expression(entry, nodes, verdicts)
        affine = evaluate(expression, read_maps(graph, nodes, verdicts, self.operators))
        like = like_of(graph, entry, nodes)
        module = convolution_with(affine, like=like, bias=affine.geometry.bias)
        become_module(graph, exit_node, free_target(graph, f"merged.{exit_node.name}"), module, entry)
        amounts = separate_padding(affine.geometry)
        if amounts:
            exit_node.args = (insert_pad(entry, exit_node, amounts),)
        erase(nodes[:-1])


def fuse(student: GraphModule) -> GraphModule:
    """The merged network of a student: one convolution for every segment, all batch norms folded; exact, for inference.

    Args:
        student: from :func:`fxmerge.linearize`, trained or not, in eval mode or not; it is not changed.

    Returns:
        A GraphModule in eval mode that computes what the student computes in eval mode, to rounding.

    Raises:
        PassError: the graph is annotated but was not linearized.
    """
    training = any(module.training for module in student.modules())
    quiet = copy.deepcopy(student).eval() if training else student
    return Sequential((FuseSegments(), FoldBatchNorm(), DropRepeated(), ReuseMemory())).apply(quiet)
