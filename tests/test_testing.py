"""The assertions that users are given: they fail where they should, and never compare nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxmerge.errors import InputError, NotEquivalentError
from fxmerge.testing import assert_equivalent, assert_untouched, snapshot

INF = float("inf")


class Gives(nn.Module):
    def __init__(self, work: Callable[..., Any]) -> None:
        super().__init__()
        self.work = work

    def forward(self, *arguments: Any) -> Any:
        return self.work(*arguments)


def compare(one: Callable[..., Any], other: Callable[..., Any], *inputs: Any) -> float:
    return assert_equivalent(Gives(one), Gives(other), inputs or [torch.ones(2)])


def always(*values: Any, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    return lambda *_: torch.tensor(values, dtype=dtype)


def used_up() -> Iterator[Tensor]:
    items = iter([torch.ones(2)])
    next(items)
    return items


@pytest.mark.parametrize("inputs", [[], (), used_up()])
def test_no_inputs_are_no_comparison(inputs: Any) -> None:
    with pytest.raises(InputError, match="nothing was compared: give at least one input"):
        assert_equivalent(nn.ReLU(), nn.ReLU(), inputs)


def test_no_outputs_are_no_comparison() -> None:
    with pytest.raises(InputError, match="nothing was compared"):
        compare(lambda x: (), lambda x: [])


def test_a_tensor_alone_is_one_comparison() -> None:
    norm = nn.BatchNorm2d(3)
    assert assert_equivalent(norm, norm, torch.randn(2, 3, 4, 4)) == 0.0


@pytest.mark.parametrize(("one", "other"), [(1.0, 2.0), ("a", "b"), (True, 1), (None, 0)])
def test_outputs_that_are_no_tensors_must_be_equal(one: Any, other: Any) -> None:
    with pytest.raises(NotEquivalentError, match="outputs .* and .* differ"):
        compare(lambda x: {"y": x, "n": one}, lambda x: {"y": x, "n": other})
    assert compare(lambda x: [x, one], lambda x: [x, one]) == 0.0


def test_a_tensor_is_not_the_number_in_it() -> None:
    with pytest.raises(NotEquivalentError, match="outputs .* differ"):
        compare(always(1.0), lambda x: 1.0)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.complex64, "0.0001"), (torch.complex128, "1e-09")])
def test_imaginary_parts_are_compared(dtype: torch.dtype, allowed: str) -> None:
    with pytest.raises(NotEquivalentError, match=f"the largest difference is 1.41 of .*; {allowed} is allowed"):
        compare(always(1j, dtype=dtype), always(1, dtype=dtype))
    assert compare(always(1j, 2, dtype=dtype), always(1j + 1e-12, 2, dtype=dtype)) < 1e-11


def test_equal_infinities_do_not_differ() -> None:
    assert compare(always(1.0, INF, -INF), always(1.0, INF, -INF)) == 0.0


@pytest.mark.parametrize("others", [(1.0, -INF), (1.0, 5.0), (2.0, INF)])
def test_infinities_do_not_hide_other_differences(others: tuple[float, ...]) -> None:
    with pytest.raises(NotEquivalentError, match="the largest difference is (inf|1) of"):
        compare(always(1.0, INF), always(*others))


def test_nan_always_differs() -> None:
    with pytest.raises(NotEquivalentError, match="the largest difference is nan"):
        compare(always(1.0, float("nan")), always(1.0, float("nan")))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-8), (torch.float32, 1e-3)])
def test_a_difference_over_the_tolerance_says_where(dtype: torch.dtype, error: float) -> None:
    values = torch.zeros(2, 3, dtype=dtype)
    values[0, 0], other = 10.0, torch.zeros(2, 3, dtype=dtype)
    other[0, 0], other[1, 2] = 10.0, 10 * error
    with pytest.raises(NotEquivalentError, match=r"of the largest value, at \(1, 2\) of an output of shape \(2, 3\)") as caught:
        compare(lambda x: values, lambda x: other)
    assert caught.value.error == pytest.approx(error)
    assert compare(lambda x: values, lambda x: values + (other - values) * 1e-3) <= 1e-3 * error * 1.01


@pytest.mark.parametrize(("one", "other"), [(always(1.0), always(1.0, 1.0)), (lambda x: x, lambda x: (x, x))])
def test_other_shapes_and_other_numbers_of_outputs_differ(one: Any, other: Any) -> None:
    with pytest.raises(NotEquivalentError, match="shapes .* differ|1 outputs and 2"):
        compare(one, other)


def test_modules_that_write_into_their_input_write_into_a_copy() -> None:
    x = torch.ones(2)
    assert compare(lambda xs: xs[0].add_(1), lambda xs: xs[0] + 1, ([x],)) == 0.0
    assert torch.equal(x, torch.ones(2))


def test_a_changed_tensor_is_named() -> None:
    layer = nn.Linear(2, 2)
    before = snapshot(layer)
    assert_untouched(layer, before)
    with torch.no_grad():
        layer.bias.add_(1)
    with pytest.raises(NotEquivalentError, match="bias has changed"):
        assert_untouched(layer, before)
    with pytest.raises(NotEquivalentError, match=r"tensors came or went: \['bias'\]"):
        assert_untouched(nn.Linear(2, 2, bias=False), before)
