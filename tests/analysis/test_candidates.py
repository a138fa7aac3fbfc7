"""Ways to merge: against all subsets of convolutions, tried one by one; the spaces with a name; what is exact."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fxmerge.analysis.candidates import Space, propose
from fxmerge.analysis.segments import Findings, find_segments
from fxmerge.core.geometry import Geometry
from fxmerge.core.segment import Candidate, Segment
from fxmerge.errors import InputError
from fxmerge.graph.trace import trace
from fxmerge.solve.space import restrict
from tests import zoo
from tests.zoo import conv, images, specimen


def found(name: str) -> Findings:
    return find_segments(trace(specimen(name), images(name)))


def candidates(findings: Findings, segment: str = "", space: Space | None = None) -> list[Candidate]:
    return [c for p in propose(findings, space) if segment in ("", str(p.segment)) for c in p.candidates]


def ids(findings: Findings, segment: str = "", space: Space | None = None) -> list[str]:
    return [candidate.id.removeprefix(f"{segment} ".replace(" -> ", "->")) for candidate in candidates(findings, segment, space)]


def weights(findings: Findings) -> dict[str, float]:
    graph = findings.graph
    calls = (node for node in graph.graph.nodes if node.op == "call_module")
    modules = {node.name: graph.get_submodule(str(node.target)) for node in calls}
    return {name: float(m.weight.detach().abs().sum()) for name, m in modules.items() if isinstance(m, nn.modules.conv._ConvNd)}


class TestOffers:
    def test_two_convolutions_compose_lose_one_or_are_fitted(self) -> None:
        assert ids(found("residual_plus"), "relu -> bn2") == [
            "identity",
            "composed 4->4 5x5",
            "composed 4->4 3x3 pruned",
            "fitted 4->4 5x5",
            "fitted 4->4 3x3",
            "fitted 4->4 1x1",
        ]

    def test_a_layer_alone_may_go_or_shrink(self) -> None:
        assert ids(found("residual_plus"), "relu_1 -> bn2") == ["identity", "fitted 4->4 1x1"]

    def test_a_convolution_that_changes_the_shape_is_forced_in(self) -> None:
        assert ids(found("stride"), "input_1 -> _3") == [
            "fitted 3->5 7x7 s4x4",
            "fitted 3->5 5x5 s4x4",
            "fitted 3->5 3x3 s4x4",
            "fitted 3->5 1x1 s4x4",
        ]

    def test_depthwise_stays_depthwise(self) -> None:
        [composed] = [c for c in candidates(found("depthwise"), "input_1 -> _3") if c.kind == "composed" and not c.removed]
        assert (composed.geometry.groups, composed.geometry.weight_shape) == (3, (6, 1, 5, 5))

    def test_a_norm_goes_with_the_convolution_before_it(self) -> None:
        pruned = [c for c in candidates(found("residual_plus")) if c.removed]
        assert pruned
        for candidate in pruned:
            assert ("bn1" in candidate.removed) == ("conv1" in candidate.removed)
            assert ("bn2" in candidate.removed) == ("conv2" in candidate.removed)

    def test_an_image_less_its_convolution_is_one_convolution_exactly(self) -> None:
        offered = candidates(found("difference"), "relu -> relu_1")
        assert [(c.kind, c.geometry.kernel, c.removed) for c in offered if c.exact] == [("composed", (3, 3), ())]

    def test_a_kernel_larger_than_allowed_is_only_offered_smaller(self) -> None:
        offered = ids(found("residual_plus"), "relu -> bn2", Space(max_kernel=3))
        assert offered == ["identity", "composed 4->4 3x3 pruned", "fitted 4->4 3x3", "fitted 4->4 1x1"]

    def test_fitted_kernels_are_offered_in_groups_where_they_divide_the_channels(self) -> None:
        offered = ids(found("residual_plus"), "relu -> bn2", Space(max_kernel=3, groups=(2, 3, 0, 4)))
        assert [name for name in offered if name.startswith("fitted")] == [
            "fitted 4->4 3x3",
            "fitted 4->4 3x3 g2",
            "fitted 4->4 3x3 dw",
            "fitted 4->4 1x1",
            "fitted 4->4 1x1 g2",
            "fitted 4->4 1x1 dw",
        ]

    def test_groups_that_the_convolutions_have_are_never_joined(self) -> None:
        for proposal in propose(found("depthwise"), Space(groups=(2, 3, 0))):
            own = proposal.segment.expression.geometry.groups
            assert all(c.geometry.groups % own == 0 for c in proposal.candidates if c.kind == "fitted")

    def test_nearest_upsampling_and_a_convolution_are_one_exactly(self) -> None:
        assert ids(found("upsampling_one_dimension"), "input_1 -> _2") == [
            "composed 3->4 7 u3",
            "fitted 3->4 7 u3",
            "fitted 3->4 4 u3",
        ]
        [exact] = [c for c in candidates(found("upsampling_one_dimension"), "input_1 -> _2") if c.exact]
        assert exact.geometry.padding == ((1, 1),)

    def test_a_bias_before_nearest_upsampling_makes_its_border_differ(self) -> None:
        net = nn.Sequential(conv(3, 4, 1, bias=True), nn.Upsample(scale_factor=2), conv(4, 4))
        found_ = find_segments(trace(net, images().float()))
        assert not any(c.exact for c in candidates(found_, "input_1 -> _2"))
        net[0].bias = None
        assert any(c.exact for c in candidates(find_segments(trace(net, images().float())), "input_1 -> _2"))

    def test_a_bias_that_would_become_a_pattern_leaves_fitted_candidates_alone(self) -> None:
        offered = candidates(found("generator"), "_2 -> _5")
        assert {c.kind for c in candidates(found("generator"), "input_1 -> _5")} == {"fitted"}
        assert {c.kind for c in offered} == {"fitted"}

    def test_a_convolution_beside_an_upsampling_may_be_pruned_with_its_bias(self) -> None:
        net = nn.Sequential(conv(4, 4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.ReLU(), conv(4, 4))
        offered = candidates(find_segments(trace(net, torch.zeros(1, 4, 12, 12))), "input_1 -> _4")
        assert [(str(c.geometry), c.removed) for c in offered if c.kind == "composed"] == [
            ("4->4 6x6 u2x2", ("_0",)),
            ("4->4 4x4 u2x2", ("_0", "_4")),
        ]

    def test_a_kernel_is_as_large_as_the_pixels_that_one_output_reads(self) -> None:
        net = nn.Sequential(conv(3, 4), nn.Upsample(scale_factor=2), conv(4, 4))
        found_ = find_segments(trace(net, torch.zeros(1, 3, 12, 12)))
        assert "composed 3->4 8x8 u2x2" in ids(found_, "input_1 -> _2", Space(max_kernel=4))
        assert "composed 3->4 8x8 u2x2" not in ids(found_, "input_1 -> _2", Space(max_kernel=3))

    def test_no_fitted_kernel_leaves_outputs_that_read_nothing(self) -> None:
        for name in ("generator", "transposed_convolutions", "decoder"):
            for candidate in candidates(found(name)):
                assert candidate.kind != "fitted" or all(axis.taps >= axis.up for axis in candidate.geometry.axes if axis.taps > 1)

    @pytest.mark.parametrize("name", zoo.ZOO)
    def test_ids_are_unique_in_a_network(self, name: str) -> None:
        offered = ids(found(name))
        assert len(offered) == len(set(offered)) > 0

    @pytest.mark.parametrize("name", zoo.ZOO)
    def test_only_what_keeps_the_shape_may_become_the_identity(self, name: str) -> None:
        findings = found(name)
        for proposal in propose(findings):
            keeps = proposal.segment.expression.geometry.preserves_shape
            assert any(c.kind == "identity" for c in proposal.candidates) == keeps

    @pytest.mark.parametrize("name", zoo.ZOO)
    def test_fitted_kernels_sit_inside_the_composed_one(self, name: str) -> None:
        for proposal in propose(found(name)):
            whole = proposal.segment.expression.geometry
            for candidate in (c for c in proposal.candidates if c.kind == "fitted"):
                small = candidate.geometry
                assert small.bias
                assert (small.groups, small.stride) == (whole.groups, whole.stride)
                for inner, outer in zip(small.axes, whole.axes, strict=True):
                    assert outer.offset <= inner.offset
                    assert inner.last <= outer.last
                    assert inner.outputs(20) == outer.outputs(20)


def choices(segment: Segment, norms: dict[str, float]) -> Iterator[tuple[Geometry, float, frozenset[str]]]:
    """Every subset of the convolutions that may go: what is left, its L1 norm, and the names that go, norms included."""
    steps = segment.expression.steps
    readers = [sum(i in step.operands for step in steps) for i in range(len(steps))]
    behind = {steps[s.operands[0]].name: s.name for s in steps if s.role == "norm" and readers[s.operands[0]] == 1}
    prunable = [s.name for s in segment.expression.convolutions if s.geometry is not None and s.geometry.preserves_shape]
    for size in range(len(prunable) + 1):
        for gone in map(frozenset, itertools.combinations(prunable, size)):
            removed = gone | {behind[name] for name in gone if name in behind}
            kept = sum(norms[name] for name in segment.convolutions if name not in gone)
            yield segment.expression.without(removed).geometry, kept, removed


@pytest.mark.parametrize(
    "name",
    [
        "residual_plus",
        "pre_activation",
        "inverted_residual",
        "concat_branches",
        "groups",
        "no_bias",
        "same_padding",
    ],
)
def test_of_the_subsets_that_give_one_geometry_the_one_that_keeps_most_is_offered(name: str) -> None:
    findings = found(name)
    norms = weights(findings)
    for segment in findings.segments:
        best: dict[Geometry, tuple[float, frozenset[str]]] = {}
        for geometry, kept, removed in choices(segment, norms):
            if geometry not in best or kept > best[geometry][0]:
                best[geometry] = kept, removed
        several = len(segment.convolutions) > 1 or segment.activations or " + " in str(segment.expression)
        expected = {
            (geometry, removed)
            for geometry, (_, removed) in best.items()
            if several and removed and not set(segment.convolutions) <= removed and max(geometry.kernel) <= 99
        }
        space = Space(max_kernel=99, fitted=False, identity=False)
        offered = {(c.geometry, frozenset(c.removed)) for c in candidates(findings, str(segment), space) if c.removed}
        assert offered == expected, segment


class TestSpaces:
    NAME = "residual_plus"

    def test_joint_is_everything(self) -> None:
        assert candidates(found(self.NAME), space=Space.named("joint")) == candidates(found(self.NAME))

    def test_composed_is_what_was_published(self) -> None:
        assert {c.kind for c in candidates(found(self.NAME), space=Space.named("composed"))} == {"composed", "identity"}

    def test_activations_removes_nothing_else(self) -> None:
        offered = candidates(found(self.NAME), space=Space.named("activations"))
        assert {c.kind for c in offered} == {"composed"}
        assert all(c.activations and not c.removed for c in offered)

    def test_layers_drops_single_convolutions_only(self) -> None:
        offered = candidates(found(self.NAME), space=Space.named("layers"))
        assert {c.id for c in offered} == {"relu->relu_1 identity", "relu_1->bn2 identity"}

    @pytest.mark.parametrize("name", zoo.ZOO)
    def test_layers_are_what_the_solver_takes_for_layers(self, name: str) -> None:
        findings = found(name)
        taken = restrict(findings.region, candidates(findings), "layers")
        assert set(ids(findings, space=Space.named("layers"))) == {candidate.id for candidate in taken}

    def test_a_pool_behind_a_convolution_is_a_layer_of_its_own(self) -> None:
        net = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4), nn.AvgPool2d(3, 1, 1), nn.ReLU())
        offered = ids(find_segments(trace(net, torch.zeros(1, 3, 12, 12))), space=Space.named("layers"))
        assert offered
        assert not any(name.endswith("->_4 identity") and name.startswith("_1->") for name in offered)

    def test_exact_keeps_the_function(self) -> None:
        offered = candidates(found("repvgg_block"), space=Space.named("exact"))
        whole = {"_1->_2_relu composed 4->4 3x3", "_2_relu->_3_relu composed 4->6 3x3 s2x2"}
        two_of_three_branches = {"_1->_2_add composed 4->4 3x3"}
        assert {c.id for c in offered} == whole | two_of_three_branches
        assert all(c.exact for c in offered)

    def test_exact_offers_nothing_where_activations_or_borders_would_go(self) -> None:
        assert not candidates(found(self.NAME), space=Space.named("exact"))

    def test_every_name_is_a_space(self) -> None:
        for name in ("joint", "composed", "activations", "layers", "exact"):
            assert isinstance(Space.named(name), Space)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "exact"),
    [
        ([conv(3, 4), conv(4, 4, 1)], True),
        ([conv(3, 4, 1, bias=False), conv(4, 4)], True),
        ([conv(3, 4, 1), conv(4, 4)], False),
        ([conv(3, 4), conv(4, 4)], False),
        ([conv(3, 4, padding=0), conv(4, 4, padding=0)], True),
        ([conv(3, 4), nn.ReLU(), conv(4, 4, 1)], False),
        ([conv(3, 4), conv(4, 4, 1), nn.ReLU()], True),
    ],
    ids=["3x3 1x1", "1x1 3x3", "1x1 with bias 3x3", "3x3 3x3", "unpadded", "activation inside", "activation behind"],
)
def test_exact_means_no_activation_gone_and_borders_kept(layers: list[nn.Module], exact: bool) -> None:
    findings = find_segments(trace(nn.Sequential(*layers), torch.zeros(1, 3, 9, 9)))
    [last] = [c for c in candidates(findings) if c.kind == "composed" and not c.removed]
    assert last.exact is exact


def test_a_kernel_that_would_read_padding_alone_is_not_offered() -> None:
    model = nn.Sequential(nn.ZeroPad2d((2, 0, 1, 1)), conv(3, 4, padding=0))
    narrow, wide = (find_segments(trace(model, torch.zeros(1, 3, 8, width))) for width in (1, 2))
    assert [len(candidates(findings, "input_1 -> _1")) for findings in (narrow, wide)] == [0, 1]


def test_an_exact_space_offers_nothing_else_whatever_else_it_names() -> None:
    findings = find_segments(trace(specimen("repvgg_block"), images("repvgg_block")))
    offered = [c for p in propose(findings, Space(exact=True)) for c in p.candidates]
    assert offered
    assert all(candidate.exact for candidate in offered)


def test_a_space_of_no_such_name_or_number_is_told() -> None:
    with pytest.raises(InputError, match="one of joint, composed, activations, layers or exact, found 'layer'"):
        Space.named("layer")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_kernel must be a whole number from 1 on, found 'a'"):
        Space(max_kernel="a")  # type: ignore[arg-type]
    assert Space(groups=[2, 0]) == Space(groups=(2, 0))
    for wrong in ((-1,), ("2",), "2", 2):
        with pytest.raises(InputError, match="groups must be"):
            Space(groups=wrong)  # type: ignore[arg-type]
