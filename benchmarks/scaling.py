"""How the cost of the tables and of the solver grows with depth, candidates and calibration images.

    python -m benchmarks.scaling --out benchmarks/results/scaling.md

Networks are chains of residual blocks of one width, random weights, 32 x 32 pixels. Each stage is timed at each size; the exponent
is the slope of log(seconds) over log(size) by least squares: 1 is linear. Last, by arithmetic from the measured times of all tasks,
what 1,000 devices would change (:mod:`benchmarks.cluster`). ``--plot scaling.png`` draws the curves.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fxmerge
from benchmarks.cluster import Watched, report
from benchmarks.reports import deliver
from benchmarks.stages import timed
from fxmerge.core.segment import narrowed

SPANS = "units a segment may span"
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
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 100, 1000], help="to do the arithmetic for")
    parser.add_argument("--steps", type=int, default=20, help="of fine-tuning each candidate, in that arithmetic; 0 leaves it out")
    parser.add_argument("--plot", type=Path, help="picture to draw the curves into (needs matplotlib)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    deliver(run(options), options.out)


def run(options: argparse.Namespace) -> str:
    """The curves as Markdown."""
    middle = options.blocks[(len(options.blocks) - 1) // 2]
    images = options.images[0]
    plans: dict[str, list[tuple[int, int, int, int]]] = {
        "blocks": [(blocks, blocks, 4, images) for blocks in options.blocks],
        SPANS: [(span, middle, span, images) for span in options.spans],
        "calibration images": [(count, middle, 4, count) for count in options.images],
    }
    measured(network(1, options.width), 1, images)  # what torch does once, it does here
    parts, curves = [], {}
    with tqdm(total=sum(map(len, plans.values()))) as bar:
        for what, runs in plans.items():
            rows = []
            for size, blocks, span, count in runs:
                rows.append((size, *measured(network(blocks, options.width), span, count)))
                bar.update()
            parts.append(_curve(what, rows))
            curves[what] = rows
    if options.plot:
        _draw(curves, options.plot)
    return "\n\n".join((_title(options), *parts, _cluster(options, middle)))


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
    # Of segments that span more units there are more candidates, which is what counts.
    sizes = [count if what == SPANS else size for size, count, _ in rows]
    exponents = [_slope([(size, row[2][stage]) for size, row in zip(sizes, rows, strict=True)]) for stage in STAGES]
    grown = "" if what == SPANS else f"{_slope([(size, row[1]) for size, row in zip(sizes, rows, strict=True)]):.2f}"
    lines.append(("exponent over candidates" if what == SPANS else "exponent", grown, *(f"{e:.2f}" for e in exponents)))
    return tabulate(lines, (what, "candidates", *(f"{stage}, s" for stage in STAGES)), "github", disable_numparse=True)


def _draw(curves: Mapping[str, Sequence[tuple[int, int, dict[str, float]]]], path: Path) -> None:
    """Seconds of each stage over each size, on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(curves), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (what, rows) in zip(figure.subplots(1, len(curves), sharey=True, squeeze=False)[0], curves.items(), strict=True):
        for stage in STAGES:
            axes.loglog([size for size, _, _ in rows], [seconds[stage] for _, _, seconds in rows], marker=".", label=stage)
        axes.set(xlabel=what, ylabel="seconds")
    axes.legend()
    figure.savefig(path, dpi=144)


def _slope(points: Sequence[tuple[float, float]]) -> float:
    xs, ys = [math.log(x) for x, _ in points], [math.log(max(y, 1e-9)) for _, y in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread if spread else math.nan


def _cluster(options: argparse.Namespace, blocks: int) -> str:
    """What many devices would change, for the network in the middle: closed form, and the published way."""
    model, images = network(blocks, options.width), options.images[-1]
    data = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    graph = fxmerge.trace(model, data[:16])
    findings = fxmerge.find_segments(graph)
    proposals = fxmerge.propose(findings)
    seconds: dict[str, float] = {}
    with timed(seconds, "latency"):
        latency = fxmerge.measure_latency(findings, proposals, (data[:16],))
    labelled = [(data[:16], torch.arange(16) % 10)]
    tuning = fxmerge.FineTuning(train=labelled, holdout=labelled, steps=options.steps)
    few = narrowed(proposals, lambda candidate: candidate.kind != "fitted") if options.steps else ()
    parts = []
    for name, scorer, offered in (("closed form", fxmerge.Reconstruction(), proposals), ("fine-tuning", tuning, few)):
        if not offered:
            continue
        cuts, totals = [], []
        for workers in options.workers:
            watched = Watched(workers)
            with timed(seconds, f"{name} {workers}"):
                importance = fxmerge.measure_importance(findings, offered, data, scorer=scorer, executor=watched)
            cuts.append(watched)
            totals.append(seconds[f"{name} {workers}"])
        candidates = [c for p in offered for c in p.candidates]
        with timed(seconds, f"{name} solve"):
            fxmerge.solve(findings.region, candidates, latency, importance, findings.fingerprint)
        steps = f" of {options.steps} steps of 16 images" if scorer is tuning else f", {images} images"
        what = f"{len(candidates)} candidates of {blocks} blocks, {name}{steps}"
        parts.append(report(what, cuts, totals, seconds["latency"], seconds[f"{name} solve"]))
    return "## What a cluster would change\n\n" + "\n\n".join(parts)


def _line(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _title(options: argparse.Namespace) -> str:
    sizes = f"--blocks {_line(options.blocks)} --spans {_line(options.spans)} --images {_line(options.images)}"
    return (
        f"# How costs grow\n\n`python -m benchmarks.scaling {sizes} --width {options.width}`, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {torch.get_num_threads()} threads, 32 x 32 pixels, latency at batch 16; all candidates "
        "scored on all images."
    )


if __name__ == "__main__":
    main()
