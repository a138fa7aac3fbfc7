"""Plans, and the front of plans that no other plan beats."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from typing import Any

from fxmerge.core.files import read_json, write_json
from fxmerge.core.geometry import whole
from fxmerge.core.segment import Candidate
from fxmerge.errors import BudgetError, InputError, PlanError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """A set of merges that do not overlap, in graph order. The plan, not the annotated graph, is what lasts.

    Args:
        fingerprint: of the graph it was made for; linearizing and training leave it valid.
        merges: the candidates taken.
        latency_ns: predicted end-to-end latency, nanoseconds; None where nothing was measured.
        loss: predicted loss, of the kind that ``objective`` says.
        objective: ``additive-loss``, the loss is the sum over the merges; or ``layermerge``, it is the number of layers less the
            sum of exp(change) over all parts of the plan, layers left alone included.
    """

    fingerprint: str
    merges: tuple[Candidate, ...] = ()
    latency_ns: int | None = None
    loss: float = 0.0
    objective: str = "additive-loss"

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
            "objective": self.objective,
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
            raise PlanError(f"not a plan of format {FORMAT}: its format is {data.get('format')!r:.40}")
        try:
            latency = None if data["latency_ns"] is None else whole(data["latency_ns"])
            if not isinstance(data["fingerprint"], str):
                raise ValueError("the fingerprint is no string")
            objective = data.get("objective", "additive-loss")  # plans of before there was another have none
            if not isinstance(objective, str):
                raise ValueError("the objective is no string")
            merges = tuple(Candidate.from_json(merge) for merge in data["merges"])
            return cls(data["fingerprint"], merges, latency, float(data["loss"]), objective)
        except (KeyError, TypeError, ValueError, OverflowError) as fault:
            if isinstance(fault, PlanError):
                raise
            raise PlanError(f"not a plan: {fault!r}") from fault

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan written by :meth:`save`.

        Raises:
            PlanError: the file is damaged, or no plan.
            OSError: it cannot be read.
        """
        return read_json(path, cls.from_json, "Make the plan again.")


