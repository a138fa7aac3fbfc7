"""A scorer that looks at nothing, for benchmarks that are run in small."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import fxmerge


class MadeUp:
    """Losses from the number of activations removed."""

    settings = "made up"

    def tasks(
        self, findings: fxmerge.Findings, proposals: Sequence[fxmerge.Proposal], at_least: int
    ) -> Sequence[Sequence[fxmerge.Proposal]]:
        return [proposals]

    def prepare(
        self, findings: fxmerge.Findings, batches: object
    ) -> Callable[[Sequence[fxmerge.Proposal]], dict[str, fxmerge.Importance]]:
        return lambda proposals: {
            c.id: fxmerge.Importance(float(len(c.activations)), 1, "made up") for p in proposals for c in p.candidates
        }
