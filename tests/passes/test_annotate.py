"""Decisions on nodes: what is written, and plans that do not fit."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from fxmerge.analysis.candidates import propose
from fxmerge.analysis.segments import find_segments
from fxmerge.core.geometry import Axis, Geometry
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate
from fxmerge.errors import FxMergeError, PlanMismatchError
from fxmerge.graph.meta import facts
from fxmerge.graph.trace import trace
from fxmerge.passes.annotate import annotate, merges, stretch
from fxmerge.passes.fuse_segments import fuse
from fxmerge.passes.linearize import linearize
from tests.laws import random_plan, relative_error
from tests.zoo import images, specimen


def offered(name: str) -> tuple[GraphModule, str, dict[str, Candidate]]:
    graph = trace(specimen(name), images(name))
    findings = find_segments(graph)
    return graph, findings.fingerprint, {c.id: c for p in propose(findings) for c in p.candidates}


def roles(graph: GraphModule) -> dict[str, str]:
    return {node.name: facts(node).role for node in graph.graph.nodes if facts(node).role}


class TestWhatIsWritten:
    def test_a_composed_merge_removes_some_nodes_and_merges_the_others(self) -> None:
        graph, fingerprint, candidates = offered("residual_plus")
        merge = candidates["relu->relu_2 composed 4->4 5x5"]
        annotated = annotate(graph, Plan(fingerprint, (merge,)))
        expected = dict.fromkeys(("conv1", "bn1", "conv2", "bn2", "add"), "merged") | {"relu_1": "removed"}
        assert roles(annotated) == expected
        assert [(node.name, found) for node, found in merges(annotated)] == [("add", merge)]

    @pytest.mark.parametrize("id", ["relu->bn2 fitted 4->4 3x3", "relu->bn2 identity"])
    def test_a_fitted_or_dropped_stretch_is_replaced(self, id: str) -> None:
        graph, fingerprint, candidates = offered("residual_plus")
        annotated = annotate(graph, Plan(fingerprint, (candidates[id],)))
        assert roles(annotated) == dict.fromkeys(("conv1", "bn1", "relu_1", "conv2", "bn2"), "replaced")

    def test_an_empty_plan_writes_nothing(self) -> None:
        graph, fingerprint, _ = offered("residual_plus")
        annotated = annotate(graph, Plan(fingerprint))
        assert not roles(annotated)
        assert not list(merges(annotated))

    def test_a_second_plan_takes_the_place_of_the_first(self) -> None:
        graph, fingerprint, candidates = offered("residual_plus")
        first = annotate(graph, Plan(fingerprint, (candidates["relu->bn2 identity"],)))
        second = annotate(first, Plan(fingerprint, (candidates["x->relu fitted 3->4 1x1"],)))
        assert roles(second) == {"stem": "replaced"}

    def test_the_stretch_of_a_merge_is_from_behind_its_entry_to_its_exit(self) -> None:
        graph, fingerprint, candidates = offered("residual_plus")
        annotated = annotate(graph, Plan(fingerprint, (candidates["relu_1->bn2 identity"],)))
        [(exit_node, merge)] = merges(annotated)
        entry, nodes = stretch(annotated, exit_node, merge)
        assert entry.name == "relu_1"
        assert [node.name for node in nodes] == ["conv2", "bn2"]


#: One tap, a thousand pixels away.
FAR = Geometry(4, 4, (Axis(offset=1000), Axis()))
#: A million taps.
HUGE = Geometry(4, 4, (Axis(taps=10**6), Axis()))


class TestMismatch:
    def test_a_plan_for_another_network_is_an_error_with_both_fingerprints(self) -> None:
        graph, fingerprint, _ = offered("residual_plus")
        other = Plan("0" * 32)
        text = f"fingerprint 000000000000, this graph has {fingerprint[:12]}. Trace the same model in the same way"
        with pytest.raises(PlanMismatchError, match=text) as caught:
            annotate(graph, other)
        assert caught.value.node is None

    @pytest.mark.parametrize("field", ["entry", "exit"])
    def test_a_node_that_is_not_there_is_named(self, field: str) -> None:
        graph, fingerprint, candidates = offered("residual_plus")
        merge = replace(candidates["relu->bn2 fitted 4->4 3x3"], **{field: "gone"})  # type: ignore[arg-type]
        with pytest.raises(PlanMismatchError, match="^the plan names node 'gone', and this graph has none") as caught:
            annotate(graph, Plan(fingerprint, (merge,)))
        assert caught.value.node == "gone"

    @pytest.mark.parametrize("field", ["activations", "removed"])
    def test_a_removed_node_that_is_not_there_is_named(self, field: str) -> None:
        graph, fingerprint, candidates = offered("residual_plus")
        merge = replace(candidates["relu->bn2 composed 4->4 5x5"], **{field: ("gone",)})  # type: ignore[arg-type]
        with pytest.raises(PlanMismatchError, match="^the plan names node 'gone'"):
            annotate(graph, Plan(fingerprint, (merge,)))

    @pytest.mark.parametrize(
        ("one", "other", "node"),
        [
            ("relu->bn2 identity", "relu_1->bn2 identity", "conv2"),
            ("relu->bn2 identity", "relu->bn2 identity", "conv1"),
            ("x->relu_2 fitted 3->4 3x3", "relu->relu_1 fitted 4->4 1x1", "conv1"),
        ],
    )
    def test_merges_that_overlap_are_an_error_that_names_a_node(self, one: str, other: str, node: str) -> None:
        graph, fingerprint, candidates = offered("residual_plus")
        with pytest.raises(PlanMismatchError, match=f"^merges overlap at {node}: a plan covers every node once$") as caught:
            annotate(graph, Plan(fingerprint, (candidates[one], candidates[other])))
        assert caught.value.node == node

    @pytest.mark.parametrize(
        ("id", "change", "text"),
        [
            ("relu->bn2 fitted 4->4 3x3", {"entry": "bn2", "exit": "conv1", "end": "conv1"}, "conv1 does not depend on bn2"),
            ("relu->bn2 fitted 4->4 3x3", {"entry": "bn2"}, "bn2 does not depend on bn2"),
            ("relu->bn2 fitted 4->4 3x3", {"entry": "relu_1"}, "relu_1 is not inside"),
            ("relu->relu_2 fitted 4->4 3x3", {"entry": "relu_1", "activations": ()}, "add reads relu, which is outside"),
            ("x->relu fitted 3->4 1x1", {"exit": "conv1", "end": "conv1"}, "add, which is outside, reads relu"),
            ("relu->bn2 fitted 4->4 3x3", {"exit": "relu_2"}, "relu_2 does not lead to bn2 alone"),
            ("relu->relu_2 fitted 4->4 3x3", {"exit": "bn2"}, "bn2 does not lead to relu_2 alone"),
            ("relu->bn2 fitted 4->4 3x3", {"geometry": HUGE}, r"\(2, 4, 12, 12\) is not 4->4 1000000x1"),
            ("relu->bn2 fitted 4->4 3x3", {"geometry": FAR}, r"\(2, 4, 12, 12\) is not 4->4 1x1"),
        ],
    )
    def test_a_merge_moved_to_other_tensors_of_the_same_shape_is_told(self, id: str, change: dict[str, object], text: str) -> None:
        graph, fingerprint, candidates = offered("residual_plus")
        merge = replace(candidates[id], **change)  # type: ignore[arg-type]
        with pytest.raises(PlanMismatchError, match=text):
            annotate(graph, Plan(fingerprint, (merge,)))

    @pytest.mark.parametrize("id", ["relu->bn2 fitted 4->4 3x3", "relu->bn2 identity"])
    def test_a_merge_of_a_longer_stretch_than_it_was_made_for_is_told(self, id: str) -> None:
        graph, fingerprint, candidates = offered("residual_plus")
        merge = replace(candidates[id], activations=())
        with pytest.raises(PlanMismatchError, match="leaves relu_1 inside its segment"):
            linearize(annotate(graph, Plan(fingerprint, (merge,))))

    @pytest.mark.parametrize(
        "change",
        [
            {"entry": "bn2", "exit": "conv1"},
            {"activations": ()},
            {"removed": ("conv1", "conv2", "bn1", "bn2")},
        ],
        ids=["turned round", "an activation left inside", "everything removed"],
    )
    def test_a_merge_that_does_not_fit_its_stretch_is_a_mismatch(self, change: dict[str, object]) -> None:
        graph, fingerprint, candidates = offered("residual_plus")
        merge = replace(candidates["relu->bn2 composed 4->4 5x5"], **change)  # type: ignore[arg-type]
        with pytest.raises(PlanMismatchError):
            fuse(linearize(annotate(graph, Plan(fingerprint, (merge,)))))


class TestStudents:
    @pytest.mark.parametrize("name", ["residual_plus", "nested_residual", "concat_branches", "pre_activation"])
    def test_a_student_takes_its_plan_again_and_again(self, name: str) -> None:
        graph, fingerprint, _ = offered(name)
        findings = find_segments(graph)
        for seed in range(5):
            plan = random_plan(findings, propose(findings), random.Random(seed))
            student = linearize(annotate(graph, plan), norms=seed % 2 == 0)
            again = annotate(annotate(student, plan), plan)
            assert again.code == student.code
            assert relative_error(student(images()), fuse(again)(images())) < 1e-12
            assert fingerprint == plan.fingerprint

    def test_a_student_refuses_a_plan_for_another_network(self) -> None:
        graph, fingerprint, _ = offered("residual_plus")
        student = linearize(annotate(graph, Plan(fingerprint)))
        with pytest.raises(PlanMismatchError, match="this plan was made for a graph with fingerprint"):
            annotate(student, Plan("0" * 32))

    def test_every_mismatch_is_a_value_error_and_one_of_ours(self) -> None:
        assert issubclass(PlanMismatchError, ValueError)
        assert issubclass(PlanMismatchError, FxMergeError)


def test_an_identity_that_changes_channels_is_no_plan_of_ours() -> None:
    torch.manual_seed(0)
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval(), torch.zeros(1, 3, 8, 8))
    findings = find_segments(graph)
    candidates = [c for p in propose(findings) for c in p.candidates]
    one = next(c for c in candidates if c.kind == "fitted" and c.geometry.in_channels != c.geometry.out_channels)
    with pytest.raises(PlanMismatchError, match="is no identity"):
        annotate(graph, Plan(findings.fingerprint, (replace(one, kind="identity"),)))
