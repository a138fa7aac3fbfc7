"""One small student for the tests of this room, without searching: a block of two convolutions fitted into one, one composed."""

from __future__ import annotations

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


@cache
def made() -> Made:
    """The first residual block as one fitted 3x3, the second as the composed 5x5; the third stays."""
    original = network(blocks=3)
    graph = fxmerge.trace(original, images(4))
    findings = fxmerge.find_segments(graph)
    candidates = [c for p in fxmerge.propose(findings) for c in p.candidates]
    blocks = [(unit.end, chain.cuts[i]) for chain in findings.region.children for i, unit in enumerate(chain.units) if unit.children]
    fitted = next(c for c in candidates if (c.end, c.entry) == blocks[0] and c.kind == "fitted" and c.geometry.kernel == (3, 3))
    composed = next(c for c in candidates if (c.end, c.entry) == blocks[1] and c.kind == "composed" and not c.removed)
    plan = fxmerge.Plan(findings.fingerprint, (fitted, composed))
    weights = fxmerge.fit(findings, plan, images(64))
    annotated = fxmerge.annotate(graph, plan)
    return Made(
        original, graph, plan, fxmerge.linearize(annotated, weights=weights), fxmerge.linearize(annotated, weights=weights, norms=True)
    )


def disturbed(student: GraphModule, amount: float = 1.2) -> GraphModule:
    """A copy whose weights are too large, so that there is something to gain."""
    import copy

    twin = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(amount)
    return twin
