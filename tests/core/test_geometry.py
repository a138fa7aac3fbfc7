"""Sizes against torch's own convolutions, and against each other."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from fxmerge.core.geometry import Axis, Geometry, whole
from fxmerge.errors import PlanError

PADDINGS = st.tuples(st.integers(-2, 4), st.integers(-2, 4))
AXES = st.builds(Axis.convolution, st.integers(1, 5), st.integers(1, 3), PADDINGS, st.integers(1, 3))


def geometry(inputs: int = 4, outputs: int = 4, kernel: int = 3, **options: Any) -> Geometry:
    stride, padding = options.pop("stride", 1), options.pop("padding", kernel // 2)
    axis = Axis.convolution(kernel, stride, (padding, padding), options.pop("dilation", 1))
    return Geometry(inputs, outputs, (axis, axis), **options)


class TestAxis:
    @given(AXES, st.integers(1, 40))
    def test_outputs_are_as_many_as_torchs_convolution_gives(self, axis: Axis, size: int) -> None:
        padded = size + sum(axis.padding)
        assume(padded >= axis.extent)
        image, kernel = torch.zeros(1, 1, padded), torch.zeros(1, 1, axis.taps)
        assert axis.outputs(size) == F.conv1d(image, kernel, stride=axis.stride, dilation=axis.dilation).shape[2]

    @given(st.integers(1, 6), st.integers(1, 3), PADDINGS, st.integers(1, 4))
    def test_a_convolution_gives_its_padding_back(self, kernel: int, stride: int, padding: Any, dilation: int) -> None:
        assert Axis.convolution(kernel, stride, padding, dilation).padding == padding

    @given(AXES, AXES, st.integers(1, 60))
    def test_outputs_of_a_chain_are_those_of_the_second_on_those_of_the_first(self, first: Axis, second: Axis, size: int) -> None:
        assert first.then(second).outputs(size) == second.outputs(first.outputs(size))

    @given(AXES, AXES, AXES)
    def test_chains_associate(self, a: Axis, b: Axis, c: Axis) -> None:
        assert a.then(b).then(c) == a.then(b.then(c))

    @given(AXES, AXES)
    def test_a_chain_reads_from_the_first_tap_of_both_to_the_last(self, first: Axis, second: Axis) -> None:
        chain = first.then(second)
        assert chain.offset == first.offset + first.stride * second.offset
        assert chain.last == first.last + first.stride * second.last

    @given(AXES)
    def test_the_identity_changes_nothing_on_either_side(self, axis: Axis) -> None:
        assert Axis().then(axis) == axis == axis.then(Axis())

    @given(AXES, AXES)
    def test_sums_commute_and_cover_both(self, a: Axis, b: Axis) -> None:
        b = replace(b, stride=a.stride)
        total = a.plus(b)
        assert total == b.plus(a)
        positions = {total.offset + total.dilation * t for t in range(total.taps)}
        assert all({x.offset + x.dilation * t for t in range(x.taps)} <= positions for x in (a, b))

    def test_the_dilation_that_all_taps_share_is_taken_out(self) -> None:
        dilated = Axis.convolution(3, 1, (2, 2), 2)
        assert dilated.then(dilated) == Axis.convolution(5, 1, (4, 4), 2)

    def test_a_tap_between_the_taps_of_a_dilated_kernel_makes_it_dense(self) -> None:
        assert Axis.convolution(3, 1, (2, 2), 2).plus(Axis.convolution(3, 1, (1, 1), 1)).taps == 5

    @pytest.mark.parametrize(("taps", "offset"), [(7, -3), (5, -2), (3, -1), (1, 0), (6, -2), (4, -1)])
    def test_a_smaller_kernel_sits_on_the_middle_taps(self, taps: int, offset: int) -> None:
        small = Axis.convolution(7, 1, (3, 3), 1).shrunk(taps)
        assert (small.taps, small.offset) == (taps, offset)
        assert small.outputs(20) == 20

    def test_a_smaller_kernel_keeps_the_dilation_while_it_has_more_taps_than_one(self) -> None:
        axis = Axis.convolution(5, 1, (4, 4), 2)
        assert axis.shrunk(3) == Axis.convolution(3, 1, (2, 2), 2)
        assert axis.shrunk(1) == Axis()


class TestGeometry:
    def test_groups_of_a_chain_are_the_greatest_common_divisor(self) -> None:
        assert geometry(12, 12, groups=4).then(geometry(12, 24, groups=6)).groups == 2

    def test_depthwise_after_depthwise_stays_depthwise(self) -> None:
        chain = geometry(8, 8, groups=8).then(geometry(8, 8, groups=8, bias=True))
        assert chain.depthwise
        assert chain.weight_shape == (8, 1, 5, 5)
        assert chain.bias

    @pytest.mark.parametrize(("changes", "depthwise"), [({}, True), ({"outputs": 8}, True), ({"inputs": 1, "groups": 1}, False)])
    def test_depthwise_allows_a_multiplier_and_needs_channels(self, changes: dict[str, int], depthwise: bool) -> None:
        assert geometry(**{"inputs": 4, "groups": 4, **changes}).depthwise is depthwise

    @pytest.mark.parametrize(
        ("changes", "keeps"),
        [({}, True), ({"outputs": 8}, False), ({"stride": 2}, False), ({"padding": 0}, False), ({"groups": 2}, True)],
    )
    def test_a_shape_is_kept_by_equal_channels_no_stride_and_full_padding(self, changes: Any, keeps: bool) -> None:
        assert geometry(**changes).preserves_shape is keeps

    def test_only_one_unpadded_tap_without_a_stride_is_pointwise(self) -> None:
        assert geometry(kernel=1).pointwise
        assert Geometry.identity(4, 2).pointwise
        assert not geometry().pointwise
        assert not geometry(kernel=1, stride=2).pointwise
        assert not geometry(kernel=1, padding=1).pointwise

    def test_multiply_adds_count_every_weight_once_for_every_output_pixel(self) -> None:
        assert geometry(4, 6, stride=2, groups=2).multiply_adds((9, 7)) == 6 * 2 * 9 * 5 * 4

    def test_a_concat_has_the_outputs_of_both_and_no_groups(self) -> None:
        both = geometry(4, 4, groups=4).concat(geometry(4, 2, 1, bias=True))
        assert (both.out_channels, both.groups, both.kernel, both.bias) == (6, 1, (3, 3), True)

    def test_channels_that_do_not_meet_in_a_chain_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="^8 channels meet 4$"):
            geometry(4, 8).then(geometry(4, 4))

    def test_strides_that_differ_in_a_sum_are_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"^paths with different strides meet: \(1, 1\) and \(2, 2\)$"):
            geometry().plus(geometry(stride=2))

    def test_channels_that_differ_in_a_sum_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="^paths with different channels meet: 4 -> 4 and 4 -> 8$"):
            geometry().plus(geometry(4, 8))

    def test_inputs_that_differ_in_a_concat_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="^paths with different channels meet: 4 -> 4 and 2 -> 4$"):
            geometry().concat(geometry(2, 4))

    @pytest.mark.parametrize(
        ("shown", "text"),
        [
            (geometry(), "4->4 3x3"),
            (geometry(4, 4, groups=4), "4->4 3x3 dw"),
            (geometry(4, 8, groups=4, stride=2), "4->8 3x3 s2x2 g4"),
            (geometry(4, 8, 1, groups=2), "4->8 1x1 g2"),
            (geometry(dilation=2), "4->4 3x3 d2x2"),
        ],
    )
    def test_it_prints_what_is_not_the_default(self, shown: Geometry, text: str) -> None:
        assert str(shown) == text

    @given(st.lists(AXES, min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.booleans())
    def test_it_survives_json(self, axes: list[Axis], inputs: int, outputs: int, groups: int, bias: bool) -> None:
        given_ = Geometry(inputs * groups, outputs * groups, tuple(axes), groups, bias)
        assert Geometry.from_json(json.loads(json.dumps(given_.to_json()))) == given_

    @pytest.mark.parametrize(
        ("damage", "text"),
        [
            ({"groups": 3}, "sizes do not fit"),
            ({"groups": 0}, "sizes do not fit"),
            ({"in_channels": -4}, "sizes do not fit"),
            ({"axes": [[0, 1, 0, 1, -1]]}, "sizes do not fit"),
            ({"axes": [[3, 0, -1, 1, -1]]}, "sizes do not fit"),
            ({"axes": [[3, 1, -1, 0, -1]]}, "sizes do not fit"),
            ({"axes": [[3, 1, -1, 1, -1, 1, 5]]}, "not a geometry: TypeError"),
            ({"axes": [[3, 1, -1, 1, -1, 0]]}, "sizes do not fit"),
            ({"axes": [[3, 2, -1, 1, -1, 2]]}, "sizes do not fit"),
            ({"axes": [[3.0, 1, -1, 1, -1]]}, "expected a whole number, found 3.0"),
            ({"axes": None}, "not a geometry: TypeError"),
            ({"out_channels": "4"}, "expected a whole number, found '4'"),
            ({"out_channels": True}, "expected a whole number, found True"),
        ],
    )
    def test_damage_is_a_plan_error_that_says_what_was_found(self, damage: dict[str, Any], text: str) -> None:
        with pytest.raises(PlanError, match=text):
            Geometry.from_json({**geometry(4, 4).to_json(), **damage})

    def test_a_missing_field_is_named(self) -> None:
        data = geometry().to_json()
        del data["groups"]
        with pytest.raises(PlanError, match="KeyError.'groups'"):
            Geometry.from_json(data)


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_only_an_int_is_a_whole_number(value: object) -> None:
    with pytest.raises(ValueError, match="expected a whole number, found"):
        whole(value)


def test_a_whole_number_is_given_back() -> None:
    assert whole(-3) == -3
