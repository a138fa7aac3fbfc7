"""Random graphs from every operator: programs, as values that shrink and print, and the modules they describe.

A program is a list of instructions. Each applies one operation to tensors made by earlier ones, mostly the latest, sometimes an
old one, and adds one or more tensors; so residual blocks in residual blocks, dense graphs that are no series-parallel ones, and
several outputs come about. Of every tensor the channels are known, and the height and the width for images of all sizes in
:data:`PROBES`: tensors meet in a join only where these agree for every size of image.

An operation in place is drawn only where no other tensor that is read later has the same memory; the overwritten name may be read
again, and means the new values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation, StochasticDepth, stochastic_depth

SMALLEST = 13
#: Sizes of images for which shapes are worked out. Strides multiply up to 8 at most, so what agrees here agrees for all.
PROBES = range(SMALLEST, SMALLEST + 16)
WIDTHS = (1, 2, 3, 4, 6, 8)
WIDEST = 16
LARGEST = 64
#: Width of the second input, constant over space.
SIDE = 3

Sizes: TypeAlias = tuple[int, ...]
Function: TypeAlias = Callable[..., Any]
Parameters: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """What is known of an image: channels; height and width for images of all sizes in PROBES; whether they have changed places."""

    channels: int
    height: Sizes = tuple(PROBES)
    width: Sizes = tuple(PROBES)
    turned: bool = False

    @property
    def smallest(self) -> int:
        return min(*self.height, *self.width)

    @property
    def sound(self) -> bool:
        return self.smallest >= 1 and max(*self.height, *self.width) <= LARGEST and 1 <= self.channels <= WIDEST

    def resized(self, axes: Iterable[Callable[[int], int]], channels: int = 0) -> Kind:
        """What a map of heights and one of widths make of this."""
        height, width = axes
        return replace(
            self, channels=channels or self.channels, height=tuple(map(height, self.height)), width=tuple(map(width, self.width))
        )


@dataclass(frozen=True)
class Instruction:
    """One operation on earlier tensors; prints as the call of :func:`do` that makes it."""

    operation: str
    of: tuple[int, ...]
    parameters: tuple[tuple[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"do({', '.join([repr(self.operation), repr(self.of), *(f'{k}={v!r}' for k, v in self.parameters)])})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How Hypothesis prints it."""
        printer.text(repr(self))


def do(operation: str, of: tuple[int, ...], **parameters: Any) -> Instruction:
    """An instruction, written shortly."""
    return Instruction(operation, of, tuple(parameters.items()))


@dataclass(frozen=True)
class Program:
    """Instructions over a growing list of tensors, which begins with an image of three channels.

    Args:
        instructions: what is computed.
        outputs: indices of the tensors given back.
        form: of what is given back: ``tensor`` (there is one), ``tuple``, ``dict``, or ``head`` (pooled, through a linear layer).
    """

    instructions: tuple[Instruction, ...]
    outputs: tuple[int, ...]
    form: str = "tensor"

    @property
    def has_side_input(self) -> bool:
        return any(instruction.operation.startswith("side") for instruction in self.instructions)

    def build(self, seed: int = 0) -> nn.Module:
        """In float64 and eval mode, with random weights and norm statistics."""
        model = (_WithSide if self.has_side_input else _Alone)(self).double()
        _randomise(model, torch.Generator().manual_seed(seed))
        return model.eval()

    def inputs(self, batch: int, size: tuple[int, int], seed: int = 0) -> tuple[Tensor, ...]:
        """Normal noise for the model that :meth:`build` makes."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [(batch, 3, *size), (batch, SIDE)][: 2 if self.has_side_input else 1]
        return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)


@dataclass(frozen=True)
class Operation:
    """One kind of instruction.

    Args:
        name: as in :class:`Instruction`.
        make: from the kinds of the operands and the parameters to what computes the result: a module, or a function.
        parameters: draws them for an operand of some kind.
        spellings: ways to write it; which of them is the parameter ``spelling``.
        in_place: ways to write it that overwrite the first operand.
        result: the kinds of the results; by default that of the first operand.
        fits: whether it can be applied to an operand of this kind.
        others: which further operands there are: none, one of the same kind or of one channel (``alike``), one or two of the same
            size (``beside``).
        alias: whether the results may share memory with the first operand.
    """

    name: str
    make: Callable[[Sequence[Kind], Parameters], Function]
    parameters: Callable[[st.DrawFn, Kind], Parameters] = lambda draw, x: {}
    spellings: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()
    result: Callable[[Sequence[Kind], Parameters], tuple[Kind, ...]] = lambda kinds, p: (kinds[0],)
    fits: Callable[[Kind], bool] = lambda x: True
    others: str = ""
    alias: bool = False


class _Model(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        kinds = [Kind(3)]
        built: list[Function] = []
        for instruction in program.instructions:
            operands = [kinds[i] for i in instruction.of]
            built.append(_function_of(instruction, operands, program.instructions, built))
            kinds += _results(instruction, operands, program.instructions)
        self.layers = nn.ModuleList(step if isinstance(step, nn.Module) else _Nothing() for step in built)
        self.functions = [None if isinstance(step, nn.Module) else step for step in built]
        self.head = nn.Linear(sum(kinds[i].channels for i in program.outputs), 5) if program.form == "head" else None

    def run(self, x: Any, side: Any) -> Any:
        tensors = [x]
        for instruction, layer, function in zip(self.program.instructions, self.layers, self.functions, strict=True):
            operands = [tensors[i] for i in instruction.of]
            if instruction.operation.startswith("side"):
                operands.append(side)
            result = (function or layer)(*operands)
            tensors += result if isinstance(result, tuple) else (result,)
        found = [tensors[i] for i in self.program.outputs]
        if self.head is not None:
            return self.head(torch.cat([torch.flatten(F.adaptive_avg_pool2d(image, 1), 1) for image in found], 1))
        if self.program.form == "dict":
            return {f"out{i}": value for i, value in enumerate(found)}
        return tuple(found) if self.program.form == "tuple" else found[0]


class _Alone(_Model):
    def forward(self, x: Tensor) -> Any:
        return self.run(x, None)


class _WithSide(_Model):
    def forward(self, x: Tensor, side: Tensor) -> Any:
        return self.run(x, side)


class _Nothing(nn.Module):
    """Stands in the list of layers where an instruction is a function."""


def _function_of(
    instruction: Instruction, operands: Sequence[Kind], everything: Sequence[Instruction], built: Sequence[Function]
) -> Function:
    parameters = dict(instruction.parameters)
    if instruction.operation == "again":
        same: Function = built[parameters["earlier"]]
        return same
    if instruction.operation == "tied":
        earlier: Any = built[parameters["earlier"]]
        twin = copy.deepcopy(earlier)
        for mine, theirs in zip(twin.modules(), earlier.modules(), strict=True):
            for name in {"weight", "kernel"} & {*theirs._parameters}:
                setattr(mine, name, theirs.get_parameter(name))
        return twin  # type: ignore[no-any-return]
    return OPERATIONS[instruction.operation].make(operands, parameters)


def _results(instruction: Instruction, operands: Sequence[Kind], everything: Sequence[Instruction]) -> tuple[Kind, ...]:
    if instruction.operation in ("again", "tied"):
        instruction = everything[dict(instruction.parameters)["earlier"]]
    return OPERATIONS[instruction.operation].result(operands, dict(instruction.parameters))


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights and statistics; He's for what multiplies, spread around one for what scales."""
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            last = name.rpartition(".")[2]
            if not value.is_floating_point():
                continue
            if last in ("weight", "kernel") and value.dim() > 1:
                nn.init.kaiming_normal_(value, generator=generator)
            elif last in ("running_var", "weight", "scale"):
                value.uniform_(0.6, 1.4, generator=generator)
            else:
                value.normal_(0, 0.3, generator=generator)


