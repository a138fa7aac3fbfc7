"""Finding: net -> names of the segments; and for whatever is in none, the reason."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxmerge.analysis.segments import Findings, find_segments
from fxmerge.core.segment import Reason, Refusal
from fxmerge.errors import InputError
from fxmerge.graph.trace import trace
from tests import zoo
from tests.zoo import Net, conv, images, specimen


def findings(model: nn.Module, **options: Any) -> Findings:
    return find_segments(trace(model, torch.zeros(1, 3, 12, 12)), **options)


def names(found: Findings) -> list[str]:
    return [str(segment) for segment in found.segments]


def only(found: Findings, node: str) -> Refusal:
    [refusal] = [refusal for refusal in found.refusals if refusal.node == node]
    return refusal


class TestWhatIsFound:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("stride", ["input_1 -> _1", "input_1 -> _3", "input_1 -> _4", "_1 -> _3", "_1 -> _4", "_3 -> _4"]),
            (
                "residual_plus",
                ["x -> relu", "x -> relu_2", "relu -> relu_2", "relu -> relu_1", "relu -> bn2", "relu_1 -> bn2"],
            ),
            (
                "projection_skip",
                ["x -> relu_1", "x -> relu", "x -> bn2", "relu -> bn2", "x -> skip_bn"],
            ),
            ("option_a_skip", ["x -> relu_1", "x -> pad", "x -> relu", "x -> bn", "relu -> bn"]),
            (
                "inverted_residual",
                ["x -> add", "x -> act", "x -> act_1", "x -> bn3", "act -> act_1", "act -> bn3", "act_1 -> bn3"],
            ),
            (
                "pre_activation",
                [
                    "x -> stem", "x -> add", "stem -> add", "stem -> relu_1", "stem -> conv2",
                    "relu -> relu_1", "relu -> conv2", "relu_1 -> conv2",
                ],
            ),
            ("shared_module", ["x -> relu", "twice_1 -> head", "relu_2 -> head"]),
            ("tied_weights", ["x -> relu", "b -> head", "relu_2 -> head"]),
            ("second_user", ["x -> a", "a -> relu_1", "a -> c", "relu -> relu_1", "relu -> c", "relu_1 -> c"]),
            (
                "concat_branches",
                [
                    "x -> relu", "x -> relu_2", "x -> head", "relu -> relu_2", "relu -> head", "relu_2 -> head",
                    "relu -> one", "relu -> relu_1", "relu -> three", "relu_1 -> three",
                ],
            ),
        ],
    )  # fmt: skip
    def test_segments_of_known_nets(self, name: str, expected: list[str]) -> None:
        assert names(find_segments(trace(specimen(name), images(name)))) == expected

    @pytest.mark.parametrize("name", zoo.RESIDUALS)
    def test_every_spelling_of_a_residual_add_gives_the_same_segments(self, name: str) -> None:
        found = find_segments(trace(specimen(name), images()))
        assert len(found.segments) == 6
        assert not found.refusals

    def test_a_segment_says_what_is_inside_and_what_is_kept(self) -> None:
        found = find_segments(trace(specimen("residual_plus"), images()))
        [block] = [segment for segment in found.segments if str(segment) == "relu -> relu_2"]
        assert block.exit == "add"
        assert block.nodes == ("conv1", "bn1", "relu_1", "conv2", "bn2", "add", "relu_2")
        assert block.activations == ("relu_1",)
        assert block.convolutions == ("conv1", "conv2")
        assert str(block.expression) == "(conv1 > bn1 > conv2 > bn2 + x)"

    def test_several_activations_at_the_end_are_all_kept(self) -> None:
        found = findings(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), nn.Tanh()))
        [last] = [segment for segment in found.segments if str(segment) == "_1 -> _4"]
        assert (last.exit, last.end, last.activations) == ("_2", "_4", ())

    @pytest.mark.parametrize(("most", "expected"), [(1, 5), (2, 9), (3, 12), (8, 15)])
    def test_a_segment_spans_at_most_so_many_units(self, most: int, expected: int) -> None:
        model = nn.Sequential(*(conv(3, 3) for _ in range(5)))
        assert len(findings(model, max_units=most).segments) == expected

    def test_segments_of_a_network_traced_by_someone_else_are_the_same(self) -> None:
        model = specimen("residual_plus")
        theirs = fx.symbolic_trace(model)
        assert names(find_segments(trace(theirs, images()))) == names(find_segments(trace(model, images())))

    def test_the_graph_is_not_touched(self) -> None:
        graph = trace(specimen("nested_residual"), images())
        before = str(graph.graph), [dict(node.meta) for node in graph.graph.nodes]
        find_segments(graph)
        assert (str(graph.graph), [dict(node.meta) for node in graph.graph.nodes]) == before


def _two_paths(one: nn.Module, other: nn.Module) -> nn.Module:
    return Net(lambda s, x: s.one(x) + s.other(x), one=one, other=other)


def _hooked() -> nn.Module:
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4))
    model[0].register_forward_hook(lambda module, given, result: result * 2)
    return model


def _tied() -> nn.Module:
    model = nn.Sequential(conv(3, 3), conv(3, 3))
    model[0].bias = model[1].bias
    return model


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str, Reason, str]] = {
    "opaque node": (lambda: nn.Sequential(conv(3, 4), nn.MaxPool2d(2)), "_1", Reason.OPAQUE, "MaxPool2d"),
    "layer norm": (lambda: nn.Sequential(conv(3, 4), nn.LayerNorm((12, 12))), "_1", Reason.BATCH_STATISTICS, "LayerNorm"),
    "no statistics": (
        lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, track_running_stats=False)),
        "_1", Reason.BATCH_STATISTICS, "no running statistics",
    ),
    "module called twice": (zoo.shared_module, "twice_1", Reason.SHARED, ""),
    "tied weights": (zoo.tied_weights, "b", Reason.SHARED, ""),
    "tied biases": (_tied, "_0", Reason.SHARED, ""),
    "strides": (
        lambda: _two_paths(conv(3, 4, stride=2), conv(3, 4, 7, padding=0)),
        "add", Reason.STRIDES, r"paths with different strides meet: \(2, 2\) and \(1, 1\)",
    ),
    "padding mode": (
        lambda: nn.Sequential(conv(3, 4, padding_mode="reflect"), conv(4, 4)), "_0", Reason.PADDING_MODE, "reflect",
    ),
    "padding with ones": (
        lambda: Net(lambda s, x: s.a(F.pad(x, (1, 1), value=1.0)), a=conv(3, 4)), "pad", Reason.PADDING_MODE, "something else",
    ),
    "broadcast": (
        lambda: Net(lambda s, x: x + s.a(x), a=conv(3, 1)), "add", Reason.SHAPE, "the addition broadcasts",
    ),
    "flat": (
        lambda: nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(576, 4), nn.ReLU()), "_3", Reason.SHAPE, r"shape \(1, 4\)",
    ),
    "image added": (
        lambda: Net(lambda s, x: s.a(x) + torch.ones(12, 12), a=conv(3, 4)), "add", Reason.OPAQUE, "one constant for each channel",
    ),
    "gate": (lambda: Net(lambda s, x: s.a(x) * s.b(x), a=conv(3, 4), b=conv(3, 4)), "mul", Reason.OPAQUE, "a gate"),
    "pooling that counts no padding": (
        lambda: nn.Sequential(conv(3, 4), nn.AvgPool2d(2, padding=1, count_include_pad=False)),
        "_1", Reason.OPAQUE, "divisor changes at the border",
    ),
    "pooling that rounds up": (
        lambda: nn.Sequential(conv(3, 4), nn.AvgPool2d(2, ceil_mode=True)), "_1", Reason.OPAQUE, "divisor changes",
    ),
    "index": (lambda: Net(lambda s, x: s.a(x)[:, :, 0], a=conv(3, 4)), "getitem", Reason.OPAQUE, "indexing other than"),
    "slice with an end": (
        lambda: Net(lambda s, x: s.a(x)[:, :, :5], a=conv(3, 4)), "getitem", Reason.OPAQUE, "indexing other than",
    ),
    "concat on rows": (
        lambda: Net(lambda s, x: torch.cat((s.a(x), x), 2), a=conv(3, 3)), "cat", Reason.OPAQUE, "concatenation on dimension 2",
    ),
    "hooks": (_hooked, "_0", Reason.HOOKED, ""),
    "lone activation": (lambda: nn.Sequential(nn.MaxPool2d(2), nn.ReLU()), "_1", Reason.SOLE, "no neighbour"),
    "large kernel": (
        lambda: nn.Sequential(*(nn.Conv2d(3, 3, 11, padding=5) for _ in range(7))),
        "_6", Reason.TOO_LARGE, "71x71 pixels, from input_1",
    ),
}  # fmt: skip


class TestWhatIsRefused:
    @pytest.mark.parametrize("case", REFUSALS)
    def test_a_refusal_names_the_node_and_the_reason(self, case: str) -> None:
        build, node, reason, detail = REFUSALS[case]
        refusal = only(findings(build()), node)
        assert refusal.reason is reason
        assert re.search(detail, refusal.detail), refusal

    def test_a_refusal_says_where_it_stands_in_the_model(self) -> None:
        found = find_segments(trace(specimen("second_user"), images()))
        refusal = only(found, "softmax")
        path, line = refusal.source.rsplit(":", 1)
        assert refusal.target == "softmax"
        assert Path(path).resolve() == Path(zoo.__file__).resolve()
        assert "softmax" in Path(path).read_text().splitlines()[int(line) - 1]

    def test_a_refused_module_bears_its_qualified_name(self) -> None:
        model = nn.Sequential(conv(3, 4), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
        assert only(findings(model), "_1_1").target == "1.1"

    def test_a_stretch_that_is_given_up_says_where_too(self) -> None:
        refusal = only(findings(_two_paths(conv(3, 4, stride=2), conv(3, 4, 7, padding=0))), "add")
        assert refusal.target == "add"
        assert refusal.source.startswith(__file__)

    @pytest.mark.parametrize(
        ("layers", "detail"),
        [
            ((conv(3, 4, stride=2), nn.Upsample(scale_factor=2), conv(4, 4)), "became smaller by 2 is made larger by 2"),
            ((nn.ConvTranspose2d(3, 4, 2, 2), conv(4, 4, stride=2)), "became larger by 2 is made smaller by 2"),
            ((conv(3, 4, stride=(2, 1)), nn.ConvTranspose2d(4, 4, 2, (1, 2))), "larger on one axis becomes smaller on another"),
        ],
    )
    def test_smaller_and_larger_in_one_stretch_is_refused(self, layers: tuple[nn.Module, ...], detail: str) -> None:
        refusals = findings(nn.Sequential(*layers)).refusals
        assert any(r.reason is Reason.UPSAMPLING and detail in r.detail for r in refusals), refusals

    def test_branches_enlarged_by_different_factors_are_refused(self) -> None:
        layers = {"a": nn.ConvTranspose2d(3, 3, 2, 2), "b": nn.ConvTranspose2d(3, 3, 2, 1, output_padding=0), "c": conv(3, 3)}
        found = findings(Net(lambda s, x: s.a(x) + s.c(F.pad(x, (0, 12, 0, 12))), **layers))
        assert only(found, "add").reason is Reason.UPSAMPLING

    def test_a_hook_comes_with_advice(self) -> None:
        assert "remove the hooks" in only(findings(_hooked()), "_0").advice

    @pytest.mark.parametrize("name", zoo.ZOO)
    def test_every_convolution_and_activation_is_in_a_segment_or_refused(self, name: str) -> None:
        found = find_segments(trace(specimen(name), images(name)))
        covered = {node for segment in found.segments for node in segment.nodes} | {r.node for r in found.refusals}
        layers = {node.name for node in found.graph.graph.nodes if node.op == "call_module"}
        acts = {node.name for node in found.graph.graph.nodes if getattr(node.target, "__name__", "") in ("relu", "silu")}
        assert layers | acts <= covered

    def test_a_kernel_may_be_as_large_as_allowed(self) -> None:
        model = nn.Sequential(*(nn.Conv2d(3, 3, 11, padding=5) for _ in range(7)))
        assert not findings(model, max_extent=71).refusals

    def test_a_graph_without_shapes_is_an_error_that_says_what_to_do(self) -> None:
        with pytest.raises(InputError, match=r"carries no shapes of fxmerge's; pass it through fxmerge\.trace"):
            find_segments(fx.symbolic_trace(specimen("stride")))

    def test_a_network_without_convolutions_has_no_segments_but_reasons(self) -> None:
        found = findings(nn.Sequential(nn.Flatten(), nn.Linear(432, 4), nn.ReLU()))
        assert not found.segments
        assert {refusal.node for refusal in found.refusals} == {"_0", "_1", "_2"}


def test_a_sum_with_what_no_input_leads_to_is_refused_and_what_is_before_it_merges() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 4, 1, 1))
            self.conv1, self.conv2, self.conv3 = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv2(self.conv1(x))
            token = self.token.expand(x.shape[0], -1, x.shape[2], x.shape[3])
            return self.conv3(token.sigmoid() + y)

    model = Token().eval()
    findings = find_segments(trace(model, torch.randn(2, 4, 6, 6)))
    assert any(refusal.detail == "joins an image and a tensor that does not come from the input" for refusal in findings.refusals)
    assert "conv1" in {name for segment in findings.segments for name in segment.nodes}
    assert all("add" not in segment.nodes for segment in findings.segments)


def test_analysis_takes_time_in_proportion_to_the_nodes() -> None:
    """Four times the blocks, four times the seconds of processor time, with room for what a busy machine does."""
    seconds = {}
    for blocks in (40, 160):
        layers = [Net(lambda s, x: torch.relu(x + s.b(torch.relu(s.a(x)))), a=conv(3, 3), b=conv(3, 3)) for _ in range(blocks)]
        graph = trace(nn.Sequential(*layers), torch.randn(1, 3, 12, 12))
        start = time.process_time()
        found = find_segments(graph)
        seconds[blocks] = time.process_time() - start
        assert len(found.segments) > 8 * blocks
    assert seconds[160] < 10 * seconds[40]
