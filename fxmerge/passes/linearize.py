"""The student: activations out, padding first, skips cropped; or one convolution in place of the stretch.

The only pass that changes the function. What it returns is still a network of ordinary layers, to be trained if wanted; multiplied
out by :mod:`fxmerge.passes.fuse_segments` it computes the same, borders included, because nothing inside a segment pads any more:
walking back from the exit, every tensor gets the halo its readers need (:meth:`Expression.halos`), the entry is padded once by the
most that is asked for, and whoever needs less crops. What makes an image larger turns each pixel of halo into several, and is
followed by a crop of those too many.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxmerge.algebra.affine import Affine
from fxmerge.algebra.module import Scaling, convolution, convolution_with
from fxmerge.core.expression import Expression, Halo, asked_of_operand, surplus_of
from fxmerge.core.geometry import Axis, Geometry, in_pad_order
from fxmerge.core.segment import Candidate
from fxmerge.errors import PassError, PlanMismatchError
from fxmerge.graph.edit import (
    add_module,
    become_module,
    become_turned,
    bypass,
    copied,
    erase,
    free_target,
    insert_pad,
    like_of,
    take_place,
    tidy,
)
from fxmerge.graph.layout import turns
from fxmerge.graph.meta import facts, origin, record, set_origin
from fxmerge.graph.query import fingerprint, tensor_named
from fxmerge.operators import (
    Activation,
    Join,
    Map,
    Norm,
    Operators,
    Site,
    Verdict,
    default_operators,
    is_linear,
    norm_behind,
    read_expression,
    write_map,
)
from fxmerge.passes.adjust import adjust, layers_of
from fxmerge.passes.annotate import merges, stretch
from fxmerge.passes.base import Pass


@dataclass(frozen=True)
class Linearize(Pass):
    """Make the student of an annotated graph.

    Args:
        weights: for fitted candidates, by id, the map to start from; where there is none, torch's initialisation. By
            :meth:`Candidate.part`, the matrix of a side input, the scale and shift for a norm, fixed or moved.
        norms: put an identity batch norm behind fitted convolutions, so that they train as the original's do.
        own: give the student parameters of its own. Without it, what is not replaced is shared with the graph given.
    """

    weights: Mapping[str, Affine] = field(default_factory=dict)
    norms: bool = False
    own: bool = True
    operators: Operators = field(default_factory=default_operators, repr=False)
    exact: ClassVar[bool] = False

    def requires(self, graph: GraphModule) -> None:
        if origin(graph) is not None:
            raise PassError("this graph is a student already; linearize the original")

    def call(self, graph: GraphModule) -> GraphModule:
        student = copied(graph)
        set_origin(student, fingerprint(graph))
        for exit_node, merge in list(merges(student)):
            entry, nodes = stretch(student, exit_node, merge)
            work = _Merge(student, merge, entry, nodes, self.operators)
            work.put_activation_behind()
            if merge.kind == "composed":
                work.keep_layers(self.weights)
            elif merge.kind == "identity":
                work.check_activations()
                work.drop()
            else:
                work.check_activations()
                work.replace(self.weights, norm=self.norms)
        stay = self.weights.keys() & layers_of(graph).keys()
        adjust(student, {name: self.weights[name] for name in stay})
        tidy(student)
        return copy.deepcopy(student) if self.own else student


def linearize(
    graph: GraphModule,
    *,
    weights: Mapping[str, Affine] | None = None,
    norms: bool = False,
    operators: Operators | None = None,
) -> GraphModule:
    """The student of an annotated graph: trainable, with parameters of its own; the graph given stays as it is.

    Args:
        graph: from :func:`fxmerge.annotate`.
        weights: from :func:`fxmerge.fit`, by name of the merge or of a part of it; where there is none, torch's initialisation;
            by the name of its node, what a layer that stays is to compute.
        norms: put a batch norm, for now an identity, behind every fitted convolution.
        operators: what was known of operators when the plan was made; None for the default table.

    Raises:
        PassError: the graph is a student already.
    """
    return Linearize(weights or {}, norms, operators=operators or default_operators()).apply(graph)


def added_norms(student: GraphModule) -> dict[str, nn.Module]:
    """The batch norms that ``norms=True`` put behind fitted convolutions, where no norm was moved, by qualified name."""
    exits = (node.args[0] if turns(node) else node for node, merge in merges(student) if merge.kind == "fitted")
    calls = (str(node.target) for node in exits if isinstance(node, Node) and node.op == "call_module")
    modules = {target: student.get_submodule(target) for target in calls}
    return {target: module for target, module in modules.items() if isinstance(module, nn.modules.batchnorm._BatchNorm)}


@dataclass(frozen=True)
class _Merge:
    """One merge being made in the student's graph. Its exit keeps its name, whatever becomes of it."""

    graph: GraphModule
    merge: Candidate
    entry: Node
    nodes: Sequence[Node]
    operators: Operators

    @property
    def exit(self) -> Node:
        return self.nodes[-1]

    def check_activations(self) -> None:
        """All activations inside go, so the plan must name them all: else it was made for a shorter stretch."""
        verdicts = self._verdicts(self.nodes)
        known = {*self.merge.activations, *self.merge.norms}
        left = [n.name for n in self.nodes if isinstance(verdicts[n], (Activation, Norm)) and n.name not in known]
        if left:
            raise PlanMismatchError(f"the merge {self.merge.id} leaves {', '.join(left)} inside its segment", node=left[0])

    def put_activation_behind(self) -> None:
        """All that reads the exit reads, from now on, the activation that the merge puts behind it."""
        if not self.merge.added:
            return
        [node] = [node for node in self.nodes if node.name == self.merge.added]
        with self.graph.graph.inserting_after(self.exit):
            made = self.graph.graph.node_copy(node, lambda _: self.exit)
        made.meta = dict(node.meta)
        known = facts(self.exit)
        record(made, role="", merge=None, behind=self.exit.name)
        record(made, shape=known.shape, dtype=known.dtype, channels_last=known.channels_last)
        self.exit.replace_all_uses_with(made, delete_user_cb=lambda reader: reader is not made)

    def drop(self) -> None:
        """An identity in place of all nodes, or what turns the entry's layout into the exit's."""
        if facts(self.entry).channels_last != facts(self.exit).channels_last:
            become_turned(self.exit, self.entry)
        else:
            self._exit_becomes_identity(self.entry)
        erase(self.nodes[:-1])

    def _exit_becomes_identity(self, operand: Node) -> None:
        become_module(self.graph, self.exit, free_target(self.graph, f"merged.{self.exit.name}"), nn.Identity(), operand)

    def replace(self, parts: Mapping[str, Affine], *, norm: bool) -> None:
        """One convolution of the candidate's geometry in place of all nodes; behind it, where one is moved there, a norm."""
        geometry, weights = self.merge.geometry, parts.get(self.merge.id)
        if weights is not None and weights.geometry != geometry:
            raise PassError(f"the weights for {self.merge.id} are of geometry {weights.geometry}, not {geometry}")
        like = like_of(self.graph, self.entry, self.nodes)
        known = facts(self.exit)
        moved, sides = self.merge.moved, self.merge.sides
        # A norm and what is added want channels first.
        linear = not (norm or sides) and is_linear(geometry, facts(self.entry), known)
        made = (
            convolution(geometry, linear=linear, dtype=like.dtype, device=like.device)
            if weights is None
            else convolution_with(weights, linear=linear, like=like)
        )
        target = add_module(self.graph, f"merged.{self.exit.name}", made)
        terms = [self._put_side(name, parts.get(self.merge.part(name)), like) for name in sides]
        behind = ""
        if norm or moved:
            module = self._moved_norm(parts, like) if moved else _identity_norm(geometry, like)
            behind = add_module(self.graph, f"{target}_norm", module)
        with self.graph.graph.inserting_before(self.exit):
            nodes = write_map(
                self.entry, target, geometry, linear=linear, channels_last=known.channels_last, sides=terms, norm=behind
            )
        take_place(self.exit, nodes[-1])
        erase(self.nodes[:-1])

    def _put_side(self, name: str, matrix: Affine | None, like: Tensor) -> tuple[Node, str]:
        """A side input, and the 1x1 convolution that it goes through before it is added."""
        side = tensor_named(self.graph, name)
        assert side is not None
        known = facts(side).image_shape
        geometry = Geometry(known[1], self.merge.geometry.out_channels, (Axis(),) * (len(known) - 2))
        made = (
            convolution(geometry, bias=False, dtype=like.dtype, device=like.device)
            if matrix is None
            else convolution_with(matrix, bias=False, like=like)
        )
        return side, add_module(self.graph, f"merged.{self.exit.name}_{name}", made)

    def _moved_norm(self, parts: Mapping[str, Affine], like: Tensor) -> nn.Module:
        """A norm of the kind of the one that is moved, for the channels of the exit."""
        [node] = [node for node in self.nodes if node.name == self.merge.moved]
        try:
            made = norm_behind(self.graph, node, self.operators, self.merge.geometry.out_channels).to(like)
        except ValueError as fault:
            raise PlanMismatchError(f"the merge {self.merge.id} does not fit the graph: {fault}", node=node.name) from fault
        return _scaled(made, parts.get(self.merge.part(node.name)))

    def _fix_norms(self, parts: Mapping[str, Affine], kept: Sequence[Node]) -> None:
        """A scale and a shift of every channel in place of each norm."""
        for node in kept:
            if node.name in self.merge.fixed:
                known, like = facts(node), like_of(self.graph, self.entry, self.nodes)
                made = Scaling(known.image_shape[1], channels_last=known.channels_last, dtype=like.dtype, device=like.device)
                target = free_target(self.graph, f"merged.{node.name}_scaling")
                scaling = _scaled(made, parts.get(self.merge.part(node.name)))
                become_module(self.graph, node, target, scaling, cast(Node, node.args[0]))

    def keep_layers(self, parts: Mapping[str, Affine]) -> None:
        """Take out what is removed, fix the norms, then move all padding to the entry."""
        gone = set(self.merge.activations) | set(self.merge.removed)
        kept = [node for node in self.nodes if node.name not in gone]
        for node in self.nodes[:-1]:
            if node.name in gone:
                bypass(node, node.args[0])
        if self.exit.name in gone:
            operand = self.exit.args[0]
            assert isinstance(operand, Node)
            self._exit_becomes_identity(operand)
            kept.append(self.exit)
        self._fix_norms(parts, kept)
        verdicts = self._verdicts(kept)
        left = [node.name for node in kept if not isinstance(verdicts[node], (Map, Join))]
        if left:
            raise PlanMismatchError(f"the merge {self.merge.id} leaves {', '.join(left)} inside its segment", node=left[0])
        expression = read_expression(self.entry, kept, verdicts)
        if expression.geometry != self.merge.geometry:
            raise PlanMismatchError(f"the merge {self.merge.id} composes to {expression.geometry} here", node=self.exit.name)
        self._pad_first(expression, [self.entry, *kept])

    def _verdicts(self, nodes: Sequence[Node]) -> dict[Node, Verdict]:
        return {node: self.operators.verdict(Site(self.graph, node)) for node in nodes}

    def _pad_first(self, expression: Expression, nodes: Sequence[Node]) -> None:
        """``nodes[i]`` computes step i of the expression."""
        halos = expression.halos()
        padded = insert_pad(self.entry, nodes[1], in_pad_order(halos[0])) if _any(halos[0]) else self.entry
        for node, step, halo in zip(nodes[1:], expression.steps[1:], halos[1:], strict=True):
            asked = asked_of_operand(step, halo)
            for index in sorted(set(step.operands)):
                if index == 0 and not _any(asked):
                    continue
                source = padded if index == 0 else nodes[index]
                surplus = tuple((a - c, b - d) for (a, b), (c, d) in zip(asked, halos[index], strict=True))
                if _any(surplus):
                    source = insert_pad(source, node, in_pad_order(surplus))
                node.replace_input_with(nodes[index], source)
            if step.kind == "apply":
                operator = self.operators.find(self.graph, node)
                assert operator is not None
                operator.unpad(Site(self.graph, node))
            batch, channels, *space = facts(node).image_shape
            grown = (size + before + after for size, (before, after) in zip(space, halo, strict=True))
            record(node, shape=facts(node).shape_of((batch, channels, *grown)))
            surplus = surplus_of(step, halo)
            if _any(surplus):
                _become_crop(node, surplus)


