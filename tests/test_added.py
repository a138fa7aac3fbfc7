"""Activations put behind merges that end in none: offered, timed, scored, fitted and built alike, and the law holds."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxmerge
from fxmerge.analysis.report import explain
from fxmerge.core.segment import narrowed
from fxmerge.measure.divergence import divergence
from fxmerge.search import build_networks
from fxmerge.tune import already_merged, shared_cuts
from tests.fakes import PriceTimer
from tests.laws import TOLERANCE, assert_law, held_out, random_plan, relative_error

SPACE = fxmerge.Space(added=True)


class Bottleneck(nn.Module):
    """Expand, depthwise, project; nothing behind it."""

    def __init__(self, width: int, activation: nn.Module, *, skip: bool = True) -> None:
        super().__init__()
        self.expand, self.first = nn.Conv2d(width, 3 * width, 1, bias=False), nn.BatchNorm2d(3 * width)
        self.depth, self.second = nn.Conv2d(3 * width, 3 * width, 3, 1, 1, groups=3 * width), nn.BatchNorm2d(3 * width)
        self.project, self.third = nn.Conv2d(3 * width, width, 1), nn.BatchNorm2d(width)
        self.act1, self.act2, self.skip = copy.deepcopy(activation), copy.deepcopy(activation), skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.first(self.expand(x)))
        y = self.third(self.project(self.act2(self.second(self.depth(y)))))
        return x + y if self.skip else y


class Net(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.one, self.two = Bottleneck(6, activation), Bottleneck(6, activation, skip=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.stem(x).relu())).mean((2, 3)))


def images(count: int = 2, size: tuple[int, int] = (12, 12), seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def traced(activation: nn.Module | None = None) -> GraphModule:
    torch.manual_seed(0)
    model = Net(activation or nn.ReLU6(inplace=True)).double()
    model.train()(images(16, seed=3))  # statistics of norms
    return fxmerge.trace(model.eval(), images())


class Found:
    """A network, and all candidates of its space."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        self.graph = traced(activation)
        self.findings = fxmerge.find_segments(self.graph)
        self.proposals = fxmerge.propose(self.findings, SPACE)
        self.candidates = [c for p in self.proposals for c in p.candidates]
        self.added = [c for c in self.candidates if c.added]

    def whole(self, kind: str = "fitted") -> fxmerge.Candidate:
        """The first block, its skip taken in, with an activation behind it."""
        blocks = (c for c in self.added if c.kind == kind and c.exit == "one_add")
        return max(blocks, key=lambda c: (len(c.activations), c.geometry.kernel))

    def plan(self, *merges: fxmerge.Candidate) -> fxmerge.Plan:
        return fxmerge.Plan(self.findings.fingerprint, merges)


@pytest.fixture(scope="module")
def found() -> Found:
    return Found()


def test_they_are_offered_where_no_activation_is_behind_and_only_when_asked_for(found: Found) -> None:
    plain = {c.id for p in fxmerge.propose(found.findings) for c in p.candidates}
    assert plain == {c.id for c in found.candidates} - {c.id for c in found.added}
    assert {c.exit for c in found.added} >= {"one_add", "one_third", "two_third"}
    for candidate in found.added:
        assert candidate.end == candidate.exit
        assert candidate.added == candidate.activations[-1]
        assert candidate.id == f"{replace(candidate, added='').id}, then {candidate.added}"
        assert candidate.kind != "identity"
        assert not candidate.exact


def test_one_with_numbers_of_its_own_is_not_put_anywhere() -> None:
    assert not Found(nn.PReLU(18)).added


@pytest.mark.parametrize("activation", [nn.ReLU6(inplace=True), nn.ReLU(), nn.SiLU(inplace=True), nn.Hardswish()])
def test_the_law(activation: nn.Module) -> None:
    case, rng = Found(activation), random.Random(0)
    inputs = [images(), images(1, (9, 14), seed=1)]
    for candidate in rng.sample(case.added, min(16, len(case.added))):
        assert_law(case.graph, case.plan(candidate), inputs, norms=rng.random() < 0.5)
    for number in range(6):
        assert_law(case.graph, random_plan(case.findings, case.proposals, rng), inputs, norms=number % 2 == 0)


