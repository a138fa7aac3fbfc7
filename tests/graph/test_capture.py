"""Whatever went in, what comes out is one dialect: the four forms of a model have the same segments under the same names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils import _pytree as pytree
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from fxmerge import find_segments
from fxmerge.errors import InputError, TraceError
from fxmerge.graph.meta import front_end
from fxmerge.graph.trace import trace
from tests import zoo
from tests.laws import relative_error
from tests.zoo import Net, conv, images, specimen


def by_symbolic_trace(model: nn.Module, x: Tensor) -> GraphModule:
    return trace(model, x, front_end="symbolic_trace")


def by_export(model: nn.Module, x: Tensor) -> GraphModule:
    return trace(model, x, front_end="export")


def by_program(model: nn.Module, x: Tensor) -> GraphModule:
    return trace(torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)), x)


def by_dynamo(model: nn.Module, x: Tensor) -> GraphModule:
    found: list[tuple[GraphModule, Any]] = []

    def backend(graph: GraphModule, inputs: Any) -> Any:
        found.append((graph, inputs))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(x)
    [(graph, inputs)] = found
    return trace(graph, tuple(inputs))


FORMS = [by_export, by_program, by_dynamo]


def findings(graph: GraphModule) -> tuple[list[str], set[tuple[str, str]]]:
    """Segments and refusals; the one input is called x, whatever its name."""
    found = find_segments(graph)
    [x] = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    segments = [f"{'x' if s.entry == x else s.entry} -> {s.end}" for s in found.segments]
    return segments, {(r.node, r.reason.name) for r in found.refusals}


def error(model: nn.Module, graph: GraphModule, x: Tensor) -> float:
    pairs = zip(pytree.tree_leaves(model(x.clone())), pytree.tree_leaves(graph(x)), strict=True)
    return max(relative_error(a, b) for a, b in pairs)


class TestForms:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("name", zoo.ZOO)
    def test_all_forms_of_a_model_have_the_same_segments_and_refusals(self, name: str, form: Any) -> None:
        model, x = specimen(name), images(name)
        expected, graph = by_symbolic_trace(model, x), form(model, x)
        assert findings(graph) == findings(expected)
        assert error(model, graph, images(name, batch=3, seed=1)) < 1e-13

    @pytest.mark.parametrize("form", FORMS)
    def test_state_dicts_keep_their_keys(self, form: Any) -> None:
        model, x = specimen("projection_skip"), images("projection_skip")
        assert set(form(model, x).state_dict()) == set(model.state_dict())

    def test_the_front_end_is_noted(self) -> None:
        model, x = specimen("residual_plus"), images()
        assert [front_end(f(model, x)) for f in (by_symbolic_trace, *FORMS)] == ["symbolic_trace", "export", "given", "given"]

    def test_a_graph_of_torch_export_can_be_trained(self) -> None:
        model = Net(lambda s, x: s.drop(s.bn(s.a(x))), a=conv(3, 4), bn=nn.BatchNorm2d(4), drop=nn.Dropout(0.5)).double()
        graph = by_export(model, images()).train()
        one, two = graph(images()), graph(images())
        assert not torch.equal(one, two)
        one.sum().backward()
        assert all(parameter.grad is not None for parameter in graph.parameters())
        assert int(graph.get_submodule("bn").num_batches_tracked) == 2
        graph.eval()
        assert torch.equal(graph(images()), graph(images()))


class ByItsSize(nn.Module):
    """Pads by what its size needs, as TensorFlow's "same" does: symbolic tracing cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        down, right = (max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[2:])
        out: Tensor = self.conv(F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2)))
        return torch.relu(out)


