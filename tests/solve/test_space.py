"""What each space offers, by its definition; and on a traced network."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.core.geometry import Geometry
from fxmerge.core.region import Chain, Unit
from fxmerge.core.segment import Candidate
from fxmerge.core.table import Importance, ImportanceTable, LatencyTable, Measurement, Target
from fxmerge.errors import InputError
from fxmerge.solve.frontier import solve_tables
from fxmerge.solve.space import restrict

INSIDE = Chain(("x", "p", "q"), (Unit("p", ("p",)), Unit("q", ("q",))))
ONE = Chain(("add", "r"), (Unit("r", ("r",)),))
ROOT = Unit("output", (), (Chain(("x", "add", "sum"), (Unit("add", ("add",), (INSIDE,)), Unit("sum", ("sum",), (ONE,)))),))


def offer(entry: str, end: str, kind: str, **options: object) -> Candidate:
    return Candidate(entry, end, end, kind, Geometry.identity(4, 2), **options)  # type: ignore[arg-type]


WHOLE = offer("x", "add", "composed", activations=("act",))
EXACT = offer("x", "q", "composed", exact=True)
PRUNED = offer("x", "add", "composed", activations=("act",), removed=("p",))
FITTED = offer("x", "add", "fitted", activations=("act",))
LAYER = offer("p", "q", "identity")
WITH_ACTIVATION = offer("x", "p", "identity", activations=("act",))
TWO_LAYERS = offer("x", "q", "identity")
BLOCK_OF_ONE = offer("add", "sum", "identity")
BLOCK_OF_TWO = offer("x", "add", "identity")
ALL = (WHOLE, EXACT, PRUNED, FITTED, LAYER, WITH_ACTIVATION, TWO_LAYERS, BLOCK_OF_ONE, BLOCK_OF_TWO)


@pytest.mark.parametrize(("space", "offered"), [("joint", ALL), ("activations", (WHOLE, EXACT)), ("layers", (LAYER, BLOCK_OF_ONE))])
def test_a_space_offers_what_its_definition_says(space: str, offered: Sequence[Candidate]) -> None:
    assert restrict(ROOT, ALL, space) == offered  # type: ignore[arg-type]


def test_another_space_is_refused() -> None:
    with pytest.raises(InputError, match="space is 'channels'; give one of joint, activations, layers"):
        restrict(ROOT, ALL, "channels")  # type: ignore[arg-type]


@pytest.mark.parametrize("space", ["joint", "activations", "layers"])
def test_the_front_of_a_space_is_that_of_its_candidates_alone(space: str) -> None:
    time = {c.id: f"t{k}" for k, c in enumerate(ALL)}
    timed = {f"t{k}": Measurement(k + 1, 0, 1, Target()) for k in range(len(ALL))} | {"unit": Measurement(20, 0, 1, Target())}
    latency = LatencyTable(timed, time, dict.fromkeys(["p", "q", "r"], "unit"), Measurement(60, 0, 1, Target()))
    importance = ImportanceTable({c.id: Importance(1 / (k + 2), 1, "") for k, c in enumerate(ALL)})
    front = solve_tables(ROOT, ALL, latency, importance, "f", space=space)  # type: ignore[arg-type]
    alone = solve_tables(ROOT, restrict(ROOT, ALL, space), latency, importance, "f")  # type: ignore[arg-type]
    assert (front.latencies_ns, front.losses, front.candidates) == (alone.latencies_ns, alone.losses, alone.candidates)
    assert len(front) > 1


@pytest.mark.parametrize("space", ["activations", "layers"])
def test_on_a_network_a_space_holds_what_proposing_in_it_offers(space: str) -> None:
    """The two ways to a baseline agree where all single layers have no activation inside."""
    layers = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(4, 8, 3, stride=2, padding=1)).eval()
    findings = fxmerge.find_segments(fxmerge.trace(model, torch.randn(1, 4, 12, 12)))
    everything = [c for p in fxmerge.propose(findings) for c in p.candidates]
    proposed = fxmerge.propose(findings, fxmerge.Space.named(space))  # type: ignore[arg-type]
    restricted = restrict(findings.region, everything, space)  # type: ignore[arg-type]
    assert {c.id for c in restricted} == {c.id for p in proposed for c in p.candidates}
    assert restricted