@pytest.mark.parametrize("kind", ["composed", "fitted"])
def test_the_activation_stands_between_the_convolution_and_all_that_reads_it(found: Found, kind: str) -> None:
    plan, bare = found.plan(found.whole(kind)), found.plan(replace(found.whole(kind), added=""))
    weights = fxmerge.fit(found.findings, plan, images(64, seed=1))
    student, merged = build_networks(found.findings, plan, weights)
    renamed = {plan.merges[0].id: bare.merges[0].id}
    _, linear = build_networks(found.findings, bare, {renamed.get(name, name): map_ for name, map_ in weights.items()})
    values: dict[str, Tensor] = {}

    def clamped(graph: GraphModule) -> Any:
        class Clamping(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Any:
                value = super().run_node(n)
                values[n.name] = value
                return value.clamp(0, 6) if n.name == "one_add" else value

        return Clamping(graph).run(images(3, seed=5))

    expected = clamped(linear)
    assert (values["one_add"] < 0).any()  # else nothing is tested
    with torch.no_grad():
        for network in (student, merged):
            assert relative_error(expected, network(images(3, seed=5))) <= TOLERANCE[torch.float64]


def test_a_merge_behind_reads_the_activation(found: Found) -> None:
    """And annotated once more, the student still says so."""
    first = found.whole()
    second = next(c for c in found.candidates if c.entry == first.exit and c.kind == "fitted" and c.exit == "two_third")
    plan = found.plan(first, second)
    student = fxmerge.linearize(fxmerge.annotate(found.graph, plan))
    [activation] = [node for node in student.graph.nodes if node.meta["fxmerge"].behind == first.exit]
    [reader] = activation.users
    assert reader.name == second.exit
    again = fxmerge.annotate(student, plan)
    with torch.no_grad():
        expected = student(images())
        for graph in (student, again):
            assert relative_error(expected, fxmerge.fuse(graph)(images())) <= TOLERANCE[torch.float64]


def test_what_is_scored_is_what_the_student_computes(found: Found) -> None:
    batch, candidate = images(32, seed=1), found.whole()
    judged, others = held_out(batch, found.graph)
    alone = fxmerge.Reconstruction().alone()
    [proposal] = narrowed(found.proposals, lambda c: c == candidate)
    scored = fxmerge.measure_importance(found.findings, [proposal], batch).loss(candidate.id)
    plan = found.plan(candidate)
    _, merged = build_networks(found.findings, plan, alone.fit(found.findings, plan, fxmerge.as_batches(others, found.graph)))
    with torch.no_grad():
        expected = float(divergence(found.graph(judged), merged(judged)).mean())
    assert scored == pytest.approx(expected, rel=1e-6)
    assert scored > 0


def test_fitted_through_it_no_more_is_lost_than_fitted_without(found: Found) -> None:
    batch, plan = images(64, seed=1), found.plan(found.whole())

    def lost(weights: Any) -> float:
        with torch.no_grad():
            _, merged = build_networks(found.findings, plan, weights)
            env = fxmerge.baseline(found.graph)
            wanted = torch.fx.Interpreter(env, garbage_collect_values=False)
            wanted.run(batch)
            target = next(value for node, value in wanted.env.items() if node.name == "one_add").clamp(0, 6)
            got = torch.fx.Interpreter(merged, garbage_collect_values=False)
            got.run(batch)
            exit_value = next(value for node, value in got.env.items() if node.name == "one_add").clamp(0, 6)
            return float((exit_value - target).square().mean())

    through = fxmerge.fit(found.findings, plan, batch, scorer=fxmerge.Reconstruction(stay=False))
    plainly = fxmerge.fit(found.findings, plan, batch, scorer=fxmerge.Reconstruction(stay=False, through=0))
    assert lost(through) < lost(plainly)


def test_it_is_timed_with_what_is_behind_it(found: Found) -> None:
    table = fxmerge.measure_latency(found.findings, found.proposals, (images(),), timer=PriceTimer())
    candidate = found.whole()
    assert table.candidate_ns(candidate.id) > 0
    keys = table.candidates[candidate.id], table.candidates[replace(candidate, added="").id]
    assert keys[0] != keys[1]


def test_training_is_not_taught_what_lies_before_it(found: Found) -> None:
    plan = found.plan(found.whole())
    student = fxmerge.linearize(fxmerge.annotate(found.graph, plan))
    bare = fxmerge.linearize(fxmerge.annotate(found.graph, found.plan(replace(plan.merges[0], added=""))))
    assert "one_add" in shared_cuts(bare, found.graph)
    assert "one_add" not in shared_cuts(student, found.graph)


def test_merged_already_it_is_the_same_network(found: Found) -> None:
    plan = found.plan(found.whole("composed"))
    one, weights = already_merged(found.graph, plan)
    assert one.merges[0].added == plan.merges[0].added
    networks = [
        fxmerge.fuse(fxmerge.linearize(fxmerge.annotate(found.graph, p), weights=w)) for p, w in ((plan, None), (one, weights))
    ]
    with torch.no_grad():
        assert relative_error(networks[0](images()), networks[1](images())) <= TOLERANCE[torch.float64]


def test_plans_keep_it_through_json_and_old_ones_have_none(found: Found) -> None:
    plan = found.plan(found.whole())
    data = json.loads(json.dumps(plan.to_json()))
    assert fxmerge.Plan.from_json(data) == plan
    assert "added" not in found.plan(replace(plan.merges[0], added="")).to_json()["merges"][0]


def test_one_with_parameters_is_refused_behind_another_tensor() -> None:
    """A plan that names it all the same, as no proposal does."""
    case = Found(nn.PReLU(18))
    good = next(c for c in case.candidates if c.kind == "fitted" and c.exit == c.end == "one_add" and c.activations)
    with pytest.raises(fxmerge.PlanMismatchError, match="has numbers of its own, or reads several tensors"):
        fxmerge.annotate(case.graph, case.plan(replace(good, added=good.activations[-1])))


def test_an_exact_space_has_none() -> None:
    case = Found()
    space = replace(fxmerge.Space(exact=True), added=True)
    offered = [c for p in fxmerge.propose(case.findings, space) for c in p.candidates]
    assert all(c.exact for c in offered)
    assert {c.id for c in offered} == {
        c.id for p in fxmerge.propose(case.findings, fxmerge.Space.named("exact")) for c in p.candidates
    }


@pytest.mark.parametrize("fault", ["stranger", "kept", "number"])
def test_damaged_plans_are_refused(found: Found, fault: str) -> None:
    good = found.whole()
    if fault == "number":
        data = found.plan(good).to_json()
        data["merges"][0]["added"] = 3
        with pytest.raises(fxmerge.PlanError, match="no string"):
            fxmerge.Plan.from_json(data)
        return
    kept = next(c for c in found.candidates if c.end != c.exit and c.activations and c.kind == "fitted")
    damaged = replace(good, added="head") if fault == "stranger" else replace(kept, added=kept.activations[0])
    with pytest.raises(fxmerge.PlanMismatchError, match="is to stand behind"):
        fxmerge.annotate(found.graph, found.plan(damaged))


def test_the_report_names_it(found: Found) -> None:
    assert f"{found.whole().added} behind" in explain(found.proposals)
