"""The student: what is gone, where padding went, whose the weights are; and that it trains and still merges."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxmerge.algebra.affine import Affine
from fxmerge.analysis.candidates import propose
from fxmerge.analysis.segments import find_segments
from fxmerge.core.geometry import Axis, Geometry
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate
from fxmerge.errors import PassError
from fxmerge.graph.meta import origin
from fxmerge.graph.query import fingerprint
from fxmerge.graph.trace import trace
from fxmerge.operators import Map, Site, default_operators
from fxmerge.passes.annotate import annotate
from fxmerge.passes.fuse_segments import fuse
from fxmerge.passes.linearize import Linearize, linearize
from tests.algebra.test_affine import random_affine
from tests.laws import TOLERANCE, random_plan, relative_error
from tests.zoo import conv, images, specimen


@torch.fx.wrap
def doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0)


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return doubled(x)


class Doubled:
    """What there is to know of it."""

    def verdict(self, site: Site) -> Map:
        return Map(Geometry(site.channels, site.channels, (Axis.nearest(2),) * site.dims, site.channels))

    def affine(self, site: Site) -> Affine:
        geometry = self.verdict(site).geometry
        return Affine.of(geometry, torch.ones(geometry.weight_shape, dtype=torch.float64))

    def unpad(self, site: Site) -> None:
        return


class Bench:
    """A specimen's graph and its candidates by id."""

    def __init__(self, name: str) -> None:
        self.model = specimen(name)
        self.graph = trace(self.model, images(name))
        self.findings = find_segments(self.graph)
        self.proposals = propose(self.findings)
        self.candidates = {c.id: c for p in self.proposals for c in p.candidates}

    def annotated(self, *ids: str) -> GraphModule:
        return annotate(self.graph, Plan(self.findings.fingerprint, tuple(self.candidates[id] for id in ids)))

    def student(self, *ids: str, norms: bool = False, weights: dict[str, Affine] | None = None) -> GraphModule:
        return linearize(self.annotated(*ids), norms=norms, weights=weights)


def text(graph: GraphModule) -> list[str]:
    """``name = target(operands)``, pads with their amounts."""
    lines = []
    for node in graph.graph.nodes:
        if node.op.startswith("call_"):
            operands = ", ".join(str(arg) for arg in node.args)
            lines.append(f"{node.name} = {getattr(node.target, '__name__', node.target)}({operands})")
    return lines


