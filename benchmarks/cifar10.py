"""Accuracy without training, and measured latency, of CIFAR ResNets at given speed-ups: fitted, composed, baselines.

    python -m benchmarks.cifar10 --network resnet20

Needs ../shared (or FXMERGE_DATA and FXMERGE_WEIGHTS). Latencies are of batch 128 on this machine's CPU, both sides timed in turn in
one process, against the original with its batch norms folded; accuracy is on all 10,000 test images of the JPEG copy.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

import fxmerge
from benchmarks.networks import accuracy, cifar10, cifar_resnet
from benchmarks.stages import timed
from fxmerge.core.segment import narrowed
from fxmerge.search import Search, build_networks
from fxmerge.survey import Survey

SPACES = {
    "fitted (ours)": "joint",
    "composed": "composed",
    "activations only": "activations",
    "layers only": "layers",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--network", default="resnet20", choices=("resnet20", "resnet56"))
    parser.add_argument("--images", type=int, default=1024, help="calibration images, unlabelled, from the training split")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.1, 1.2, 1.3, 1.5, 2.0])
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    report = run(options.network, options.images, options.speedups)
    print(report)  # noqa: T201
    if options.out:
        options.out.write_text(report + "\n", encoding="utf-8")


def run(name: str, images: int, speedups: list[float]) -> str:
    """The whole benchmark as one Markdown text."""
    network = cifar_resnet(name)
    test_x, test_y = cifar10("test")
    train_x, _ = cifar10("train")
    calibration = train_x[torch.randperm(len(train_x), generator=torch.Generator().manual_seed(0))[:images]]
    example = test_x[:128]
    costs: dict[str, float] = {}
    with timed(costs, "trace"):
        graph = fxmerge.trace(network, example)
    with timed(costs, "find"):
        findings = fxmerge.find_segments(graph)
        proposals = fxmerge.propose(findings)
    with timed(costs, "measure latency"):
        latency = fxmerge.measure_latency(findings, proposals, (example,))
    useful = fxmerge.worthwhile(proposals, latency, findings.region)
    with timed(costs, "measure importance"):
        importance = fxmerge.measure_importance(findings, useful, calibration, latency=latency)
    rows: list[tuple[object, ...]] = [
        ("original, folded", "1.00", "1.00", "1.00", f"{accuracy(network, test_x, test_y):.2f}", "", "")
    ]
    for label, space in SPACES.items():
        offered = {c.id for p in fxmerge.propose(findings, fxmerge.Space.named(space)) for c in p.candidates}
        batches = fxmerge.as_batches(calibration, graph)
        some = narrowed(useful, lambda candidate, offered=offered: candidate.id in offered)  # type: ignore[misc]
        found = Survey(name, findings, some, batches, latency, importance, (example,), fxmerge.Target())
        rows += [_row(label, speedup, Search(found, 0.03), test_x, test_y, costs) for speedup in speedups]
    heads = ("candidates", "asked", "predicted", "measured", "top-1, no training", "convolutions", "merges")
    return "\n\n".join(
        (_title(name, images), tabulate(rows, heads, "github", disable_numparse=True), _costs(costs, latency, useful))
    )


def _row(label: str, speedup: float, search: Search, test_x: Tensor, test_y: Tensor, costs: dict[str, float]) -> tuple[object, ...]:
    with timed(costs, "solve"):
        assert len(search.front)
    try:
        found = search.within(1 / speedup, None, 4, lambda done, total: None)
    except fxmerge.BudgetError as refusal:
        fastest = search.measure(search.front.plan(0))
        return label, f"{speedup:.2f}", "", f"cannot; fastest {fastest[0].median_ns / refusal.fastest_ns:.2f}", "", "", ""
    with timed(costs, "fit (several plans a row)"):
        plan, measured, weights = search.best_near(found, 1 / speedup, None, fxmerge.Reconstruction(), lambda done, total: None)
    with timed(costs, "fuse"):
        _, merged = build_networks(search.found.findings, plan, weights)
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in merged.modules())
    return (
        label,
        f"{speedup:.2f}",
        f"{search.front.original_ns / max(1, plan.latency_ns or 1):.2f}",
        f"{measured[0].median_ns / measured[1].median_ns:.2f}",
        f"{accuracy(merged, test_x, test_y):.2f}",
        convolutions,
        len(plan.merges),
    )


def _title(name: str, images: int) -> str:
    return (
        f"# {name}, CIFAR-10 (JPEG), no training\n\n"
        f"`python -m benchmarks.cifar10 --network {name} --images {images}`, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {torch.get_num_threads()} threads, batch 128, float32, contiguous, eager; {images} "
        "unlabelled calibration images; speed-ups against the folded original, timed in turn."
    )


def _costs(costs: dict[str, float], latency: fxmerge.LatencyTable, useful: tuple[fxmerge.Proposal, ...]) -> str:
    rows = [(stage, f"{seconds:.2f}") for stage, seconds in costs.items()]
    counts = (
        f"{len(latency.candidates)} candidates, {len(latency.measurements)} distinct geometries measured, "
        f"{sum(len(p.candidates) for p in useful)} faster than leaving their stretch alone and scored. "
        "Solve, fit and fuse are sums over all rows."
    )
    return f"{counts}\n\n{tabulate(rows, ('stage', 'seconds'), 'github', disable_numparse=True)}"


if __name__ == "__main__":
    main()
