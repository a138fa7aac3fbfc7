"""What a candidate computes in place of its stretch, on the values of a network that runs as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxmerge.algebra.affine import Affine, evaluate, evaluate_sides
from fxmerge.algebra.module import convolved
from fxmerge.analysis.segments import Findings
from fxmerge.core.expression import Expression
from fxmerge.core.segment import Candidate, Segment
from fxmerge.errors import InputError
from fxmerge.graph.layout import to_first, to_last
from fxmerge.graph.meta import facts
from fxmerge.graph.query import data_operands, node_named
from fxmerge.measure.calibration import Batch, accepted, images_in, in_parts, picked, shared_out
from fxmerge.measure.channel_sums import ChannelSums
from fxmerge.measure.replay import Replacement, Replay
from fxmerge.operators import norm_behind, read_maps
from fxmerge.passes.fold_batchnorm import FoldBatchNorm


class Limits(Protocol):
    """What bounds the memory, and how images count; see :class:`fxmerge.Reconstruction`."""

    @property
    def memory_bytes(self) -> int: ...

    @property
    def shares(self) -> Callable[[Batch], Tensor] | None: ...


@dataclass
class Substitution:
    """A network, its folded form, and calibration data.

    Args:
        options: of the scorer: what bounds the memory, how images count.
        findings: of the traced graph.
        batches: calibration data, without the images that count for nothing; cut so that all tensors of a batch fit into the
            memory limit.
    """

    options: Limits
    findings: Findings
    batches: Sequence[Batch]
    folded: GraphModule = field(init=False)
    replay: Replay = field(init=False)
    fixed: dict[str, Affine] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        entries = frozenset(segment.entry for segment in self.findings.segments)
        self.folded = FoldBatchNorm(self.findings.operators, entries).apply(self.findings.graph)
        self.replay = Replay(self.folded)
        self.batches = counting(self.options.shares, self.batches, self.folded)
        if self.batches:
            self.batches = in_parts(self.batches, self.folded, self.images_at_once())
        empty = torch.empty(0)
        self.like: Tensor = next((p for p in self.folded.parameters() if p.is_floating_point()), empty)

    def images_at_once(self) -> int:
        """So many that all tensors of a batch fit into the memory limit."""
        known = [facts(node) for node in self.folded.graph.nodes if facts(node).shape]
        batch = max((known_of.shape[0] for known_of in known if known_of.shape and len(known_of.shape) > 2), default=1)
        one = sum(math.prod(k.shape or ()) * (k.dtype.itemsize if k.dtype else 4) for k in known) // max(1, batch)
        return max(1, self.options.memory_bytes // max(1, 4 * one))

    def original(self, batch: Batch, *, last: str | None = None) -> dict[Node, Any]:
        """The values of the original network, up to a node or all."""
        with accepted(batch):
            return self.replay.values(batch, last=last)

    def shares(self, batch: Batch) -> Tensor | None:
        """How much each image of a batch counts; None where all count alike."""
        return None if self.options.shares is None else _checked_shares(self.options.shares, batch)

    def image(self, name: str, values: Mapping[Node, Any]) -> Tensor:
        """The value of a node with channels first, whatever its layout."""
        return _turned_if(self._is_last(name), values[self.replay.named[name]], to_first)

    def _is_last(self, name: str) -> bool:
        return facts(self.replay.named[name]).channels_last

    def composed(self, segment: Segment, candidate: Candidate) -> Affine:
        """The map that the segment's remaining layers compose to; the identity, where none is left."""
        if candidate.kind == "identity":
            return Affine.identity(candidate.geometry.in_channels, len(candidate.geometry.axes))
        expression = segment.expression.without(candidate.removed)
        return evaluate(expression, self._maps(expression, candidate))

    def _maps(self, expression: Expression, candidate: Candidate) -> dict[str, Affine]:
        graph = self.findings.graph
        nodes = [node for step in expression.steps[1:] if (node := node_named(graph, step.name)) is not None]
        self.fix_norms(candidate.fixed)
        fixed = {name: self.fixed[name] for name in candidate.fixed}
        return {**read_maps(graph, nodes, self.findings.verdicts, self.findings.operators), **fixed}

    def fix_norms(self, names: Sequence[str]) -> None:
        """Find the scale and shift that stand for each of these norms, as the original runs on the data."""
        sums = {name: ChannelSums() for name in names if name not in self.fixed}
        for batch in self.batches if sums else ():
            with torch.inference_mode():
                values = self.original(batch)
                for name, total in sums.items():
                    operand = data_operands(self.replay.named[name])[0].name
                    x = self.image(operand, values)
                    total.add(x, self.image(name, values), shared_out(self.shares(batch), x, len(x)))
        self.fixed.update({name: total.solve() for name, total in sums.items()})

    def replacement(self, segment: Segment, candidate: Candidate, maps: Mapping[str, Affine]) -> Replacement:
        """What the candidate computes from its entry and its side inputs, in the network's own dtype and layouts.

        Args:
            segment: that it is of.
            candidate: whose numbers ``maps`` holds if it is fitted; if it is composed, they are worked out.
            maps: as :meth:`weights` gives them.
        """
        names, compute = self._on_images(candidate, maps, segment)
        before, after = self._is_last(candidate.entry), self._is_last(candidate.exit)

        def replaced(x: Tensor, *sides: Tensor) -> Tensor:
            return _turned_if(after, compute(_turned_if(before, x, to_first), *sides), to_last)

        return names, replaced if before or after else compute

    def _on_images(self, candidate: Candidate, maps: Mapping[str, Affine], segment: Segment | None = None) -> Replacement:
        """The same, channels first; of a composed candidate, its segment must be known."""
        if candidate.kind == "identity":
            return (candidate.entry,), lambda x: x
        matrices = {name: maps[candidate.part(name)].weight.flatten(1) for name in candidate.sides}
        if segment is not None and candidate.kind == "composed":
            expression = segment.expression.without(candidate.removed)
            matrices = evaluate_sides(expression, self._maps(expression, candidate)) if expression.sides else {}
        affine = maps.get(candidate.id)
        if affine is None:
            assert segment is not None
            affine = self.composed(segment, candidate)
        convolve, behind = partial(convolved, affine), self._norm_behind(candidate, maps)
        if candidate.added:
            behind = self.applied(candidate.added)  # no norm is moved there then

        def with_all(x: Tensor, *sides: Tensor) -> Tensor:
            terms = zip(matrices.values(), sides, strict=True)
            return behind(sum((torch.einsum("oi,ni...->no...", matrix.to(s), s) for matrix, s in terms), start=convolve(x)))

        return (candidate.entry, *matrices), with_all if matrices or candidate.moved or candidate.added else convolve

    def applied(self, name: str) -> Callable[[Tensor], Tensor]:
        """The activation of this name, as a function."""
        node = self.replay.named[name]
        operand = node.all_input_nodes[0]

        def activation(value: Tensor) -> Tensor:
            result: Tensor = self.replay.run(node, {operand: value})
            return result

        return activation

    def _norm_behind(self, candidate: Candidate, maps: Mapping[str, Affine]) -> Callable[[Tensor], Tensor]:
        """The norm that is moved behind the convolution, its scale and shift too, where they are known."""
        if not candidate.moved:
            return lambda x: x
        node = self.replay.named[candidate.moved]
        norm = norm_behind(self.folded, node, self.findings.operators, candidate.geometry.out_channels).to(self.like)
        scaling = maps.get(candidate.part(candidate.moved))
        return norm if scaling is None else lambda x: convolved(scaling, norm(x))


def counting(shares: Callable[[Batch], Tensor] | None, batches: Sequence[Batch], graph: GraphModule) -> tuple[Batch, ...]:
    """The images that count for something; all, where no shares are given.

    Raises:
        InputError: none does.
    """
    if shares is None or not batches:
        return tuple(batches)
    found = []
    for batch in batches:
        index = _checked_shares(shares, batch).nonzero().flatten()
        if len(index):
            found.append(batch if len(index) == images_in(batch) else picked(batch, graph, index))
    if not found:
        raise InputError(f"none of the {sum(map(images_in, batches))} calibration images counts: shares gave 0 for all")
    return tuple(found)


def _checked_shares(shares: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    found = shares(batch)
    sound = isinstance(found, Tensor) and found.shape == (images_in(batch),)
    if not sound or not bool((found >= 0).all() & found.isfinite().all()):
        raise InputError(f"shares must give a number from 0 on for each of {images_in(batch)} images, gave {found!r:.200}")
    return found


def _turned_if(turned: bool, value: Tensor, dims: Callable[[int], tuple[int, ...]]) -> Tensor:
    return value.permute(dims(value.dim())) if turned else value