@dataclass(frozen=True, slots=True)
class ParetoFront:
    """Every (latency, loss) that no other plan beats, by rising latency and falling loss, and the plan behind each.

    With a second resource, every (latency, amount, loss), in lexicographic order; :meth:`within` a limit of it, or of none,
    gives a front of two coordinates again.

    Args:
        fingerprint: of the graph the plans are for.
        latencies_ns: end-to-end latencies, nanoseconds, strictly rising (never falling, with a second resource).
        losses: strictly falling (of any order, with a second resource).
        candidates: all candidates that were offered.
        original_ns: latency of the folded original; the reference of speed-ups.
        choose: index of a point -> indices into ``candidates``, by back pointers.
        slack: how much lower the loss of a left-out point may be; 0 for an exact front.
        objective: what the losses are; see :class:`Plan`.
        second: the name of a second resource, or empty.
        amounts: what each plan takes of it.
        surplus: how much more of it than a left-out plan the one that stands in for it may take; 0 for an exact front.
    """

    fingerprint: str
    latencies_ns: Sequence[int]
    losses: Sequence[float]
    candidates: tuple[Candidate, ...]
    original_ns: int
    choose: Callable[[int], Sequence[int]] = field(repr=False)
    slack: float = 0.0
    objective: str = "additive-loss"
    second: str = ""
    amounts: Sequence[int] = ()
    surplus: int = 0

    def __len__(self) -> int:
        return len(self.latencies_ns)

    @property
    def fastest_ns(self) -> int:
        return self.latencies_ns[0]

    def plan(self, index: int) -> Plan:
        """The plan at one point of the front."""
        merges = tuple(self.candidates[i] for i in self.choose(index))
        return Plan(self.fingerprint, merges, self.latencies_ns[index], self.losses[index], self.objective)

    def within(
        self, *, parameters: int | None = None, multiply_adds: int | None = None, peak_bytes: int | None = None
    ) -> ParetoFront:
        """The front of (latency, loss) of the plans that take no more than this of the second resource.

        Raises:
            BudgetError: no plan does; it names the least there is.
            InputError: the front was solved without that resource, or the limit is no number.
        """
        limits = {"parameters": parameters, "multiply_adds": multiply_adds, "peak_bytes": peak_bytes}
        asked = {name: limit for name, limit in limits.items() if limit is not None}
        for name, most in asked.items():
            if isinstance(most, bool) or not isinstance(most, Real) or math.isnan(most):
                raise InputError(f"{name} must be a number, the most that a plan may take, found {most!r:.80}")
            if name != self.second:
                known = f"{self.second} beside latency" if self.second else "latency alone"
                raise InputError(f"this front was solved for {known}; solve with second= to pick by {name}")
        if not self.second:
            return self
        limit = asked.get(self.second)
        fitting = [i for i, amount in enumerate(self.amounts) if limit is None or amount <= limit]
        if not fitting:
            least = min(self.amounts)
            raise BudgetError(
                f"no plan takes {limit} {self.second} or less; the least there is takes {least}. Ask for that or more, or offer "
                "more candidates.",
                asked_ns=self.latencies_ns[-1],
                fastest_ns=self.latencies_ns[list(self.amounts).index(least)],
                resource=self.second,
                asked_amount=limit,
                least_amount=least,
            )
        kept: list[int] = []
        for i in sorted(fitting, key=lambda i: (self.latencies_ns[i], self.losses[i])):
            if not kept or self.losses[i] < self.losses[kept[-1]]:
                kept.append(i)
        return replace(
            self,
            latencies_ns=tuple(self.latencies_ns[i] for i in kept),
            losses=tuple(self.losses[i] for i in kept),
            choose=partial(_choose_of, self.choose, tuple(kept)),
            second="",
            amounts=tuple(self.amounts[i] for i in kept),
        )

    def pick(
        self,
        budget_ns: int,
        *,
        parameters: int | None = None,
        multiply_adds: int | None = None,
        peak_bytes: int | None = None,
    ) -> Plan:
        """The plan of least loss that is not over the budget, nor over that of the second resource.

        Raises:
            BudgetError: even the fastest plan is over, or the leanest; it names that.
            InputError: the front was solved without that resource.
        """
        _check_budget(budget_ns, 0)
        front = self.within(parameters=parameters, multiply_adds=multiply_adds, peak_bytes=peak_bytes)
        if front is not self and front.fastest_ns > budget_ns >= self.fastest_ns:
            least = min(n for n, ns in zip(self.amounts, self.latencies_ns, strict=True) if ns <= budget_ns)
            limit = next(n for n in (parameters, multiply_adds, peak_bytes) if n is not None)
            raise BudgetError(
                f"no plan runs in {budget_ns / 1e6:.3f} ms with {limit} {self.second} or less; in that time the least is {least}, "
                f"with so much the fastest takes {front.fastest_ns / 1e6:.3f} ms. Ask for more of one of the two.",
                asked_ns=budget_ns,
                fastest_ns=front.fastest_ns,
                resource=self.second,
                asked_amount=limit,
                least_amount=least,
            )
        return front.plan(front.index(budget_ns))

    def index(self, budget_ns: int) -> int:
        """The point that :meth:`pick` takes, of a front without a second resource.

        Raises:
            BudgetError: even the fastest plan is over; it names the fastest.
            InputError: the front has a second resource, or the budget is no number.
        """
        _check_budget(budget_ns, -math.inf)  # of tables made up, all latencies may be negative
        if self.second:
            raise InputError(f"this front has {self.second} beside latency; take the index of within(), or pick()")
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


def _check_budget(budget_ns: object, least: float) -> None:
    if isinstance(budget_ns, bool) or not isinstance(budget_ns, Real) or not least <= float(budget_ns) < math.inf:
        raise InputError(f"a budget is a number of nanoseconds from 0 on, found {budget_ns!r:.80}")


def _choose_of(choose: Callable[[int], Sequence[int]], kept: Sequence[int], index: int) -> Sequence[int]:
    return choose(kept[index])
