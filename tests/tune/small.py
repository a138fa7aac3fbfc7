"""One small student for the tests of this room, without searching: a block of two convolutions fitted into one, one composed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.fx import GraphModule

import fxmerge
from tests.small import images, network


@dataclass(frozen=True, eq=False)
class Made:
    """A trained network, its graph, a plan, and the students of it."""

    network: nn.Sequential
    graph: GraphModule
    plan: fxmerge.Plan
    fitted: GraphModule
    with_norms: GraphModule
    composed_plan: fxmerge.Plan
    composed: GraphModule


@cache
def made() -> Made:
    """The first residual block as one fitted 3x3, the second as the composed 5x5; the third stays. And both blocks composed."""
    original = network(blocks=3)
    graph = fxmerge.trace(original, images(4))
    findings = fxmerge.find_segments(graph)
    candidates = [c for p in fxmerge.propose(findings) for c in p.candidates]
    blocks = [
        (unit.end, chain.cuts[i]) for chain in findings.region.children for i, unit in enumerate(chain.units) if unit.children
    ]
    fitted, composed = _of(candidates, blocks[0], "fitted"), _of(candidates, blocks[1], "composed")
    plan = fxmerge.Plan(findings.fingerprint, (fitted, composed))
    weights = fxmerge.fit(findings, plan, images(64))
    annotated = fxmerge.annotate(graph, plan)
    one, two = (_of(candidates, block, "composed") for block in blocks[:2])
    published = fxmerge.Plan(findings.fingerprint, (one, two))
    return Made(
        original,
        graph,
        plan,
        fxmerge.linearize(annotated, weights=weights),
        fxmerge.linearize(annotated, weights=weights, norms=True),
        published,
        fxmerge.linearize(fxmerge.annotate(graph, published)),
    )


def _of(candidates: list[fxmerge.Candidate], block: tuple[str, str], kind: str) -> fxmerge.Candidate:
    """The candidate for a whole block that keeps what can be kept; of fitted ones the 3x3."""
    return next(
        c
        for c in candidates
        if (c.end, c.entry) == block and c.kind == kind and not c.removed and (kind == "composed" or c.geometry.kernel == (3, 3))
    )


def disturbed(student: GraphModule, amount: float = 1.2) -> GraphModule:
    """A copy whose weights are too large, so that there is something to gain."""
    twin = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(amount)
    return twin