class TestComposed:
    def test_activations_go_and_padding_moves_to_the_entry(self) -> None:
        student = Bench("same_padding").student("_1->_4 composed 4->4 5x7")
        assert text(student) == [
            "_0 = 0(input_1)",
            "_1 = relu(_0)",
            "pad = pad(_1, (2, 2, 1, 1))",
            "_2 = 2(pad)",
            "_4 = 4(_2)",
        ]

    def test_a_skip_is_cropped_to_what_the_sum_needs(self) -> None:
        student = Bench("residual_plus").student("relu->relu_2 composed 4->4 5x5")
        assert text(student)[2:] == [
            "pad = pad(relu, (2, 2, 2, 2))",
            "conv1 = conv1(pad)",
            "bn1 = bn1(conv1)",
            "conv2 = conv2(bn1)",
            "bn2 = bn2(conv2)",
            "add = add(bn2, relu)",
            "relu_2 = relu(add)",
        ]

    def test_what_an_upsampling_makes_too_much_of_a_halo_is_cropped_behind_it(self) -> None:
        student = Bench("decoder").student("relu->relu_1 composed 4->3 4x4 u2x2")
        assert text(student)[3:8] == [
            "pad = pad(relu, (1, 1, 1, 1))",
            "interpolate_2 = interpolate(pad)",
            "interpolate = pad(interpolate_2, (-1, -1, -1, -1))",
            "a = a(interpolate)",
            "relu_1 = relu(a)",
        ]

    def test_an_exit_that_is_cropped_keeps_its_name(self) -> None:
        bench = Bench("transposed_convolutions")
        student = bench.student("input_1->_3 composed 3->6 8x7 u2x2")
        assert text(student)[:5] == [
            "pad = pad(input_1, (1, 1, 2, 2))",
            "_0 = 0(pad)",
            "_2_1 = 2(_0)",
            "_2 = pad(_2_1, (-1, 0, -1, -1))",
            "_3 = relu(_2)",
        ]

    def test_a_crop_in_place_of_a_function_that_torch_fx_wraps_is_not_wrapped_itself(self) -> None:
        """It would be, when the student's code is run, and no model could be traced any more."""
        model = nn.Sequential(conv(3, 4), nn.ReLU(), Doubling(), conv(4, 3)).eval()
        operators = default_operators().extended(functions={doubled: Doubled()})
        graph = trace(model, images().float())
        findings = find_segments(graph, operators=operators)
        [whole] = [c for p in propose(findings) for c in p.candidates if c.id == "input_1->_3 composed 3->3 8x8 u2x2"]
        student = linearize(annotate(graph, Plan(findings.fingerprint, (whole,))), operators=operators)
        assert text(student)[2:4] == ["_2_doubled_1 = doubled(_0)", "_2_doubled = pad(_2_doubled_1, (-1, -1, -1, -1))"]
        assert [node.name for node in student.graph.nodes if node.meta.get("is_wrapped")] == ["_2_doubled_1"]

    def test_an_unpadded_transposed_convolution_begins_with_the_first_output_that_its_pixels_suffice_for(self) -> None:
        student = Bench("parallel_upsampling").student("relu->relu_1 composed 3->4 4x4 u2x2")
        short, deep = (student.get_submodule(name) for name in ("short", "deep"))
        assert (short.padding, deep.padding) == ((0, 0), (0, 0))

    def test_nothing_inside_pads_any_more(self) -> None:
        for name in ("zero_pad_module", "same_padding", "average_pool", "non_square", "option_a_skip"):
            bench = Bench(name)
            whole = [p.segment for p in bench.proposals][-1]
            for candidate in bench.candidates.values():
                if candidate.kind != "composed":
                    continue
                student = bench.student(candidate.id)
                inside = {node.name for node in student.graph.nodes} & set(candidate.activations)
                assert not inside - {candidate.exit}
                calls = {node.name: node for node in student.graph.nodes if node.op == "call_module"}
                for step in whole.expression.convolutions:
                    if step.name in calls and calls[step.name].meta["fxmerge"].role == "merged":
                        module = student.get_submodule(str(calls[step.name].target))
                        assert not any(module.padding)

    def test_the_modules_of_the_graph_given_keep_their_padding(self) -> None:
        bench = Bench("residual_plus")
        bench.student("relu->relu_2 composed 4->4 5x5")
        assert bench.graph.get_submodule("conv1").padding == (1, 1)

    def test_away_from_the_border_only_the_activation_is_missing(self) -> None:
        bench = Bench("residual_plus")
        x = images(size=(15, 15))
        found = bench.student("relu->relu_2 composed 4->4 5x5")(x)
        m = bench.model
        given = F.relu(m.stem(x))
        expected = F.relu(m.bn2(m.conv2(m.bn1(m.conv1(given)))) + given)
        assert relative_error(expected[..., 1:-1, 1:-1], found[..., 1:-1, 1:-1]) < 1e-14
        assert relative_error(expected, found) > 1e-3

    def test_a_removed_convolution_goes_and_so_do_its_weights(self) -> None:
        student = Bench("residual_plus").student("relu->bn2 composed 4->4 3x3 pruned")
        left = {name.split(".")[0] for name in student.state_dict()}
        assert ("conv1" in left) != ("conv2" in left)

    def test_keys_of_the_layers_that_stay_are_those_of_the_model(self) -> None:
        bench = Bench("residual_plus")
        student = bench.student("relu->relu_2 composed 4->4 5x5")
        assert list(student.state_dict()) == list(bench.model.state_dict())


class TestIdentity:
    def test_the_exit_becomes_an_identity_of_the_entry(self) -> None:
        student = Bench("residual_plus").student("relu->bn2 identity")
        assert text(student)[2:] == ["bn2 = merged.bn2(relu)", "add = add(bn2, relu)", "relu_2 = relu(add)"]
        assert isinstance(student.get_submodule("merged.bn2"), nn.Identity)
        assert {name.split(".")[0] for name in student.state_dict()} == {"stem"}


class TestFitted:
    ID = "relu->bn2 fitted 4->4 3x3"

    def test_one_convolution_takes_the_place_of_all(self) -> None:
        student = Bench("residual_plus").student(self.ID)
        assert text(student)[2:] == ["bn2 = merged.bn2(relu)", "add = add(bn2, relu)", "relu_2 = relu(add)"]
        module = student.get_submodule("merged.bn2")
        assert (module.kernel_size, module.padding, module.weight.dtype) == ((3, 3), (1, 1), torch.float64)

    def test_it_starts_from_the_weights_given(self) -> None:
        bench = Bench("residual_plus")
        affine = random_affine(bench.candidates[self.ID].geometry)
        student = bench.student(self.ID, weights={self.ID: affine})
        assert torch.equal(student.get_submodule("merged.bn2").weight, affine.weight)
        assert torch.equal(student.get_submodule("merged.bn2").bias, affine.bias)

    def test_weights_of_another_geometry_are_an_error(self) -> None:
        bench = Bench("residual_plus")
        other = random_affine(bench.candidates["relu->bn2 fitted 4->4 5x5"].geometry)
        with pytest.raises(PassError, match=f"^the weights for {self.ID} are of geometry 4->4 5x5, not 4->4 3x3$"):
            bench.student(self.ID, weights={self.ID: other})

    def test_a_norm_behind_it_is_an_identity_until_it_is_trained(self) -> None:
        bench = Bench("residual_plus")
        affine = random_affine(bench.candidates[self.ID].geometry)
        plain = bench.student(self.ID, weights={self.ID: affine})
        normed = bench.student(self.ID, weights={self.ID: affine}, norms=True)
        assert isinstance(normed.get_submodule("merged.bn2_norm"), nn.BatchNorm2d)
        assert relative_error(plain(images()), normed(images())) < 1e-15

    @pytest.mark.parametrize("name", ["one_dimension", "three_dimensions"])
    def test_signals_and_volumes_get_their_own_norm(self, name: str) -> None:
        bench = Bench(name)
        [id, *_] = [id for id in bench.candidates if "fitted" in id]
        assert bench.student(id, norms=True)(images(name)).shape == bench.model(images(name)).shape


