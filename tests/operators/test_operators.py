"""Operators: what each says a node is, against what torch computes; and one that a user brings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.parametrizations import weight_norm

from fxmerge.algebra.affine import Affine, scaling
from fxmerge.algebra.module import convolution_with, separate_padding
from fxmerge.analysis.candidates import propose
from fxmerge.analysis.segments import find_segments
from fxmerge.core.geometry import Geometry
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Reason
from fxmerge.graph.trace import trace
from fxmerge.operators import Activation, Join, Map, Norm, Opaque, Operators, Site, Verdict, default_operators
from fxmerge.operators.norms import InputNorm
from fxmerge.passes.annotate import annotate
from fxmerge.passes.fuse_segments import FuseSegments, fuse
from fxmerge.passes.linearize import Linearize, linearize
from tests.laws import relative_error
from tests.zoo import Net, conv, images

Forward = Callable[[Any, Any], Any]


def last(forward: Forward, x: Tensor | None = None, **modules: nn.Module) -> tuple[GraphModule, Node, Verdict]:
    """A net's graph, the node that computes its output, and the verdict on it."""
    graph = trace(Net(forward, **modules).double().eval(), images() if x is None else x)
    node = graph.graph.output_node().args[0]
    assert isinstance(node, Node)
    return graph, node, default_operators().verdicts(graph)[node]


MAPS: dict[str, Forward] = {
    "crop": lambda s, x: x[:, :, 1:-2, 3:],
    "step": lambda s, x: x[:, :, ::2, 1::3],
    "step and crop": lambda s, x: x[:, :, 1:-1:2, :-4:3],
    "rows only": lambda s, x: x[:, :, 2:],
    "a range of channels": lambda s, x: x[:, 1:],
    "every other channel": lambda s, x: x[:, ::2],
    "channels from the end": lambda s, x: x[:, -2:],
    "pad": lambda s, x: F.pad(x, (1, 2, 0, 3)),
    "pad one axis": lambda s, x: F.pad(x, (1, 2)),
    "pad a list": lambda s, x: F.pad(x, [0, 1, 1, 0]),
    "crop by padding": lambda s, x: F.pad(x, (-1, 2, -3, 0)),
    "pad channels": lambda s, x: F.pad(x, (0, 0, 0, 0, 2, 1)),
    "pad channels and rows": lambda s, x: F.pad(x, (0, 0, 1, 1, 1, 0), "constant", 0.0),
    "pad by keyword": lambda s, x: F.pad(x, pad=(1, 1), value=0),
    "an ellipsis": lambda s, x: x[..., 1:],
    "a number added": lambda s, x: x + 1,
    "a number before": lambda s, x: 2 * x,
    "a number subtracted": lambda s, x: x - 0.5,
    "divided by a number": lambda s, x: x / 3,
    "the negative": lambda s, x: -x,
    "a number for each channel": lambda s, x: x * torch.tensor([1.0, 2.0, 3.0]).double().view(1, 3, 1, 1),
    "divided by a number for each channel": lambda s, x: x / torch.tensor([1.0, 2.0, 3.0]).double().view(3, 1, 1),
    "a shift of each channel": lambda s, x: x - torch.tensor([1.0, 2.0, 3.0]).double().view(1, 3, 1, 1),
    "half of a split": lambda s, x: x.split([1, 2], 1)[1],
    "part of a chunk": lambda s, x: torch.chunk(x, 2, dim=1)[0],
    "narrow": lambda s, x: x.narrow(1, 1, 2),
    "slices in a row": lambda s, x: x[:, 1:][:, :, ::2][:, :, :, 1:],
    "F.avg_pool2d": lambda s, x: F.avg_pool2d(x, 3, 2, padding=1),
    "channel_shuffle": lambda s, x: F.channel_shuffle(x, 3),
    "nearest": lambda s, x: F.interpolate(x, scale_factor=2),
    "nearest by floats": lambda s, x: F.interpolate(x, None, (3.0, 2.0), "nearest"),
    "nearest-exact": lambda s, x: F.interpolate(x, scale_factor=(1, 3), mode="nearest-exact"),
    "upsample_nearest2d": lambda s, x: torch.ops.aten.upsample_nearest2d.vec(x, None, [2.0, 5.0]),
    "_upsample_nearest_exact2d": lambda s, x: torch.ops.aten._upsample_nearest_exact2d.vec(x, None, [2.0, 1.0]),
    "nn.Dropout": lambda s, x: s.dropout(x),
}