# --- kernels over space -------------------------------------------------------------------------------------------------------


def _window(kernel: int, stride: int, dilation: int, padding: int) -> Callable[[int], int]:
    """The size behind a kernel; 0 where it does not fit. ``padding`` is that of both sides together."""
    return lambda n: max(0, (n + padding - dilation * (kernel - 1) - 1) // stride + 1) if n + padding > 0 else 0


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _pairs(smallest: int, largest: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(smallest, largest), st.integers(smallest, largest))


def _stride(x: Kind) -> st.SearchStrategy[tuple[int, int]]:
    return st.sampled_from(((1, 1), (1, 1), (1, 1), (2, 2), (1, 2))) if _can_shrink(x) else st.just((1, 1))


def _can_shrink(x: Kind) -> bool:
    """Whether there are pixels to lose, and the image is not an eighth of the input already."""
    return x.smallest >= 4 and min(x.height[-1] - x.height[0], x.width[-1] - x.width[0]) >= 3


_PADDED = ("padding", "same", "function", "F.pad", "ZeroPad2d")
_TRAINED = ("weight norm", "standardised", "hooked")
_MODES = ("reflect", "replicate", "circular")


def _convolution_parameters(draw: st.DrawFn, x: Kind) -> Parameters:
    spelling = draw(st.sampled_from((*_PADDED * 3, *_TRAINED, *_MODES)))
    kernel = draw(st.one_of(st.sampled_from(((3, 3), (1, 1))), _pairs(1, 4)))
    dilation = draw(st.sampled_from(((1, 1), (1, 1), (2, 2), (1, 2))))
    stride = (1, 1) if spelling == "same" else draw(_stride(x))
    out = draw(st.sampled_from((x.channels, x.channels, *WIDTHS)))
    groups = draw(st.sampled_from(_divisors(math.gcd(x.channels, out))))
    padding = tuple(_padding(draw, spelling, d * (k - 1)) for k, d in zip(kernel, dilation, strict=True))
    drawn = {"spelling": spelling, "out": out, "kernel": kernel, "stride": stride, "dilation": dilation, "padding": padding}
    drawn.update(groups=groups, bias=draw(st.booleans()))
    if (spelling in _MODES and max(map(max, padding)) >= x.smallest) or not _convolved([x], drawn)[0].sound:
        drawn.update(spelling="padding", kernel=(1, 1), padding=((0, 0), (0, 0)))
    return drawn


def _padding(draw: st.DrawFn, spelling: str, total: int) -> tuple[int, int]:
    """(before, after) on one axis."""
    usual = total // 2
    if spelling == "same":
        return usual, total - usual
    if spelling in ("F.pad", "ZeroPad2d"):
        first = draw(st.integers(0, total))
        return first, max(0, total - first + draw(st.sampled_from((0, 0, 1, -1))))
    amount = draw(st.sampled_from((usual, usual, 0, total)))
    return amount, amount


def _depthwise_parameters(draw: st.DrawFn, x: Kind) -> Parameters:
    multiplier = draw(st.sampled_from((1, 1, 2))) if 2 * x.channels <= WIDEST else 1
    return {**_convolution_parameters(draw, x), "out": multiplier * x.channels, "groups": x.channels}


def _convolved(kinds: Sequence[Kind], p: Parameters) -> tuple[Kind, ...]:
    axes = zip(p["kernel"], p["stride"], p["dilation"], map(sum, p["padding"]), strict=True)
    return (kinds[0].resized((_window(*axis) for axis in axes), p["out"]),)


def _convolution(kinds: Sequence[Kind], p: Parameters) -> nn.Module:
    (top, bottom), (left, right) = p["padding"]
    settings = {"stride": p["stride"], "dilation": p["dilation"], "groups": p["groups"]}
    shape = (kinds[0].channels, p["out"], p["kernel"])
    if p["spelling"] in ("function", "standardised"):
        like = nn.Conv2d(*shape, bias=p["bias"], groups=p["groups"])
        return _Convolved(like, {**settings, "padding": (top, left)}, p["spelling"] == "standardised")
    if p["spelling"] in ("F.pad", "ZeroPad2d"):
        return _Padded((left, right, top, bottom), p["spelling"], nn.Conv2d(*shape, bias=p["bias"], **settings))
    padding: Any = "same" if p["spelling"] == "same" else (top, left)
    mode: Any = p["spelling"] if p["spelling"] in _MODES else "zeros"
    conv = nn.Conv2d(*shape, padding=padding, padding_mode=mode, bias=p["bias"], **settings)
    if p["spelling"] == "hooked":
        conv.register_forward_hook(_hook)
    return weight_norm(conv) if p["spelling"] == "weight norm" else conv


def _hook(module: nn.Module, args: Any, result: Any) -> None:
    return None


class _Convolved(nn.Module):
    """The function on a parameter, or on one that is standardised first."""

    def __init__(self, like: nn.Conv2d, settings: Mapping[str, Any], standardised: bool) -> None:
        super().__init__()
        self.standardised = standardised
        self.kernel, self.bias, self.settings = like.weight, like.bias, settings

    def forward(self, x: Tensor) -> Tensor:
        weight = self.kernel
        if self.standardised:
            weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.pow(2).mean((1, 2, 3), keepdim=True) + 0.1).sqrt()
        return F.conv2d(x, weight, self.bias, **self.settings)


class _Padded(nn.Module):
    def __init__(self, amounts: tuple[int, int, int, int], spelling: str, conv: nn.Module) -> None:
        super().__init__()
        self.amounts, self.conv = amounts, conv
        self.pad = nn.ZeroPad2d(amounts) if spelling == "ZeroPad2d" else None

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.amounts) if self.pad is None else self.pad(x))  # type: ignore[no-any-return]


