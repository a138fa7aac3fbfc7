"""Plans written as LayerMerge writes them: where activations stay and which convolutions go, by number in the order they run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeAlias

from torch import nn

import fxmerge
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate, Segment, narrowed

#: Whether a candidate of a segment is what becomes of it where these of its convolutions are pruned.
Fits: TypeAlias = "Callable[[Segment, Candidate, Collection[str]], bool]"


def convolutions(findings: fxmerge.Findings, *, but: Callable[[str], bool] = lambda path: False) -> tuple[str, ...]:
    """Names of the convolutions in the order they run.

    Args:
        but: of a layer's path in the model, whether it has no number; shortcuts, say.
    """
    calls = [node for node in findings.graph.graph.nodes if node.op == "call_module"]
    layers = [(node.name, str(node.target), findings.graph.get_submodule(str(node.target))) for node in calls]
    return tuple(name for name, path, layer in layers if isinstance(layer, nn.Conv2d) and not but(path))


def groups(count: int, ends: Collection[int]) -> Iterator[tuple[int, ...]]:
    """Numbers of the convolutions that lie between two kept activations, the last convolution being an end as well.

    >>> list(groups(4, (0, 2)))
    [(0,), (1, 2), (3,)]
    """
    for before, end in itertools.pairwise((-1, *(end for end in ends if end < count - 1), count - 1)):
        yield tuple(range(before + 1, end + 1))


def multiplied_out(segment: Segment, candidate: Candidate, gone: Collection[str]) -> bool:
    """What remains is one convolution of the weights that there are; what stands for norms is fitted."""
    return candidate.kind == "composed" and set(candidate.removed) & set(segment.convolutions) == set(gone)


def norm_behind(segment: Segment, candidate: Candidate, gone: Collection[str]) -> bool:
    """The last norm inside stands behind one convolution of the size of what remains, whose weights are fitted."""
    left = [step.geometry for step in segment.expression.convolutions if step.name not in gone and step.geometry is not None]
    taps = tuple(1 + sum(kernel - 1 for kernel in axis) for axis in zip(*(geometry.kernel for geometry in left), strict=True))
    return candidate.kind == "fitted" and bool(candidate.moved) and candidate.geometry.kernel == taps


def expressed(
    findings: fxmerge.Findings,
    names: Sequence[str],
    kept: Collection[int],
    pruned: Collection[int],
    *,
    fits: Fits = multiplied_out,
    space: fxmerge.Space | None = None,
    first: int = 0,
) -> tuple[Plan, tuple[str, ...]]:
    """A plan, and what of it cannot be merged here.

    Args:
        findings: segments of the network.
        names: the convolutions that have a number, in the order they run.
        kept: numbers of convolutions that an activation is kept behind: a merge ends there.
        pruned: numbers of those that go.
        fits: which candidates stand for a run of several; of those the one of the longest stretch is taken.
        space: which candidates are offered; if with activations behind them, such a one is taken where there is one.
        first: the number of the first convolution.
    """
    proposals = fxmerge.propose(findings, space)
    merges, refused = [], []
    ends, away = sorted(number - first for number in kept), {number - first for number in pruned}
    for group in groups(len(names), ends):
        wanted = tuple(names[i] for i in group)
        gone = {names[i] for i in group if i in away}
        if len(group) == 1 and not gone:
            continue
        fitting = [
            (len(proposal.segment.nodes), candidate)
            for proposal in proposals
            if _covers(proposal.segment, wanted)
            for candidate in proposal.candidates
            if (candidate.kind == "identity" if len(gone) == len(wanted) else fits(proposal.segment, candidate, gone))
        ]
        if fitting:
            # the longest takes the skip in
            merges.append(max(fitting, key=lambda entry: (entry[0], bool(entry[1].added)))[1])
        else:
            numbers = f"{group[0] + first} to {group[-1] + first}"
            refused.append(f"no candidate merges convolutions {numbers} without {sorted(gone) or 'pruning'}")
    return Plan(findings.fingerprint, tuple(merges)), tuple(refused)


def _covers(segment: Segment, wanted: tuple[str, ...]) -> bool:
    """Whether a segment holds these convolutions, and no activation or norm but those between them."""
    between = len(wanted) - 1
    return segment.convolutions == wanted and len(segment.activations) <= between and len(segment.norms) <= between


def loss_of(
    findings: fxmerge.Findings,
    plan: Plan,
    calibration: object,
    *,
    space: fxmerge.Space | None = None,
    scorer: fxmerge.Scorer | None = None,
    store: fxmerge.Store | None = None,
) -> float:
    """Predicted loss of a plan, each of its merges scored on all that there is."""
    taken = {merge.id for merge in plan.merges}
    proposals = narrowed(fxmerge.propose(findings, space), lambda candidate: candidate.id in taken)
    scores = fxmerge.measure_importance(findings, proposals, calibration, scorer=scorer, store=store)
    return sum(scores.loss(name) for name in taken)


def fastest_within(front: fxmerge.ParetoFront, loss: float) -> Plan:
    """The fastest plan of a front that loses no more than this."""
    return next(front.plan(index) for index in range(len(front)) if front.losses[index] <= loss)
