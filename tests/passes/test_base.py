"""The contract of a pass, in our hands and in torch's."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from fxmerge.analysis.candidates import propose
from fxmerge.analysis.segments import find_segments
from fxmerge.core.plan import Plan
from fxmerge.errors import InputError, PassError
from fxmerge.graph.trace import trace
from fxmerge.passes.annotate import Annotate, annotate
from fxmerge.passes.base import Pass, Sequential
from fxmerge.passes.drop_repeated import DropRepeated
from fxmerge.passes.fold_batchnorm import FoldBatchNorm
from fxmerge.passes.fuse_segments import FuseSegments
from fxmerge.passes.linearize import Linearize
from fxmerge.passes.reuse_memory import ReuseMemory
from tests import zoo
from tests.laws import random_plan, relative_error
from tests.zoo import images, specimen

EXACT: tuple[Pass, ...] = (FoldBatchNorm(), DropRepeated(), ReuseMemory(), FuseSegments())


def traced(name: str) -> tuple[GraphModule, Plan]:
    """A specimen's graph, and a plan for it that holds whatever fits."""
    graph = trace(specimen(name), images(name))
    findings = find_segments(graph)
    return graph, random_plan(findings, propose(findings), random.Random(1))


def applied(step: Pass | Callable[[GraphModule], Pass], graph: GraphModule) -> GraphModule:
    return step(graph).graph_module  # type: ignore[no-any-return, operator, union-attr]


def snapshot(graph: GraphModule) -> Any:
    """All that a pass might change: text, facts, modules by identity, numbers, modes."""
    nodes = [(node.name, node.op, node.target, dict(node.meta)) for node in graph.graph.nodes]
    modules = [(name, id(module), module.training, str(module)) for name, module in graph.named_modules()]
    tensors = [(name, id(value), value.clone()) for name, value in graph.state_dict(keep_vars=True).items()]
    return str(graph.graph), graph.code, nodes, modules, tensors


def assert_untouched(before: Any, after: Any) -> None:
    assert before[:4] == after[:4]
    for (name, one, value), (other_name, other, now) in zip(before[4], after[4], strict=True):
        assert (name, one) == (other_name, other)
        assert torch.equal(value, now), name


def assert_same_network(one: GraphModule, other: GraphModule) -> None:
    assert one.code == other.code
    leaves = [sorted((name, str(m)) for name, m in graph.named_modules() if not [*m.children()]) for graph in (one, other)]
    assert leaves[0] == leaves[1]


def every_pass(name: str) -> list[tuple[Pass, GraphModule]]:
    """Each pass with a graph that it takes."""
    graph, plan = traced(name)
    annotated = annotate(graph, plan)
    student = applied(Linearize(), annotated)
    plain = [(step, graph) for step in EXACT]
    return [*plain, (Annotate(plan), graph), (Linearize(), annotated), (Linearize(own=False), annotated), (FuseSegments(), student)]