def _transposed_parameters(draw: st.DrawFn, x: Kind) -> Parameters:
    kernel = draw(_pairs(1, 3))
    dilation = draw(st.sampled_from(((1, 1), (1, 1), (2, 1))))
    stride = draw(st.sampled_from(((1, 1), (1, 1), (2, 2), (2, 2), (1, 2), (3, 2))))
    padding = tuple(draw(st.integers(0, min(2, d * (k - 1)))) for k, d in zip(kernel, dilation, strict=True))
    spare = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    out = draw(st.sampled_from((x.channels, *WIDTHS)))
    groups = draw(st.sampled_from(_divisors(math.gcd(x.channels, out))))
    drawn = {"out": out, "kernel": kernel, "stride": stride, "dilation": dilation, "padding": padding, "spare": spare}
    drawn.update(groups=groups, bias=draw(st.booleans()))
    if not _transposed([x], drawn)[0].sound:
        drawn.update(kernel=(1, 1), stride=(1, 1), padding=(0, 0), spare=(0, 0))
    return drawn


def _transposed(kinds: Sequence[Kind], p: Parameters) -> tuple[Kind, ...]:
    def larger(k: int, s: int, d: int, padding: int, spare: int) -> Callable[[int], int]:
        return lambda n: (n - 1) * s - 2 * padding + d * (k - 1) + spare + 1

    axes = zip(p["kernel"], p["stride"], p["dilation"], p["padding"], p["spare"], strict=True)
    return (kinds[0].resized((larger(*axis) for axis in axes), p["out"]),)


def _transposed_convolution(kinds: Sequence[Kind], p: Parameters) -> nn.Module:
    settings = {"stride": p["stride"], "padding": p["padding"], "output_padding": p["spare"], "dilation": p["dilation"]}
    return nn.ConvTranspose2d(kinds[0].channels, p["out"], p["kernel"], groups=p["groups"], bias=p["bias"], **settings)


