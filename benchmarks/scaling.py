"""How the cost of the tables and of the solver grows with depth, candidates and calibration images.

    python -m benchmarks.scaling --out benchmarks/results/scaling.md

Networks are chains of residual blocks of one width, random weights, 32 x 32 pixels. Each stage is timed at each size; the exponent
is the slope of log(seconds) over log(size) by least squares: 1 is linear. Last, by arithmetic from the measured time of a task,
what many devices would change.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fxmerge
from benchmarks.stages import timed

STAGES = ("trace", "find and propose", "latency", "importance", "solve")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, 1, 1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return y


def network(blocks: int, width: int) -> nn.Module:
    """A stem, so many residual blocks, a classifier."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 3, 1, 1), nn.ReLU(), *(Block(width) for _ in range(blocks))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--spans", type=int, nargs="+", default=[1, 2, 4, 8], help="units a segment may span")
    parser.add_argument("--images", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = run(options)
    print(report)  # noqa: T201
    if options.out:
        options.out.write_text(report + "\n", encoding="utf-8")


def run(options: argparse.Namespace) -> str:
    """The curves as Markdown."""
    middle = options.blocks[len(options.blocks) // 2 - 1]
    images = options.images[0]
    plans: dict[str, list[tuple[int, int, int, int]]] = {
        "blocks": [(blocks, blocks, 4, images) for blocks in options.blocks],
        "units a segment may span": [(span, middle, span, images) for span in options.spans],
        "calibration images": [(count, middle, 4, count) for count in options.images],
    }
    parts, last = [], (0, {})
    with tqdm(total=sum(map(len, plans.values()))) as bar:
        for what, runs in plans.items():
            rows = []
            for size, blocks, span, count in runs:
                last = measured(network(blocks, options.width), span, count)
                rows.append((size, *last))
                bar.update()
            parts.append(_curve(what, rows))
    return "\n\n".join((_title(options), *parts, _cluster(*last)))


def measured(model: nn.Module, span: int, images: int) -> tuple[int, dict[str, float]]:
    """The number of candidates scored, and the seconds of each stage."""
    seconds: dict[str, float] = {}
    data = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    example = data[:16]
    with timed(seconds, "trace"):
        graph = fxmerge.trace(model, example)
    with timed(seconds, "find and propose"):
        findings = fxmerge.find_segments(graph, max_units=span)
        proposals = fxmerge.propose(findings)
    with timed(seconds, "latency"):
        latency = fxmerge.measure_latency(findings, proposals, (example,))
    with timed(seconds, "importance"):
        importance = fxmerge.measure_importance(findings, proposals, data)
    candidates = [c for p in proposals for c in p.candidates]
    with timed(seconds, "solve"):
        fxmerge.solve(findings.region, candidates, latency, importance, findings.fingerprint)
    return len(candidates), seconds


def _curve(what: str, rows: Sequence[tuple[int, int, dict[str, float]]]) -> str:
    lines: list[tuple[object, ...]] = [
        (size, count, *(f"{seconds[stage]:.3f}" for stage in STAGES)) for size, count, seconds in rows
    ]
    exponents = [_slope([(size, seconds[stage]) for size, _, seconds in rows]) for stage in STAGES]
    lines.append(("exponent", f"{_slope([(size, count) for size, count, _ in rows]):.2f}", *(f"{e:.2f}" for e in exponents)))
    return tabulate(lines, (what, "candidates", *(f"{stage}, s" for stage in STAGES)), "github", disable_numparse=True)


def _slope(points: Sequence[tuple[float, float]]) -> float:
    xs, ys = [math.log(x) for x, _ in points], [math.log(max(y, 1e-9)) for _, y in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread if spread else math.nan


def _cluster(candidates: int, seconds: dict[str, float]) -> str:
    """What 1,000 devices would change: importance is shared out, latency is not."""
    here = seconds["latency"] + seconds["importance"] + seconds["solve"]
    shared = seconds["importance"] / min(1000, candidates)
    there = seconds["latency"] + shared + seconds["solve"]
    return (
        f"By arithmetic, for the last network: importance is {candidates} candidates of "
        f"{seconds['importance'] / candidates:.4f} s, "
        f"which 1,000 devices would share out ({shared:.3f} s, the sending of network and images not counted). Latency "
        f"({seconds['latency']:.1f} s) is measured one piece at a time on one device of the kind that counts, and solving "
        f"({seconds['solve']:.2f} s) is one process: {here:.1f} s would become {there:.1f} s. A scorer that fine-tunes takes "
        "minutes a candidate, and is what a cluster is for: its time falls in proportion up to one device a candidate."
    )


def _title(options: argparse.Namespace) -> str:
    return (
        f"# How costs grow\n\n`python -m benchmarks.scaling`, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, width {options.width}, 32 x 32 pixels, latency at batch 16; all candidates scored "
        "on all images."
    )


if __name__ == "__main__":
    main()
