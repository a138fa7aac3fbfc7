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
#: Kernel, stride, padding, output padding, dilation.
TRANSPOSED = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 4), st.integers(0, 3), st.integers(1, 3))
ENLARGING = st.one_of(st.builds(Axis.nearest, st.integers(2, 5)), TRANSPOSED.map(lambda settings: Axis.transposed(*settings)))
ANY = st.one_of(AXES, ENLARGING)


def compose(*axes: Axis) -> Axis | None:
    """None where the image becomes smaller and larger."""
    try:
        return axes[0].then(axes[1]) if len(axes) == 2 else axes[0]
    except ValueError:
        return None


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

    @given(TRANSPOSED, st.integers(1, 12))
    def test_outputs_are_as_many_as_torchs_transposed_convolution_gives(self, settings: Any, size: int) -> None:
        kernel, stride, padding, spare, dilation = settings
        wanted = (size - 1) * stride + dilation * (kernel - 1) + 1 - 2 * padding + spare
        assume(wanted > 0 and spare < max(stride, dilation))
        image = F.conv_transpose1d(torch.zeros(1, 1, size), torch.zeros(1, 1, kernel), None, stride, padding, spare, 1, dilation)
        assert Axis.transposed(*settings).outputs(size) == image.shape[2]

    @given(ANY, ANY, st.integers(1, 60))
    def test_outputs_of_a_chain_are_those_of_the_second_on_those_of_the_first(self, first: Axis, second: Axis, size: int) -> None:
        chain = compose(first, second)
        assert (chain is None) == ((first.stride > 1 and second.up > 1) or (first.up > 1 and second.stride > 1))
        if chain is not None:
            assert chain.outputs(size) == second.outputs(first.outputs(size))

    @given(ANY, ANY, ANY)
    def test_chains_associate(self, a: Axis, b: Axis, c: Axis) -> None:
        ab, bc = compose(a, b), compose(b, c)
        assume(ab is not None and bc is not None)
        assert ab is not None
        assert bc is not None
        assert compose(ab, c) == compose(a, bc)

    @given(ENLARGING, st.integers(0, 7), st.integers(0, 7), st.integers(1, 6))
    def test_the_unpadded_map_on_the_halo_gives_what_is_wanted_and_less_than_a_pixel_more(
        self, axis: Axis, before: int, after: int, size: int
    ) -> None:
        (u, v), (more, behind), bare = axis.halo(before, after), axis.surplus(before, after), axis.unpadded
        assume(size + min(0, u) + min(0, v) + u + v > 0)
        assert 0 <= more < axis.up
        assert 0 <= behind < axis.up
        assert bare.outputs(size + u + v) == before + axis.outputs(size) + after + more + behind
        # Output 0 of the unpadded map is output -(before + more) of this one: both read the same positions.
        assert bare.offset - axis.up * u == axis.offset - (before + more)

    @given(ANY, st.integers(0, 7), st.integers(0, 7), st.integers(4, 9))
    def test_the_halo_holds_every_pixel_that_is_read(self, axis: Axis, before: int, after: int, size: int) -> None:
        u, v = axis.halo(before, after)
        outputs = range(-before, axis.outputs(size) + after)
        read = {axis.stride * p + axis.offset + axis.dilation * t for p in outputs for t in range(axis.taps)}
        pixels = {position // axis.up for position in read if position % axis.up == 0}
        assert pixels <= {*range(-u, size + v)}

    @given(ANY, st.integers(1, 9))
    def test_zeros_are_kept_where_nothing_outside_reads_a_pixel(self, axis: Axis, size: int) -> None:
        count = axis.outputs(size)
        outside = (*range(-40, 0), *range(count, count + 40))
        pixels = {axis.up * q for q in range(size)}
        reads = any(axis.stride * p + axis.offset + axis.dilation * t in pixels for p in outside for t in range(axis.taps))
        assert not (axis.keeps_zeros and reads)

    @pytest.mark.parametrize(
        ("axis", "keeps"),
        [
            (Axis(), True),
            (Axis.nearest(3), True),
            (Axis.transposed(2, 2, 0, 0, 1), True),
            (Axis.transposed(4, 2, 1, 0, 1), False),
            (Axis.convolution(3, 1, (1, 1), 1), False),
            (Axis.convolution(3, 1, (2, 2), 1), True),
            (Axis.convolution(1, 2, (0, 0), 1), True),
            (Axis.convolution(2, 2, (0, 0), 1), False),
        ],
    )
    def test_what_keeps_zeros(self, axis: Axis, keeps: bool) -> None:
        assert axis.keeps_zeros is keeps

    def test_nearest_upsampling_and_a_kernel_are_one_transposed_convolution(self) -> None:
        assert Axis.nearest(2).then(Axis.convolution(3, 1, (1, 1), 1)) == Axis.transposed(4, 2, 1, 0, 1)

    def test_a_filter_before_an_upsampling_has_its_taps_spread_behind_it(self) -> None:
        assert Axis.convolution(3, 1, (1, 1), 1).then(Axis.transposed(1, 2, 0, 1, 1)) == Axis(3, 1, -2, 2, -1, 2)

    @pytest.mark.parametrize(
        ("first", "second", "text"),
        [
            (Axis(1, 2), Axis.nearest(3), "became smaller by 2 is made larger by 3"),
            (Axis.nearest(3), Axis(1, 2), "became larger by 3 is made smaller by 2"),
        ],
    )
    def test_smaller_and_larger_do_not_compose(self, first: Axis, second: Axis, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            first.then(second)

    @given(AXES, AXES)
    def test_a_chain_reads_from_the_first_tap_of_both_to_the_last(self, first: Axis, second: Axis) -> None:
        chain = first.then(second)
        assert chain.offset == first.offset + first.stride * second.offset
        assert chain.last == first.last + first.stride * second.last

    @given(ANY)
    def test_the_identity_changes_nothing_on_either_side(self, axis: Axis) -> None:
        assert Axis().then(axis) == axis == axis.then(Axis())

    @given(ANY, ANY)
    def test_sums_commute_and_cover_both(self, a: Axis, b: Axis) -> None:
        b = replace(b, stride=a.stride, up=a.up)
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

    def test_no_shape_is_kept_where_pixels_become_several(self) -> None:
        assert not Geometry(4, 4, (Axis.nearest(2),)).preserves_shape

    def test_only_one_unpadded_tap_without_a_stride_is_pointwise(self) -> None:
        assert geometry(kernel=1).pointwise
        assert Geometry.identity(4, 2).pointwise
        assert not geometry().pointwise
        assert not geometry(kernel=1, stride=2).pointwise
        assert not geometry(kernel=1, padding=1).pointwise

    def test_multiply_adds_count_every_weight_once_for_every_output_pixel(self) -> None:
        assert geometry(4, 6, stride=2, groups=2).multiply_adds((9, 7)) == 6 * 2 * 9 * 5 * 4

    def test_taps_between_pixels_take_no_multiply_adds(self) -> None:
        nearest, conv = Geometry(4, 4, (Axis.nearest(2),) * 2, 4), geometry(4, 4)
        assert conv.multiply_adds((20, 14)) == 36 * 4 * 280
        assert nearest.then(conv).multiply_adds((10, 7)) == 16 * 4 * 280

    def test_a_bias_becomes_a_pattern_where_pixels_are_uneven_sums(self) -> None:
        uneven = Geometry(4, 4, (Axis.transposed(3, 2, 1, 1, 1),), even=False)
        biased, plain, nearest = Geometry(4, 4, (Axis(),), bias=True), Geometry(4, 4, (Axis(),)), Geometry(4, 4, (Axis.nearest(2),))
        assert biased.then(plain).then(uneven).phased
        assert biased.then(plain.then(uneven)).phased
        assert biased.then(uneven).plus(plain.then(uneven)).phased
        assert not plain.then(uneven).then(biased).phased
        assert not biased.then(nearest).phased
        assert biased.then(nearest).then(uneven).phased

    def test_larger_on_one_axis_and_smaller_on_another_does_not_compose(self) -> None:
        narrow = Geometry(4, 4, (Axis(1, 2), Axis()))
        with pytest.raises(ValueError, match="larger on one axis becomes smaller on another"):
            narrow.then(Geometry(4, 4, (Axis(), Axis.nearest(2))))

    def test_factors_that_differ_in_a_sum_are_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"became larger by different factors: \(2,\) and \(1,\)"):
            Geometry(4, 4, (Axis.nearest(2),)).plus(Geometry(4, 4, (Axis(),)))

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
            (Geometry(4, 4, (Axis.nearest(2), Axis.nearest(3)), 4), "4->4 2x3 u2x3 dw"),
        ],
    )
    def test_it_prints_what_is_not_the_default(self, shown: Geometry, text: str) -> None:
        assert str(shown) == text

    @given(
        st.one_of(st.lists(AXES, min_size=1, max_size=3), st.lists(ENLARGING, min_size=1, max_size=3)),
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, 4),
        st.booleans(),
    )
    def test_it_survives_json(self, axes: list[Axis], inputs: int, outputs: int, groups: int, bias: bool) -> None:
        given_ = Geometry(inputs * groups, outputs * groups, tuple(axes), groups, bias, axes[0].taps != axes[0].up)
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

    def test_the_json_of_what_does_not_enlarge_has_no_word_of_it(self) -> None:
        assert geometry().to_json() == {
            "in_channels": 4,
            "out_channels": 4,
            "axes": [[3, 1, -1, 1, -1], [3, 1, -1, 1, -1]],
            "groups": 1,
            "bias": False,
        }

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