MODULES: dict[str, nn.Module] = {
    "AvgPool2d": nn.AvgPool2d(3),
    "AvgPool2d with a stride": nn.AvgPool2d((2, 3), (1, 2)),
    "AvgPool2d with padding": nn.AvgPool2d(3, 2, 1),
    "ZeroPad2d": nn.ZeroPad2d((3, 0, -1, 2)),
    "ConstantPad2d": nn.ConstantPad2d(1, 0.0),
    "Conv2d same": nn.Conv2d(3, 4, (3, 2), padding="same", dilation=(1, 2)),
    "ConvTranspose2d": nn.ConvTranspose2d(3, 4, 3),
    "ConvTranspose2d padded": nn.ConvTranspose2d(3, 6, (3, 2), 1, (2, 0), groups=3, dilation=(1, 2), bias=False),
    "ConvTranspose2d strided": nn.ConvTranspose2d(3, 4, 4, 2, 1),
    "ConvTranspose2d short": nn.ConvTranspose2d(3, 6, (1, 2), (3, 2), 0, (2, 0), groups=3),
    "ConvTranspose2d far": nn.ConvTranspose2d(3, 6, (4, 3), (2, 3), (4, 5), (1, 2), groups=3, dilation=(3, 1), bias=False),
    "Upsample": nn.Upsample(scale_factor=3),
    "Upsample exact": nn.Upsample(scale_factor=(2.0, 1.0), mode="nearest-exact"),
    "UpsamplingNearest2d": nn.UpsamplingNearest2d(scale_factor=2),
    "Conv2d grouped": nn.Conv2d(3, 6, (2, 5), 3, (1, 2), (4, 1), 3),
    "BatchNorm2d": nn.BatchNorm2d(3, eps=0.1),
    "Dropout2d": nn.Dropout2d(),
}


