"""Whether what the solver is given is of the kinds that it takes; what the numbers say is looked at where they are used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from fxmerge.core.region import Unit
from fxmerge.core.resource import Resource
from fxmerge.core.segment import Candidate
from fxmerge.errors import InputError

T = TypeVar("T")


def a_unit(root: object) -> Unit:
    """The root of a region."""
    return _a(Unit, root, "root", "the region of find_segments(), a Unit")


def some_candidates(given: Any) -> tuple[Candidate, ...]:
    """Candidates, in order."""
    return tuple(_a(Candidate, one, f"candidates, number {k},", "a Candidate") for k, one in enumerate(some(given, "candidates")))


def some(given: Any, name: str) -> tuple[Any, ...]:
    """Values one after the other: no text, no mapping.

    >>> some([1, 2], "losses")
    (1, 2)
    """
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping)):
        raise InputError(f"{name} must be a sequence, found {given!r:.80}")
    return tuple(given)


def by_name(given: Any, name: str) -> Mapping[str, Any]:
    """Values by the ends of units, or by the ids of candidates."""
    return _a(Mapping, given, name, "a mapping")  # type: ignore[type-abstract]


def a_resource(second: Any) -> Resource | None:
    """A second resource, or none."""
    if second is None:
        return None
    found = _a(Resource, second, "second", "a Resource, such as count_resource() gives, or None")
    if not isinstance(found.name, str):
        raise InputError(f"the name of second must be a text, found {found.name!r:.80}")
    for part in ("candidates", "units"):
        by_name(getattr(found, part), f"{part} of {found.name}")
    return found


def at_most(max_points: Any, ends: int) -> int | None:
    """How many points a front may have."""
    if max_points is None:
        return None
    if isinstance(max_points, bool) or not isinstance(max_points, int):
        raise InputError(f"max_points must be a whole number or None, found {max_points!r:.80}")
    if max_points < ends:
        raise InputError(f"max_points is {max_points}; a front needs {ends} to keep its ends. Give {ends} or more, or None.")
    return max_points


def _a(kind: type[T], value: object, name: str, what: str) -> T:
    if not isinstance(value, kind):
        raise InputError(f"{name} must be {what}, found {value!r:.80}")
    return value