class TestParameters:
    def test_a_student_has_its_own(self) -> None:
        bench = Bench("residual_plus")
        student = bench.student("relu->bn2 composed 4->4 5x5")
        assert not {id(p) for p in student.parameters()} & {id(p) for p in bench.graph.parameters()}

    def test_without_them_it_shares_what_is_not_replaced(self) -> None:
        bench = Bench("residual_plus")
        student = Linearize(own=False).apply(bench.annotated("relu->bn2 composed 4->4 5x5"))
        assert {id(p) for p in student.parameters()} == {id(p) for p in bench.graph.parameters()}

    def test_it_remembers_which_graph_it_was_made_from(self) -> None:
        bench = Bench("residual_plus")
        student = bench.student("relu->bn2 identity")
        assert origin(student) == fingerprint(bench.graph)
        assert origin(bench.graph) is None

    def test_a_student_has_no_student(self) -> None:
        student = Bench("residual_plus").student()
        with pytest.raises(PassError, match="^this graph is a student already; linearize the original$"):
            linearize(student)

    def test_a_model_may_have_a_layer_named_merged(self) -> None:
        layers = {"merged": nn.Conv2d(3, 4, 3), "act": nn.ReLU(), "b": nn.Conv2d(4, 4, 3)}
        model = nn.Sequential()
        for name, layer in layers.items():
            model.add_module(name, layer)
        graph = trace(model.double(), images())
        findings = find_segments(graph)
        [candidate, *_] = [c for p in propose(findings) for c in p.candidates if str(p.segment) == "act -> b"]
        student = linearize(annotate(graph, Plan(findings.fingerprint, (candidate,))))
        assert relative_error(student(images()), fuse(student)(images())) < 1e-12

    def test_a_fitted_convolution_has_the_dtype_of_the_tensor_it_reads(self) -> None:
        class Mixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32))
                self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).double()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.body(x) * self.scale

        graph = trace(Mixed(), images())
        findings = find_segments(graph)
        [candidate, *_] = [c for p in propose(findings) for c in p.candidates if c.kind == "fitted"]
        linearize(annotate(graph, Plan(findings.fingerprint, (candidate,))))(images())

    def test_a_network_without_parameters_can_be_merged(self) -> None:
        graph = trace(nn.Sequential(nn.AvgPool2d(2, 1), nn.ReLU(), nn.AvgPool2d(2, 1)), images())
        findings = find_segments(graph)
        for candidate in (c for p in propose(findings) for c in p.candidates):
            student = linearize(annotate(graph, Plan(findings.fingerprint, (candidate,))))
            assert relative_error(student(images()), fuse(student)(images())) < 1e-12


def train(student: GraphModule, steps: int = 3) -> None:
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        student(images(seed=step)).square().mean().backward()
        optimizer.step()


class TestTraining:
    @pytest.mark.parametrize("name", ["residual_plus", "projection_skip", "inverted_residual", "concat_branches"])
    def test_a_trained_student_still_merges(self, name: str) -> None:
        bench = Bench(name)
        for seed in range(3):
            plan = random_plan(bench.findings, bench.proposals, random.Random(seed))
            student = linearize(annotate(bench.graph, plan), norms=True)
            start = [p.detach().clone() for p in student.parameters()]
            train(student)
            assert any(not torch.equal(a, b) for a, b in zip(start, student.parameters(), strict=True))
            merged = fuse(student)
            assert student.training
            assert not merged.training
            x = images(size=(11, 14), batch=3, seed=9)
            assert relative_error(student.eval()(x), merged(x.clone())) <= TOLERANCE[torch.float64]

    def test_training_leaves_the_original_as_it_is(self) -> None:
        bench = Bench("residual_plus")
        before = {key: value.clone() for key, value in bench.graph.state_dict().items()}
        student = bench.student("relu->relu_2 composed 4->4 5x5", norms=True)
        train(student)
        assert all(torch.equal(value, before[key]) for key, value in bench.graph.state_dict().items())


def test_a_plan_of_nothing_gives_the_original() -> None:
    bench = Bench("concat_branches")
    assert relative_error(bench.model(images()), bench.student()(images())) == 0


def test_candidates_of_the_bench_are_candidates() -> None:
    assert all(isinstance(candidate, Candidate) for candidate in Bench("stride").candidates.values())