class TestMaps:
    @pytest.mark.parametrize("case", [*MAPS, *MODULES])
    def test_the_map_computes_what_the_node_computes(self, case: str) -> None:
        if case in MODULES:
            graph, node, verdict = last(lambda s, x: s.m(x), m=MODULES[case])
        else:
            graph, node, verdict = last(MAPS[case], identity=nn.Identity(), dropout=nn.Dropout())
        assert isinstance(verdict, Map), verdict
        operator = default_operators().find(graph, node)
        assert operator is not None
        affine = operator.affine(Site(graph, node))
        assert affine.geometry == verdict.geometry
        module = convolution_with(affine, like=affine.weight)
        for size in ((12, 12), (13, 17)):
            x = images(size=size, seed=1)
            with torch.no_grad():
                assert relative_error(graph(x), module(F.pad(x, separate_padding(affine.geometry)))) < 1e-14

    def test_pixels_become_channels_where_the_size_allows(self) -> None:
        graph, node, verdict = last(lambda s, x: F.pixel_unshuffle(x, 2))
        assert isinstance(verdict, Map)
        operator = default_operators().find(graph, node)
        assert operator is not None
        affine = operator.affine(Site(graph, node))
        x = images(size=(14, 8), seed=1)
        assert torch.equal(graph(x), convolution_with(affine, like=affine.weight)(x))

    def test_channels_shuffled_by_views_are_read_as_one_node(self) -> None:
        def forward(s: Any, x: Any) -> Any:
            y = s.a(x)
            n, c, h, w = y.shape
            return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)

        _, node, verdict = last(forward, a=conv(3, 4))
        assert node.target is F.channel_shuffle
        assert isinstance(verdict, Map)

    def test_a_transposed_convolution_whose_size_is_given_in_the_call_is_refused(self) -> None:
        verdict = last(lambda s, x: s.a(x, output_size=(24, 25)), a=nn.ConvTranspose2d(3, 4, 2, 2))[2]
        assert isinstance(verdict, Opaque)
        assert verdict.reason is Reason.UPSAMPLING
        assert verdict.detail == "output_size is given in the call"

    @pytest.mark.parametrize(
        "forward",
        [
            lambda s, x: F.interpolate(x, size=(24, 24)),
            lambda s, x: F.interpolate(x, size=(2 * x.shape[2], 2 * x.shape[3])),
            lambda s, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
            lambda s, x: F.interpolate(x, scale_factor=1.5),
            lambda s, x: F.interpolate(x, scale_factor=0.5),
            lambda s, x: F.interpolate(x, scale_factor=(2, 2.5)),
            lambda s, x: F.interpolate(x, scale_factor=2, recompute_scale_factor=True),
            lambda s, x: F.interpolate(x, scale_factor=33),
            lambda s, x: F.interpolate(x, scale_factor=(2.0, 2.0), mode="nearest", recompute_scale_factor=True),
            lambda s, x: F.interpolate(x, scale_factor=(2.0, 2.0), mode="bicubic"),
            lambda s, x: torch.ops.aten.upsample_nearest2d.vec(x, [24, 24], None),
            lambda s, x: s.bilinear(x),
            lambda s, x: s.sized(x),
        ],
    )
    def test_resizing_by_anything_but_whole_factors_stays(self, forward: Forward) -> None:
        modules = {"bilinear": nn.Upsample(scale_factor=2, mode="bilinear"), "sized": nn.Upsample(size=(24, 24))}
        graph, _, verdict = last(forward, **modules)
        assert isinstance(verdict, Opaque)
        x = images()
        assert torch.equal(graph(x), forward(graph, x) if verdict.detail != "Upsample" else Net(forward, **modules)(x))

    @pytest.mark.parametrize("factor", range(2, 33))
    @pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
    def test_torch_repeats_every_pixel_as_often_as_the_factor_says(self, mode: str, factor: int) -> None:
        x = torch.arange(2000.0)[None, None]
        assert torch.equal(F.interpolate(x, scale_factor=factor, mode=mode), x.repeat_interleave(factor, 2))

    @pytest.mark.parametrize("norm", [nn.GroupNorm(1, 3), nn.InstanceNorm2d(3), nn.LayerNorm(3)])
    def test_a_norm_that_depends_on_its_input_is_no_map(self, norm: nn.Module) -> None:
        over_channels = isinstance(norm, nn.LayerNorm)
        verdict = last(lambda s, x: s.n(x.permute(0, 2, 3, 1)) if over_channels else s.n(x), n=norm)[2]
        assert isinstance(verdict, Norm)
        assert (verdict.name, str(verdict.geometry)) == (type(norm).__name__, "3->3 1x1 dw")

    @pytest.mark.parametrize("norm", [nn.InstanceNorm2d(3, track_running_stats=True), nn.LayerNorm((12, 12))])
    def test_a_norm_with_statistics_of_another_kind_is_refused(self, norm: nn.Module) -> None:
        verdict = last(lambda s, x: s.n(x), n=norm)[2]
        assert isinstance(verdict, Opaque)
        assert verdict.reason is Reason.BATCH_STATISTICS

    @pytest.mark.parametrize(
        ("norm", "channels", "made"),
        [
            (nn.GroupNorm(4, 8, 1e-3), 12, "GroupNorm(4, 12, eps=0.001, affine=True"),
            (nn.GroupNorm(4, 8), 6, "GroupNorm(2, 6, eps=1e-05, affine=True"),
            (nn.InstanceNorm2d(8, 1e-3), 6, "InstanceNorm2d(6, eps=0.001, momentum=0.1, affine=True"),
            (nn.LayerNorm(8, 1e-3), 6, "LayerNorm((6,), eps=0.001"),
        ],
    )
    def test_a_norm_elsewhere_is_of_the_same_kind(self, norm: nn.Module, channels: int, made: str) -> None:
        assert str(InputNorm().behind(norm, channels)).startswith(made)

    def test_a_parametrized_convolution_is_unpadded_like_any(self) -> None:
        model = nn.Sequential(weight_norm(conv(3, 4)), nn.ReLU(), conv(4, 4)).double().eval()
        graph = trace(model, images())
        findings = find_segments(graph)
        candidates = [c for p in propose(findings) for c in p.candidates if c.kind == "composed" and c.activations]
        student = linearize(annotate(graph, Plan(findings.fingerprint, (candidates[0],))))
        assert relative_error(student(images(seed=2)), fuse(student)(images(seed=2))) < 1e-12

    def test_roles_say_what_may_be_pruned(self) -> None:
        assert last(lambda s, x: s.a(x), a=conv(3, 4))[2].role == "convolution"  # type: ignore[union-attr]
        assert last(lambda s, x: s.a(x), a=nn.BatchNorm2d(3))[2].role == "norm"  # type: ignore[union-attr]
        assert last(lambda s, x: s.a(x), a=nn.AvgPool2d(2))[2].role == "other"  # type: ignore[union-attr]


