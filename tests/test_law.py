"""The law on real architectures and on random ones: student and merged network are equal, whatever the plan."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from fxmerge.analysis.candidates import Space, propose
from fxmerge.analysis.segments import Findings, find_segments
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate, Proposal
from fxmerge.graph.trace import trace
from fxmerge.passes import fuse_segments
from fxmerge.passes.annotate import annotate
from fxmerge.passes.fuse_segments import fuse
from fxmerge.passes.linearize import linearize
from tests import laws
from tests.laws import TOLERANCE, assert_law, covering_plans, filled, random_plan, relative_error
from tests.strategies import SMALLEST, Network, networks
from tests.zoo import NETWORKS, ZOO, images, network, randomise_, specimen

SAMPLE = 120
PLANS = 8
#: Odd and even, square and not, and batches other than the one traced.
SIZES = ((2, (40, 40)), (1, (33, 47)), (3, (51, 32)))


@dataclass(frozen=True, eq=False)
class Case:
    """A network that has been searched, in both precisions."""

    model: nn.Module
    graph: GraphModule
    graph32: GraphModule
    findings: Findings
    proposals: tuple[Proposal, ...]
    inputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: nn.Module, example: Tensor, inputs: tuple[Tensor, ...], space: Space | None = None) -> Case:
        graph = trace(model, example)
        findings = find_segments(graph)
        return cls(model, graph, copy.deepcopy(graph).float(), findings, propose(findings, space), inputs)

    @property
    def candidates(self) -> list[Candidate]:
        return [candidate for proposal in self.proposals for candidate in proposal.candidates]

    def assert_covered(self, rng: random.Random) -> None:
        """The law for every candidate, in plans of as many as fit together.

        Where there are more than SAMPLE, for so many: a third of them drawn, the others drawn from what fits beside these.
        """
        everything = self.candidates
        drawn = everything if len(everything) <= SAMPLE else rng.sample(everything, SAMPLE // 3)
        plans = filled(covering_plans(self.findings, self.proposals, drawn), self.proposals, SAMPLE, rng)
        covered = [merge for plan in plans for merge in plan.merges]
        assert len(covered) == len(set(covered)) == min(SAMPLE, len(everything))
        for number, plan in enumerate(plans):
            x = self.inputs[number % len(self.inputs)]
            assert_law(self.graph, plan, [x], norms=number % 2 == 0, float32=True)

    def assert_whole(self, rng: random.Random, *, norms: bool) -> None:
        """The law for a random plan, at all sizes and in both precisions."""
        plan = random_plan(self.findings, self.proposals, rng)
        assert_law(self.graph, plan, self.inputs, norms=norms)
        assert_law(self.graph32, plan, [x.float() for x in self.inputs], norms=norms)

    def assert_function_kept(self, candidate: Candidate) -> None:
        """An exact candidate computes what the original does."""
        merged = fuse(linearize(annotate(self.graph, Plan(self.findings.fingerprint, (candidate,)))))
        for x in self.inputs:
            with torch.no_grad():
                error = relative_error(self.model(x.clone()), merged(x.clone()))
            assert error <= TOLERANCE[torch.float64], candidate.id


@cache
def case(name: str) -> Case:
    inputs = tuple(images(batch=batch, size=size, seed=batch) for batch, size in SIZES)
    return Case.of(network(name), images(size=(40, 40)), inputs)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", NETWORKS)
class TestNetworks:
    def test_every_candidate_alone(self, name: str) -> None:
        assert len(case(name).candidates) > 80
        case(name).assert_covered(random.Random(0))

    def test_whole_plans(self, name: str) -> None:
        rng = random.Random(1)
        for number in range(PLANS):
            case(name).assert_whole(rng, norms=number % 2 == 0)

    def test_exact_candidates_keep_the_original_function(self, name: str) -> None:
        exact = [candidate for candidate in case(name).candidates if candidate.exact]
        assert bool(exact) == (name == "repvgg" or name.startswith("mobilenet"))
        for candidate in exact:
            case(name).assert_function_kept(candidate)


@pytest.mark.parametrize(
    "build",
    [
        torchvision.models.resnet.resnet18,
        lambda: torchvision.models.MobileNetV2(width_mult=1.0),
        lambda: torchvision.models.MobileNetV2(width_mult=1.4),
    ],
    ids=["resnet18", "mobilenet_v2_1.0", "mobilenet_v2_1.4"],
)
def test_a_whole_plan_at_full_width(build: type[nn.Module]) -> None:
    model = randomise_(build().double(), 0, images(batch=4, size=(40, 40))).eval()
    whole = Case.of(model, images(size=(40, 40)), (images(size=(33, 40)),))
    whole.assert_whole(random.Random(2), norms=True)


@pytest.mark.parametrize("name", ZOO)
class TestZoo:
    SIZES = ((2, (12, 12)), (1, (9, 14)), (3, (13, 11)))

    def case(self, name: str) -> Case:
        inputs = tuple(images(name, batch=batch, size=size, seed=batch) for batch, size in self.SIZES)
        return Case.of(specimen(name), images(name), inputs)

    def test_every_candidate_alone_and_whole_plans(self, name: str) -> None:
        found = self.case(name)
        found.assert_covered(random.Random(0))
        rng = random.Random(1)
        for number in range(3):
            found.assert_whole(rng, norms=number % 2 == 0)

    def test_exact_candidates_keep_the_original_function(self, name: str) -> None:
        found = self.case(name)
        for candidate in found.candidates:
            if candidate.exact:
                found.assert_function_kept(candidate)


class TestRandomNetworks:
    @settings(max_examples=60)
    @given(networks(), st.randoms(use_true_random=False))
    def test_the_law_and_the_plan_through_json(self, network: Network, rng: random.Random) -> None:
        torch.manual_seed(0)
        inputs = (images(size=(SMALLEST, 18)), images(size=(16, 15), batch=1))
        found = Case.of(network.build(), images(size=(16, SMALLEST)), inputs, Space(added=True, groups=(2, 0)))
        for number in range(3):
            plan = random_plan(found.findings, found.proposals, rng)
            assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
            assert_law(found.graph, plan, inputs, norms=number % 2 == 0)

    @settings(max_examples=60)
    @given(networks(max_blocks=3))
    def test_exact_candidates_keep_the_original_function(self, network: Network) -> None:
        torch.manual_seed(0)
        inputs = (images(size=(SMALLEST, 18)), images(size=(16, 15), batch=1))
        found = Case.of(network.build(), images(size=(16, SMALLEST)), inputs)
        for candidate in [candidate for candidate in found.candidates if candidate.exact][:6]:
            found.assert_function_kept(candidate)

    @settings(max_examples=30)
    @given(networks(), st.randoms(use_true_random=False))
    def test_the_model_the_graph_and_the_example_are_untouched(self, network: Network, rng: random.Random) -> None:
        model = network.build()
        model.train()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        example = images(size=(16, SMALLEST))
        found = Case.of(model, example, ())
        text, shared = str(found.graph.graph), {key: value.clone() for key, value in found.graph.state_dict().items()}
        fuse(linearize(annotate(found.graph, random_plan(found.findings, found.proposals, rng)), norms=True))
        assert all(module.training for module in model.modules())
        assert torch.equal(example, images(size=(16, SMALLEST)))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert str(found.graph.graph) == text
        assert all(torch.equal(value, shared[key]) for key, value in found.graph.state_dict().items())


class TestTheLawCanFail:
    """A corner tap of every merged kernel is disturbed by 1e-6."""

    FIVE = "relu->bn2 composed 4->4 5x5"

    @pytest.fixture
    def found(self, monkeypatch: pytest.MonkeyPatch) -> Case:
        built = fuse_segments.convolution_with

        def disturbed(*args: Any, **options: Any) -> nn.Module:
            module: Any = built(*args, **options)
            module.weight.data[0, 0, 0, 0] += 1e-6
            return module

        monkeypatch.setattr(fuse_segments, "convolution_with", disturbed)
        return TestZoo().case("residual_plus")

    def plan(self, found: Case) -> Plan:
        chosen = {c.id: c for c in found.candidates}
        return Plan(found.findings.fingerprint, (chosen["x->relu fitted 3->4 1x1"], chosen[self.FIVE]))

    def test_it_says_by_how_much_and_which_merge_is_at_fault(self, found: Case) -> None:
        with pytest.raises(AssertionError, match=r"differ by .*\n +\S+e-1\d  x->relu fitted.*\n +\S+e-0\d  .* 5x5"):
            assert_law(found.graph, self.plan(found), found.inputs)

    def test_a_tap_that_sees_only_padding_is_noticed_too(self, found: Case) -> None:
        with pytest.raises(AssertionError, match=rf"{self.FIVE} is off by .* on its own, at \(2, 4, 7, 8\)"):
            assert_law(found.graph, self.plan(found), [images(size=(2, 2))])

    def test_in_float32_too(self, found: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(TOLERANCE, torch.float64, 1.0)
        monkeypatch.setitem(TOLERANCE, torch.float32, 1e-8)
        with pytest.raises(AssertionError, match=r"differ by .*\nx->relu"):
            assert_law(found.graph, self.plan(found), found.inputs, float32=True)

    def test_a_merge_that_is_not_there_is_noticed(self, found: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(laws, "fuse", lambda student: student)
        with pytest.raises(AssertionError, match=f"^{self.FIVE} became BatchNorm2d"):
            assert_law(found.graph, self.plan(found), found.inputs)
