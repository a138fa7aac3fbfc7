"""Forms that one kernel could take: what each costs against the dense one, alone, at shapes of networks that are merged.

    python -m benchmarks.forms
    python -m benchmarks.forms --batch 1 --channels-last

A merge is one dense kernel k x k (or with the groups that its layers have). Offered beside it could be kernels of fewer taps, with
more groups, depthwise, or products of two: k x 1 and 1 x k; depthwise and 1x1; 1x1 to fewer channels and k x k. Every form is
followed by the ReLU behind the merge, and timed in turn with the others. A form of two layers that takes longer than a
dense kernel of fewer taps has little to offer.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

import fxmerge
from benchmarks.reports import deliver

#: Channels in and out, pixels on a side, of the stages of networks for small and for larger images.
SHAPES = ((16, 16, 32), (32, 32, 16), (64, 64, 8), (24, 24, 56), (64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7))


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--kernels", type=int, nargs="+", default=[3, 5], help="odd, from 3 on")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if any(kernel < 3 or kernel % 2 == 0 for kernel in options.kernels):
        parser.error(f"--kernels must be odd and at least 3, found {options.kernels}")
    report = run(options)
    deliver(report, options.out)
    return report


def run(options: argparse.Namespace) -> str:
    """A row for every shape and kernel: the time of each form, in parts of the dense one's."""
    target = fxmerge.Target(channels_last=options.channels_last)
    rows = []
    for entering, leaving, size in SHAPES:
        for kernel in options.kernels:
            made = dict(forms(entering, leaving, kernel))
            shape = (options.batch, entering, size, size)
            timed = [fxmerge.Timed(nn.Sequential(form, nn.ReLU(inplace=True)).eval(), (shape,)) for form in made.values()]
            dense, *others = (found.median_ns for found in fxmerge.compare(timed, target=target))
            rows.append((f"{entering}->{leaving}, {size}x{size}, {kernel}x{kernel}", *(f"{ns / dense:.2f}" for ns in others)))
            print(*rows[-1], flush=True)  # noqa: T201
    layout = "channels last" if options.channels_last else "contiguous"
    where = f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads"
    title = f"Batch {options.batch}, float32, {layout}, eager, {where}; time of each form over that of the dense kernel:"
    return f"{title}\n\n{tabulate(rows, ('dense', *list(made)[1:]), 'github', disable_numparse=True)}"


def forms(entering: int, leaving: int, kernel: int) -> Iterator[tuple[str, nn.Module]]:
    """The dense kernel, then the others by their names."""

    def convolution(a: int, b: int, taps: tuple[int, int], groups: int = 1) -> nn.Conv2d:
        return nn.Conv2d(a, b, taps, padding=(taps[0] // 2, taps[1] // 2), groups=groups)

    square, few, half = (kernel, kernel), min(entering, leaving), max(1, entering // 2)
    yield "dense", convolution(entering, leaving, square)
    yield "two taps fewer", convolution(entering, leaving, (kernel - 2, kernel - 2))
    for groups in (2, 4):
        yield f"{groups} groups", convolution(entering, leaving, square, groups)
    yield "depthwise", convolution(entering, leaving, square, entering)
    yield "kx1, 1xk", nn.Sequential(convolution(entering, few, (kernel, 1)), convolution(few, leaving, (1, kernel)))
    yield "depthwise, 1x1", nn.Sequential(convolution(entering, entering, square, entering), convolution(entering, leaving, (1, 1)))
    yield "1x1 to half, kxk", nn.Sequential(convolution(entering, half, (1, 1)), convolution(half, leaving, square))


if __name__ == "__main__":
    main()
