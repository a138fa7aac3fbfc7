"""One model of the zoo: built, read, searched, and the law tested on random plans."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

import fxmerge
from benchmarks.zoo.blocks import Row, blocks, found
from benchmarks.zoo.models import Entry
from benchmarks.zoo.weights import mapped, outputs, randomise

#: Largest difference allowed, over the largest value of the reference.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
#: How often a model's weights are in memory at a time: the model, its copy to be traced; the graph, the merged network.
COPIES = 2.6
#: Weights that the merged convolutions of one plan may have together; larger candidates are counted and not drawn.
PLAN_WEIGHTS = 16_000_000
PLANS = 3


def examine(entry: Entry, memory: float, *, alone: bool) -> Iterator[Row]:
    """Build a model, read it, look for candidates, test the law; facts as they come to be known.

    Args:
        entry: the model.
        memory: GiB that may be used.
        alone: whether that is all there is; a model for which it is too little is then run in float32.
    """
    yield {"stage": "build"}
    model, dtype, size = _runnable(entry, memory, alone=alone)
    example = _arguments(entry, 2, size, dtype)
    parameters = sum(p.numel() for p in model.parameters())
    yield {"parameters": parameters, "dtype": str(dtype).removeprefix("torch."), "size": size[0]}
    randomise(model, example)
    yield {"stage": "trace"}
    with _clock("trace") as seconds:
        graph = fxmerge.trace(model, example)
    del model
    yield {"stage": "find", "front_end": graph.meta.get("fxmerge_front_end", "?"), **seconds}
    with _clock("find") as seconds:
        findings = fxmerge.find_segments(graph)
    yield {"stage": "propose", **found(findings), **seconds}
    with _clock("propose") as seconds:
        proposals = fxmerge.propose(findings)
    exact = fxmerge.propose(findings, fxmerge.Space.named("exact"))
    weights = [math.prod(c.geometry.weight_shape) for p in proposals for c in p.candidates]
    yield {"candidates": len(weights), "too_large_to_draw": sum(n > PLAN_WEIGHTS for n in weights), "exact": len(exact), **seconds}
    yield {"stage": "blocks", **blocks(findings, proposals)}
    yield {"stage": "law"}
    inputs = accepted(graph, entry, example, size, dtype)
    with _clock("law") as seconds:
        yield from law(findings, proposals, [example, *inputs.values()], dtype)
    yield {"stage": "done", "compared": ["example", *inputs], **seconds}


@contextlib.contextmanager
def _clock(stage: str) -> Iterator[dict[str, float]]:
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    yield seconds
    seconds[f"seconds_{stage}"] = time.perf_counter() - start


def _arguments(entry: Entry, batch: int, size: tuple[int, int], dtype: torch.dtype) -> tuple[Any, ...]:
    """The model's arguments, floating point tensors in the type asked for."""
    return mapped(lambda x: x.to(dtype) if x.is_floating_point() else x, entry.inputs(batch, size))


def _runnable(entry: Entry, memory: float, *, alone: bool) -> tuple[nn.Module, torch.dtype, tuple[int, int]]:
    """The model in eval mode, in float64 if it can be, and the smallest image size that it accepts."""
    model = entry.make().eval()
    fits = COPIES * 8 * sum(p.numel() for p in model.parameters()) < memory * 2**30
    if not fits and not alone:
        raise MemoryError("to be run alone")
    faults: list[str] = []
    for dtype in (torch.float64, torch.float32) if fits else (torch.float32,):
        model.to(dtype)
        for size in entry.sizes:
            fault = _rejection(model, _arguments(entry, 2, (size, size), dtype))
            if fault is None:
                return model, dtype, (size, size)
            faults.append(f"{size}: {fault}")
    raise ValueError("; ".join(faults)[-180:])


def _rejection(model: nn.Module, arguments: tuple[Any, ...]) -> Exception | None:
    """Why a model does not run on these arguments; None where it does."""
    try:
        with torch.no_grad():
            model(*arguments)
    except Exception as fault:
        return fault
    return None


