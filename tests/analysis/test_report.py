"""Whatever the pipeline makes can be printed; anything else is told."""

from __future__ import annotations

import pytest
import torch

import fxmerge
from fxmerge.core.table import Importance, ImportanceTable, LatencyTable, Measurement, Target

ROUGH = Measurement(1_500_000, 20_000, 11, Target(), {"torch": "2"})


def test_a_latency_table_says_what_was_timed_and_what_is_left() -> None:
    table = LatencyTable({"conv": ROUGH}, {"x->y composed": "conv"}, {"relu": "conv"}, Measurement(2_000_000, 0, 3, Target()))
    text = fxmerge.explain(table)
    assert "Latencies: 2.000 ms the whole, 0.500 ms of it in no entry" in text
    assert text.splitlines()[-1].split() == ["1.500", "0.010", "11", "candidate:", "x->y", "composed", "2"]


def test_an_importance_table_says_what_each_candidate_costs() -> None:
    text = fxmerge.explain(ImportanceTable({"x->y identity": Importance(0.25, 16, "reconstruction")}))
    assert text.splitlines()[-1].split() == ["x->y", "identity", "0.25", "16", "reconstruction"]


@pytest.mark.parametrize("measured", [ROUGH, (ROUGH, ROUGH)])
def test_measurements_are_printed_with_what_is_needed_to_judge_them(measured: Measurement | tuple[Measurement, ...]) -> None:
    lines = fxmerge.explain(measured).splitlines()
    assert lines[0] == "Measurements"
    assert lines[-1].split() == ["1.500", "0.010", "11", "cpu", "float32", "contiguous", "eager", "torch", "2"]


def test_no_proposals_are_no_rows() -> None:
    assert fxmerge.explain(()) == "Segments and candidates\n(none)"


@pytest.mark.parametrize(
    ("subject", "name"),
    [(torch.nn.Conv2d(3, 3, 3), "Conv2d"), ({"x": torch.zeros(3)}, "dict"), (None, "NoneType"), ([1], "int"), ([ROUGH, 2], "int")],
)
def test_anything_else_is_refused_by_its_type(subject: object, name: str) -> None:
    with pytest.raises(fxmerge.InputError, match=f"explain prints findings, proposals, .*, found {name}; of a network print its"):
        fxmerge.explain(subject)  # type: ignore[arg-type]


def test_a_plan_and_a_front_say_what_their_loss_is_and_what_else_they_take() -> None:
    plan = fxmerge.Plan("f", (), 5_000_000, 0.25, "layermerge")
    title = "Plan: 0 merges, 5.000 ms predicted, loss 0.25 (layermerge: layers less the sum of exp(change))"
    assert fxmerge.explain(plan).splitlines()[0] == title
    front = fxmerge.ParetoFront(
        "f", (2_000_000,), (0.5,), (), 4_000_000, lambda _: (), objective="layermerge", second="parameters", amounts=(7,)
    )
    lines = fxmerge.explain(front).splitlines()
    assert lines[1].split() == ["speed-up", "ms", "parameters", "loss", "(layermerge)"]
    assert lines[-1].split() == ["2.000x", "2.000", "7", "0.5"]
