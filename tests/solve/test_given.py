"""Whatever the solver is given of another kind is told by its name, and never by what happens inside."""

from __future__ import annotations

from typing import Any

import pytest

from fxmerge.core.geometry import Geometry
from fxmerge.core.region import Chain, Unit
from fxmerge.core.resource import Resource
from fxmerge.core.segment import Candidate
from fxmerge.core.table import Importance, ImportanceTable, LatencyTable, Measurement, Target
from fxmerge.errors import FxMergeError, InputError
from fxmerge.solve.frontier import solve, solve_tables
from fxmerge.solve.space import restrict

ROOT = Unit("output", (), (Chain(("x", "a", "b"), (Unit("a", ("a",)), Unit("b", ("b",)))),))
MERGE = Candidate("x", "b", "b", "identity", Geometry.identity(8, 2))
TIME = Measurement(5, 1, 3, Target())
NUMBERS: dict[str, Any] = {
    "root": ROOT,
    "candidates": [MERGE],
    "latencies_ns": [5],
    "losses": [0.25],
    "units_ns": {"a": 10, "b": 10},
    "remainder_ns": 1,
    "original_ns": 21,
    "fingerprint": "",
    "objective": "additive-loss",
    "units_loss": None,
    "second": None,
    "max_points": None,
}
TABLES: dict[str, Any] = {
    "root": ROOT,
    "candidates": [MERGE],
    "latency": LatencyTable({"k": TIME}, {MERGE.id: "k"}, {"a": "k", "b": "k"}, TIME),
    "importance": ImportanceTable({MERGE.id: Importance(0.1, 1, "s")}),
    "fingerprint": "",
    "space": "joint",
    "objective": "layermerge",
    "second": None,
    "max_points": None,
}
STRANGE = [None, 3, -1.5, "x", b"x", [], {}, [None], ["x"], [3.5], {"a": "x"}, {"a": None}, {3: 4}, object(), float("nan"), True]


@pytest.mark.parametrize("strange", STRANGE, ids=[f"{type(s).__name__}{k}" for k, s in enumerate(STRANGE)])
def test_nothing_strange_raises_anything_but_our_errors(strange: Any) -> None:
    calls = [(solve, {**NUMBERS, name: strange}) for name in NUMBERS]
    calls += [(solve_tables, {**TABLES, name: strange}) for name in TABLES]
    calls += [
        (restrict, {"root": ROOT, "candidates": [MERGE], "space": "layers"} | {name: strange}) for name in ("root", "candidates")
    ]
    for part in ("name", "candidates", "units", "rest", "largest"):
        sound: dict[str, Any] = {"name": "parameters", "candidates": {MERGE.id: 1}, "units": {}}
        calls.append((solve, {**NUMBERS, "second": Resource(**{**sound, part: strange})}))
    assert sum(_refused(*call) for call in calls) >= 7


def _refused(function: Any, arguments: dict[str, Any]) -> bool:
    try:
        function(**arguments)
    except FxMergeError:
        return True
    return False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": "x"}, "root must be the region of find_segments.., a Unit, found 'x'"),
        ({"candidates": None}, "candidates must be a sequence, found None"),
        ({"candidates": [3]}, "candidates, number 0, must be a Candidate, found 3"),
        ({"latencies_ns": {"a": 1}}, "latencies_ns must be a sequence, found .'a': 1"),
        ({"losses": ["x"]}, "the loss of candidate 'x->b identity' is x; it must be a finite number"),
        ({"losses": ["x"], "objective": "layermerge"}, "the loss of candidate 'x->b identity' is x; it must be a finite number"),
        ({"units_ns": []}, r"units_ns must be a mapping, found \[\]"),
        ({"units_loss": 3}, "units_loss must be a mapping, found 3"),
        ({"remainder_ns": "x"}, "the size of remainder_ns is 'x'; it must be a whole number of nanoseconds"),
        ({"second": "parameters"}, "second must be a Resource, such as count_resource.. gives, or None, found 'parameters'"),
        ({"second": Resource("parameters", {}, [])}, "units of parameters must be a mapping"),  # type: ignore[arg-type]
        ({"max_points": 2.5}, "max_points must be a whole number or None, found 2.5"),
    ],
)
def test_it_is_told_by_name_with_what_was_found(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        solve(**{**NUMBERS, **options})


def test_what_is_no_table_is_told() -> None:
    with pytest.raises(InputError, match="importance must be a table, ImportanceTable, found .'a': 0.5."):
        solve_tables(**{**TABLES, "importance": {"a": 0.5}})