def accepted(
    graph: GraphModule, entry: Entry, example: tuple[Any, ...], size: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[Any, ...]]:
    """Arguments of another batch, and of another image size, where the traced graph takes them."""
    side = size[0]
    others = {"batch": [(3, size)], "size": [(2, (side + 5, side + 2)), (2, (side + 32, side)), (2, (2 * side, side))]}
    taken: dict[str, tuple[Any, ...]] = {}
    for what, shapes in others.items():
        for batch, shape in shapes:
            with contextlib.suppress(Exception):
                arguments = _arguments(entry, batch, shape, dtype)
                outputs(graph, arguments)
                taken[what] = arguments
                break
    return taken


def law(
    findings: fxmerge.Findings, proposals: Sequence[fxmerge.Proposal], inputs: Sequence[tuple[Any, ...]], dtype: torch.dtype
) -> Iterator[Row]:
    """For each of some random plans its merges by kind and the largest error.

    A plan is drawn again if its student overflows, or is so ill-conditioned that rounding its own tensors once more moves its
    output by a tenth of the tolerance: with random weights in place of fitted ones, values may grow by orders of magnitude.
    ``shaky`` counts these.
    """
    errors: list[float] = []
    merges: Counter[str] = Counter()
    shaky = 0
    rng = random.Random(0)
    for _ in range(4 * PLANS if proposals else 0):
        plan = _random_plan(findings, proposals, rng)
        student = fxmerge.Linearize(own=False).apply(fxmerge.annotate(findings.graph, plan))
        response = max(_response(student, arguments, torch.finfo(dtype).eps) for arguments in inputs)
        if plan.merges and response <= 0.1 * TOLERANCE[dtype]:
            errors.append(_plan_error(student, inputs))
            merges.update(merge.kind for merge in plan.merges)
        else:
            shaky += bool(plan.merges)
        yield {"errors": errors, "merges": merges, "tolerance": TOLERANCE[dtype], "shaky": shaky}
        if len(errors) == PLANS:
            return


def _random_plan(findings: fxmerge.Findings, proposals: Sequence[fxmerge.Proposal], rng: random.Random) -> fxmerge.Plan:
    """Candidates that do not overlap, taken in random order as long as they fit."""
    taken: set[str] = set()
    chosen: list[fxmerge.Candidate] = []
    left = PLAN_WEIGHTS
    for proposal in rng.sample(proposals, len(proposals)):
        candidate = rng.choice(proposal.candidates)
        weights = math.prod(candidate.geometry.weight_shape)
        if taken.isdisjoint(proposal.segment.nodes) and weights <= left:
            taken.update(proposal.segment.nodes)
            left -= weights
            chosen.append(candidate)
    return fxmerge.Plan(findings.fingerprint, tuple(chosen))


def _plan_error(student: GraphModule, inputs: Sequence[tuple[Any, ...]]) -> float:
    """The largest error of a student's merged network over the student's largest value."""
    merged = fxmerge.fuse(student)
    pairs = [zip(outputs(student, x), outputs(merged, x), strict=True) for x in inputs]
    return max((relative_error(a, b) for pair in pairs for a, b in pair), default=0.0)


class _Rounded(Interpreter):
    """A graph with every floating-point tensor in it off by a rounding error of this size."""

    def __init__(self, graph: GraphModule, eps: float) -> None:
        super().__init__(graph)
        self.eps = eps

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point() and n.op.startswith("call_"):
            return value * (1 + self.eps * torch.randn_like(value))
        return value


def _response(student: GraphModule, arguments: tuple[Any, ...], eps: float) -> float:
    """How far a student's outputs move when all its tensors are rounded once more; infinite where it overflows."""
    expected = outputs(student, arguments)
    if not all(bool(x.isfinite().all()) for x in expected if x.is_floating_point()):
        return math.inf
    with torch.no_grad():
        disturbed = _Rounded(student, eps).run(*mapped(torch.clone, arguments))
    moved = [leaf for leaf in pytree.tree_leaves(disturbed) if isinstance(leaf, Tensor)]
    return max((relative_error(a, b) for a, b in zip(expected, moved, strict=True) if a.is_floating_point()), default=0.0)


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Largest difference over the largest value expected (over 1 where that is 0); infinite where shapes differ, or for NaN."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf
    if not expected.numel():
        return 0.0
    a, b = expected.double(), found.double()
    error = float((a - b).abs().max()) / (float(a.abs().max()) or 1.0)
    return error if error == error else math.inf
