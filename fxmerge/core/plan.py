"""Plans, and the front of plans that no other plan beats."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxmerge.core.geometry import whole
from fxmerge.core.segment import Candidate
from fxmerge.errors import BudgetError, PlanError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """A set of merges that do not overlap, in graph order. The plan, not the annotated graph, is what lasts.

    Args:
        fingerprint: of the graph it was made for; linearizing and training leave it valid.
        merges: the candidates taken.
        latency_ns: predicted end-to-end latency, nanoseconds; None where nothing was measured.
        loss: predicted loss, the sum over the merges.
    """

    fingerprint: str
    merges: tuple[Candidate, ...] = ()
    latency_ns: int | None = None
    loss: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether every merge keeps the function of the original."""
        return all(merge.exact for merge in self.merges)

    def to_json(self) -> dict[str, Any]:
        """A value that ``json`` can write and :meth:`from_json` reads back."""
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "latency_ns": self.latency_ns,
            "loss": self.loss,
            "merges": [merge.to_json() for merge in self.merges],
        }

    @classmethod
    def from_json(cls, data: object) -> Plan:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: it is not such a value, or of another format.
        """
        if not isinstance(data, Mapping):
            raise PlanError(f"not a plan: expected an object, found {type(data).__name__}")
        if data.get("format") != FORMAT:
            raise PlanError(f"not a plan of format {FORMAT}: its format is {data.get('format')!r}")
        try:
            latency = None if data["latency_ns"] is None else whole(data["latency_ns"])
            if not isinstance(data["fingerprint"], str):
                raise ValueError("the fingerprint is no string")
            merges = tuple(Candidate.from_json(merge) for merge in data["merges"])
            return cls(data["fingerprint"], merges, latency, float(data["loss"]))
        except (KeyError, TypeError, ValueError) as fault:
            if isinstance(fault, PlanError):
                raise
            raise PlanError(f"not a plan: {fault!r}") from fault

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        target = Path(path)
        scratch = target.with_name(target.name + ".part")
        scratch.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        scratch.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan written by :meth:`save`.

        Raises:
            PlanError: the file is damaged, or no plan.
            OSError: it cannot be read.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as fault:
            raise PlanError(f"{path} is damaged: it is not JSON ({fault}). Make the plan again.") from fault
        except PlanError as fault:
            raise PlanError(f"{path} cannot be used: {fault}. Make the plan again.") from fault


@dataclass(frozen=True, slots=True)
class ParetoFront:
    """Every (latency, loss) that no other plan beats, by rising latency and falling loss, and the plan behind each.

    Args:
        fingerprint: of the graph the plans are for.
        latencies_ns: end-to-end latencies, nanoseconds, strictly rising.
        losses: strictly falling.
        candidates: all candidates that were offered.
        original_ns: latency of the folded original; the reference of speed-ups.
        choose: index of a point -> indices into ``candidates``, by back pointers.
        slack: how much lower the loss of a left-out point may be; 0 for an exact front.
    """

    fingerprint: str
    latencies_ns: Sequence[int]
    losses: Sequence[float]
    candidates: tuple[Candidate, ...]
    original_ns: int
    choose: Callable[[int], Sequence[int]] = field(repr=False)
    slack: float = 0.0

    def __len__(self) -> int:
        return len(self.latencies_ns)

    @property
    def fastest_ns(self) -> int:
        return self.latencies_ns[0]

    def plan(self, index: int) -> Plan:
        """The plan at one point of the front."""
        merges = tuple(self.candidates[i] for i in self.choose(index))
        return Plan(self.fingerprint, merges, self.latencies_ns[index], self.losses[index])

    def pick(self, budget_ns: int) -> Plan:
        """The plan of least loss that is not over the budget.

        Raises:
            BudgetError: even the fastest plan is over; it names the fastest.
        """
        return self.plan(self.index(budget_ns))

    def index(self, budget_ns: int) -> int:
        """The point that :meth:`pick` takes."""
        fitting = [i for i, latency in enumerate(self.latencies_ns) if latency <= budget_ns]
        if not fitting:
            asked, fastest = (self.original_ns / max(1, ns) for ns in (budget_ns, self.fastest_ns))
            raise BudgetError(
                f"no plan runs in {budget_ns / 1e6:.3f} ms ({asked:.2f}x); the fastest there is takes "
                f"{self.fastest_ns / 1e6:.3f} ms ({fastest:.2f}x). Ask for that or less, or offer more candidates.",
                asked_ns=budget_ns,
                fastest_ns=self.fastest_ns,
            )
        return fitting[-1]
