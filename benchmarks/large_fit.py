"""One large fit: a 5x5 kernel over 512 channels, 12,800 weights a filter, in place of two 3x3: its time and its memory.

    python -m benchmarks.large_fit

Weights are random and the images noise: what is measured is the size of the equations, not what they are good for.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence

import torch
from tabulate import tabulate
from torch import nn

import fxmerge
from benchmarks.reports import deliver


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=8, help="of the images, pixels")
    parser.add_argument("--rows-per-unknown", type=int, default=2, help="positions for every weight of a filter")
    options = parser.parse_args(arguments)
    report = run(options)
    deliver(report, None)
    return report


def run(options: argparse.Namespace) -> str:
    """Seconds and memory, as Markdown."""
    torch.manual_seed(0)
    model = network(options.channels).eval()
    images = torch.randn(options.images, 3, options.size, options.size)
    findings = fxmerge.find_segments(fxmerge.trace(model, images[:4]))
    unknowns = 25 * options.channels
    space = fxmerge.Space(max_kernel=5, max_unknowns=unknowns)
    candidates = [c for p in fxmerge.propose(findings, space) for c in p.candidates]
    largest = next(c for c in candidates if c.kind == "fitted" and c.geometry.weight_shape[1:] == (options.channels, 5, 5))
    before = _peak_bytes()
    begun = time.perf_counter()
    scorer = fxmerge.Reconstruction(rows_per_unknown=options.rows_per_unknown, stay=False)
    fitted = fxmerge.fit(findings, fxmerge.Plan(findings.fingerprint, (largest,)), images, scorer=scorer)
    seconds = time.perf_counter() - begun
    assert bool(fitted[largest.id].weight.isfinite().all())
    row = (largest.id, f"{unknowns:,}", f"{seconds:.0f}", f"{before / 2**30:.1f}", f"{_peak_bytes() / 2**30:.1f}")
    heads = ("candidate", "weights a filter", "seconds", "GiB before, at most", "GiB at most")
    return tabulate([row], heads, "github", disable_numparse=True)


def network(channels: int) -> nn.Module:
    """A stem, and two convolutions behind each other."""
    return nn.Sequential(
        *(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()),
    )


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
