"""What a stretch computes: its geometry, the pixels it owes, and whether it can be merged without harm to the borders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fxmerge.core.expression import Expression, Halo, Step, asked_of_operand
from fxmerge.core.geometry import Axis, Geometry

ENTRY = Step("x", "entry", (), Geometry.identity(4, 1))


def apply(name: str, operand: int, kernel: int = 3, padding: tuple[int, int] | None = None, **options: Any) -> Step:
    """A convolution on one axis; it keeps the size unless told otherwise."""
    stride, dilation, role = options.pop("stride", 1), options.pop("dilation", 1), options.pop("role", "convolution")
    total = dilation * (kernel - 1)
    axis = Axis.convolution(kernel, stride, padding if padding is not None else (total // 2, total - total // 2), dilation)
    return Step(name, "apply", (operand,), Geometry(4, 4, (axis,), **options), role)


def norm(name: str, operand: int) -> Step:
    return Step(name, "apply", (operand,), replace(Geometry.identity(4, 1), bias=True), "norm")


def crop(name: str, operand: int, start: int, stop: int) -> Step:
    return Step(name, "apply", (operand,), Geometry(4, 4, (Axis(1, 1, start, 1, -stop - start - 1),), 4))


def program(*steps: Step) -> Expression:
    return Expression((ENTRY, *steps))


def sizes(expression: Expression) -> list[tuple[int, int]]:
    return [halo[0] for halo in expression.halos()]


class TestGeometryOfAnExpression:
    def test_a_chain_composes(self) -> None:
        chain = program(apply("a", 0), norm("n", 1), apply("b", 2, stride=2))
        assert chain.geometry == Geometry(4, 4, (Axis.convolution(5, 2, (2, 2), 1),), 1, True)

    def test_a_residual_block_is_as_large_as_its_body(self) -> None:
        block = program(apply("a", 0), apply("b", 1), Step("add", "sum", (2, 0)))
        assert block.geometry.kernel == (5,)
        assert [g.kernel for g in block.geometries()] == [(1,), (3,), (5,), (5,)]

    def test_a_concat_of_three_stacks_them_in_order(self) -> None:
        branches = program(apply("a", 0), apply("b", 0, 1), Step("cat", "concat", (1, 2, 0)))
        assert branches.geometry.out_channels == 12

    def test_strides_that_differ_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="different strides meet"):
            _ = program(apply("a", 0, stride=2), Step("add", "sum", (1, 0))).geometry

    def test_convolutions_are_the_steps_of_that_role(self) -> None:
        chain = program(apply("a", 0), norm("n", 1), apply("b", 2))
        assert [step.name for step in chain.convolutions] == ["a", "b"]


class TestHalos:
    def test_each_convolution_asks_for_its_padding_more(self) -> None:
        assert sizes(program(apply("a", 0), apply("b", 1), apply("c", 2, 5))) == [(4, 4), (3, 3), (2, 2), (0, 0)]

    def test_a_stride_multiplies_what_is_owed_behind_it(self) -> None:
        assert sizes(program(apply("a", 0, stride=2), apply("b", 1))) == [(3, 3), (1, 1), (0, 0)]

    def test_sides_are_counted_apart(self) -> None:
        steps = (apply("a", 0, 4, (0, 3)), apply("b", 1, 2, (1, 0), dilation=2, stride=2), apply("c", 2, 3, (2, 0)))
        assert sizes(program(*steps)) == [(5, 3), (5, 0), (2, 0), (0, 0)]

    def test_a_tensor_with_two_readers_owes_the_most_on_each_side(self) -> None:
        steps = (apply("a", 0, 3, (2, 0)), apply("b", 0, 3, (0, 2)), Step("add", "sum", (1, 2)))
        assert sizes(program(*steps)) == [(2, 2), (0, 0), (0, 0), (0, 0)]

    def test_a_sum_hands_its_halo_to_all_operands(self) -> None:
        steps = (apply("a", 0), Step("add", "sum", (1, 0)), apply("b", 2))
        assert sizes(program(*steps)) == [(2, 2), (1, 1), (1, 1), (0, 0)]

    def test_nothing_is_owed_where_nothing_is_padded(self) -> None:
        assert sizes(program(apply("a", 0, 3, (0, 0)), apply("b", 1, 5, (0, 0)))) == [(0, 0)] * 3

    def test_a_crop_asks_for_less_but_never_for_less_than_nothing(self) -> None:
        cropped = program(crop("crop", 0, 2, 1), apply("a", 1))
        assert sizes(cropped) == [(0, 0), (1, 1), (0, 0)]
        assert asked_of_operand(cropped.steps[1], ((1, 1),)) == ((-1, 0),)

    def test_a_sum_asks_for_what_it_owes(self) -> None:
        halo: Halo = ((1, 2),)
        assert asked_of_operand(Step("add", "sum", (0, 1)), halo) == halo


class TestKeepsBorders:
    @pytest.mark.parametrize(
        ("steps", "keeps"),
        [
            pytest.param((apply("a", 0),), True, id="one layer"),
            pytest.param((apply("a", 0), apply("b", 1)), False, id="3x3 after 3x3"),
            pytest.param((apply("a", 0), apply("b", 1, 1)), True, id="1x1 after anything"),
            pytest.param((apply("a", 0, 1), apply("b", 1)), True, id="anything after a 1x1 without bias"),
            pytest.param((apply("a", 0, 1, bias=True), apply("b", 1)), False, id="3x3 after a 1x1 with bias"),
            pytest.param((apply("a", 0, 1), norm("n", 1), apply("b", 2)), False, id="3x3 after a norm"),
            pytest.param((apply("a", 0), norm("n", 1)), True, id="norm after 3x3"),
            pytest.param((apply("a", 0, 3, (0, 0)), apply("b", 1, 3, (0, 0))), True, id="nothing padded"),
            pytest.param((apply("a", 0, 3, (1, 1)), apply("b", 1, 3, (0, 0))), True, id="only the first padded"),
            pytest.param((apply("a", 0, 3, (0, 0)), apply("b", 1, 3, (1, 0))), False, id="only the second padded"),
            pytest.param((apply("a", 0), apply("b", 0, 1), Step("s", "sum", (1, 2))), True, id="parallel branches"),
            pytest.param((apply("a", 0), Step("s", "sum", (1, 0)), apply("b", 2)), False, id="3x3 after a block"),
            pytest.param((apply("a", 0, 1), Step("s", "sum", (1, 0)), apply("b", 2)), True, id="3x3 after a sum of 1x1"),
            pytest.param((crop("c", 0, 1, 1), apply("a", 1)), False, id="padding where a crop took pixels"),
        ],
    )
    def test_it_does_where_what_is_padded_inside_is_zero_outside(self, steps: tuple[Step, ...], keeps: bool) -> None:
        assert program(*steps).keeps_borders() is keeps


class TestWithout:
    def test_a_removed_map_is_an_identity(self) -> None:
        chain = program(apply("a", 0), norm("n", 1), apply("b", 2))
        assert chain.without({"a", "n"}) == program(apply("b", 0))

    def test_the_last_may_go(self) -> None:
        chain = program(apply("a", 0), apply("b", 1), norm("n", 2))
        assert chain.without({"b", "n"}) == program(apply("a", 0))

    def test_what_is_not_read_any_more_goes_with_the_last(self) -> None:
        fork = program(apply("a", 0), apply("b", 0), apply("c", 1))
        assert fork.without({"c"}) == program(apply("a", 0))

    def test_a_branch_may_become_the_identity(self) -> None:
        block = program(apply("a", 0), Step("add", "sum", (1, 0)))
        assert block.without({"a"}) == program(Step("add", "sum", (0, 0)))

    def test_sums_stay_though_they_be_named(self) -> None:
        block = program(apply("a", 0), Step("add", "sum", (1, 0)))
        assert block.without({"add", "x"}) == block


def test_it_prints_as_a_formula() -> None:
    steps = (apply("a", 0), apply("b", 1), Step("add", "sum", (2, 0)), apply("c", 0), Step("cat", "concat", (3, 4)))
    assert str(program(*steps)) == "[(a > b + x) | c]"