def _pool_parameters(draw: st.DrawFn, x: Kind) -> Parameters:
    kernel = draw(st.sampled_from(((2, 2), (3, 3), (1, 3), (1, 1))))
    stride = draw(_stride(x))
    padding = draw(st.sampled_from((0, min(kernel) // 2)))
    drawn = {"kernel": kernel, "stride": stride, "padding": padding, "ceil": draw(st.sampled_from((False, False, True)))}
    return drawn if _pooled([x], drawn)[0].sound else {**drawn, "kernel": (1, 1), "padding": 0}


def _average_parameters(draw: st.DrawFn, x: Kind) -> Parameters:
    return {**_pool_parameters(draw, x), "counted": draw(st.booleans())}


def _pooled(kinds: Sequence[Kind], p: Parameters) -> tuple[Kind, ...]:
    def smaller(k: int, s: int) -> Callable[[int], int]:
        def size(n: int) -> int:
            room = n + 2 * p["padding"] - k
            if room < 0:
                return 0
            count = (-(-room // s) if p["ceil"] else room // s) + 1
            beyond = bool(p["ceil"]) and (count - 1) * s >= n + p["padding"]
            return int(count - beyond)

        return size

    return (kinds[0].resized((smaller(k, s) for k, s in zip(p["kernel"], p["stride"], strict=True))),)


def _average_pool(kinds: Sequence[Kind], p: Parameters) -> Function:
    settings: dict[str, Any] = {"stride": p["stride"], "padding": p["padding"]}
    settings.update(ceil_mode=p["ceil"], count_include_pad=p["counted"], divisor_override=3 if p["spelling"] == "divisor" else None)
    return (
        nn.AvgPool2d(p["kernel"], **settings) if p["spelling"] == "module" else lambda x: F.avg_pool2d(x, p["kernel"], **settings)
    )


def _max_pool(kinds: Sequence[Kind], p: Parameters) -> Function:
    settings = {"stride": p["stride"], "padding": p["padding"], "ceil_mode": p["ceil"]}
    return (
        nn.MaxPool2d(p["kernel"], **settings) if p["spelling"] == "module" else lambda x: F.max_pool2d(x, p["kernel"], **settings)
    )


# --- sizes and channels -------------------------------------------------------------------------------------------------------


def _upsampling_parameters(draw: st.DrawFn, x: Kind) -> Parameters:
    return {"factors": draw(st.sampled_from(((2, 2), (2, 2), (1, 2), (3, 1), (3, 3))))}


def _upsampled(kinds: Sequence[Kind], p: Parameters) -> tuple[Kind, ...]:
    down, across = p["factors"]
    return (kinds[0].resized((lambda n: down * n, lambda n: across * n)),)


def _upsample(kinds: Sequence[Kind], p: Parameters) -> Function:
    down, across = p["factors"]
    if p["spelling"] == "module":
        return nn.Upsample(scale_factor=p["factors"], mode="nearest")
    if p["spelling"] == "size":
        return lambda x: F.interpolate(x, size=(down * x.shape[2], across * x.shape[3]))
    if p["spelling"] == "bilinear":
        return lambda x: F.interpolate(x, scale_factor=(float(down), float(across)), mode="bilinear")
    if down == across and p["spelling"] == "function":
        return lambda x: F.interpolate(x, scale_factor=down)
    mode = "nearest-exact" if p["spelling"] == "exact" else "nearest"
    return lambda x: F.interpolate(x, None, (float(down), float(across)), mode)


def _small(x: Kind) -> bool:
    return 2 * max(*x.height, *x.width) <= LARGEST


def _even(x: Kind) -> bool:
    return all(n % 2 == 0 for n in (*x.height, *x.width))


def _to_even(kinds: Sequence[Kind], p: Parameters) -> tuple[Kind, ...]:
    return (kinds[0].resized([lambda n: n // 2 * 2] * 2),)


def _unshuffled(kinds: Sequence[Kind], p: Parameters) -> tuple[Kind, ...]:
    return (kinds[0].resized([lambda n: n // 2] * 2, 4 * kinds[0].channels),)


def _shuffled(kinds: Sequence[Kind], p: Parameters) -> tuple[Kind, ...]:
    return (kinds[0].resized([lambda n: 2 * n] * 2, kinds[0].channels // 4),)


def _unshuffle(kinds: Sequence[Kind], p: Parameters) -> Function:
    if not _even(kinds[0]):
        return lambda x: F.pixel_unshuffle(_cropped_to_even(x), 2)
    return nn.PixelUnshuffle(2) if p["spelling"] == "module" else lambda x: F.pixel_unshuffle(x, 2)


def _cropped_to_even(x: Any) -> Any:
    return x[:, :, : x.shape[2] // 2 * 2, : x.size(3) // 2 * 2]


def _shuffle(kinds: Sequence[Kind], p: Parameters) -> Function:
    return nn.PixelShuffle(2) if p["spelling"] == "module" else lambda x: F.pixel_shuffle(x, 2)


def _pad_parameters(draw: st.DrawFn, x: Kind) -> Parameters:
    before, after = draw(_pairs(0, 2)), draw(_pairs(-1 if _can_shrink(x) else 0, 2))
    more = draw(st.sampled_from(((0, 0), (0, 0), (1, 0), (0, 2)))) if x.channels + 2 <= WIDEST else (0, 0)
    return {"rows": before, "columns": after, "channels": more, "value": draw(st.sampled_from((0.0, 0.0, 0.0, 0.7)))}


def _padded(kinds: Sequence[Kind], p: Parameters) -> tuple[Kind, ...]:
    more = sum(p["channels"]) if p["spelling"] == "channels" else 0
    return (kinds[0].resized((lambda n: n + sum(p["rows"]), lambda n: n + sum(p["columns"])), kinds[0].channels + more),)


def _pad(kinds: Sequence[Kind], p: Parameters) -> Function:
    amounts = (*p["columns"], *p["rows"])
    if p["spelling"] == "module":
        return nn.ConstantPad2d(amounts, p["value"]) if p["value"] else nn.ZeroPad2d(amounts)
    if p["spelling"] == "channels":
        return lambda x: F.pad(x, (*amounts, *p["channels"]), value=p["value"])
    return lambda x: F.pad(x, amounts, "constant", p["value"])


def _slice_parameters(draw: st.DrawFn, x: Kind) -> Parameters:
    step = draw(st.sampled_from((1, 2, 2)))
    return {"start": draw(_pairs(0, 1)), "stop": draw(st.sampled_from((None, None, -1, -2))), "step": (step, draw(st.just(step)))}


def _sliced(kinds: Sequence[Kind], p: Parameters) -> tuple[Kind, ...]:
    def smaller(start: int, step: int) -> Callable[[int], int]:
        return lambda n: len(range(n)[slice(start, p["stop"], step)])

    return (kinds[0].resized((smaller(a, s) for a, s in zip(p["start"], p["step"], strict=True))),)


def _slice(kinds: Sequence[Kind], p: Parameters) -> Function:
    rows, columns = (slice(start or None, p["stop"], step) for start, step in zip(p["start"], p["step"], strict=True))
    if p["spelling"] == "ellipsis":
        return lambda x: x[..., rows, columns]
    return (lambda x: x[:, :, rows][:, :, :, columns]) if p["spelling"] == "twice" else lambda x: x[:, :, rows, columns]


def _channel_parameters(draw: st.DrawFn, x: Kind) -> Parameters:
    start = draw(st.integers(0, x.channels - 1))
    return {"start": start, "stop": draw(st.integers(start + 1, x.channels)), "step": draw(st.sampled_from((1, 1, 2)))}


def _range(x: Kind, p: Parameters) -> slice:
    return slice(p["start"], p["stop"], 1 if p["spelling"] == "narrow" else p["step"])


def _picked(kinds: Sequence[Kind], p: Parameters) -> tuple[Kind, ...]:
    return (replace(kinds[0], channels=len(range(kinds[0].channels)[_range(kinds[0], p)])),)


def _pick(kinds: Sequence[Kind], p: Parameters) -> Function:
    part, x = _range(kinds[0], p), kinds[0]
    if p["spelling"] == "narrow":
        return lambda x: x.narrow(1, part.start, part.stop - part.start)
    if p["spelling"] == "from the end":
        part = slice(part.start - x.channels, part.stop - x.channels or None, part.step)
    return (lambda x: x[:, part, ...]) if p["spelling"] == "ellipsis" else lambda x: x[:, part]


def _split_parameters(draw: st.DrawFn, x: Kind) -> Parameters:
    return {"count": draw(st.integers(2, min(3, x.channels)))}


def _widths(x: Kind, p: Parameters) -> list[int]:
    if p["spelling"].startswith("split"):
        rest = x.channels - (p["count"] - 1)
        return [rest, *[1] * (p["count"] - 1)] if p["spelling"] == "split widths" else _steps(x.channels, p["count"])
    return _steps(x.channels, -(-x.channels // p["count"]))


def _steps(total: int, step: int) -> list[int]:
    return [min(step, total - start) for start in range(0, total, step)]


def _parts(kinds: Sequence[Kind], p: Parameters) -> tuple[Kind, ...]:
    return tuple(replace(kinds[0], channels=width) for width in _widths(kinds[0], p))


def _split(kinds: Sequence[Kind], p: Parameters) -> Function:
    widths = _widths(kinds[0], p)

    def parts(x: Any) -> Any:
        if p["spelling"] == "split widths":
            return torch.split(x, widths, dim=1)
        if p["spelling"] == "split":
            return x.split(p["count"], 1)
        return x.chunk(p["count"], dim=1) if p["spelling"] == "method" else torch.chunk(x, p["count"], -3)

    def function(x: Any) -> tuple[Any, ...]:
        found = parts(x)
        return tuple(found[i] for i in range(len(widths)))

    return function


def _shuffle_parameters(draw: st.DrawFn, x: Kind) -> Parameters:
    return {"groups": draw(st.sampled_from(_divisors(x.channels)[1:] or [1]))}


def _channel_shuffle(kinds: Sequence[Kind], p: Parameters) -> Function:
    groups = p["groups"]
    if p["spelling"] == "module":
        return nn.ChannelShuffle(groups)
    if p["spelling"] == "function":
        return lambda x: F.channel_shuffle(x, groups)

    def shuffled(x: Any) -> Any:
        n, c, h, w = x.size()
        if p["spelling"] == "permute":
            return x.view(n, groups, c // groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)
        return torch.transpose(x.view(n, groups, c // groups, h, w), 1, 2).contiguous().view(n, -1, h, w)

    return shuffled


def _turned(kinds: Sequence[Kind], p: Parameters) -> tuple[Kind, ...]:
    x = kinds[0]
    return (Kind(x.channels, x.width, x.height, not x.turned),)


def _transpose(kinds: Sequence[Kind], p: Parameters) -> Function:
    return (lambda x: x.transpose(2, 3)) if p["spelling"] == "transpose" else lambda x: torch.permute(x, (0, 1, 3, 2))


# --- joins --------------------------------------------------------------------------------------------------------------------


def _iadd(x: Any, y: Any) -> Any:
    x += y
    return x


def _isub(x: Any, y: Any) -> Any:
    x -= y
    return x


def _imul(x: Any, y: Any) -> Any:
    x *= y
    return x


def _idiv(x: Any, y: Any) -> Any:
    x /= y
    return x


_OF_TWO: Mapping[str, Mapping[str, Function]] = {
    "add": {
        "+": lambda x, y: x + y,
        "torch.add": torch.add,
        "add": lambda x, y: x.add(y),
        "alpha": lambda x, y: torch.add(x, y, alpha=0.7),
        "sum": lambda x, y: sum([x, y]),
        "+=": _iadd,
        "add_": lambda x, y: x.add_(y),
    },
    "sub": {
        "-": lambda x, y: x - y,
        "torch.sub": torch.sub,
        "sub": lambda x, y: x.sub(y),
        "-=": _isub,
        "sub_": lambda x, y: x.sub_(y),
    },
    "mul": {
        "sigmoid": lambda x, y: x * torch.sigmoid(y),
        "tanh": lambda x, y: torch.mul(y.tanh(), x),
        "*": lambda x, y: x * y,
        "*=": lambda x, y: _imul(x, torch.sigmoid(y)),
        "mul_": lambda x, y: x.mul_(torch.sigmoid(y)),
    },
}


def _of_two(name: str) -> Operation:
    ways = tuple(_OF_TWO[name])
    return Operation(name, lambda kinds, p: _OF_TWO[name][p["spelling"]], spellings=ways[:-2], in_place=ways[-2:], others="alike")


def _concatenated(kinds: Sequence[Kind], p: Parameters) -> tuple[Kind, ...]:
    return (replace(kinds[0], channels=sum(kind.channels for kind in kinds)),)


def _concat(kinds: Sequence[Kind], p: Parameters) -> Function:
    if p["spelling"] == "concat":
        return lambda *parts: torch.concat(parts, dim=-3)
    return (lambda *parts: torch.cat(parts, 1)) if p["spelling"] == "cat" else lambda *parts: torch.cat(dim=1, tensors=list(parts))


class _Excite(nn.Module):
    """Squeeze-and-excite by a mean and linear layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 2), nn.Linear(2, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


def _squeeze_excite(kinds: Sequence[Kind], p: Parameters) -> Function:
    channels = kinds[0].channels
    if p["spelling"] == "mean":
        return lambda x: x - x.mean((2, 3), keepdim=True)
    return _Excite(channels) if p["spelling"] == "linear" else SqueezeExcitation(channels, 2)


class _Side(nn.Module):
    """A second input, constant over space, added to an image or multiplied with it."""

    def __init__(self, channels: int, spelling: str) -> None:
        super().__init__()
        self.linear, self.spelling = nn.Linear(SIDE, channels), spelling

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        vector: Tensor = self.linear(side)
        if self.spelling == "view":
            return x + vector.view(vector.shape[0], -1, 1, 1)
        vector = vector[:, :, None, None]
        return x * torch.sigmoid(vector) if self.spelling == "gate" else vector + x if self.spelling == "first" else x + vector


# --- norms and arithmetic with constants --------------------------------------------------------------------------------------


def _norm(kinds: Sequence[Kind], p: Parameters) -> nn.Module:
    c, way = kinds[0].channels, p["spelling"]
    if way == "function":
        return _NormFunction(c)
    if way == "frozen":
        frozen: nn.Module = FrozenBatchNorm2d(c)
        return frozen
    return nn.BatchNorm2d(c, affine=way == "affine")


def _input_norm(kinds: Sequence[Kind], p: Parameters) -> nn.Module:
    c, eps = kinds[0].channels, 0.01  # a small eps would amplify rounding where an image is constant
    made: Mapping[str, Callable[[], nn.Module]] = {
        "group": lambda: nn.GroupNorm(2 if c % 2 == 0 else 1, c, eps),
        "batch": lambda: nn.BatchNorm2d(c, eps, track_running_stats=False),
        "instance": lambda: nn.InstanceNorm2d(c, eps),
        "instance affine": lambda: nn.InstanceNorm2d(c, eps, affine=True),
        "layer": lambda: _LayerNorm(c, eps),
    }
    return made[p["spelling"]]()


class _LayerNorm(nn.Module):
    """Over channels, as in ConvNeXt."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class _NormFunction(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps)


class _FrozenNorm(nn.Module):
    """A batch norm written as arithmetic with buffers, in several ways."""

    scale: Tensor
    shift: Tensor
    running_var: Tensor

    def __init__(self, channels: int, spelling: str) -> None:
        super().__init__()
        shape = (1, channels, 1, 1) if spelling == "shaped" else (channels,)
        for name in ("scale", "shift", "running_var"):
            self.register_buffer(name, torch.ones(shape))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "shaped":
            return (x - self.shift) / self.running_var * self.scale
        scale = self.scale * (self.running_var + 1e-5).rsqrt()
        shift = self.shift - 0.3 * scale
        if self.spelling == "view":
            return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return torch.add(x.mul(scale[None, :, None, None]), shift[:, None, None])


#: Neither values that others use as thresholds, nor fractions that a sum could hit.
_SCALARS = (1.37, 0.61, -0.83, 2)
_TENSORS = ("per channel", "four dimensions", "one value", "no dimension")

_WITH_CONSTANT: Mapping[str, Function] = {
    "x * c": lambda x, c: x * c,
    "x + c": lambda x, c: x + c,
    "x - c": lambda x, c: x - c,
    "x / c": lambda x, c: x / c,
    "c * x": lambda x, c: c * x,
    "c + x": lambda x, c: c + x,
    "c - x": lambda x, c: c - x,
    "-x": lambda x, c: -x,
    "torch.sub": torch.sub,
    "torch.div": torch.div,
    "mul": lambda x, c: x.mul(c),
    "x *= c": _imul,
    "x /= c": _idiv,
    "x += c": _iadd,
    "mul_": lambda x, c: x.mul_(c),
    "sub_": lambda x, c: x.sub_(c),
}


def _constant_parameters(draw: st.DrawFn, x: Kind) -> Parameters:
    return {"constant": draw(st.sampled_from((*_SCALARS, *_TENSORS)))}


def _arithmetic(kinds: Sequence[Kind], p: Parameters) -> Function:
    function, constant = _WITH_CONSTANT[p["spelling"]], p["constant"]
    if constant not in _TENSORS:
        return lambda x: function(x, constant)
    c = kinds[0].channels
    shape = {"per channel": (c, 1, 1), "four dimensions": (1, c, 1, 1), "one value": (1,), "no dimension": ()}[constant]
    return _WithTensor(function, shape, buffer=constant in ("one value", "four dimensions"))


class _WithTensor(nn.Module):
    scale: Tensor

    def __init__(self, function: Function, shape: tuple[int, ...], *, buffer: bool) -> None:
        super().__init__()
        self.function = function
        if buffer:
            self.register_buffer("scale", torch.ones(shape))
        else:
            self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.scale)  # type: ignore[no-any-return]


class _LayerScale(nn.Module):
    def __init__(self, channels: int, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.scale = nn.Parameter(torch.ones(channels if spelling == "channels last" else (channels, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "channels last":
            return (x.permute(0, 2, 3, 1) * self.scale).permute(0, 3, 1, 2)
        return self.scale * x


_LAST = ("linear", "linear", "linear", "gelu", "relu", "scale", "norm", "dropout", "residual", "concat", "crop", "sin", "flip")


def _last_parameters(draw: st.DrawFn, x: Kind) -> Parameters:
    """Steps, each with the channels behind it."""
    steps = []
    channels = x.channels
    for name in draw(st.lists(st.sampled_from(_LAST), min_size=1, max_size=8)):
        channels = _channels_behind(name, channels, draw(st.sampled_from(WIDTHS)))
        steps.append((name, channels))
    return {"steps": tuple(steps)}


def _channels_behind(name: str, channels: int, drawn: int) -> int:
    if name == "concat":
        return channels + drawn
    return drawn if name == "linear" else max(1, channels - 1) if name == "crop" else channels


class _ChannelsLast(nn.Module):
    """A stretch on channels last, between two permutations."""

    def __init__(self, channels: int, spelling: str, steps: Sequence[tuple[str, int]]) -> None:
        super().__init__()
        self.spelling, self.steps, self.channels = spelling, steps, channels
        self.layers, self.vectors = nn.ModuleDict(), nn.ParameterDict()
        for number, (name, out) in enumerate(steps):
            if name in ("linear", "residual", "concat"):
                width = out - channels if name == "concat" else out
                self.layers[str(number)] = nn.Linear(channels, width, bias=number % 3 != 1)
            elif name == "norm":
                self.layers[str(number)] = nn.LayerNorm(channels, 0.1)
            elif name == "scale":
                self.vectors[f"scale{number}"] = nn.Parameter(torch.ones(channels))
            channels = out

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1) if self.spelling != "transpose" else x.transpose(1, 2).transpose(2, 3)
        for number, (name, _) in enumerate(self.steps):
            x = self._step(number, name, x)
        return x.permute(0, 3, 1, 2).contiguous() if self.spelling == "contiguous" else torch.permute(x, (0, 3, 1, 2))

    def _step(self, number: int, name: str, x: Tensor) -> Tensor:
        if name in ("linear", "norm"):
            return self.layers[str(number)](x)  # type: ignore[no-any-return]
        if name in ("residual", "concat"):
            y: Tensor = self.layers[str(number)](x)
            return x + F.gelu(y) if name == "residual" else torch.cat((y, x), -1)
        if name == "scale":
            return self.vectors[f"scale{number}"] * x
        if name == "crop":
            return x[..., 1:] if self.steps[number][1] < (self.steps[number - 1][1] if number else self.channels) else x
        functions = {"gelu": F.gelu, "relu": F.relu, "sin": torch.sin, "dropout": lambda t: F.dropout(t, 0.1, self.training)}
        return functions[name](x) if name in functions else x.flip(3)


def _behind_last(kinds: Sequence[Kind], p: Parameters) -> tuple[Kind, ...]:
    return (replace(kinds[0], channels=p["steps"][-1][1]),)


# --- pointwise ----------------------------------------------------------------------------------------------------------------

_ACTIVATIONS: Mapping[str, Mapping[str, Function]] = {
    "relu": {
        "module": nn.ReLU,
        "function": lambda: F.relu,
        "torch": lambda: torch.relu,
        "method": lambda: lambda x: x.relu(),
        "in place module": lambda: nn.ReLU(inplace=True),
        "in place function": lambda: lambda x: F.relu(x, True),
        "in place keyword": lambda: lambda x: F.relu(x, inplace=True),
        "in place method": lambda: lambda x: x.relu_(),
        "in place torch": lambda: torch.relu_,
    },
    "relu6": {"module": nn.ReLU6, "function": lambda: F.relu6, "in place module": lambda: nn.ReLU6(True)},
    "silu": {"module": nn.SiLU, "function": lambda: F.silu, "in place module": lambda: nn.SiLU(True)},
    "mish": {"module": nn.Mish, "function": lambda: F.mish, "in place function": lambda: lambda x: F.mish(x, inplace=True)},
    "selu": {"module": nn.SELU, "torch": lambda: torch.selu, "in place module": lambda: nn.SELU(True)},
    "hardswish": {"module": nn.Hardswish, "function": lambda: F.hardswish, "in place module": lambda: nn.Hardswish(True)},
    "hardsigmoid": {"module": nn.Hardsigmoid, "function": lambda: F.hardsigmoid},
    "leaky_relu": {
        "module": lambda: nn.LeakyReLU(0.2),
        "function": lambda: lambda x: F.leaky_relu(x, 0.1),
        "in place module": lambda: nn.LeakyReLU(0.2, True),
        "in place function": lambda: lambda x: F.leaky_relu_(x, 0.3),
    },
    "elu": {
        "module": lambda: nn.ELU(0.7),
        "function": lambda: F.elu,
        "in place module": lambda: nn.ELU(inplace=True),
        "in place function": lambda: lambda x: F.elu_(x, 0.7),
    },
    "celu": {"module": nn.CELU, "function": lambda: lambda x: F.celu(x, 0.6), "in place module": lambda: nn.CELU(inplace=True)},
    "gelu": {"module": nn.GELU, "function": lambda: F.gelu, "tanh": lambda: nn.GELU("tanh")},
    "softplus": {"module": nn.Softplus, "function": lambda: lambda x: F.softplus(x, beta=2)},
    "hardtanh": {
        "module": lambda: nn.Hardtanh(-0.8, 1.2),
        "function": lambda: F.hardtanh,
        "in place module": lambda: nn.Hardtanh(0.0, 6.0, True),
    },
    "hardshrink": {"module": nn.Hardshrink, "function": lambda: F.hardshrink},
    "softshrink": {"module": lambda: nn.Softshrink(0.2), "function": lambda: F.softshrink},
    "threshold": {"module": lambda: nn.Threshold(0.1, 0.23), "in place module": lambda: nn.Threshold(0.1, 0.23, True)},
    "tanh": {
        "module": nn.Tanh,
        "torch": lambda: torch.tanh,
        "method": lambda: lambda x: x.tanh(),
        "in place torch": lambda: torch.tanh_,
    },
    "sigmoid": {
        "module": nn.Sigmoid,
        "function": lambda: torch.sigmoid,
        "method": lambda: lambda x: x.sigmoid(),
        "in place method": lambda: lambda x: x.sigmoid_(),
    },
    "tanhshrink": {"module": nn.Tanhshrink, "function": lambda: F.tanhshrink},
    "softsign": {"module": nn.Softsign, "function": lambda: F.softsign},
    "logsigmoid": {"module": nn.LogSigmoid, "function": lambda: F.logsigmoid},
    "clamp": {
        "method": lambda: lambda x: x.clamp(0, 6),
        "function": lambda: lambda x: torch.clamp(x, min=-0.4),
        "clip": lambda: lambda x: x.clip(max=1.1),
        "in place method": lambda: lambda x: x.clamp_(min=0),
    },
    "rrelu": {"module": nn.RReLU, "function": lambda: F.rrelu, "in place module": lambda: nn.RReLU(inplace=True)},
    # Pointwise, and unknown to fxmerge.
    "other": {
        "sin": lambda: torch.sin,
        "abs": lambda: lambda x: x.abs(),
        "erf": lambda: torch.erf,
        "in place abs": lambda: torch.abs_,
    },
}


def _activation(name: str) -> Operation:
    made = _ACTIVATIONS[name]
    ways = tuple(way for way in made if not way.startswith("in place"))
    over = tuple(way for way in made if way.startswith("in place"))
    return Operation(name, lambda kinds, p: made[p["spelling"]](), spellings=ways, in_place=over)


def _prelu(kinds: Sequence[Kind], p: Parameters) -> nn.Module:
    return nn.PReLU(kinds[0].channels if p["spelling"] == "channels" else 1)


class _InTraining(nn.Module):
    """Dropout and drop-path called as functions."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "stochastic depth":
            return stochastic_depth(x, 0.2, "row", training=self.training)  # type: ignore[no-any-return]
        return F.dropout(x, 0.2, self.training) if self.spelling == "dropout" else F.dropout2d(x, p=0.2, training=self.training)


_IDLE: Mapping[str, Callable[[], Function]] = {
    "nn.Identity": nn.Identity,
    "nn.Dropout": nn.Dropout,
    "nn.Dropout2d": lambda: nn.Dropout2d(0.1),
    "nn.AlphaDropout": nn.AlphaDropout,
    "StochasticDepth": lambda: StochasticDepth(0.2, "row"),
    "stochastic depth": lambda: _InTraining("stochastic depth"),
    "dropout": lambda: _InTraining("dropout"),
    "dropout2d": lambda: _InTraining("dropout2d"),
    "clone": lambda: lambda x: x.clone(),
    "torch.clone": lambda: torch.clone,
    "contiguous": lambda: lambda x: x.contiguous(),
    "channels last": lambda: lambda x: x.contiguous(memory_format=torch.channels_last),
    "detach": lambda: lambda x: x.detach(),
    "to": lambda: lambda x: x.to(torch.float64),
}


# --- the table ----------------------------------------------------------------------------------------------------------------

_USUAL = "module", "function"
_CONVOLUTIONS = (Operation("conv", _convolution, _convolution_parameters, result=_convolved),)
_OTHER_CONVOLUTIONS = (
    Operation("depthwise", _convolution, _depthwise_parameters, result=_convolved),
    Operation("depthwise", _convolution, _depthwise_parameters, result=_convolved),
    Operation("transposed", _transposed_convolution, _transposed_parameters, result=_transposed, fits=_small),
)
_POINTWISE = (*map(_activation, _ACTIVATIONS), Operation("prelu", _prelu, spellings=("one", "channels")))
_CONCAT = (Operation("cat", _concat, spellings=("cat", "concat", "keywords"), result=_concatenated, others="beside"),)
_NORMS = (Operation("norm", _norm, spellings=("affine", "plain", "function", "frozen")),)
_OF_THE_INPUT = (
    Operation(
        "input norm",
        _input_norm,
        spellings=("group", "batch", "instance", "instance affine", "layer"),
        fits=lambda x: x.smallest > 1,
    ),
    Operation("squeeze-excite", _squeeze_excite, spellings=("linear", "convolutions", "mean")),
    Operation("side", lambda k, p: _Side(k[0].channels, p["spelling"]), spellings=("index", "view", "gate", "first")),
)
_WITH_CONSTANTS = (
    Operation("arithmetic", _arithmetic, _constant_parameters, tuple(_WITH_CONSTANT)[:-5], tuple(_WITH_CONSTANT)[-5:]),
    Operation("frozen norm", lambda k, p: _FrozenNorm(k[0].channels, p["spelling"]), spellings=("shaped", "view", "indexed")),
    Operation("layer scale", lambda k, p: _LayerScale(k[0].channels, p["spelling"]), spellings=("first", "channels last")),
)
_ON_CHANNELS_LAST = (
    Operation(
        "channels last",
        lambda k, p: _ChannelsLast(k[0].channels, p["spelling"], p["steps"]),
        _last_parameters,
        ("permute", "transpose", "contiguous"),
        result=_behind_last,
        alias=True,
    ),
)
_POOLS = (
    Operation("average pool", _average_pool, _average_parameters, (*_USUAL, *_USUAL, "divisor"), result=_pooled),
    Operation("max pool", _max_pool, _pool_parameters, _USUAL, result=_pooled),
)
_OF_CHANNELS = (
    Operation(
        "split",
        _split,
        _split_parameters,
        ("chunk", "method", "split", "split widths"),
        result=_parts,
        fits=lambda x: x.channels > 1,
        alias=True,
    ),
    Operation("channels", _pick, _channel_parameters, ("plain", "ellipsis", "narrow", "from the end"), result=_picked, alias=True),
    Operation("channel shuffle", _channel_shuffle, _shuffle_parameters, ("view", "permute", *_USUAL), alias=True),
)
_OF_SPACE = (
    Operation("slice", _slice, _slice_parameters, ("plain", "ellipsis", "twice"), result=_sliced, fits=_can_shrink, alias=True),
    Operation("pad", _pad, _pad_parameters, ("function", "module", "channels"), result=_padded),
    Operation(
        "pixel unshuffle",
        _unshuffle,
        spellings=_USUAL,
        result=_unshuffled,
        fits=lambda x: 4 * x.channels <= WIDEST and _can_shrink(x),
    ),
)
_UPSAMPLING = (
    Operation("upsample", _upsample, _upsampling_parameters, ("module", "function", "exact"), result=_upsampled, fits=_small),
)
_OF_SPACE_OPAQUE = (
    Operation("resize", _upsample, _upsampling_parameters, ("size", "bilinear"), result=_upsampled, fits=_small),
    Operation(
        "even crop",
        lambda kinds, p: _cropped_to_even,
        result=_to_even,
        fits=lambda x: x.smallest > 1 and not _even(x),
        alias=True,
    ),
    Operation("pixel shuffle", _shuffle, spellings=_USUAL, result=_shuffled, fits=lambda x: x.channels % 4 == 0 and _small(x)),
    Operation("transpose", _transpose, spellings=("transpose", "permute"), result=_turned, alias=True),
)
_IDLES = (Operation("idle", lambda k, p: _IDLE[p["spelling"]](), spellings=tuple(_IDLE), alias=True),)

_Groups: TypeAlias = tuple[tuple[int, tuple[Operation, ...]], ...]

#: How often a group is drawn, and its members: what can be merged, and all.
_MERGEABLE: _Groups = (
    (6, _CONVOLUTIONS),
    (3, _OTHER_CONVOLUTIONS),
    (4, (_activation("relu"),)),
    (6, (_of_two("add"),)),
    (1, (_of_two("sub"),)),
    (3, _CONCAT),
    (3, _NORMS),
    (2, _WITH_CONSTANTS),
    (1, _ON_CHANNELS_LAST),
    (1, _POOLS[:1]),
    (3, _OF_CHANNELS),
    (1, _OF_SPACE),
    (1, _UPSAMPLING),
    (1, _IDLES),
)
_GROUPS: _Groups = (
    *_MERGEABLE,
    (3, _POINTWISE),
    (2, (_of_two("sub"), _of_two("mul"))),
    (2, _OF_THE_INPUT),
    (2, _WITH_CONSTANTS),
    (2, _POOLS),
    (1, _OF_SPACE),
    (2, _OF_SPACE_OPAQUE),
    (1, _IDLES),
)

OPERATIONS: Mapping[str, Operation] = {operation.name: operation for _, group in _GROUPS for operation in group}

#: Modules that may be called twice; in-place ones are not among them. And those whose weight another may share.
_REPEATABLE = ("conv", "depthwise", "transposed", "norm", "prelu", "layer scale", "channels last")
_TIEABLE = ("conv", "depthwise")


@st.composite
def programs(draw: st.DrawFn, most: int = 30) -> Program:
    """Programs of up to so many instructions."""
    draft = _Draft(draw(st.sampled_from((_MERGEABLE, _GROUPS))))
    for _ in range(draw(st.integers(1, most))):
        draft.grow(draw)
    return draft.finished(draw)


@dataclass
class _Draft:
    """A program being drawn.

    Args:
        groups: what it is made of.
        kinds: of every tensor.
        memory: for every tensor a number; those of one number may share memory.
        gone: tensors not to be read any more, because something else has overwritten them.
        unread: tensors that nobody has read yet.
        products: how many images were multiplied with images unbounded; each squares what is large.
    """

    groups: _Groups
    instructions: list[Instruction] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=lambda: [Kind(3)])
    memory: list[int] = field(default_factory=lambda: [0])
    gone: set[int] = field(default_factory=set)
    unread: set[int] = field(default_factory=set)
    products: int = 0

    def grow(self, draw: st.DrawFn) -> None:
        """Draw one more instruction."""
        last = len(self.kinds) - 1
        x = draw(st.sampled_from(self.alive)) if draw(st.integers(0, 4)) == 4 else last
        kind = self.kinds[x]
        if draw(st.integers(0, 9)) == 9 and self._repeatable(x):
            self._repeat(draw, x)
            return
        groups = [group for weight, group in self.groups for _ in range(weight) if any(map(self._can, group, [kind] * len(group)))]
        group = draw(st.sampled_from(groups))
        self._apply(draw, draw(st.sampled_from([operation for operation in group if self._can(operation, kind)])), x)

    @property
    def alive(self) -> list[int]:
        return [i for i in range(len(self.kinds)) if i not in self.gone]

    def _can(self, operation: Operation, kind: Kind) -> bool:
        return operation.fits(kind) and (operation.others != "beside" or 2 * kind.channels <= WIDEST)

    def _apply(self, draw: st.DrawFn, operation: Operation, x: int) -> None:
        of = (x, *self._others(draw, operation, x))
        spellings = [s for s in operation.spellings if s != "*" or self.products < 2]
        if all(i == x or self.memory[i] != self.memory[x] for i in of):
            spellings += operation.in_place
        drawn = {"spelling": draw(st.sampled_from(spellings))} if spellings else {}
        parameters = {**drawn, **operation.parameters(draw, self.kinds[x])}
        over = parameters.get("spelling") in operation.in_place
        self.products += parameters.get("spelling") == "*"
        results = operation.result([self.kinds[i] for i in of], parameters)
        if all(kind.sound for kind in results):
            if over:
                self._overwrite(x, keep=not parameters["spelling"].strip(" c").endswith("=") and draw(st.booleans()))
            self._add(do(operation.name, of, **parameters), results, self.memory[x] if over or operation.alias else None)

    def _others(self, draw: st.DrawFn, operation: Operation, x: int) -> tuple[int, ...]:
        if not operation.others:
            return ()
        kind = self.kinds[x]
        room = WIDEST - kind.channels

        def matches(other: Kind) -> bool:
            if operation.others == "alike":
                return other in (kind, replace(kind, channels=1))
            return replace(other, channels=kind.channels) == kind and other.channels <= room

        partners = [i for i in self.alive if i != x and matches(self.kinds[i])]
        loose = [i for i in partners if i in self.unread]
        one = draw(st.sampled_from([*loose * 3, *partners, x]))
        third = [i for i in partners if self.kinds[i].channels + self.kinds[one].channels <= room]
        if operation.others == "alike" or not third or draw(st.booleans()):
            return (one,)
        return one, draw(st.sampled_from(third))

    def _overwrite(self, x: int, *, keep: bool) -> None:
        """Nobody reads what shares memory with the overwritten tensor; its own name may be read again, for the new values."""
        self.gone |= {i for i in range(len(self.kinds)) if self.memory[i] == self.memory[x] and not (keep and i == x)}

    def _add(self, instruction: Instruction, results: Iterable[Kind], memory: int | None) -> None:
        self.instructions.append(instruction)
        self.unread -= {*instruction.of}
        for kind in results:
            self.unread.add(len(self.kinds))
            self.memory.append(len(self.kinds) if memory is None else memory)
            self.kinds.append(kind)

    def _repeat(self, draw: st.DrawFn, x: int) -> None:
        """A module called once more, or one that shares its weight."""
        earlier = draw(st.sampled_from(self._repeatable(x)))
        tieable = self.instructions[earlier].operation in _TIEABLE
        instruction = do(draw(st.sampled_from(("again", "tied") if tieable else ("again",))), (x,), earlier=earlier)
        self._add(instruction, _results(instruction, [self.kinds[x]], self.instructions), None)

    def _repeatable(self, x: int) -> list[int]:
        return [i for i, earlier in enumerate(self.instructions) if earlier.operation in _REPEATABLE and self._takes(earlier, x)]

    def _takes(self, earlier: Instruction, x: int) -> bool:
        """Whether what was applied earlier can be applied to this tensor, too."""
        kind, parameters = self.kinds[x], dict(earlier.parameters)
        if self.kinds[earlier.of[0]].channels != kind.channels or (parameters.get("spelling") in _MODES and kind.smallest < 7):
            return False
        return all(found.sound for found in _results(earlier, [kind], self.instructions))

    def finished(self, draw: st.DrawFn) -> Program:
        """The program, with the last tensor as an output, and perhaps loose ends and others."""
        last = len(self.kinds) - 1
        loose = sorted(self.unread - self.gone - {last})
        forms = ("tuple", "dict", "head") if loose and draw(st.integers(0, 5)) < 5 else ("tensor", "tuple", "dict", "head")
        form = draw(st.sampled_from(forms))
        more: Sequence[int] = ()
        if form != "tensor":
            more = loose if draw(st.integers(0, 3)) < 3 else draw(st.lists(st.sampled_from(self.alive), max_size=3))
        return Program(tuple(self.instructions), (last, *more), form)