def _scaled(module: nn.Module, scaling: Affine | None) -> nn.Module:
    """The module, which scales and shifts channels, with these numbers."""
    if scaling is not None:
        module.weight.data.copy_(scaling.weight.flatten())  # type: ignore[operator]
        module.bias.data.copy_(scaling.bias)  # type: ignore[operator]
    return module


def _identity_norm(geometry: Geometry, like: Tensor) -> nn.Module:
    """A batch norm that is an identity until it is calibrated or trained."""
    norm: nn.Module = _NORMS[len(geometry.axes)](geometry.out_channels, device=like.device, dtype=like.dtype)
    norm.weight.data.fill_((1 + norm.eps) ** 0.5)  # type: ignore[operator]  # cancels eps
    return norm


_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _become_crop(node: Node, surplus: Halo) -> None:
    """The node becomes the crop of what it computed, which a new node before it computes now."""
    with node.graph.inserting_before(node):
        whole = node.graph.node_copy(node)
    shape = facts(node).shape or ()
    whole.meta = dict(node.meta)
    grown = (size + before + after for size, (before, after) in zip(shape[2:], surplus, strict=True))
    record(whole, merge=None, shape=(*shape[:2], *grown))
    take_place(node, insert_pad(whole, node, tuple(-amount for amount in in_pad_order(surplus))))


def _any(halo: Halo) -> bool:
    return any(amount for pair in halo for amount in pair)
