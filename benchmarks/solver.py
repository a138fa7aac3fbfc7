"""Seconds of the solver on chains of a given size, and on a real network's candidates with made-up tables.

    python -m benchmarks.solver --units 1000 --offers 10 --repeats 3
    python -m benchmarks.solver --network mobilenet_v2 --entries 391 --second

Latencies and losses are drawn from a seeded generator: what is timed depends on how many there are, and on how many plans no
other beats. One line a solve, with the median of the repeats.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tabulate import tabulate

from fxmerge.core.geometry import Axis, Geometry
from fxmerge.core.plan import ParetoFront
from fxmerge.core.region import Chain, Unit
from fxmerge.core.resource import Resource
from fxmerge.core.segment import Candidate
from fxmerge.solve.frontier import MAX_POINTS, solve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--units", type=int, default=1000)
    parser.add_argument("--offers", type=int, default=10, help="candidates that end at each unit")
    parser.add_argument("--network", help="of torchvision; its own candidates instead of a chain")
    parser.add_argument("--entries", type=int, default=391, help="how many of the network's candidates to take, evenly spread")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--max-points", type=int, default=MAX_POINTS)
    parser.add_argument("--second", action="store_true", help="with a second budget as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    print(run(parser.parse_args()))  # noqa: T201


def run(options: argparse.Namespace) -> str:
    """The table as Markdown."""
    random = np.random.default_rng(options.seed)
    root, candidates = of_network(options) if options.network else chain(random, options.units, options.offers)
    layers = [unit.end for unit in root.walk()]
    covers = covered(root)
    numbers: dict[str, Any] = {
        "latencies_ns": [int(random.integers(3, 10) * 10**4 * covers[c.entry, c.end]) for c in candidates],
        "losses": random.uniform(0, 1, len(candidates)).tolist(),
        "units_ns": dict(zip(layers, random.integers(5 * 10**4, 15 * 10**4, len(layers)).tolist(), strict=True)),
    }
    second = Resource(
        "parameters",
        {c.id: int(random.integers(1, 10) * 10**3 * covers[c.entry, c.end]) for c in candidates},
        dict.fromkeys(layers, 5000),
    )
    given = {
        "remainder_ns": 0,
        "original_ns": sum(numbers["units_ns"].values()),
        "fingerprint": "",
        "max_points": options.max_points,
    }
    ways: dict[str, dict[str, Any]] = {"additive-loss": {}, "layermerge": {"objective": "layermerge"}}
    if options.second:
        ways["additive-loss and parameters"] = {"second": second}
    rows = []
    for name, more in ways.items():
        seconds, front = timed(lambda more=more: solve(root, candidates, **numbers, **given, **more), options.repeats)  # type: ignore[misc]
        rows.append((name, len(layers) - 1, len(candidates), f"{seconds:.4f}", len(front), f"{front.slack:.3g}", front.surplus))
    return tabulate(rows, headers=("", "units", "candidates", "seconds", "points", "slack", "surplus"), tablefmt="pipe")


def timed(work: Callable[[], ParetoFront], repeats: int) -> tuple[float, ParetoFront]:
    """Median seconds, and what came out."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        front = work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), front


def chain(random: np.random.Generator, units: int, offers: int) -> tuple[Unit, list[Candidate]]:
    """One chain; at each unit end so many candidates, of up to eight units."""
    cuts = ("x", *(f"n{k}" for k in range(units)))
    root = Unit("output", (), (Chain(cuts, tuple(Unit(cut, (cut,)) for cut in cuts[1:])),))
    ends = [stop for stop in range(1, units + 1) for _ in range(offers)]
    starts = [max(0, stop - int(random.integers(1, 9))) for stop in ends]
    geometries = [Geometry(8, 8, (Axis(k + 1),)) for k in range(len(ends))]  # names of their own
    return root, [
        Candidate(cuts[a], cuts[b], cuts[b], "fitted", geometry) for a, b, geometry in zip(starts, ends, geometries, strict=True)
    ]


def of_network(options: argparse.Namespace) -> tuple[Unit, list[Candidate]]:
    """The region of a network, and some of its candidates."""
    import torch
    import torchvision

    import fxmerge

    model = torchvision.models.get_model(options.network, weights=None).eval()
    findings = fxmerge.find_segments(fxmerge.trace(model, torch.randn(1, 3, options.size, options.size)))
    every = [c for proposal in fxmerge.propose(findings) for c in proposal.candidates]
    taken = np.linspace(0, len(every) - 1, min(options.entries, len(every))).astype(int).tolist()
    return findings.region, [every[k] for k in taken]


def covered(root: Unit) -> dict[tuple[str, str], int]:
    """How many units lie between two cuts of a chain."""
    return {
        (chain.cuts[a], chain.cuts[b]): sum(1 for unit in chain.units[a:b] for _ in unit.walk())
        for unit in root.walk()
        for chain in unit.children
        for a, b in itertools.combinations(range(len(chain.cuts)), 2)
        if b - a <= 16
    }


if __name__ == "__main__":
    main()
