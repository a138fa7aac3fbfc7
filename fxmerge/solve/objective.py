"""What a plan is judged by, as non-negative integers whose sum is to be as small as can be.

``additive-loss``: the sum of the candidates' losses; each is rounded up, once, to a whole number of 1e-9.

``layermerge`` (Kim, El Halabi, Ji, Song; ICML 2024, arXiv 2406.12837): maximise the sum, over all parts that a plan leaves of
the network, of exp(change), where change = -loss and a layer left alone is a part with change 0. A plan partitions the N layers
(:mod:`fxmerge.solve.layers`): if part p covers n_p of them, sum n_p = N. For any number m, therefore,

    sum over p of (m n_p - exp(change_p))  =  m N - sum over p of exp(change_p),

so the plan with the smallest left side is the one with the largest sum of exponentials. With m = max(1, exp(change_p) / n_p) over
everything offered, no term is negative. In units of 1e-9 each exponential is rounded down, once, and m up; the equation then
holds in integers, without any rounding more. What a front reports is the loss  N - sum exp(change):  by how much the sum is
below that of the network as it is. It is negative where something offered is better than the original.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeAlias, get_args

from fxmerge.core.segment import Candidate
from fxmerge.errors import InputError
from fxmerge.solve.layers import Places

Objective: TypeAlias = Literal["additive-loss", "layermerge"]

NANO = 1_000_000_000  # a loss of 1, as an integer
LIMIT = 1 << 63
_LEAST = -20.0  # exp(20) nanos leave room for billions of layers


@dataclass(frozen=True, slots=True)
class Prices:
    """What each part adds to the sum, in nanos; ``base`` is what a plan without any loss adds up to."""

    candidates: tuple[int, ...]
    units: Mapping[str, int]
    base: int = 0


def price(
    objective: Objective,
    candidates: Sequence[Candidate],
    losses: Sequence[float],
    units_loss: Mapping[str, float],
    places: Places,
    root_end: str,
) -> Prices:
    """Turn losses into integers.

    Args:
        objective: see the module's text.
        candidates: what is offered.
        losses: of each candidate; for ``layermerge`` they may be negative.
        units_loss: unit (its ``end``) -> its loss left alone; 0 for a unit that is missing.
        places: of the network.
        root_end: the end of the root unit.

    Raises:
        InputError: no such objective, or a loss that cannot be used.
    """
    if objective not in get_args(Objective):
        raise InputError(f"objective is {objective!r}; give one of {', '.join(get_args(Objective))}.")
    for end in units_loss:
        if end not in places.layers:
            raise InputError(f"units_loss names {end!r}, which ends no unit. Score again, on this network.")
    named = [(f"candidate {c.id!r}", loss) for c, loss in zip(candidates, losses, strict=True)]
    named_units = [(f"unit {end!r}", loss) for end, loss in units_loss.items()]
    if objective == "additive-loss":
        alone = (_rounded_up(*entry) for entry in named_units)
        return Prices(tuple(_rounded_up(*entry) for entry in named), dict(zip(units_loss, alone, strict=True)))
    return _layermerge(candidates, named, dict(zip(units_loss, named_units, strict=True)), places, root_end)


def _layermerge(
    candidates: Sequence[Candidate],
    named: Sequence[tuple[str, float]],
    units: Mapping[str, tuple[str, float]],
    places: Places,
    root_end: str,
) -> Prices:
    covered = [places.covered(candidate) for candidate in candidates]
    gains = [_exponential(*entry) for entry in named]
    layers = places.ends_of_layers
    alone = dict.fromkeys(layers, NANO) | {end: _exponential(*entry) for end, entry in units.items()}
    if len(alone) > len(layers):
        block = next(end for end in units if end not in layers)
        raise InputError(f"units_loss names {block!r}, which is no layer but holds some. Give the losses of those.")
    level = max([NANO, *alone.values(), *(-(-gain // count) for gain, count in zip(gains, covered, strict=True))])
    return Prices(
        tuple(level * count - gain for gain, count in zip(gains, covered, strict=True)),
        {end: level - gain for end, gain in alone.items()},
        (level - NANO) * places.layers[root_end],
    )


def _rounded_up(name: str, loss: float) -> int:
    if not isinstance(loss, Real) or not 0 <= loss < LIMIT // NANO:
        limit = f"a finite number from 0 to {LIMIT // NANO:.1e}"
        raise InputError(f"the loss of {name} is {loss!s:.80}; it must be {limit}. Score it again, or leave it out.")
    return math.ceil(float(loss) * NANO)


def _exponential(name: str, loss: float) -> int:
    if not isinstance(loss, Real) or not _LEAST <= loss < math.inf:
        text = f"the loss of {name} is {loss!s:.80}; it must be a finite number from {_LEAST:g}"
        raise InputError(f"{text}. Score it again, or leave it out.")
    return math.floor(math.exp(-float(loss)) * NANO)