class TestContract:
    @pytest.mark.parametrize("name", zoo.ZOO)
    def test_no_pass_changes_its_input(self, name: str) -> None:
        for step, graph in every_pass(name):
            before = snapshot(graph)
            applied(step, graph)
            assert_untouched(before, snapshot(graph))

    @pytest.mark.parametrize("name", zoo.ZOO)
    def test_an_exact_pass_computes_the_same(self, name: str) -> None:
        for step, graph in every_pass(name):
            if step.exact:
                for size in ((12, 12), (9, 14)):
                    x = images(name, size=size, batch=3, seed=2)
                    assert relative_error(graph(x), applied(step, graph)(x.clone())) < 1e-12, step

    @pytest.mark.parametrize("name", zoo.ZOO)
    def test_a_second_time_changes_nothing(self, name: str) -> None:
        for step, graph in every_pass(name):
            if isinstance(step, (Linearize, FuseSegments)):
                continue  # the first refuses a student, the second has a test of its own
            assert_same_network(applied(step, graph), applied(step, applied(step, graph)))

    @pytest.mark.parametrize("name", zoo.ZOO)
    def test_an_exact_pass_that_finds_nothing_to_do_returns_the_graph_itself_and_says_so(self, name: str) -> None:
        graph, _ = traced(name)
        for step in EXACT:
            done = applied(step, graph)
            assert step(done) == PassResult(done, False), step
        assert FuseSegments()(graph) == PassResult(graph, False)

    def test_an_empty_plan_leaves_the_graph_itself(self) -> None:
        graph, plan = traced("residual_plus")
        empty = Plan(plan.fingerprint)
        assert annotate(graph, empty) is graph
        assert Annotate(empty)(annotate(graph, plan)).modified

    @pytest.mark.parametrize(
        "name",
        [
            "residual_plus",
            "zero_pad_module",
        ],
    )
    def test_fusing_a_second_time_changes_nothing(self, name: str) -> None:
        once = applied(FuseSegments(), every_pass(name)[-1][1])
        assert_same_network(once, applied(FuseSegments(), once))

    @pytest.mark.parametrize("name", zoo.ZOO)
    def test_names_shapes_and_sources_stay_on_the_nodes_that_stay(self, name: str) -> None:
        graph, _ = traced(name)
        for step in EXACT:
            before = {node.name: node.meta["fxmerge"].shape for node in graph.graph.nodes}
            after = {node.name: node.meta["fxmerge"].shape for node in applied(step, graph).graph.nodes}
            assert after.items() <= before.items(), step

    def test_only_linearizing_is_lossy(self) -> None:
        assert all(step.exact for step in (*EXACT, Annotate(Plan(""))))
        assert not Linearize().exact

    @pytest.mark.parametrize("step", [*EXACT, Linearize(), Annotate(Plan(""))], ids=lambda step: step.name)
    def test_something_that_is_no_graph_is_an_error_that_names_the_pass(self, step: Pass) -> None:
        with pytest.raises(InputError, match=rf"^{step.name} works on a torch\.fx\.GraphModule, found Conv2d; trace it first$"):
            step(nn.Conv2d(3, 3, 3))  # type: ignore[arg-type]

    @pytest.mark.parametrize("step", [*EXACT, Linearize()], ids=lambda step: step.name)
    def test_a_pass_is_a_frozen_value(self, step: Pass) -> None:
        with pytest.raises(FrozenInstanceError, match="cannot assign to field"):
            step.operators = None  # type: ignore[attr-defined]

    def test_a_result_says_whether_there_is_a_new_graph(self) -> None:
        @dataclass(frozen=True)
        class Nothing(Pass):
            exact: ClassVar[bool] = True

            def call(self, graph: GraphModule) -> GraphModule:
                return graph

        graph, _ = traced("projection_skip")
        assert Nothing()(graph) == PassResult(graph, False)
        assert FoldBatchNorm()(graph).modified

    def test_what_a_pass_promises_is_asked_of_its_result(self) -> None:
        asked: list[GraphModule] = []

        @dataclass(frozen=True)
        class Promising(Pass):
            exact: ClassVar[bool] = True

            def call(self, graph: GraphModule) -> GraphModule:
                return copy.deepcopy(graph)

            def ensures(self, result: GraphModule) -> None:
                asked.append(result)

        graph, _ = traced("stride")
        assert [Promising()(graph).graph_module] == asked

    def test_a_pass_without_work_of_its_own_is_none(self) -> None:
        graph, _ = traced("stride")
        with pytest.raises(NotImplementedError):
            Pass()(graph)


class TestSequential:
    def test_it_is_its_passes_in_order(self) -> None:
        graph, _ = traced("projection_skip")
        both = Sequential((FoldBatchNorm(), ReuseMemory()))
        assert applied(both, graph).code == applied(ReuseMemory(), applied(FoldBatchNorm(), graph)).code

    def test_it_is_exact_if_all_are(self) -> None:
        assert Sequential().exact
        assert Sequential((FoldBatchNorm(), ReuseMemory())).exact
        assert not Sequential((FoldBatchNorm(), Linearize())).exact

    def test_an_error_says_which_pass_failed_after_which(self) -> None:
        graph, plan = traced("residual_plus")
        steps = Sequential((Annotate(plan), FoldBatchNorm(), FuseSegments()))
        with pytest.raises(PassError, match="^FuseSegments, after Annotate, FoldBatchNorm: this graph is annotated but"):
            steps(graph)

    def test_an_error_of_the_first_pass_stays_as_it_is(self) -> None:
        graph, plan = traced("residual_plus")
        annotated = annotate(graph, plan)
        with pytest.raises(PassError, match="^this graph is annotated but not linearized"):
            Sequential((FuseSegments(), FoldBatchNorm()))(annotated)


class TestTorchsPassManager:
    @pytest.mark.parametrize("name", ["residual_plus", "concat_branches", "inverted_residual", "zero_pad_module"])
    def test_the_whole_way_runs_in_it(self, name: str) -> None:
        graph, plan = traced(name)
        before = snapshot(graph)
        ours = Sequential((Annotate(plan), Linearize(own=False)))
        student = applied(ours, graph)
        manager = PassManager(passes=[Annotate(plan), FuseSegments(), FoldBatchNorm(), DropRepeated(), ReuseMemory()])
        result = manager(student)
        assert isinstance(result, PassResult)
        x = images(name, seed=3)
        assert relative_error(student(x), result.graph_module(x.clone())) < 1e-12
        assert_untouched(before, snapshot(graph))

    def test_beside_a_pass_of_someone_else(self) -> None:
        def theirs(graph: GraphModule) -> PassResult:
            graph.recompile()
            return PassResult(graph, False)

        graph, _ = traced("dropout")
        result = PassManager(passes=[theirs, FoldBatchNorm(), theirs])(graph)
        assert result is not None
        assert relative_error(graph(images()), result.graph_module(images())) < 1e-12
