"""How long the nodes of a network take inside of it, with the caches and the freed memory that they find there.

Timed alone, layers that read a cold input come out too slow, and layers whose outputs are large too fast, so that the parts do not
add up to the whole. Eight plans of mobilenet_v2 (224 pixels, batch 8, 2 threads; by hand), measured over predicted speed-up:

    units and candidates as timed alone, all times one pace                   0.99 - 1.11, off by 5.6 % on average
    units as timed inside, candidates alone times that pace                   0.93 - 1.02, off by 2.0 %
    units as timed inside, candidates alone times the pace of what they replace   0.97 - 1.04, off by 2.2 %
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxmerge.core.table import Target
from fxmerge.graph.edit import free_target
from fxmerge.measure.running import Inputs, copies, prepare, running_on


class _Mark(nn.Module):
    """Notes what time it is when it is called, with as little around it as can be."""

    def __init__(self, clock: Callable[[], int]) -> None:
        super().__init__()
        self.clock = clock
        self.times: list[int] = []

    def __call__(self) -> None:
        self.times.append(self.clock())

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mark:
        return self


def nanoseconds_inside(
    network: GraphModule, inputs: Inputs, target: Target, *, rounds: int, warmup: int, clock: Callable[[], int]
) -> dict[str, list[int]]:
    """Nanoseconds of every node that computes something, by its name, a number for each round.

    Args:
        network: on the CPU, eager; it is not changed.
        inputs: what it is called with.
        target: dtype, layout, threads.
        rounds, warmup: runs that count, and runs before them.
        clock: nanoseconds.
    """
    marked = GraphModule(network, copy.deepcopy(network.graph))
    mark = _Mark(clock).eval()
    name = free_target(marked, "mark")
    marked.add_submodule(name, mark)
    names = []
    for node in list(marked.graph.nodes):
        if node.op.startswith("call_"):
            names.append(node.name)
            with marked.graph.inserting_after(node):
                marked.graph.call_module(name)
    marked.recompile()
    run, sources = prepare(marked, inputs, target)
    fresh = copies(sources)
    found: dict[str, list[int]] = {one: [] for one in names}
    with running_on(target):
        for number in range(warmup + rounds):
            given = fresh()
            mark.times.clear()
            last = clock()
            run(*given)
            for one, at in zip(names, mark.times, strict=True):
                if number >= warmup:
                    found[one].append(at - last)
                last = at
    return found
