"""Numbers of a recipe that are out of range."""

from __future__ import annotations

from typing import Any

import pytest

import fxmerge
from fxmerge.errors import InputError
from fxmerge.tune import Distillation, Recipe


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epochs": 1.5}, "epochs must be a whole number from 0 on, found 1.5"),
        ({"learning_rate": None}, "learning_rate must be a positive number, found None"),
        ({"warm_up": 1.0}, "warm_up must be a fraction of all steps, from 0 to below 1, found 1.0"),
        ({"average": -0.1}, "average must be a fraction of all steps"),
        ({"momentum": -1}, "momentum must be a finite number from 0 on, found -1"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number from 0 on, found nan"),
        ({"clip": 0}, "clip must be a positive number or None, found 0"),
        ({"checkpoint_steps": 0.5}, "checkpoint_steps must be a whole number from 1 on, found 0.5"),
    ],
)
def test_numbers_of_a_recipe_out_of_range_are_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(fxmerge.InputError, match=told):
        Recipe(**options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"share": 1.1}, "share must be a fraction from 0 to 1, found 1.1"),
        ({"temperature": 0}, "temperature must be a positive number, found 0"),
        ({"features": None}, "features must be a finite number from 0 on, found None"),
    ],
)
def test_numbers_of_a_distillation_out_of_range_are_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(fxmerge.InputError, match=told):
        Distillation(**options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"distillation": None}, "distillation must be a Distillation"),
        ({"optimiser": 3}, "optimiser must be a function"),
        ({"loss": None}, "loss must be a function"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": 2**70}, "seed must be a whole number from 0 to"),
    ],
)
def test_parts_of_another_kind_are_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Recipe(**options)
