"""Tables survive JSON, give CSV, and say what is wrong with a damaged file."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmerge.core.table import Importance, ImportanceTable, LatencyTable, Measurement, Target
from fxmerge.errors import InputError, PlanError

names = st.text(max_size=6)
counts = st.integers(0, 2**53)
targets = st.builds(Target, names, names, st.booleans(), names, counts)
measurements = st.builds(Measurement, counts, counts, counts, targets, st.dictionaries(names, names, max_size=2))
importances = st.builds(Importance, st.floats(allow_nan=False, allow_infinity=False), counts, names)
LATENCY = LatencyTable(
    {"conv": Measurement(10, 1, 3, Target()), "pool": Measurement(7, 2, 5, Target("cuda:0", threads=4), {"torch": "2"})},
    {"x->y, 3x3": "conv", "x->z": "conv"},
    {"y": "pool"},
    Measurement(100, 0, 1, Target()),
)
IMPORTANCE = ImportanceTable({"x->y, 3x3": Importance(0.1 + 0.2, 256, "reconstruction")})


@given(st.dictionaries(names, measurements, min_size=1, max_size=3), measurements, st.data())
def test_a_latency_table_survives_json(found: dict[str, Measurement], network: Measurement, data: st.DataObject) -> None:
    keyed = st.dictionaries(names, st.sampled_from(sorted(found)), max_size=3)
    table = LatencyTable(found, data.draw(keyed), data.draw(keyed), network)
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table


@given(st.dictionaries(names, importances, max_size=3))
def test_an_importance_table_survives_json(found: dict[str, Importance]) -> None:
    table = ImportanceTable(found)
    assert ImportanceTable.from_json(json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.parametrize("table", [LATENCY, IMPORTANCE])
def test_a_table_survives_the_disk_and_leaves_nothing_beside(table: LatencyTable | ImportanceTable, tmp_path: Path) -> None:
    table.save(tmp_path / "t.json")
    assert type(table).load(tmp_path / "t.json") == table
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_a_latency_table_as_csv_has_a_line_for_the_whole_each_unit_and_each_candidate(tmp_path: Path) -> None:
    LATENCY.to_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["what"], row["name"], row["median_ns"]) for row in rows] == [
        ("network", "", "100"),
        ("unit", "y", "7"),
        ("candidate", "x->y, 3x3", "10"),
        ("candidate", "x->z", "10"),
    ]
    assert (rows[1]["spread_ns"], rows[1]["repeats"], rows[1]["device"], rows[1]["threads"]) == ("2", "5", "cuda:0", "4")
    assert [row["in_network_ns"] for row in rows] == ["100", "7", "10", "10"]


def test_as_csv_a_part_has_what_it_takes_alone_and_what_it_takes_in_a_faster_network(tmp_path: Path) -> None:
    replace(LATENCY, network=Measurement(4, 0, 1, Target())).to_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["median_ns"], row["in_network_ns"]) for row in rows] == [("4", "4"), ("7", "4"), ("10", "6"), ("10", "6")]


@pytest.mark.parametrize("part", ["candidates", "units"])
def test_a_table_whose_entry_has_no_measurement_is_refused(part: str) -> None:
    with pytest.raises(InputError, match="'z' has no measurement, its key is 'gone'; give one under that key"):
        replace(LATENCY, **{part: {"z": "gone"}})  # type: ignore[arg-type]


def test_an_importance_table_as_csv_keeps_every_digit(tmp_path: Path) -> None:
    IMPORTANCE.to_csv(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == 'candidate,loss,samples,scorer\n"x->y, 3x3",0.30000000000000004,256,reconstruction\n'


def without(data: dict[str, Any], part: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != part}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not a latency table: expected an object, found list"),
        (LATENCY.to_json() | {"format": 2}, "not a latency table of format 1: its format is 2"),
        (without(LATENCY.to_json(), "network"), "not a latency table: 'network' is missing"),
        (LATENCY.to_json() | {"units": 3}, "expected an object of entries by name, found int"),
        (LATENCY.to_json() | {"units": {"y": "gone"}}, "'y' has no measurement, its key is 'gone'"),
        (LATENCY.to_json() | {"units": {"y": []}}, r"'y' has no measurement, its key is \[\]"),
        (LATENCY.to_json() | {"network": {"median_ns": 1.5}}, "not a measurement: .*expected a whole number, found 1.5"),
    ],
)
def test_what_is_no_latency_table_is_told(data: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        LatencyTable.from_json(data)
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=rf"t.json cannot be used: .*{message}.* Measure again, or"):
        LatencyTable.load(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "not an importance table: expected an object, found NoneType"),
        ({"format": 1}, "'candidates' is missing"),
        ({"format": 1, "candidates": {"c": None}}, "in the entry 'c'"),
        ({"format": 1, "candidates": {"c": {"loss": "1", "samples": 1, "scorer": ""}}}, "the loss is '1'.* in the entry 'c'"),
        ({"format": 1, "candidates": {"c": {"loss": float("nan"), "samples": 1, "scorer": ""}}}, "the loss is nan"),
        ({"format": 1, "candidates": {"c": {"loss": 1, "samples": True, "scorer": ""}}}, "expected a whole number, found True"),
        ({"format": 1, "candidates": {"c": {"loss": 1, "samples": 1, "scorer": 4}}}, "the scorer is no string"),
    ],
)
def test_what_is_no_importance_table_is_told(data: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        ImportanceTable.from_json(data)
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=rf"t.json cannot be used: .*{message}.* Measure again, or"):
        ImportanceTable.load(tmp_path / "t.json")


@pytest.mark.parametrize("kind", [LatencyTable, ImportanceTable])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_told(kind: Any, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(PlanError, match=r"t.json is damaged: it is not JSON .* Measure again, or take the table"):
        kind.load(tmp_path / "t.json")


@pytest.mark.parametrize("digits", [400, 4000, 5000])
@pytest.mark.parametrize("field", ["median_ns", "repeats", "loss", "samples", "format"])
def test_a_number_of_thousands_of_digits_is_told_in_a_line(field: str, digits: int, tmp_path: Path) -> None:
    """Python reads no whole number of over 4300 digits from a text, and turns none of over 308 into a float."""
    table: LatencyTable | ImportanceTable = LATENCY if field in ("median_ns", "repeats") else IMPORTANCE
    text = re.sub(rf'"{field}": [\d.]+', f'"{field}": ' + "9" * digits, json.dumps(table.to_json()), count=1)
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(PlanError, match=r"t\.json (is damaged|cannot be used): .* Measure again, or take the table") as told:
        type(table).load(tmp_path / "t.json")
    assert len(str(told.value)) < 1000
