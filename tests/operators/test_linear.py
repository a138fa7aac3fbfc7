"""Linear layers on channels last: what they are, what merges around them, and what must not."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import fxmerge
from fxmerge.algebra.affine import Affine
from fxmerge.analysis.candidates import Space, propose
from fxmerge.analysis.segments import find_segments
from fxmerge.core.geometry import Geometry
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate, Reason
from fxmerge.graph.layout import to_first, to_last
from fxmerge.graph.query import module_of, node_named
from fxmerge.graph.trace import trace
from fxmerge.measure.latency import baseline
from fxmerge.operators import Map, Opaque, Site, Verdict, channelwise, default_operators
from fxmerge.passes.annotate import annotate
from fxmerge.passes.fold_batchnorm import FoldBatchNorm
from fxmerge.passes.fuse_segments import fuse
from fxmerge.passes.linearize import added_norms, linearize
from fxmerge.tune.norms import calibrate_norms
from tests.fakes import PriceTimer
from tests.laws import assert_law, held_out, random_plan, relative_error
from tests.zoo import Net, conv

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (11,), 2: (6, 9), 3: (5, 4, 7)}


class Block(nn.Module):
    """ConvNeXt's block in so many dimensions, its scale before or behind the permutation back."""

    def __init__(self, channels: int = 4, dims: int = 2, *, scale: str = "inside") -> None:
        super().__init__()
        self.dims, self.where = dims, scale
        self.dw = _CONVOLUTIONS[dims](channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.fc1, self.fc2 = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x).permute(to_last(self.dims + 2)))
        y = self.fc2(F.gelu(self.fc1(y)))
        y = self.gamma * y if self.where == "inside" else y
        y = y.permute(to_first(self.dims + 2))
        y = y * self.gamma.view(1, -1, *(1,) * self.dims) if self.where == "outside" else y
        return x + y


def network(dims: int = 2, **options: Any) -> tuple[GraphModule, Tensor]:
    """Two blocks between convolutions, traced, and an image."""
    torch.manual_seed(0)
    kind = _CONVOLUTIONS[dims]
    model = nn.Sequential(kind(3, 4, 1), Block(4, dims, **options), Block(4, dims, **options), kind(4, 3, 3)).double().eval()
    x = torch.randn(2, 3, *SIZES[dims], dtype=torch.float64)
    return trace(model, x), x


def verdict(forward: Callable[[Any, Any], Any], x: Tensor | None = None, **modules: nn.Module) -> Verdict:
    """On the node that computes the output of a net that is given channels last."""
    x = torch.randn(2, 5, 7, 3) if x is None else x
    graph = trace(Net(forward, **modules).eval(), x)
    [node] = graph.graph.output_node().all_input_nodes
    return default_operators().verdicts(graph)[node]


class TestMaps:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_a_linear_layer_is_a_convolution_of_one_tap(self, dims: int, bias: bool) -> None:
        x = torch.randn(2, *SIZES[dims], 3, dtype=torch.float64)
        graph = trace(nn.Sequential(nn.Linear(3, 4, bias=bias)).double(), x)
        [node] = graph.graph.output_node().all_input_nodes
        found = default_operators().verdicts(graph)[node]
        assert isinstance(found, Map)
        assert (found.role, str(found.geometry)) == ("convolution", f"3->4 {'x'.join('1' * dims)}")
        operator = default_operators().find(graph, node)
        assert operator is not None
        affine = operator.affine(Site(graph, node))
        assert affine.geometry == found.geometry
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
        y = convolve(x.permute(to_first(dims + 2)), affine.weight, affine.bias).permute(to_last(dims + 2))
        assert relative_error(y, graph(x)) < 1e-14

    def test_joins_slices_scales_and_identities_are_read(self) -> None:
        vector = torch.tensor([1.0, 2.0, 3.0])
        linear = nn.Linear(3, 3)
        assert verdict(lambda s, x: torch.cat((s.l(x), x), -1), l=linear).kind == "concat"  # type: ignore[union-attr]
        assert verdict(lambda s, x: s.l(x) + x, l=linear).kind == "sum"  # type: ignore[union-attr]
        assert isinstance(verdict(lambda s, x: s.l(x) * vector, l=linear), Map)
        assert isinstance(verdict(lambda s, x: s.d(s.l(x)), l=linear, d=nn.Dropout()), Map)
        cropped = verdict(lambda s, x: s.l(x)[:, ::2, :, 1:], l=linear)
        assert isinstance(cropped, Map)
        assert str(cropped.geometry) == "3->2 1x1 s2x1"
        padded = verdict(lambda s, x: F.pad(s.l(x), (0, 1, 2, 0)), l=linear)
        assert isinstance(padded, Map)
        assert (padded.geometry.out_channels, padded.geometry.padding) == (4, ((0, 0), (2, 0)))


