"""Options that are numbers."""

from __future__ import annotations

import math

import numpy
import pytest

from fxmerge.core.options import require_number, require_whole
from fxmerge.errors import InputError


@pytest.mark.parametrize("value", [-1, True, 1.0, "3", None, numpy.int64(3)])
def test_what_is_no_whole_number_from_some_on_is_told(value: object) -> None:
    with pytest.raises(InputError, match="steps must be a whole number from 0 on, found"):
        require_whole("steps", value, 0)


@pytest.mark.parametrize("value", [0, 1, True, "0.5", None, math.nan, 1j])
def test_what_is_no_number_that_fits_is_told(value: object) -> None:
    with pytest.raises(InputError, match="share must be a fraction, found"):
        require_number("share", value, "a fraction", lambda share: 0 < share < 1)


def test_numbers_of_numpy_are_numbers() -> None:
    require_number("share", numpy.float32(0.5), "a fraction", lambda share: 0 < share < 1)
    with pytest.raises(InputError, match="share must be a fraction"):
        require_number("share", numpy.float32(1.5), "a fraction", lambda share: 0 < share < 1)