class TestJoins:
    def test_operands_come_in_order(self) -> None:
        _, _, verdict = last(lambda s, x: torch.cat((x, s.a(x), x), 1), a=conv(3, 3))
        assert isinstance(verdict, Join)
        assert (verdict.kind, [n.name for n in verdict.operands]) == ("concat", ["x", "a", "x"])

    @pytest.mark.parametrize("forward", [lambda s, x: torch.cat([x, x], dim=-3), lambda s, x: torch.cat(tensors=[x, x], dim=1)])
    def test_channels_may_be_counted_from_the_end(self, forward: Forward) -> None:
        assert isinstance(last(forward)[2], Join)

    def test_what_is_added_to_all_pixels_alike_is_a_side_input(self) -> None:
        _, node, verdict = last(lambda s, x: x.mean((2, 3), keepdim=True) + x)
        assert isinstance(verdict, Map)
        assert verdict.role == "side"
        assert verdict.side is not None
        assert (node.args[0].name, verdict.side.name) == ("x", "mean")  # type: ignore[union-attr]

    def test_a_difference_is_a_join(self) -> None:
        _, _, verdict = last(lambda s, x: s.a(x) - x, a=conv(3, 3))
        assert isinstance(verdict, Join)
        assert (verdict.kind, [n.name for n in verdict.operands]) == ("difference", ["a", "x"])

    def test_a_tensor_may_be_added_to_itself(self) -> None:
        _, _, verdict = last(lambda s, x: x + x)
        assert isinstance(verdict, Join)
        assert len(verdict.operands) == 2


OPAQUE: dict[str, tuple[Forward, Reason]] = {
    "an index": (lambda s, x: x[:, :, 0], Reason.OPAQUE),
    "an end from the start": (lambda s, x: x[:, :, :5], Reason.OPAQUE),
    "a start from the end": (lambda s, x: x[:, :, -5:], Reason.OPAQUE),
    "a slice of the batch": (lambda s, x: x[:1], Reason.OPAQUE),
    "a new axis": (lambda s, x: x[:, None], Reason.OPAQUE),
    "a computed bound": (lambda s, x: x[:, :, : x.shape[2] - 1], Reason.OPAQUE),
    "a tensor as index": (lambda s, x: x[:, torch.tensor([0, 2])], Reason.OPAQUE),
    "reflection": (lambda s, x: F.pad(x, (1, 1, 1, 1), mode="reflect"), Reason.PADDING_MODE),
    "ones": (lambda s, x: F.pad(x, (1, 1), value=1.0), Reason.PADDING_MODE),
    "computed amounts": (lambda s, x: F.pad(x, (0, x.shape[3] % 5)), Reason.PADDING_MODE),
    "padding of the batch": (lambda s, x: F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1)), Reason.PADDING_MODE),
    "channels cropped by padding": (lambda s, x: F.pad(x, (0, 0, 0, 0, -1, 0)), Reason.PADDING_MODE),
    "concat on rows": (lambda s, x: torch.cat((x, x), 2), Reason.OPAQUE),
    "a number less": (lambda s, x: 1 - x, Reason.OPAQUE),
    "a broadcast sum": (lambda s, x: x + x.mean(3, keepdim=True), Reason.SHAPE),
    "a scaled sum": (lambda s, x: torch.add(x, x, alpha=2), Reason.OPAQUE),
    "a product": (lambda s, x: x * x, Reason.OPAQUE),
    "a flat activation": (lambda s, x: F.relu(x.flatten(1)), Reason.SHAPE),
}