class Checked(nn.Module):
    """Checks its size, as many do; any other is as good."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] < 4:
            raise ValueError("too small")
        out: Tensor = self.conv(x)
        return torch.relu(out)


class TestSizes:
    def test_a_size_that_is_only_checked_stays_free(self) -> None:
        model = Checked().double()
        graph = trace(model, images())
        assert front_end(graph) == "export"
        for size in ((12, 12), (13, 9)):
            x = images(size=size, batch=5)
            assert relative_error(model(x), graph(x)) == 0

    def test_a_pad_that_depends_on_the_size_fixes_it_and_says_so(self) -> None:
        graph = trace(ByItsSize().double(), images())
        assert [str(s) for s in find_segments(graph).segments] == ["x -> relu", "pad -> relu"]
        assert graph(images(batch=7)).shape == (7, 4, 6, 6)
        with pytest.raises(InputError, match=r"captured for inputs of size \(any, 3, 12, 12\) and found \(2, 3, 13, 12\)"):
            graph(images(size=(13, 12)))

    def test_sizes_that_the_model_treats_apart_are_left_to_it(self) -> None:
        """As a U-Net does that must bring odd images back to their size."""

        def forward(s: Any, x: Tensor) -> Tensor:
            y = F.max_pool2d(F.relu(s.a(x)), 2, ceil_mode=True)
            odd = any(n % 2 for n in x.shape[-2:])
            y = F.interpolate(s.b(y), size=x.shape[-2:]) if odd else F.interpolate(s.b(y), scale_factor=2.0)
            return x + y if odd else x - y

        model = Net(forward, a=conv(3, 3), b=conv(3, 3)).double().eval()
        graph = by_export(model, images(size=(12, 12)))
        other = images(size=(20, 14))
        assert relative_error(model(other), graph(other)) < 1e-12
        with pytest.raises(InputError, match=r"captured for images of 12x12 pixels, .* by multiples of 2; found 13x12"):
            graph(images(size=(13, 12)))

    def test_a_batch_of_one_is_not_fixed(self) -> None:
        graph = trace(Checked().double(), images(batch=1))
        assert graph(images(batch=4)).shape[0] == 4


def _pads_same(s: Any, x: Any) -> Any:
    return s.b(F.relu(s.a(F.pad(x, (0, 1, 0, 1)))))


def _channels_last(s: Any, x: Tensor) -> Tensor:
    """ConvNeXt's block, one of its linear layers called as a function."""
    y = s.norm(s.dw(x).permute(0, 2, 3, 1))
    y = s.fc2(F.gelu(F.linear(y, s.fc1.weight, s.fc1.bias)))
    return x + (y * s.scale.weight).permute(0, 3, 1, 2)


PITFALLS: dict[str, tuple[Any, list[str]]] = {
    "frozen batch norm": (
        lambda: Net(lambda s, x: F.relu(s.n(s.a(x))), a=conv(3, 4), n=_frozen()), ["x -> relu"],
    ),
    "weight norm": (
        lambda: Net(lambda s, x: s.b(F.relu(s.a(x))), a=weight_norm(conv(3, 4)), b=conv(4, 4)),
        ["x -> relu", "x -> b", "relu -> b"],
    ),
    "spectral norm": (
        lambda: Net(lambda s, x: s.b(F.relu(s.a(x))), a=spectral_norm(conv(3, 4)), b=conv(4, 4)),
        ["x -> relu", "x -> b", "relu -> b"],
    ),
    "channels last": (
        lambda: Net(
            _channels_last,
            dw=conv(3, 3, 7, groups=3),
            norm=nn.LayerNorm(3),
            fc1=nn.Linear(3, 8),
            fc2=nn.Linear(8, 3),
            scale=nn.LayerNorm(3),
        ),
        ["x -> add", "x -> norm", "x -> norm", "x -> gelu", "x -> permute_1", "norm -> gelu", "norm -> permute_1",
         "gelu -> permute_1"],
    ),
    "a pad before": (lambda: Net(_pads_same, a=nn.Conv2d(3, 4, 3, 2), b=conv(4, 4)), None),
    "same": (lambda: Net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Conv2d(3, 4, 3, padding="same", dilation=2), b=conv(4, 4)), None),
    "one output channel": (
        lambda: Net(lambda s, x: s.b(F.relu(s.a(x))), a=conv(3, 1), b=conv(1, 4)), ["x -> relu", "x -> b", "relu -> b"],
    ),
    "a norm without scale and shift": (
        lambda: Net(lambda s, x: s.b(s.n(s.a(x))), a=conv(3, 4), n=nn.BatchNorm2d(4, affine=False), b=conv(4, 4)),
        ["x -> n", "x -> b", "n -> b"],
    ),
    "a norm that is a function, with its activation": (
        lambda: Net(lambda s, x: s.b(s.n(s.a(x))), a=conv(3, 4), n=_NormAct(4), b=conv(4, 4)),
        ["x -> n_act", "x -> b", "n_act -> b"],
    ),
    "lazily built": (
        lambda: _built(Net(lambda s, x: s.b(F.relu(s.n(s.a(x)))), a=nn.LazyConv2d(4, 3), n=nn.LazyBatchNorm2d(), b=conv(4, 4))),
        ["x -> relu", "x -> b", "relu -> b"],
    ),
    "checks of sizes": (
        lambda: Net(_checked, a=conv(3, 4), b=conv(4, 4)), ["x -> relu", "x -> b", "relu -> b"],
    ),
}  # fmt: skip


