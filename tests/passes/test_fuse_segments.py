"""One convolution for every segment: what must fuse, what must not, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

from fxmerge.analysis.candidates import propose
from fxmerge.analysis.segments import find_segments
from fxmerge.core.plan import Plan
from fxmerge.errors import InputError, PassError
from fxmerge.graph.query import module_of
from fxmerge.graph.trace import trace
from fxmerge.passes.fuse_segments import FuseSegments, fuse
from fxmerge.passes.linearize import linearize
from tests.laws import assert_law, relative_error
from tests.passes.test_linearize import Bench, text
from tests.zoo import Net, conv, images


def convolutions(graph: GraphModule) -> dict[str, nn.Module]:
    calls = {node.name: module_of(graph, node) for node in graph.graph.nodes}
    return {name: module for name, module in calls.items() if isinstance(module, nn.modules.conv._ConvNd)}


class TestMustFuse:
    @pytest.mark.parametrize(
        ("name", "id", "expected"),
        [
            (
                "residual_plus",
                "relu->relu_2 composed 4->4 5x5",
                ["stem = stem(x)", "relu = relu(stem)", "add = merged.add(relu)", "relu_2 = relu(add)"],
            ),
            (
                "projection_skip",
                "x->relu_1 composed 3->6 7x7 s2x2",
                ["add = merged.add(x)", "relu_1 = relu(add)"],
            ),
            (
                "option_a_skip",
                "x->relu_1 composed 3->6 7x7 s2x2",
                ["add = merged.add(x)", "relu_1 = relu(add)"],
            ),
            (
                "concat_branches",
                "relu->relu_2 composed 4->11 3x3",
                ["stem = stem(x)", "relu = relu(stem)", "bn = merged.bn(relu)", "relu_2 = relu(bn)", "head = head(relu_2)"],
            ),
            (
                "repvgg_block",
                "_1->_2_relu composed 4->4 3x3",
                [
                    "_0 = 0(input_1)", "_1 = relu(_0)", "_2_add_1 = merged._2_add_1(_1)", "_2_relu = relu(_2_add_1)",
                    "_3_dense_0 = 3.dense.0(_2_relu)", "_3_dense_1 = 3.dense.1(_3_dense_0)",
                    "_3_pointwise_0 = 3.pointwise.0(_2_relu)", "_3_pointwise_1 = 3.pointwise.1(_3_pointwise_0)",
                    "_3_add = add(_3_dense_1, _3_pointwise_1)", "_3_relu = relu(_3_add)",
                ],
            ),
            (
                "zero_pad_function",
                "x->b composed 3->4 4x4",
                [
                    "pad_3 = pad(x, (2, 1, 1, 3))", "b = merged.b(pad_3)", "pad_1 = pad(b, (2, 1, -1, 1))",
                    "c = c(pad_1)", "relu_1 = relu(c)",
                ],
            ),
        ],
    )  # fmt: skip
    def test_a_composed_stretch_becomes_one_convolution(self, name: str, id: str, expected: list[str]) -> None:
        assert text(FuseSegments().apply(Bench(name).student(id))) == expected

    def test_a_dropped_stretch_is_gone(self) -> None:
        merged = FuseSegments().apply(Bench("residual_plus").student("relu->bn2 identity"))
        assert text(merged)[2:] == ["add = add(relu, relu)", "relu_2 = relu(add)"]

    def test_a_norm_behind_a_fitted_convolution_is_folded(self) -> None:
        merged = FuseSegments().apply(Bench("residual_plus").student("relu->bn2 fitted 4->4 3x3", norms=True))
        assert list(convolutions(merged)) == ["stem", "bn2"]

    def test_several_segments_fuse_at_once(self) -> None:
        student = Bench("residual_plus").student("x->relu fitted 3->4 1x1", "relu->relu_2 composed 4->4 5x5")
        assert list(convolutions(fuse(student))) == ["stem", "add"]

    def test_modules_that_nothing_calls_any_more_are_gone(self) -> None:
        merged = fuse(Bench("residual_plus").student("relu->relu_2 composed 4->4 5x5"))
        assert {name.split(".")[0] for name in merged.state_dict()} == {"stem", "merged"}

    def test_the_dtype_and_the_memory_format_are_the_models(self) -> None:
        bench = Bench("residual_plus")
        annotated = bench.annotated("relu->relu_2 composed 4->4 5x5")
        student = linearize(annotated).to(torch.float32, memory_format=torch.channels_last)  # type: ignore[call-overload]
        made = fuse(student).get_submodule("merged.add")
        assert made.weight.dtype == torch.float32
        assert made.weight.is_contiguous(memory_format=torch.channels_last)


class TestMustNotFuse:
    def test_an_annotated_graph_that_is_no_student_is_an_error(self) -> None:
        annotated = Bench("residual_plus").annotated("relu->relu_2 composed 4->4 5x5")
        with pytest.raises(PassError, match=r"^this graph is annotated but not linearized: fuse the student that linearize"):
            fuse(annotated)

    def test_a_graph_without_merges_keeps_its_layers(self) -> None:
        bench = Bench("residual_plus")
        assert text(FuseSegments().apply(bench.graph)) == text(bench.graph)

    def test_one_convolution_stays_the_very_module_it_is(self) -> None:
        student = Bench("residual_plus").student("relu->bn2 fitted 4->4 3x3")
        merged = FuseSegments().apply(student)
        assert merged.get_submodule("merged.bn2") is student.get_submodule("merged.bn2")

    def test_what_is_outside_the_segments_stays(self) -> None:
        student = Bench("second_user").student("a->c composed 4->4 5x5")
        assert [line for line in text(fuse(student)) if "softmax" in line or "mul" in line] == [
            "softmax = softmax(a, 1)",
            "mul = mul(c, softmax)",
        ]


class TestOnlyAStudentIsFused:
    def test_a_traced_graph_is_none(self) -> None:
        with pytest.raises(PassError, match=r"^this graph is no student: fuse what linearize\(\) returns"):
            fuse(Bench("residual_plus").graph)

    def test_a_pickled_student_is_one_no_more(self) -> None:
        student = pickle.loads(pickle.dumps(Bench("residual_plus").student("relu->relu_2 composed 4->4 5x5")))
        with pytest.raises(PassError, match="pickle lose what is to be merged; use save_student and load"):
            fuse(student)

    def test_something_that_is_no_graph_is_told(self) -> None:
        with pytest.raises(InputError, match=r"works on a torch\.fx\.GraphModule, found Conv2d"):
            fuse(nn.Conv2d(3, 3, 3))  # type: ignore[arg-type]


class TestTheStudentStays:
    @pytest.mark.parametrize("ids", [(), ("relu->relu_2 composed 4->4 5x5",), ("relu->bn2 fitted 4->4 3x3",)])
    def test_apart_from_the_merged_network(self, ids: tuple[str, ...]) -> None:
        student = Bench("residual_plus").student(*ids)
        merged = fuse(student)
        before = merged(images())
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.5)
        assert torch.equal(merged(images()), before)

    @pytest.mark.parametrize("training", [True, False])
    def test_in_its_mode_with_its_weights(self, training: bool) -> None:
        student = Bench("residual_plus").student("relu->relu_2 composed 4->4 5x5").train(training)
        before = copy.deepcopy(student.state_dict())
        merged = fuse(student)
        merged.get_submodule("stem").weight.data.zero_() if training else None
        assert all(module.training is training for module in student.modules())
        assert not any(module.training for module in (merged, *merged.modules()) if module._parameters)
        assert not merged.training
        assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())

    def test_in_its_mode_also_where_a_layer_is_in_another(self) -> None:
        student = Bench("dropout").student().eval()
        student.get_submodule("5").train()
        fuse(student)
        assert student.get_submodule("5").training


@pytest.mark.parametrize(
    "write",
    [
        lambda s, y: y.mul_(3),
        lambda s, y: s.act(y),
        lambda s, y: F.celu_(y),
        lambda s, y: torch.neg_(y),
    ],
    ids=["method", "module", "torch.nn.functional", "torch"],
)
def test_an_opaque_operation_in_place_does_not_change_what_a_merged_convolution_reads(write: Callable[[Any, Any], Any]) -> None:
    def forward(s: Any, x: Any) -> Any:
        a = s.a(x)
        h = s.b(a)
        written = write(s, a)  # between two layers of a branch that starts before it
        return s.c(h) + written

    model = Net(forward, a=conv(3, 4), b=conv(4, 4), c=conv(4, 4), act=nn.SELU(inplace=True)).double()
    graph = trace(model, images())
    findings = find_segments(graph)
    for candidate in (c for p in propose(findings) for c in p.candidates):
        assert_law(graph, Plan(findings.fingerprint, (candidate,)), [images()])


def test_an_opaque_operation_in_place_is_no_dead_code() -> None:
    def forward(s: Any, x: Any) -> Any:
        y = s.a(x)
        y.mul_(3)
        return y.abs()

    graph = trace(Net(forward, a=conv(3, 4)).double(), images())
    assert relative_error(graph(images()), FuseSegments().apply(graph)(images())) == 0