class TestOpaque:
    @pytest.mark.parametrize("case", OPAQUE)
    def test_what_is_no_map_is_opaque_with_a_reason(self, case: str) -> None:
        forward, reason = OPAQUE[case]
        verdict = last(forward)[2]
        assert isinstance(verdict, Opaque)
        assert verdict.reason is reason

    @pytest.mark.parametrize(
        "module", [nn.AvgPool2d(2, ceil_mode=True), nn.AvgPool2d(3, padding=1, count_include_pad=False), nn.ConstantPad2d(1, 0.5)]
    )
    def test_modules_that_are_no_convolution_at_the_border(self, module: nn.Module) -> None:
        assert isinstance(last(lambda s, x: s.m(x), m=module)[2], Opaque)

    def test_an_image_without_a_batch_says_what_to_do(self) -> None:
        verdict = last(lambda s, x: s.a(x), images()[0], a=conv(3, 4))[2]
        assert verdict == Opaque(Reason.SHAPE, "operand of shape (3, 12, 12)", "give a batch dimension")

    def test_an_activation_of_a_parameter_is_no_activation(self) -> None:
        graph, _, _ = last(lambda s, x: s.a(x) * F.relu(s.a.weight).sum(), a=conv(3, 4))
        [node] = [n for n in graph.graph.nodes if n.target is F.relu]
        assert not isinstance(default_operators().verdicts(graph)[node], Activation)


class Gain(nn.Module):
    """A scale for every channel: a map that fxmerge does not know."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(1, -1, 1, 1)


class GainOperator:
    def verdict(self, site: Site) -> Verdict:
        return Map(replace(Geometry.identity(site.channels, site.dims), bias=True))

    def affine(self, site: Site) -> Affine:
        return scaling(site.module.scale.detach(), torch.zeros(site.channels), site.dims)

    def unpad(self, site: Site) -> None:
        return


class Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Gain) or super().is_leaf_module(m, module_qualified_name)


class TestAnOperatorOfTheUser:
    TABLE: Operators = default_operators().extended(modules={Gain: GainOperator()})

    def graph(self) -> GraphModule:
        model = nn.Sequential(conv(3, 4), Gain(4), nn.ReLU(), conv(4, 4)).double().eval()
        return trace(model, images(), leaves=self.TABLE.modules)

    def test_a_graph_of_the_users_own_tracer_is_the_same(self) -> None:
        model = nn.Sequential(conv(3, 4), Gain(4), nn.ReLU(), conv(4, 4)).double().eval()
        graph = trace(fx.GraphModule(model, Leaves().trace(model)), images())
        assert [n.name for n in graph.graph.nodes] == [n.name for n in self.graph().graph.nodes]

    def test_without_it_the_layer_is_opaque(self) -> None:
        [refusal, *_] = find_segments(self.graph()).refusals
        assert (refusal.node, refusal.reason, refusal.detail) == ("_1", Reason.OPAQUE, "Gain")

    def test_with_it_the_layer_merges(self) -> None:
        graph = self.graph()
        findings = find_segments(graph, operators=self.TABLE)
        assert not findings.refusals
        x = images(size=(9, 14))
        for candidate in (c for p in propose(findings) for c in p.candidates):
            annotated = annotate(graph, Plan(findings.fingerprint, (candidate,)))
            student = Linearize(operators=self.TABLE).apply(annotated)
            assert relative_error(student(x), FuseSegments(self.TABLE).apply(student)(x)) < 1e-12

    def test_the_table_that_was_extended_stays_as_it_was(self) -> None:
        assert Gain in self.TABLE.modules
        assert Gain not in default_operators().modules
