"""Options that are numbers: what is of another kind, or out of range, is told by the name of the option."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

from fxmerge.errors import InputError


def require_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise InputError unless an option is a whole number from some on, up to some if there is a most.

    >>> require_whole("steps", 0, 0)
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        until = "on" if most is None else f"to {most}"
        raise InputError(f"{name} must be a whole number from {least} {until}, found {value!r:.80}")


def require_number(name: str, value: Any, what: str, fits: Callable[[float], bool]) -> None:
    """Raise InputError unless an option is a number that fits; of what it must be, ``what`` is in words.

    >>> require_number("share", 0.5, "a fraction from 0 to 1", lambda share: 0 <= share <= 1)
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not fits(value):  # type: ignore[arg-type]
        raise InputError(f"{name} must be {what}, found {value!r:.80}")
