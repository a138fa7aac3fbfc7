"""A scorer that looks at no data: losses are counted, not measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import fxmerge


def removed_activations(segment: fxmerge.Segment, candidate: fxmerge.Candidate) -> float:
    """One for each."""
    return float(len(candidate.activations))


@dataclass(frozen=True)
class MadeUp:
    """Losses from what candidates are.

    Args:
        settings: what the losses are kept under.
        counted: of a segment and a candidate, the loss.
    """

    settings: str = "made up"
    counted: Callable[[fxmerge.Segment, fxmerge.Candidate], float] = removed_activations

    def tasks(
        self, findings: fxmerge.Findings, proposals: Sequence[fxmerge.Proposal], at_least: int
    ) -> Sequence[Sequence[fxmerge.Proposal]]:
        return [proposals]

    def prepare(
        self, findings: fxmerge.Findings, batches: object
    ) -> Callable[[Sequence[fxmerge.Proposal]], dict[str, fxmerge.Importance]]:
        return lambda proposals: {
            c.id: fxmerge.Importance(self.counted(p.segment, c), 1, "made up") for p in proposals for c in p.candidates
        }
