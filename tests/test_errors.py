"""One tree of errors, each also what a caller would catch anyway, with its facts."""

from __future__ import annotations

import inspect

import pytest

from fxmerge import errors
from fxmerge.errors import BudgetError, FxMergeError, MeasurementError, NotEquivalentError, NotFiniteError, PlanMismatchError

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind is not FxMergeError])
def test_each_is_one_of_ours_and_a_builtin(kind: type[Exception]) -> None:
    assert issubclass(kind, FxMergeError)
    builtins = [base for base in kind.__mro__ if base.__module__ == "builtins"]
    assert builtins[0] not in (Exception, BaseException)
    assert kind.__doc__


def test_facts_are_attributes() -> None:
    assert NotFiniteError("text", where="0.weight").where == "0.weight"
    assert MeasurementError("text", index=3).index == 3
    assert PlanMismatchError("text", node="add").node == "add"
    assert BudgetError("text", asked_ns=1, fastest_ns=2).fastest_ns == 2
    assert NotEquivalentError("text", error=0.5, tolerance=0.1).error == 0.5
