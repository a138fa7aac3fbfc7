"""What a plan takes of something beside time: parameters, multiply-adds, memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

#: What can be a second budget.
Name: TypeAlias = Literal["parameters", "multiply_adds", "peak_bytes"]


@dataclass(frozen=True, slots=True)
class Resource:
    """What every candidate and every unit left alone takes of one resource.

    A plan takes the sum over its parts and the rest; or, where ``largest``, the largest of them.

    Args:
        name: ``parameters``, ``multiply_adds`` or ``peak_bytes``.
        candidates: candidate id -> amount.
        units: unit (its ``end``) -> amount of its own nodes left alone; 0 for a unit that is missing.
        rest: of what is in no entry.
        largest: whether a plan takes the largest amount of its parts, not their sum.
    """

    name: Name
    candidates: Mapping[str, int]
    units: Mapping[str, int]
    rest: int = 0
    largest: bool = False
