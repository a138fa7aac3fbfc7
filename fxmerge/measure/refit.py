r"""Weights for a whole plan, in one walk over the network from the input on, original and student side by side.

At every merge and, behind the first merge, at every layer that stays: the student's own values go in, the original's are wanted, so
that errors do not add up. A layer that stays starts from the weights it has,

    min over W, b of   sum over positions of |W patch + b + s - y|^2  +  lambda |W - W0|^2

where, if its output is added to other tensors, y is the original's sum and s the student's other operands: so a residual branch
makes up for what its skip carries. lambda is the one, of a few, that does best on images held out; where none beats the weights
that the layer has, they stay.

Every node runs once for the original and once for the student; the values that a later node needs lie on a :class:`Shelf`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxmerge.algebra.affine import Affine
from fxmerge.algebra.least_squares import NormalEquations, unknowns
from fxmerge.algebra.module import convolved
from fxmerge.analysis.segments import Findings
from fxmerge.core.geometry import Geometry
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate, Segment
from fxmerge.errors import InputError
from fxmerge.graph.query import has_sole_user, module_of
from fxmerge.measure.calibration import Batch, accepted, images_in, in_parts, shared_out
from fxmerge.measure.replay import Replacement, Replay
from fxmerge.measure.shelf import Shelf, Values
from fxmerge.operators import Join, Map, Site
from fxmerge.passes.adjust import layers_of

#: The lambdas tried for layers that stay, relative to the mean of the Gram matrix's diagonal.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
#: Of so many batches, one is held out; there are at least so many, if there are images enough.
_HELD_OUT = 5
#: A layer keeps its weights where there are fewer positions than this for each unknown.
_LEAST_ROWS = 2
#: The name of the only target in a layer's equations.
_TARGET = ""


class Pair(NamedTuple):
    """One batch as both networks see it.

    Args:
        original, student: values by node.
        shares: (N,), how much each image counts; None for all alike.
    """

    original: Any
    student: Any
    shares: Tensor | None


class Fits(Protocol):
    """What the walk asks of the closed-form scorer."""

    findings: Findings
    folded: GraphModule
    replay: Replay
    batches: Sequence[Batch]

    def refit(self, merge: Candidate, pairs: Sequence[Pair]) -> dict[str, Affine]: ...

    def shares(self, batch: Batch) -> Tensor | None: ...

    def replacement(self, segment: Segment, candidate: Candidate, maps: Mapping[str, Affine]) -> Replacement: ...

    def positions(self, geometry: Geometry, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor | None: ...


@dataclass
class Walk:
    """One walk.

    Args:
        work: fits single merges.
        plan: what is merged.
        segments: of the plan's merges, by their ids.
        stay: whether layers that stay are fitted too, or the names of those that are.
        seed: of the sampling of positions.
        progress: called with (done, total) merges.
    """

    work: Fits
    plan: Plan
    segments: Mapping[str, Segment]
    stay: bool | Collection[str]
    seed: int
    progress: Callable[[int, int], None] | None = None
    weights: dict[str, Affine] = field(init=False, default_factory=dict)
    changed: set[Node] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        replay = self.work.replay
        images = sum(map(images_in, self.work.batches))
        self.batches = in_parts(self.work.batches, self.work.folded, max(1, images // _HELD_OUT))
        self.merges = {merge.exit: merge for merge in self.plan.merges}
        reads = {merge.exit: ((merge.entry, *self._sides(merge)), _unused) for merge in self.plan.merges}
        self.needed = replay.needed(None, reads)
        self.layers = layers_to_fit(self.work.findings.graph, self.stay)
        self.last: dict[Node, int] = {}
        for index, node in enumerate(replay.nodes):
            for operand in (*node.all_input_nodes, *(replay.named[name] for name in reads.get(node.name, ((), None))[0])):
                self.last[operand] = index

    def _sides(self, merge: Candidate) -> tuple[str, ...]:
        return (*merge.sides, *self.segments[merge.id].expression.sides)

    def run(self, shelf: Shelf) -> dict[str, Affine]:
        """Weights of the merges and their parts by name, and of the layers that stay by the name of their node."""
        work = self.work
        self.original = [Values(shelf) for _ in self.batches]
        self.student = [Values(shelf) for _ in self.batches]
        self.inputs = [iter(batch) for batch in self.batches]
        #: Every batch as both see it; what does not differ is held once.
        self.pairs = [
            Pair(original, _Over(student, original), work.shares(batch))
            for original, student, batch in zip(self.original, self.student, self.batches, strict=True)
        ]
        done = 0
        for index, node in enumerate(work.replay.nodes):
            if node is work.replay.output:
                break
            with torch.inference_mode():
                self._compute_original(node)
            if node.name in self.merges:
                self._merge(node, self.merges[node.name])
                done += 1
                if self.progress is not None:
                    self.progress(done, len(self.merges))
                if done == len(self.merges) and not self.stay:
                    break
            elif node in self.needed and self.changed.intersection(node.all_input_nodes):
                self._stay(node)
            self._drop(index)
        return self.weights

    def _compute_original(self, node: Node) -> None:
        for batch, inputs, values in zip(self.batches, self.inputs, self.original, strict=True):
            if node.op == "placeholder":
                values[node] = next(inputs, node.args[0] if node.args else None)
            else:
                with accepted(batch):
                    values[node] = self.work.replay.run(node, values)

    def _drop(self, index: int) -> None:
        for values in (*self.original, *self.student):
            for node in [node for node in values if self.last.get(node, -1) <= index]:
                values.drop(node)

    def _merge(self, node: Node, merge: Candidate) -> None:
        before = self.changed.intersection(self.work.replay.named[name] for name in (merge.entry, *self._sides(merge)))
        if merge.exact and not before:
            return
        self.weights.update(self.work.refit(merge, self.pairs))
        replacement = self.work.replacement(self.segments[merge.id], merge, self.weights)
        self.changed.add(node)
        with torch.inference_mode():
            for (_, student, _), values in zip(self.pairs, self.student, strict=True):
                values[node] = self.work.replay.computed(replacement, student)

    def _stay(self, node: Node) -> None:
        """A node that is computed from changed values; its weights, if it has any, are fitted to them."""
        self.changed.add(node)
        affine = self._fitted(node) if node.name in self.layers else None
        if affine is not None:
            self.weights[node.name] = affine
        with torch.inference_mode():
            for (_, student, _), values in zip(self.pairs, self.student, strict=True):
                values[node] = (
                    self.work.replay.run(node, student) if affine is None else with_weights(affine, student[node.args[0]])
                )

    def _fitted(self, node: Node) -> Affine | None:
        """Weights for a layer that stays, if others than its own are better on the images held out."""
        prior = self._own(node)
        if prior is None:
            return None
        learn, judge = (NormalEquations.empty(prior.geometry, prior.weight.device) for _ in range(2))
        generator = torch.Generator().manual_seed(self.seed)
        added = self._added_to(node)
        operand = node.args[0]
        assert isinstance(operand, Node)
        with torch.inference_mode():
            for number, (original, student, shares) in enumerate(self.pairs):
                x, y = _rows(prior.geometry, student[operand]), _rows(prior.geometry, self._wanted(node, added, original, student))
                positions = self.work.positions(prior.geometry, x, y, generator)
                equations = judge if number % _HELD_OUT == _HELD_OUT - 1 else learn
                equations.add(x, {_TARGET: y}, positions, shares=shared_out(shares, student[operand], len(x)))
        if not judge.rows or learn.rows < _LEAST_ROWS * unknowns(prior.geometry):
            return None
        return _better(learn, judge, prior)

    def _own(self, node: Node) -> Affine | None:
        """The weights that a layer has in the folded network; None where it is no plain convolution or linear layer there."""
        module: Any = module_of(self.work.folded, node)
        if type(module) is nn.Linear:
            geometry = Geometry(module.in_features, module.out_features, (), bias=True)
            return Affine.of(geometry, module.weight, module.bias)
        operators = self.work.findings.operators
        site = Site(self.work.folded, node)
        verdict, operator = operators.verdict(site), operators.find(self.work.folded, node)
        if operator is None or not isinstance(verdict, Map) or verdict.role != "convolution":
            return None
        affine = operator.affine(site)
        return replace(affine, geometry=replace(affine.geometry, bias=True))

    def _added_to(self, node: Node) -> Node | None:
        """The sum that a layer's output goes into and nowhere else, where the student's other operands are known."""
        if not has_sole_user(node):
            return None
        reader = next(iter(node.users))
        verdict = self.work.findings.operators.verdict(Site(self.work.folded, reader))
        if not isinstance(verdict, Join) or verdict.kind != "sum" or verdict.operands.count(node) != 1:
            return None
        known = all(operand in self.original[0] for operand in verdict.operands)
        return reader if known and reader.name not in self.merges and reader in self.needed else None

    def _wanted(self, node: Node, added: Node | None, original: Values, student: _Over) -> Tensor:
        if added is None:
            value: Tensor = original[node]
            return value
        others = [operand for operand in added.all_input_nodes if operand is not node]
        wanted: Tensor = original[node]
        for other in others:
            if other in self.changed:
                wanted = wanted + (original[other] - student[other])
        return wanted


def layers_to_fit(graph: GraphModule, stay: bool | Collection[str]) -> Collection[str]:
    """The names of the layers that may get other weights; of a convolution with a norm behind it, the norm's.

    Raises:
        InputError: a name is of no such layer.
    """
    layers = layers_of(graph)
    behind = {layer.node.name: name for name, layer in layers.items() if layer.norm is not None}
    there = layers.keys() - behind.keys()
    if isinstance(stay, bool):
        return there if stay else ()
    for name in stay:
        if name not in there:
            advice = f"give {behind[name]!r}, the norm behind it" if name in behind else "give names of nodes, True or False"
            raise InputError(f"stay names {name!r}, which is no layer of this graph that can be fitted: {advice}")
    return stay


def _unused(*_: Tensor) -> Tensor:
    raise AssertionError("only what it reads is asked for")


@dataclass(frozen=True)
class _Over:
    """The student's values; the original's, where they do not differ."""

    student: Values
    original: Values

    def __getitem__(self, node: Node) -> Any:
        return self.student[node] if node in self.student else self.original[node]


def _rows(geometry: Geometry, value: Tensor) -> Tensor:
    """Of a linear layer, every position an image."""
    return value if geometry.axes else value.reshape(-1, value.shape[-1])


def _better(learn: NormalEquations, judge: NormalEquations, prior: Affine) -> Affine | None:
    """The best lambda's weights, from all rows; None where the prior is better on the rows held out."""
    found = [(judge.error(_TARGET, prior), 0.0)]
    for ridge in RIDGES:
        error = judge.error(_TARGET, learn.solve(_TARGET, prior.geometry, ridge=ridge, prior=prior))
        if not math.isnan(error):
            found.append((error, ridge))
    _, ridge = min(found)
    return learn.plus(judge).solve(_TARGET, prior.geometry, ridge=ridge, prior=prior) if ridge else None


def with_weights(affine: Affine, x: Tensor) -> Tensor:
    """What a layer with these weights makes of its operand."""
    return convolved(affine, x) if affine.geometry.axes else F.linear(x, affine.weight.to(x), affine.bias.to(x))
