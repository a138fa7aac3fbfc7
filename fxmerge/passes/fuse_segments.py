"""One convolution for every annotated segment of a student; exact."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxmerge.algebra.affine import evaluate, evaluate_sides, pointwise
from fxmerge.algebra.module import convolution_with
from fxmerge.core.segment import Candidate
from fxmerge.errors import PassError
from fxmerge.graph.edit import add_module, bypass, copied, erase, like_of, take_place, tidy
from fxmerge.graph.layout import turns
from fxmerge.graph.meta import facts, origin, record
from fxmerge.graph.query import module_of, node_named
from fxmerge.operators import Operators, Verdict, default_operators, is_linear, read_expression, read_maps, write_map
from fxmerge.passes.annotate import merges, stretch
from fxmerge.passes.base import Pass, Sequential
from fxmerge.passes.drop_repeated import DropRepeated
from fxmerge.passes.fold_batchnorm import FoldBatchNorm
from fxmerge.passes.reuse_memory import ReuseMemory

_NOT_LINEARIZED = "this graph is annotated but not linearized: fuse the student that linearize() returns"


@dataclass(frozen=True)
class FuseSegments(Pass):
    """Multiply out every segment of a student (from :class:`Linearize`, annotated)."""

    operators: Operators = field(default_factory=default_operators, repr=False)
    exact: ClassVar[bool] = True

    def requires(self, graph: GraphModule) -> None:
        if origin(graph) is None and any(True for _ in merges(graph)):
            raise PassError(_NOT_LINEARIZED)

    def call(self, graph: GraphModule) -> GraphModule:
        if not any(True for _ in merges(graph)):
            return graph
        merged = copied(graph)
        verdicts = self.operators.verdicts(merged)
        found = list(merges(merged))
        for exit_node, merge in found:
            if merge.kind != "identity":
                self._fuse(merged, exit_node, merge, verdicts)
        for exit_node, merge in found:
            record(exit_node, merge=None, role="")  # done; nothing is left to fuse
            if merge.kind == "identity" and not turns(exit_node):
                bypass(exit_node, exit_node.args[0])
        return tidy(merged)

    def _fuse(self, graph: GraphModule, exit_node: Node, merge: Candidate, verdicts: Mapping[Node, Verdict]) -> None:
        entry, nodes = stretch(graph, exit_node, merge)
        normed = any(isinstance(module_of(graph, node), nn.modules.batchnorm._NormBase) for node in nodes)
        if merge.moved or (merge.sides and not normed):  # one convolution, and what is around it, already
            return
        if len(nodes) == 1 and isinstance(module_of(graph, exit_node), (nn.modules.conv._ConvNd, nn.Linear)):
            return  # one convolution already
        try:
            expression = read_expression(entry, nodes, verdicts)
            maps = read_maps(graph, nodes, verdicts, self.operators)
        except ValueError as fault:
            raise PassError(
                f"the merge {merge.id} cannot be multiplied out: {fault}. Give fuse() the operators that the plan was made with, "
                "and the student as linearize() made it"
            ) from fault
        affine, sides = evaluate(expression, maps), evaluate_sides(expression, maps)
        like = like_of(graph, entry, nodes)
        known = facts(exit_node)
        linear = not sides and is_linear(affine.geometry, facts(entry), known)
        layer = convolution_with(affine, like=like, bias=affine.geometry.bias, linear=linear)
        target = add_module(graph, f"merged.{exit_node.name}", layer)
        terms = [_put_side(graph, exit_node, *_source(graph, merge, side), like) for side in sides.items()]
        with graph.graph.inserting_before(exit_node):
            made = write_map(entry, target, affine.geometry, linear=linear, channels_last=known.channels_last, sides=terms)
        take_place(exit_node, made[-1])
        erase(nodes[:-1])


def _source(graph: GraphModule, merge: Candidate, side: tuple[str, Tensor]) -> tuple[str, Tensor]:
    """A side input and its matrix; of a fitted merge, which has a layer of its own for each, what goes into that layer."""
    name, matrix = side
    node = node_named(graph, name)
    module = module_of(graph, node) if merge.sides and node is not None else None
    if node is None or not isinstance(module, nn.modules.conv._ConvNd):
        return name, matrix
    return node.all_input_nodes[0].name, matrix @ module.weight.detach().flatten(1).to(matrix)


def _put_side(graph: GraphModule, exit_node: Node, name: str, matrix: Tensor, like: Tensor) -> tuple[Node, str]:
    """A side input, and the module that multiplies it by its matrix: a 1x1 convolution on one pixel."""
    side = node_named(graph, name)
    assert side is not None
    layer = convolution_with(pointwise(matrix, len(facts(side).image_shape) - 2), like=like, bias=False)
    return side, add_module(graph, f"merged.{exit_node.name}_{name}", layer)


def fuse(student: GraphModule, *, operators: Operators | None = None) -> GraphModule:
    """The merged network of a student: one convolution for every segment, all batch norms folded; exact, for inference.

    Args:
        student: from :func:`fxmerge.linearize`, trained or not, in eval mode or not; it is not changed.
        operators: what was known of operators when the student was made; None for the default table.

    Returns:
        A GraphModule in eval mode, with weights of its own, that computes what the student computes in eval mode, to rounding.

    Raises:
        InputError: not a GraphModule.
        PassError: the graph is no student, or is one no more: pickling loses what is to be merged.
    """
    table = operators or default_operators()
    passes = Sequential((FuseSegments(table), FoldBatchNorm(table), DropRepeated(), ReuseMemory(table)))
    if isinstance(student, GraphModule):
        _require_student(student)
    return passes.apply(copy.deepcopy(student).eval())


def _require_student(graph: GraphModule) -> None:
    if origin(graph) is not None:
        return
    if any(True for _ in merges(graph)):
        raise PassError(_NOT_LINEARIZED)
    raise PassError(
        "this graph is no student: fuse what linearize() returns. torch.save and pickle lose what is to be merged; use "
        "save_student and load, or make the student again by linearize(annotate(graph, plan)) and load its state dict"
    )