OPAQUE: dict[str, tuple[Callable[[Any, Any], Any], Reason]] = {
    "a concat of rows": (lambda s, x: torch.cat((s.l(x), x), 1), Reason.OPAQUE),
    "a scale of rows": (lambda s, x: s.l(x) * torch.arange(5.0).view(5, 1, 1), Reason.OPAQUE),
    "a vector for each row": (lambda s, x: s.l(x) + torch.ones(5, 1, 3), Reason.OPAQUE),
    "a permutation of space": (lambda s, x: s.l(x).permute(0, 2, 1, 3), Reason.LAYOUT),
    "a mean added": (lambda s, x: s.l(x) + s.l(x).mean((1, 2), keepdim=True), Reason.LAYOUT),
    "a norm over more than channels": (lambda s, x: s.n(s.l(x)), Reason.BATCH_STATISTICS),
    "a linear layer of an image": (lambda s, x: s.m(s.a(x)), Reason.LAYOUT),
    "a gate": (lambda s, x: s.l(x) * x, Reason.OPAQUE),
}


class TestOpaque:
    @pytest.mark.parametrize("case", OPAQUE)
    def test_what_is_no_map_is_opaque_with_a_reason(self, case: str) -> None:
        forward, reason = OPAQUE[case]
        modules = {"l": nn.Linear(3, 3), "n": nn.LayerNorm((7, 3)), "a": conv(5, 5, 1), "m": nn.Linear(3, 3)}
        found = verdict(forward, **modules)
        assert isinstance(found, Opaque), found
        assert found.reason is reason

    def test_as_many_rows_as_channels_are_no_channels(self) -> None:
        square = torch.randn(2, 3, 3, 3)
        rows = verdict(lambda s, x: s.l(x) * torch.arange(3.0).view(3, 1, 1), square, l=nn.Linear(3, 3))
        assert isinstance(rows, Opaque)
        assert isinstance(verdict(lambda s, x: s.l(x) * torch.arange(3.0), square, l=nn.Linear(3, 3)), Map)

    @pytest.mark.parametrize("other", [lambda s, y: s.a(y), lambda s, y: F.avg_pool2d(y, 2)])
    def test_a_linear_layer_whose_tensor_is_an_image_gives_way(self, other: Callable[[Any, Any], Any]) -> None:
        graph = trace(Net(lambda s, x: other(s, s.l(x)), l=nn.Linear(3, 3), a=conv(5, 4)), torch.randn(2, 5, 7, 3))
        linear, image = [v for n, v in default_operators().verdicts(graph).items() if n.op.startswith("call_")]
        assert isinstance(linear, Opaque)
        assert (linear.reason, isinstance(image, Map)) == (Reason.LAYOUT, True)

    def test_an_operator_of_the_user_sees_channels_last_only_if_it_says_so(self) -> None:
        graph = trace(Net(lambda s, x: torch.sin(s.l(x)), l=nn.Linear(3, 3)), torch.randn(2, 5, 7, 3))
        [sin] = graph.graph.output_node().all_input_nodes

        def same(site: Site) -> Verdict:
            return Map(Geometry.identity(site.channels, site.dims))

        careless = default_operators().extended(functions={torch.sin: channelwise(same)}).verdicts(graph)[sin]
        assert isinstance(careless, Opaque)
        assert (careless.reason, careless.detail) == (Reason.LAYOUT, "sin on channels last")
        aware = default_operators().extended(functions={torch.sin: channelwise(same, any_layout=True)}).verdicts(graph)[sin]
        assert aware == Map(Geometry.identity(3, 2))


_STEPS: dict[str, Callable[[Any, Any], Any]] = {
    "linear": lambda layer, y: layer(y),
    "gelu": lambda layer, y: F.gelu(y),
    "scale": lambda layer, y: y * layer.bias,
    "skip": lambda layer, y: y + layer(y),
    "concat": lambda layer, y: torch.cat((y, layer(y)), -1),
    "slice": lambda layer, y: y[..., -3:],
    "stride": lambda layer, y: y[:, ::2, 1::2],
}


