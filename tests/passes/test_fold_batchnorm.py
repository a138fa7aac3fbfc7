"""Batch norms into convolutions: where they go, and where they must stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, symbolic_trace

from fxmerge.errors import InputError
from fxmerge.graph.trace import trace
from fxmerge.passes.fold_batchnorm import FoldBatchNorm
from tests.laws import relative_error
from tests.zoo import Net, conv, images, randomise_, specimen


def norms(graph: GraphModule) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in graph.modules())


def folded(model: nn.Module, x: torch.Tensor | None = None) -> tuple[GraphModule, float]:
    """The folded graph, and how far it is from the model."""
    x = images() if x is None else x
    model = randomise_(model.double(), 0, x).eval()
    graph = FoldBatchNorm().apply(trace(model, x))
    return graph, relative_error(model(x), graph(x))


MUST: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "without bias": (lambda: nn.Sequential(conv(3, 4, bias=False), nn.BatchNorm2d(4)), (12, 12)),
    "with bias": (lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4)), (12, 12)),
    "depthwise": (lambda: nn.Sequential(conv(3, 6, groups=3), nn.BatchNorm2d(6)), (12, 12)),
    "strided and dilated": (lambda: nn.Sequential(conv(3, 4, stride=2, dilation=2), nn.BatchNorm2d(4)), (12, 12)),
    "padding that is no zeros": (lambda: nn.Sequential(conv(3, 4, padding="same"), nn.BatchNorm2d(4)), (12, 12)),
    "another eps": (lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, eps=0.5)), (12, 12)),
    "in front of an activation": (lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU()), (12, 12)),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (12,)),
    "three dimensions": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)), (5, 6, 7)),
}


@pytest.mark.parametrize("case", MUST)
def test_it_must_fold(case: str) -> None:
    build, size = MUST[case]
    x = torch.randn(4, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph, error = folded(build(), x)
    assert norms(graph) == 0
    assert error < 1e-14


class Scaled(nn.Module):
    """A convolution, then arithmetic with a vector of channels and with numbers."""

    def __init__(self, forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], **options: Any) -> None:
        super().__init__()
        self.conv, self.arithmetic = conv(3, 4, **options), forward
        self.gamma = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.arithmetic(self.conv(x), self.gamma)


def _depthwise_scale() -> nn.Module:
    return nn.Sequential(conv(3, 4), nn.Conv2d(4, 4, 1, groups=4))


def _weight_norm(*, bias: bool) -> nn.Module:
    weighted: nn.Module = nn.utils.parametrizations.weight_norm(conv(3, 4, stride=2, bias=bias))
    return nn.Sequential(weighted, nn.BatchNorm2d(4))


SCALES: dict[str, Callable[[], nn.Module]] = {
    "a scale": lambda: Scaled(lambda y, gamma: y * gamma),
    "a scale, no bias": lambda: Scaled(lambda y, gamma: y * gamma, bias=False),
    "a shift, no bias": lambda: Scaled(lambda y, gamma: y - gamma, bias=False),
    "a frozen norm, spelt out": lambda: Scaled(lambda y, gamma: (y - gamma) / gamma * 3.0 + gamma),
    "a norm, then a scale": lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Dropout(), nn.BatchNorm2d(4)),
    "a depthwise convolution of one tap": _depthwise_scale,
    "a parametrized convolution": lambda: _weight_norm(bias=True),
    "a parametrized convolution without bias": lambda: _weight_norm(bias=False),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)),
    "transposed, strided": lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4)),
    "transposed, grouped": lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 3, 3, bias=False, groups=3), nn.BatchNorm2d(6)),
}


@pytest.mark.parametrize("case", SCALES)
def test_scales_and_shifts_of_channels_fold_into_one_plain_convolution(case: str) -> None:
    graph, error = folded(SCALES[case]())
    [node] = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    made = graph.get_submodule(str(node.target))
    assert type(made) in (nn.Conv2d, nn.ConvTranspose2d)
    assert [name for name, _ in made.named_parameters()] in (["weight"], ["weight", "bias"])
    assert error < 1e-14


def test_a_scale_alone_brings_no_bias() -> None:
    graph, _ = folded(SCALES["a scale, no bias"]())
    assert graph.get_submodule("conv").bias is None


def test_a_scale_that_makes_other_numbers_stays() -> None:
    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(3, 4).float()
            self.register_buffer("gamma", torch.rand(4, 1, 1, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv(x) * self.gamma
            return y

    x = images().float()
    graph = FoldBatchNorm().apply(trace(Double(), x))
    assert graph(x).dtype == torch.float64
    assert any(node.name == "mul" for node in graph.graph.nodes)


def test_a_parametrized_convolution_in_train_mode_stays() -> None:
    graph = trace(_weight_norm(bias=True).double(), images())
    graph.get_submodule("0").train()
    assert FoldBatchNorm().apply(graph) is graph


def test_a_convolution_whose_own_output_is_wanted_stays() -> None:
    graph = trace(specimen("projection_skip"), images())
    assert norms(FoldBatchNorm(keep=frozenset(("conv1",))).apply(graph)) == 1


def test_a_graph_without_shapes_is_told_to_be_traced() -> None:
    with pytest.raises(InputError, match=r"no shapes of fxmerge's; pass it through fxmerge\.trace\(graph, example_inputs\) first"):
        FoldBatchNorm()(symbolic_trace(specimen("projection_skip")))


def test_a_norm_without_parameters_folds() -> None:
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, affine=False)).double()
    model.train()(images())
    graph = FoldBatchNorm().apply(trace(model, images()))
    assert norms(graph) == 0
    assert relative_error(model.eval()(images()), graph(images())) < 1e-14


def test_a_norm_without_bias_folds() -> None:
    norm = nn.BatchNorm2d(4)
    norm.bias = None  # as newer torch's bias=False does
    model = nn.Sequential(conv(3, 4), norm).double().eval()
    graph = FoldBatchNorm().apply(trace(model, images()))
    assert relative_error(model(images()), graph(images())) < 1e-14


def _twice_read() -> nn.Module:
    return Net(lambda s, x: (lambda y: s.bn(y) + y)(s.a(x)), a=conv(3, 4), bn=nn.BatchNorm2d(4))


def _shared_convolution() -> nn.Module:
    return Net(lambda s, x: s.b1(s.a(x)) + s.b2(s.a(x + 1)), a=conv(3, 4), b1=nn.BatchNorm2d(4), b2=nn.BatchNorm2d(4))


def _shared_norm() -> nn.Module:
    return Net(lambda s, x: s.bn(s.a(x)) + s.bn(s.b(x)), a=conv(3, 4), b=conv(3, 4), bn=nn.BatchNorm2d(4))


def _hooked() -> nn.Module:
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda module, given, result: result.abs())
    return model


MUST_NOT: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "an activation between": (lambda: nn.Sequential(conv(3, 4), nn.ReLU(), nn.BatchNorm2d(4)), 1),
    "a pooling between": (lambda: nn.Sequential(conv(3, 4), nn.AvgPool2d(2), nn.BatchNorm2d(4)), 1),
    "nothing before": (lambda: nn.Sequential(nn.BatchNorm2d(3), conv(3, 4)), 1),
    "the convolution is read twice": (_twice_read, 1),
    "the convolution is called twice": (_shared_convolution, 2),
    "the norm is called twice": (_shared_norm, 1),
    "the convolution has hooks": (_hooked, 1),
    "padding mode": (lambda: nn.Sequential(conv(3, 4, padding_mode="reflect"), nn.BatchNorm2d(4)), 1),
}


@pytest.mark.parametrize("case", MUST_NOT)
def test_it_must_not_fold(case: str) -> None:
    build, left = MUST_NOT[case]
    graph, error = folded(build())
    assert norms(graph) == left
    assert error < 1e-14


def test_a_norm_without_statistics_stays() -> None:
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, track_running_stats=False)).double().eval()
    graph = FoldBatchNorm().apply(trace(model, images()))
    assert norms(graph) == 1
    assert relative_error(model(images()), graph(images())) == 0


def test_a_norm_in_train_mode_stays() -> None:
    graph = trace(specimen("projection_skip"), images()).train()
    assert norms(FoldBatchNorm().apply(graph)) == 3
    graph.eval().get_submodule("bn1").train()
    assert norms(FoldBatchNorm().apply(graph)) == 1


def test_norms_in_a_row_all_fold() -> None:
    graph, error = folded(nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    assert error < 1e-14
    assert norms(graph) == 0


def test_the_folded_convolution_takes_the_norms_node_and_keeps_its_own_target() -> None:
    graph = FoldBatchNorm().apply(trace(specimen("projection_skip"), images()))
    found = {node.name: str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    assert found == {"bn1": "conv1", "bn2": "conv2", "skip_bn": "skip"}


def test_the_modules_of_the_graph_given_stay() -> None:
    graph = trace(specimen("projection_skip"), images())
    before = {key: value.clone() for key, value in graph.state_dict().items()}
    FoldBatchNorm().apply(graph)
    assert list(graph.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in graph.state_dict().items())
    assert graph.get_submodule("conv1").bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_in_float64_and_casts_once(dtype: torch.dtype) -> None:
    model: Any = specimen("projection_skip").to(dtype)
    graph = FoldBatchNorm().apply(trace(model, images().to(dtype)))
    made: Any = graph.get_submodule("conv1")
    scale = model.bn1.weight.double() / (model.bn1.running_var.double() + model.bn1.eps).sqrt()
    assert torch.equal(made.weight, (model.conv1.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype))
    assert made.weight.dtype == made.bias.dtype == dtype
    assert F.relu(made.weight).requires_grad
