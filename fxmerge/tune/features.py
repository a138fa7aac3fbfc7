"""Tensors that exist in both student and original: what the one can be taught by the other, beside the outputs.

The two share the names of their nodes. A cut (a tensor that every path of its chain crosses) means the same in both unless it lies
inside a merge: there the student's is without its activation, padded by a halo, or gone. Behind no merge, both are equal, and there
is nothing to learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from fxmerge.analysis.segments import find_segments
from fxmerge.core.region import Chain
from fxmerge.errors import InputError, PlanMismatchError
from fxmerge.graph.edit import copied
from fxmerge.graph.meta import facts, origin
from fxmerge.graph.query import fingerprint, node_named
from fxmerge.operators import Operators
from fxmerge.passes.annotate import merges, stretch


def shared_cuts(student: GraphModule, original: GraphModule, *, operators: Operators | None = None) -> tuple[str, ...]:
    """Names of the cuts that student and original both compute and that some merge lies before, in graph order.

    Args:
        student: from :func:`fxmerge.linearize`.
        original: the traced graph that its plan was made for.
        operators: what was known of operators when the plan was made; None for the default table.

    Raises:
        PlanMismatchError: the student was made from another graph.
    """
    if origin(student) != fingerprint(original):
        raise PlanMismatchError("this student was not made from this graph: give the traced graph that was annotated with its plan")
    exits = list(merges(student))
    inside = {node for exit_node, merge in exits for node in stretch(student, exit_node, merge)[1]}
    inside -= {exit_node for exit_node, merge in exits if merge.exit == merge.end and not merge.added}
    changed = _downstream(student, {exit_node for exit_node, _ in exits})
    cuts = {name for chain in _chains(find_segments(original, operators=operators).region.children) for name in chain.cuts}
    here = {node.name: node for node in student.graph.nodes if node in changed and node not in inside}
    return tuple(
        node.name
        for node in original.graph.nodes
        if node.name in cuts and node.name in here and node.op != "output" and _same_kind(node, here[node.name])
    )


def require_graph(name: str, value: object) -> None:
    """Raise InputError unless an argument is a traced graph; a model is easily given in its place."""
    if not isinstance(value, GraphModule):
        raise InputError(f"{name} must be a GraphModule, as trace() and linearize() give, found {type(value).__name__}")


def _downstream(graph: GraphModule, starts: set[Node]) -> set[Node]:
    seen = set(starts)
    for node in graph.graph.nodes:
        if seen.intersection(node.all_input_nodes):
            seen.add(node)
    return seen


def _chains(chains: Sequence[Chain]) -> Iterator[Chain]:
    for chain in chains:
        yield chain
        for unit in chain.units:
            yield from _chains(unit.children)


def _same_kind(one: Node, other: Node) -> bool:
    known, twin = facts(one), facts(other)
    return known.dtype is not None and known.dtype.is_floating_point and (known.shape, known.dtype) == (twin.shape, twin.dtype)


def with_features(graph: GraphModule, names: Sequence[str]) -> GraphModule:
    """A graph that shares the modules of the one given and returns (its output, a tuple of the tensors named).

    Args:
        graph: student or original.
        names: of nodes, such as :func:`shared_cuts` gives.

    Raises:
        InputError: the graph has no node of such a name.
    """
    twin = copied(graph)
    nodes = [node_named(twin, name) for name in names]
    if None in nodes:
        raise InputError(f"the graph has no node {names[nodes.index(None)]!r} to take features from")
    taken = tuple(node for node in nodes if node is not None)
    output = twin.graph.output_node()
    codegen = twin.graph._codegen
    spec = codegen.pytree_info.out_spec if isinstance(codegen, _PyTreeCodeGen) else None
    if isinstance(codegen, _PyTreeCodeGen) and spec is not None:  # exported: its outputs are flat
        whole = pytree.tree_unflatten([0] * spec.num_leaves, spec)
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=pytree.tree_structure((whole, (0,) * len(taken))))
        output.args = ((*pytree.tree_leaves(output.args[0]), *taken),)
    else:
        output.args = ((output.args[0], taken),)
    twin.recompile()
    return twin


def feature_loss(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean over the cuts of the squared error over the variance of what is wanted, channel by channel; 0 where there are none.

    Args:
        found: the student's tensors, (N, C, ...) each.
        wanted: the original's, alike.
    """
    if not found:
        return torch.zeros(())
    return torch.stack([_relative_error(a, b) for a, b in zip(found, wanted, strict=True)]).mean()


def _relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    mean = wanted.mean([axis for axis in range(wanted.dim()) if axis != 1], keepdim=True)
    size = _square(wanted - mean)
    return _square(found - wanted) / size.clamp_min(torch.finfo(wanted.dtype).tiny)


def _square(value: Tensor) -> Tensor:
    """The sum of the squares, in float32 at least.

    As a norm: with mse_loss a step of training ResNet-20 took a fifth longer (177 to 147 ms, two cores, memory kept by glibc;
    where it is not kept, page faults cost what is gained: 182 and 181). The differences are held for the gradient, which
    mse_loss does not do.
    """
    norm: Tensor = torch.linalg.vector_norm(value, dtype=torch.promote_types(value.dtype, torch.float32))
    return norm.square()