class TestTheLaw:
    @pytest.mark.parametrize("norms", [False, True])
    @pytest.mark.parametrize("scale", ["inside", "outside"])
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_blocks_merge(self, dims: int, scale: str, norms: bool) -> None:
        graph, x = network(dims, scale=scale)
        findings = find_segments(graph)
        proposals = propose(findings)
        kinds = {(c.entry, c.kind) for p in proposals for c in p.candidates}
        assert {("_1_norm", kind) for kind in ("composed", "fitted", "identity")} <= kinds
        for seed in range(4):
            assert_law(
                graph, random_plan(findings, proposals, random.Random(seed)), [x, x[:1].repeat(3, *(1,) * (dims + 1))], norms=norms
            )

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_any_stretch_on_channels_last_merges(self, data: st.DataObject) -> None:
        """Linear layers, scales, skips, concats, slices, in any order, a convolution of 3x3 before and behind."""
        steps = data.draw(st.lists(st.sampled_from([*_STEPS]), max_size=5))
        torch.manual_seed(len(steps))
        layers: list[nn.Module] = []
        channels = 4
        for step in steps:
            layers.append(nn.Linear(channels, channels))
            channels = 2 * channels if step == "concat" else 3 if step == "slice" else channels

        def forward(s: Any, x: Tensor) -> Tensor:
            y = s.a(x).permute(0, 2, 3, 1)
            for step, layer in zip(steps, s.layers, strict=True):
                y = _STEPS[step](layer, y)
            return s.b(y.permute(0, 3, 1, 2))  # type: ignore[no-any-return]

        model = Net(forward, a=conv(3, 4), layers=nn.ModuleList(layers), b=conv(channels, 2)).double().eval()
        x = torch.randn(1, 3, 40, 37, dtype=torch.float64)
        graph = trace(model, x)
        findings = find_segments(graph, max_units=16, max_extent=1000)
        whole = [s for s in findings.segments if s.entry == "x" and s.end == "b"]
        assert whole, str(fxmerge.explain(findings))
        for space in (Space(), Space(fitted=False, identity=False)):
            proposals = propose(findings, space)
            if proposals:
                assert_law(graph, random_plan(findings, proposals, random.Random(len(steps))), [x])


def taken(graph: GraphModule, wanted: Callable[[Candidate], bool]) -> tuple[fxmerge.Findings, Candidate]:
    findings = find_segments(graph)
    return findings, next(c for p in propose(findings) for c in p.candidates if wanted(c))


class TestWhatIsBuilt:
    def test_between_two_tensors_of_channels_last_stands_a_linear_layer(self) -> None:
        model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).double().eval()
        x = torch.randn(2, 5, 7, 4, dtype=torch.float64)
        graph = trace(model, x)
        for kind in ("composed", "fitted"):
            findings, candidate = taken(graph, lambda c, kind=kind: c.kind == kind and c.end == "_3")  # type: ignore[misc]
            student = linearize(annotate(graph, Plan(findings.fingerprint, (candidate,))))
            merged = fuse(student)
            kept = [type(module) for module in merged.children() if not list(module.children())]
            assert kept == ([nn.LayerNorm] if not candidate.norms else [])
            made = node_named(merged, "_3")
            assert made is not None
            assert type(module_of(merged, made)) is nn.Linear
            assert not any(node.target is torch.permute for node in merged.graph.nodes)
            assert relative_error(student(x), merged(x)) < 1e-12
            normed = linearize(annotate(graph, Plan(findings.fingerprint, (candidate,))), norms=True)
            assert relative_error(normed(x), fuse(normed)(x)) < 1e-12
            assert len(added_norms(normed)) == (kind == "fitted")

    def test_what_is_timed_is_what_is_built(self) -> None:
        graph, x = network()
        findings = find_segments(graph)
        proposals = propose(findings)
        timer = PriceTimer()
        table = fxmerge.measure_latency(findings, proposals, x, timer=timer)
        for proposal in proposals:
            for candidate in proposal.candidates:
                merged = fuse(linearize(annotate(graph, Plan(findings.fingerprint, (candidate,)))))
                exit_node = node_named(merged, candidate.exit)
                text = table.candidates[candidate.id]
                if exit_node is not None and candidate.kind != "identity":
                    permutes = text.count("permute")
                    assert (exit_node.target is torch.permute) <= (permutes > 0)
                    assert ("Linear" in text) == isinstance(module_of(merged, exit_node), nn.Linear)
        assert any("permute" in key for key in table.candidates.values())

    def test_dropping_a_stretch_keeps_the_change_of_layout(self) -> None:
        graph, x = network()
        findings, candidate = taken(graph, lambda c: c.kind == "identity" and c.entry == "_1_norm")
        student = linearize(annotate(graph, Plan(findings.fingerprint, (candidate,))))
        merged = fuse(student)
        made = node_named(merged, candidate.exit)
        assert made is not None
        assert made.target is torch.permute
        assert relative_error(student(x), merged(x)) < 1e-12

    def test_norms_behind_fitted_merges_see_channels_first(self) -> None:
        graph, x = network()
        findings, candidate = taken(graph, lambda c: c.kind == "fitted" and c.exit == "_1_permute")
        student = linearize(annotate(graph, Plan(findings.fingerprint, (candidate,))), norms=True)
        before = student(x)
        [norm] = added_norms(student).values()
        calibrate_norms(student, [(x,)])
        assert float(norm.running_mean.abs().sum()) > 0  # type: ignore[operator, union-attr]
        assert relative_error(before, student(x)) < 1e-12


