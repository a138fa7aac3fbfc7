"""Plans through JSON and files, damaged ones too; and the front they are picked from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmerge.core.geometry import Axis, Geometry
from fxmerge.core.plan import ParetoFront, Plan
from fxmerge.core.segment import Candidate
from fxmerge.errors import BudgetError, FxMergeError, InputError, PlanError

AXIS = Axis.convolution(3, 1, (1, 1), 1)
EXACT = Candidate("x", "b", "b", "composed", Geometry(4, 4, (AXIS, AXIS)), exact=True)
LOSSY = Candidate("b", "d", "relu", "fitted", Geometry(4, 4, (AXIS, AXIS), bias=True), ("relu_1",))
PLAN = Plan("f" * 32, (EXACT, LOSSY), 1_500_000, 0.25)

NAMES = st.text(min_size=1, max_size=6)
CANDIDATES = st.builds(
    Candidate,
    NAMES,
    NAMES,
    NAMES,
    st.sampled_from(("composed", "fitted", "identity")),
    st.just(EXACT.geometry),
    st.lists(NAMES, max_size=2).map(tuple),
    st.lists(NAMES, max_size=2).map(tuple),
    st.booleans(),
)
PLANS = st.builds(
    Plan,
    NAMES,
    st.lists(CANDIDATES, max_size=3).map(tuple),
    st.none() | st.integers(0, 10**12),
    st.floats(allow_nan=False, allow_infinity=False),
)


@given(PLANS)
def test_a_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_plan_survives_a_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    PLAN.save(path)
    assert Plan.load(path) == PLAN
    assert list(tmp_path.iterdir()) == [path]


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        replace(PLAN, fingerprint=b"bytes").save(path)  # type: ignore[arg-type]
    assert Plan.load(path) == PLAN


def test_a_plan_is_exact_if_every_merge_is() -> None:
    assert Plan("f").exact
    assert Plan("f", (EXACT,)).exact
    assert not PLAN.exact


def damaged(**changes: Any) -> Mapping[str, Any]:
    return {**PLAN.to_json(), **changes}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "^not a plan: expected an object, found list$"),
        (None, "^not a plan: expected an object, found NoneType$"),
        ({}, "^not a plan of format 1: its format is None$"),
        (damaged(format=2), "^not a plan of format 1: its format is 2$"),
        (damaged(fingerprint=7), "^not a plan: .*the fingerprint is no string"),
        (damaged(latency_ns=1.5), "^not a plan: .*expected a whole number, found 1.5"),
        (damaged(loss="much"), "^not a plan: .*could not convert string to float: 'much'"),
        (damaged(loss=None), "^not a plan: TypeError"),
        (damaged(merges=None), "^not a plan: TypeError"),
        (damaged(merges="ab"), "^not a candidate: TypeError"),
        (damaged(merges=[{}]), "^not a candidate: KeyError.'entry'"),
    ],
)
def test_damage_is_a_plan_error_that_says_what_was_found(data: object, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        Plan.from_json(data)


@pytest.mark.parametrize("field", ["fingerprint", "merges", "latency_ns", "loss"])
def test_a_missing_field_is_named(field: str) -> None:
    data = PLAN.to_json()
    del data[field]
    with pytest.raises(PlanError, match=f"^not a plan: KeyError.'{field}'"):
        Plan.from_json(data)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000], ids=["empty", "cut off", "not text", "nested without end"]
)
def test_a_file_that_is_no_json_is_named_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json is damaged: it is not JSON \(.*\)\. Make the plan again\.$"):
        Plan.load(path)


def test_a_file_that_is_no_plan_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"format": 1}')
    with pytest.raises(PlanError, match=r"plan\.json cannot be used: not a plan: KeyError.*\. Make the plan again\.$"):
        Plan.load(path)


@given(st.data())
def test_a_file_damaged_anywhere_is_a_plan_or_a_plan_error(data: st.DataObject) -> None:
    text = json.dumps(PLAN.to_json())
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start, min(len(text), start + 30)))
    cut = text[:start] + data.draw(st.sampled_from(("", "0", "null", '"', "[]", "{}", "-1", "true"))) + text[stop:]
    try:
        parsed = json.loads(cut)
    except json.JSONDecodeError:
        return
    try:
        Plan.from_json(parsed)
    except FxMergeError as fault:
        assert isinstance(fault, PlanError)  # noqa: PT017


def test_a_missing_file_stays_the_errors_that_callers_know(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"plan\.json"):
        Plan.load(tmp_path / "plan.json")


class TestParetoFront:
    CHOICES = ((0, 1), (0,), ())
    FRONT = ParetoFront("f", (100, 150, 200), (0.5, 0.25, 0.0), (EXACT, LOSSY), 200, CHOICES.__getitem__)

    @pytest.mark.parametrize(("budget_ns", "latency_ns"), [(100, 100), (149, 100), (150, 150), (10**9, 200)])
    def test_it_gives_the_least_loss_that_is_not_over_the_budget(self, budget_ns: int, latency_ns: int) -> None:
        assert self.FRONT.pick(budget_ns).latency_ns == latency_ns

    def test_a_plan_carries_its_point_and_its_merges(self) -> None:
        assert self.FRONT.plan(0) == Plan("f", (EXACT, LOSSY), 100, 0.5)
        assert len(self.FRONT) == 3

    def test_a_budget_below_the_fastest_is_an_error_that_names_it(self) -> None:
        with pytest.raises(BudgetError, match=r"no plan runs in 0\.000 ms \(2\.02x\); .* takes 0\.000 ms \(2\.00x\)") as caught:
            self.FRONT.pick(99)
        assert (caught.value.asked_ns, caught.value.fastest_ns) == (99, 100)

    @pytest.mark.parametrize("budget", [-1, float("nan"), float("inf"), True, "2x", None])
    def test_what_is_no_budget_is_told(self, budget: object) -> None:
        with pytest.raises(InputError, match="a budget is a number of nanoseconds from 0 on, found"):
            self.FRONT.pick(budget)  # type: ignore[arg-type]

    @pytest.mark.parametrize("budget", [float("nan"), float("inf"), True, "2x", None])
    def test_the_index_of_what_is_no_budget_is_told(self, budget: object) -> None:
        with pytest.raises(InputError, match="a budget is a number of nanoseconds from 0 on, found"):
            self.FRONT.index(budget)  # type: ignore[arg-type]

    def test_a_budget_of_nothing_is_an_error_too(self) -> None:
        with pytest.raises(BudgetError, match="no plan runs in"):
            self.FRONT.pick(0)


@pytest.mark.parametrize("digits", [400, 4000, 5000])
@pytest.mark.parametrize("field", ["latency_ns", "loss", "in_channels", "format"])
def test_a_number_of_thousands_of_digits_is_told_in_a_line(field: str, digits: int, tmp_path: Path) -> None:
    """Python reads no whole number of over 4300 digits from a text, and turns none of over 308 into a float."""
    text, number = json.dumps(PLAN.to_json()), f'"{field}": ' + "9" * digits
    (tmp_path / "plan.json").write_text(re.sub(rf'"{field}": [\d.]+', number, text, count=1))
    with pytest.raises(PlanError, match=r"plan\.json (is damaged|cannot be used): .* Make the plan again\.$") as told:
        Plan.load(tmp_path / "plan.json")
    assert len(str(told.value)) < 1000
