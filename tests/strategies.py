"""Random small networks, as values that shrink and print; and the modules they describe.

Shapes are valid for every image of at least :data:`SMALLEST` pixels on both axes, odd and even: every layer of a block keeps the
size, or divides it by its stride and rounds up; between blocks a layer may lose or win a pixel while there are pixels to lose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.zoo import randomise_

SMALLEST = 13
WIDTHS = (1, 2, 3, 4, 6, 8)
Pair: TypeAlias = tuple[int, int]

_MODULES = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish, "gelu": nn.GELU}
_FUNCTIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish, "gelu": F.gelu}


@dataclass(frozen=True)
class Act:
    """An activation and how it is written; ``name`` is empty for none."""

    name: str = ""
    style: str = "function"


@dataclass(frozen=True)
class Layer:
    """A convolution with what stands around it: zero padding, norm and activation, behind it or before it."""

    inputs: int
    outputs: int
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((1, 1), (1, 1))
    groups: int = 1
    bias: bool = True
    norm: bool = False
    act: Act = Act()
    before: bool = False
    pad_module: bool = False


@dataclass(frozen=True)
class Residual:
    """Layers, or blocks of them, beside an identity (None), a projection, or "option A"."""

    body: tuple[Layer | Residual, ...]
    shortcut: Layer | str | None
    spelling: str
    act: Act


@dataclass(frozen=True)
class Branches:
    """Layers of one input, put one after the other on channels."""

    branches: tuple[Layer, ...]
    act: Act


@dataclass(frozen=True)
class Pool:
    """A pooling of 2x2 at stride 1: ``average`` merges, ``max`` does not."""

    channels: int
    kind: str


Block: TypeAlias = Layer | Residual | Branches | Pool


@dataclass(frozen=True)
class Network:
    """Blocks one after the other, from three channels."""

    blocks: tuple[Block, ...]

    def build(self, seed: int = 0) -> nn.Module:
        """In float64 and eval mode, with random weights and norm statistics."""
        model = nn.Sequential(*map(_module, self.blocks)).double()
        generator = torch.Generator().manual_seed(seed)
        return randomise_(model, seed, torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=generator)).eval()


def channels_of(block: Block) -> int:
    """How many channels leave a block."""
    if isinstance(block, Layer):
        return block.outputs
    if isinstance(block, Residual):
        return channels_of(block.body[-1])
    return block.channels if isinstance(block, Pool) else sum(branch.outputs for branch in block.branches)


@st.composite
def networks(draw: st.DrawFn, max_blocks: int = 4) -> Network:
    """Networks of a few blocks."""
    blocks: list[Block] = []
    channels, size = 3, SMALLEST
    for _ in range(draw(st.integers(1, max_blocks))):
        roomy = size > 6
        kinds = ("layer", "layer", "residual", "residual", "branches", "pool")
        kind = draw(st.sampled_from(kinds if blocks else kinds[:-1]))
        if kind == "layer":
            block: Block = draw(_layers(channels, roomy=roomy, loose=roomy))
            size = _smallest_side(block, size)
        elif kind == "pool":
            block = Pool(channels, draw(st.sampled_from(("average", "max"))))
            size -= 1
        else:
            stride = draw(_strides(roomy))
            size = -(-size // max(stride))
            block = draw(_residuals(channels, stride, 1) if kind == "residual" else _branches(channels, stride))
        blocks.append(block)
        channels = channels_of(block)
        if size < 3:
            break
    return Network(tuple(blocks))


def _smallest_side(layer: Layer, size: int) -> int:
    sides = zip(layer.kernel, layer.stride, layer.dilation, layer.padding, strict=True)
    return min((size + sum(padding) - d * (k - 1) - 1) // s + 1 for k, s, d, padding in sides)


def _strides(roomy: bool) -> st.SearchStrategy[Pair]:
    return st.sampled_from(((1, 1), (1, 1), (2, 2), (1, 2))) if roomy else st.just((1, 1))


def _acts() -> st.SearchStrategy[Act]:
    styles = st.sampled_from(("module", "function", "in place module", "in place function", "method"))
    return st.builds(Act, st.sampled_from(("", "relu", "relu", *_MODULES)), styles)


@st.composite
def _layers(
    draw: st.DrawFn,
    inputs: int,
    *,
    outputs: int | None = None,
    stride: Pair | None = None,
    roomy: bool = False,
    loose: bool = False,
) -> Layer:
    outputs = outputs or draw(st.sampled_from(WIDTHS))
    kernel = draw(st.one_of(st.sampled_from(((3, 3), (1, 1))), st.tuples(st.integers(1, 4), st.integers(1, 4))))
    dilation = draw(st.sampled_from(((1, 1), (1, 1), (2, 2), (1, 2))))
    padding = []
    for k, d in zip(kernel, dilation, strict=True):
        total = d * (k - 1)
        first = total // 2 if draw(st.booleans()) else draw(st.integers(0, total))
        spare = draw(st.integers(-1, 1)) if loose else 0
        padding.append((first, max(0, total - first + spare)))
    shared = math.gcd(inputs, outputs)
    return Layer(
        inputs,
        outputs,
        kernel,
        stride or draw(_strides(roomy)),
        dilation,
        (padding[0], padding[1]),
        draw(st.sampled_from([g for g in range(1, shared + 1) if shared % g == 0])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(_acts()),
        draw(st.booleans()),
        draw(st.booleans()),
    )


@st.composite
def _residuals(draw: st.DrawFn, inputs: int, stride: Pair, depth: int) -> Residual:
    plain = stride == (1, 1)
    outputs = inputs if plain and draw(st.booleans()) else draw(st.sampled_from(WIDTHS))
    widths = [*(draw(st.sampled_from(WIDTHS)) for _ in range(draw(st.integers(0, 2)))), outputs]
    body: list[Layer | Residual] = []
    channels, left = inputs, stride
    for width in widths:
        if depth and channels == width and draw(st.booleans()):
            body.append(draw(_residuals(channels, left, depth - 1)))
        else:
            body.append(draw(_layers(channels, outputs=width, stride=left)))
        channels, left = channels_of(body[-1]), (1, 1)
    kinds = ["projection"]
    if channels >= inputs:
        kinds.append("option A")
    if plain and channels == inputs:
        kinds.insert(0, "identity")
    kind = draw(st.sampled_from(kinds))
    shortcut: Layer | str | None = {"identity": None}.get(kind, kind)
    if kind == "projection":
        shortcut = draw(_layers(inputs, outputs=channels, stride=stride))
    return Residual(tuple(body), shortcut, draw(st.sampled_from(("+", "+=", "torch.add", "add", "add_"))), draw(_acts()))


@st.composite
def _branches(draw: st.DrawFn, inputs: int, stride: Pair) -> Branches:
    count = draw(st.integers(2, 3))
    return Branches(tuple(draw(_layers(inputs, stride=stride)) for _ in range(count)), draw(_acts()))


def _module(block: Block) -> nn.Module:
    if isinstance(block, Pool):
        return nn.AvgPool2d(2, 1) if block.kind == "average" else nn.MaxPool2d(2, 1)
    return {Layer: _LayerModule, Residual: _ResidualModule, Branches: _BranchesModule}[type(block)](block)  # type: ignore[operator]


class _Activation(nn.Module):
    def __init__(self, act: Act) -> None:
        super().__init__()
        self.act = act
        in_place = {"inplace": True} if act.style.startswith("in place") and act.name != "gelu" else {}
        self.options = in_place
        self.module = _MODULES[act.name](**in_place) if act.name and act.style.endswith("module") else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.act.name:
            return x
        if self.module is not None:
            return self.module(x)  # type: ignore[no-any-return]
        if self.act.style == "method" and self.act.name == "relu":
            return x.relu()
        function: Any = _FUNCTIONS[self.act.name]
        return function(x, **self.options)  # type: ignore[no-any-return]


class _LayerModule(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        (top, bottom), (left, right) = layer.padding
        self.layer = layer
        self.amounts = (left, right, top, bottom)
        uneven = top != bottom or left != right
        self.pad = nn.ZeroPad2d(self.amounts) if uneven and layer.pad_module else None
        self.pads = uneven and not layer.pad_module
        self.conv = nn.Conv2d(
            layer.inputs,
            layer.outputs,
            layer.kernel,
            layer.stride,
            0 if uneven else (top, left),
            layer.dilation,
            layer.groups,
            layer.bias,
        )
        self.norm = nn.BatchNorm2d(layer.inputs if layer.before else layer.outputs) if layer.norm else None
        # An activation at the head of a block must not overwrite what the shortcut reads, or reads already.
        style = "function" if layer.before else layer.act.style
        self.act = _Activation(Act(layer.act.name, style))

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.before:
            return self._convolved(self._normed(x))
        return self._normed(self._convolved(x))

    def _convolved(self, x: Tensor) -> Tensor:
        if self.pad is not None:
            x = self.pad(x)
        if self.pads:
            x = F.pad(x, self.amounts)
        return self.conv(x)  # type: ignore[no-any-return]

    def _normed(self, x: Tensor) -> Tensor:
        return self.act(x if self.norm is None else self.norm(x))  # type: ignore[no-any-return]


class _ResidualModule(nn.Module):
    def __init__(self, block: Residual) -> None:
        super().__init__()
        self.block = block
        self.body = nn.Sequential(*map(_module, block.body))
        self.shortcut = _LayerModule(block.shortcut) if isinstance(block.shortcut, Layer) else None
        self.act = _Activation(block.act)
        first = block.body[0]
        while isinstance(first, Residual):
            first = first.body[0]
        last = block.body[-1]
        assert isinstance(first, Layer)
        self.step = first.stride
        inputs = first.inputs
        self.missing = channels_of(last) - inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self._joined(self.body(x), self._skip(x)))  # type: ignore[no-any-return]

    def _skip(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            return self.shortcut(x)  # type: ignore[no-any-return]
        if self.block.shortcut is None:
            return x
        x = x[:, :, :: self.step[0], :: self.step[1]]
        return F.pad(x, (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2))

    def _joined(self, out: Tensor, skip: Tensor) -> Tensor:
        spelling = self.block.spelling
        if spelling == "+=":
            out += skip
            return out
        if spelling == "add_":
            return out.add_(skip)
        if spelling == "add":
            return out.add(skip)
        return torch.add(out, skip) if spelling == "torch.add" else out + skip


class _BranchesModule(nn.Module):
    def __init__(self, block: Branches) -> None:
        super().__init__()
        self.branches = nn.ModuleList(map(_module, block.branches))
        self.act = _Activation(block.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(torch.cat([branch(x) for branch in self.branches], 1))  # type: ignore[no-any-return]