class TestFolding:
    @pytest.mark.parametrize("scale", ["inside", "outside"])
    def test_a_scale_goes_into_the_linear_layer_before_it(self, scale: str) -> None:
        graph, x = network(scale=scale)
        folded = baseline(graph)
        assert relative_error(graph(x), folded(x)) < 1e-13
        assert not any(node.op == "get_attr" for node in folded.graph.nodes)
        assert sum(node.target is torch.permute for node in folded.graph.nodes) == 4

    def test_a_permutation_itself_is_not_folded_away(self) -> None:
        model = Net(lambda s, x: s.a(x).permute(0, 2, 3, 1) * torch.arange(1.0, 5.0).double(), a=conv(3, 4)).double().eval()
        x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
        folded = FoldBatchNorm().apply(trace(model, x))
        assert relative_error(model(x), folded(x)) < 1e-14
        assert [node.op for node in folded.graph.nodes if node.op == "call_function"] == ["call_function"]

    @pytest.mark.parametrize("kept", ["fc", "permute_1"])
    def test_nothing_is_folded_into_a_tensor_that_is_wanted(self, kept: str) -> None:
        def forward(s: Any, x: Tensor) -> Tensor:
            return s.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * 2  # type: ignore[no-any-return]

        graph = trace(Net(forward, fc=nn.Linear(3, 4)).eval(), torch.randn(2, 3, 5, 7))
        assert FoldBatchNorm().apply(graph) is not graph
        assert FoldBatchNorm(keep=frozenset((kept,))).apply(graph) is graph


class TestWeightsFromData:
    def test_fitted_weights_bring_the_network_back(self) -> None:
        graph, _ = network()
        data = torch.randn(64, 3, 6, 9, dtype=torch.float64)
        findings, candidate = taken(graph, lambda c: c.kind == "fitted" and c.entry == "_1_norm")
        plan = Plan(findings.fingerprint, (candidate,))
        [weights] = fxmerge.fit(findings, plan, data, scorer=fxmerge.Reconstruction().alone()).values()
        assert isinstance(weights, Affine)
        fitted = fuse(linearize(annotate(graph, plan), weights={candidate.id: weights}))
        shaken = replace(weights, weight=weights.weight + 0.05 * torch.randn_like(weights.weight))
        worse = fuse(linearize(annotate(graph, plan), weights={candidate.id: shaken}))
        with torch.no_grad():
            errors = [float((net(data) - graph(data)).pow(2).mean()) for net in (fitted, worse)]
        assert errors[0] < errors[1]

    def test_losses_are_those_of_the_rebuilt_network(self) -> None:
        graph, _ = network()
        data = torch.randn(16, 3, 6, 9, dtype=torch.float64)
        findings = find_segments(graph)
        proposals = propose(findings, Space(fitted=False))
        table = fxmerge.measure_importance(findings, proposals, data)
        judged, others = held_out(data, graph)
        reference = graph(judged)
        for candidate in (c for p in proposals for c in p.candidates):
            plan = Plan(findings.fingerprint, (candidate,))
            weights = fxmerge.fit(findings, plan, others, scorer=fxmerge.Reconstruction().alone())
            student = linearize(annotate(graph, plan), weights=weights)
            with torch.no_grad():
                loss = float(fxmerge.measure.divergence.divergence(reference, student(judged)).mean())  # type: ignore[attr-defined]
            if candidate.geometry.pointwise:  # else padding has moved in the student
                assert table.loss(candidate.id) == pytest.approx(min(loss, 1e6), rel=1e-6, abs=1e-9), candidate.id
