"""What each stage of the pipeline takes on a network of torchvision's, with random weights and images.

    python -m benchmarks.costs --network mobilenet_v2 --size 224 --batch 4 --images 8

Weights do not matter for time. The scorer's time is proportional to the images; few are taken here and the time for one image of
one candidate is given, too.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate

import fxmerge
from fxmerge.search import build_networks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--network", default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--speedup", type=float, default=1.5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = run(options)
    print(report)  # noqa: T201
    if options.out:
        options.out.write_text(report + "\n", encoding="utf-8")


def run(options: argparse.Namespace) -> str:
    """The table as Markdown."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(options.network, weights=None).eval()
    example = torch.randn(options.batch, 3, options.size, options.size)
    rows: list[tuple[str, str]] = []

    def timed(stage: str, work: Any) -> Any:
        start = time.perf_counter()
        result = work()
        rows.append((stage, f"{time.perf_counter() - start:.2f}"))
        return result

    graph = timed("trace", lambda: fxmerge.trace(model, example))
    findings = timed("find segments", lambda: fxmerge.find_segments(graph))
    proposals = timed("propose candidates", lambda: fxmerge.propose(findings))
    latency = timed("measure latency", lambda: fxmerge.measure_latency(findings, proposals, (example,)))
    useful = fxmerge.worthwhile(proposals, latency, findings.region)
    candidates = [c for p in useful for c in p.candidates]
    images = torch.randn(options.images, 3, options.size, options.size)
    importance = timed("measure importance", lambda: fxmerge.measure_importance(findings, useful, images))
    seconds = float(rows[-1][1])
    front = timed("solve", lambda: fxmerge.solve(findings.region, candidates, latency, importance, findings.fingerprint))
    plan = front.pick(max(front.fastest_ns, int(front.original_ns / options.speedup)))
    weights = timed("fit one plan", lambda: fxmerge.fit(findings, plan, images))
    timed("student and merged network", lambda: build_networks(findings, plan, weights))
    composed = sum(c.kind != "fitted" for p in proposals for c in p.candidates)
    text = (
        f"# Costs: torchvision {options.network}, {options.size} pixels, batch {options.batch}\n\n"
        f"`python -m benchmarks.costs --network {options.network} --size {options.size} --batch {options.batch} "
        f"--images {options.images}`, torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} "
        f"threads, random weights.\n\n{len(findings.segments)} segments; {len(latency.candidates)} candidates, {composed} of them "
        f"published (composed or dropped) and the others fitted; {len(latency.measurements)} distinct pieces of work timed; "
        f"{len(candidates)} candidates faster than leaving their stretch alone, scored on {options.images} images "
        f"({1e3 * seconds / max(1, len(candidates)) / options.images:.1f} ms a candidate and image); front of {len(front)} plans; "
        f"the plan fitted has {len(plan.merges)} merges."
    )
    return f"{text}\n\n{tabulate(rows, ('stage', 'seconds'), 'github', disable_numparse=True)}"


if __name__ == "__main__":
    main()
