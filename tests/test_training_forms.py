"""Networks in the form they are trained in become, from the graph alone, the convolutions that their authors' own switches make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxmerge import Space, annotate, find_segments, fuse, linearize, measure_latency, propose, solve, trace
from fxmerge.core.table import Importance, ImportanceTable
from tests.fakes import PriceTimer
from tests.laws import relative_error
from tests.zoo import images, randomise_


def conv_norm(inputs: int, outputs: int, kernel: Any, stride: int = 1, padding: Any = 0, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(outputs))


class RepVGG(nn.Module):
    """Ding et al. 2021: 3x3, 1x1 and a norm alone, added."""

    def __init__(self, width: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.dense = conv_norm(width, outputs, 3, stride, 1)
        self.point = conv_norm(width, outputs, 1, stride)
        self.skip = nn.BatchNorm2d(width) if width == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.point(x)
        return F.relu(y + self.skip(x) if self.skip is not None else y)


class MobileOne(nn.Module):
    """Vasu et al. 2023: several branches of one geometry, a 1x1 and a norm; depthwise, then pointwise."""

    def __init__(self, width: int, outputs: int, branches: int = 3) -> None:
        super().__init__()
        self.depthwise = nn.ModuleList(conv_norm(width, width, 3, 1, 1, width) for _ in range(branches))
        self.scale = conv_norm(width, width, 1, groups=width)
        self.skip = nn.BatchNorm2d(width)
        self.pointwise = nn.ModuleList(conv_norm(width, outputs, 1) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale(x) + self.skip(x)
        for branch in self.depthwise:
            y += branch(x)
        y = F.relu(y)
        return F.relu(sum(branch(y) for branch in self.pointwise))  # type: ignore[arg-type]


class ACNet(nn.Module):
    """Ding et al. 2019: square, vertical and horizontal kernels, each with its norm, added."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.square = conv_norm(width, outputs, 3, padding=1)
        self.vertical = conv_norm(width, outputs, (3, 1), padding=(1, 0))
        self.horizontal = conv_norm(width, outputs, (1, 3), padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.square(x) + self.vertical(x) + self.horizontal(x))


class _NormAndPad(nn.Module):
    """A norm, then a pad with what the norm makes of zero."""

    def __init__(self, width: int, pad: int) -> None:
        super().__init__()
        self.bn, self.pad = nn.BatchNorm2d(width), pad

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.bn(x), [self.pad] * 4)
        bn, p = self.bn, self.pad
        outside = bn.bias.detach() - bn.running_mean * bn.weight.detach() / torch.sqrt(bn.running_var + bn.eps)
        outside = outside.view(1, -1, 1, 1)
        y[:, :, 0:p, :] = outside
        y[:, :, -p:, :] = outside
        y[:, :, :, 0:p] = outside
        y[:, :, :, -p:] = outside
        return y


class DiverseBranch(nn.Module):
    """Ding et al. 2021: kxk, 1x1, 1x1 then kxk, 1x1 then average, each with norms, added."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.origin = conv_norm(width, outputs, 3, padding=1)
        self.point = conv_norm(width, outputs, 1)
        self.twice = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False), _NormAndPad(width, 1),
            nn.Conv2d(width, outputs, 3, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.average = nn.Sequential(
            nn.Conv2d(width, outputs, 1, bias=False), _NormAndPad(outputs, 1), nn.AvgPool2d(3, 1), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.origin(x) + self.point(x) + self.twice(x) + self.average(x))


class RepViT(nn.Module):
    """Wang et al. 2024: depthwise 3x3 with norm, depthwise 1x1, and the image, added, then a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense, self.point = conv_norm(width, width, 3, 1, 1, width), nn.Conv2d(width, width, 1, groups=width)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.bn(self.dense(x) + self.point(x) + x))


class RepMixer(nn.Module):
    """FastViT (Vasu et al. 2023): x + gamma * (mixer(x) - norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.mixer, self.scale = conv_norm(width, width, 3, 1, 1, width), conv_norm(width, width, 1, groups=width)
        self.skip = nn.BatchNorm2d(width)
        self.gamma = nn.Parameter(torch.full((width, 1, 1), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(x) + self.scale(x) + self.skip(x)
        return F.gelu(x + self.gamma * (mixed - self.norm(x)))


FORMS: dict[str, tuple[nn.Module, int]] = {
    "RepVGG": (nn.Sequential(RepVGG(3, 4, 2), RepVGG(4, 4), RepVGG(4, 6)), 3),
    "MobileOne": (nn.Sequential(MobileOne(3, 4), MobileOne(4, 4, 2)), 4),
    "ACNet": (nn.Sequential(ACNet(3, 4), ACNet(4, 4)), 2),
    "DBB": (nn.Sequential(DiverseBranch(3, 4), DiverseBranch(4, 4)), 2),
    "RepViT": (nn.Sequential(RepViT(3), RepViT(3)), 2),
    "FastViT": (nn.Sequential(RepMixer(3), RepMixer(3)), 2),
}


def count(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


@pytest.mark.parametrize("name", FORMS)
def test_what_is_left_is_what_its_authors_deploy(name: str) -> None:
    model, convolutions = FORMS[name]
    model = randomise_(model.double(), 0, images()).eval()
    assert count(model) > convolutions
    graph = trace(model, images())
    findings = find_segments(graph)
    proposals = propose(findings, Space.named("exact"))
    offered = [candidate for proposal in proposals for candidate in proposal.candidates]
    latency = measure_latency(findings, proposals, (images(),), timer=PriceTimer())
    exact = ImportanceTable({candidate.id: Importance(0.0, 0, "exact") for candidate in offered})
    plan = solve(findings.region, offered, latency, exact, findings.fingerprint).plan(0)
    merged = fuse(linearize(annotate(graph, plan)))
    assert count(merged) == convolutions
    for size in ((12, 12), (9, 15)):
        x = images(size=size, batch=3, seed=1)
        assert relative_error(model(x), merged(x)) < 1e-13