class _NormAct(nn.BatchNorm2d):
    """A norm of a class of its own that calls torch's function, then its activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.dim() == 4, "images")
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        out: Tensor = self.act(y)
        return out


def _built(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.eval()(images().float())
    return model


def _checked(s: Any, x: Tensor) -> Tensor:
    torch._assert(x.shape[1] == 3, "three channels")
    y = F.relu(s.a(x))
    torch._assert(y.shape[0] == x.shape[0], "as many as before")
    out: Tensor = s.b(y)
    return out


def _frozen() -> nn.Module:
    torch.manual_seed(1)
    norm = FrozenBatchNorm2d(4)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 1.5)
    return norm


class TestPitfalls:
    @pytest.mark.parametrize("form", [by_symbolic_trace, *FORMS])
    @pytest.mark.parametrize("case", PITFALLS)
    def test_it_merges_in_every_form(self, case: str, form: Any) -> None:
        make, expected = PITFALLS[case]
        torch.manual_seed(0)
        model = make().double().eval()
        segments, _ = findings(form(model, images()))
        assert segments == (expected or findings(by_symbolic_trace(model, images()))[0])
        assert segments

    def test_stochastic_depth_is_an_identity_that_comes_back_in_training(self) -> None:
        model = Net(lambda s, x: x + s.d(s.b(x)), b=conv(3, 3), d=StochasticDepth(1.0, "batch")).double()
        graph = by_symbolic_trace(model, images())
        assert "x -> add" in findings(graph)[0]
        assert torch.equal(graph.train()(images()), images())

    @pytest.mark.parametrize("padding_mode", ["reflect", "circular", "replicate"])
    @pytest.mark.parametrize("form", [by_symbolic_trace, *FORMS])
    def test_padding_modes_are_refused_in_every_form(self, form: Any, padding_mode: str) -> None:
        model = nn.Sequential(conv(3, 4), nn.Conv2d(4, 4, 3, padding=1, padding_mode=padding_mode), conv(4, 4)).double()
        _, refusals = findings(form(model, images()))
        assert "PADDING_MODE" in {reason for _, reason in refusals}

    def test_a_program_exported_in_train_mode_is_refused(self) -> None:
        model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4)).double().train()
        with pytest.raises(TraceError, match=r"exported in train mode: call model\.eval\(\) before"):
            trace(torch.export.export(model, (images(),)), images())

    def test_a_decomposed_program_is_read_as_well(self) -> None:
        model, x = specimen("projection_skip"), images("projection_skip")
        program = torch.export.export(model, (x,)).run_decompositions()
        assert findings(trace(program, x)) == findings(by_symbolic_trace(model, x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("form", [by_symbolic_trace, *FORMS])
    def test_any_float_dtype_and_channels_last(self, form: Any, dtype: torch.dtype) -> None:
        model = specimen("residual_plus").to(dtype).to(memory_format=torch.channels_last)
        x = images().to(dtype).to(memory_format=torch.channels_last)
        expected = findings(by_symbolic_trace(specimen("residual_plus"), images()))
        assert findings(form(model, x)) == expected
