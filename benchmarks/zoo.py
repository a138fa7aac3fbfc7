"""Every model of the zoo with random weights: is it read, what is found in it, and does the law hold?

    python -m benchmarks.zoo --workers 2

Every model has a process of its own; one that hangs or runs out of memory is a row, too. Rows are kept as they come in a file of
JSON lines, so a run that was interrupted goes on where it stopped (``--again`` runs anew what is in it). Models too large for a
worker's share of the memory are run alone, at the end. A model is run

1. with random weights, nothing in it exactly zero or one: parameters that are constant are drawn at random, and every batch norm
   gets the statistics of what it sees, disturbed, so that values stay of order one at any depth; where the output still vanishes
   or is not finite, every layer is scaled to an output of order one,
2. traced, searched, all candidates proposed,
3. and for three random plans of candidates that do not overlap the student is compared with the merged network, on the example,
   on another batch, and on another image size where the traced graph takes these.

A *residual add* adds two image tensors of one shape: one is a tensor, the fork, or computed from it by a row of layers without an
activation or maximum (the shortcut); the other is computed from the fork, too, with a convolution on the way; and nothing between
fork and addition enlarges the image. A *residual CNN* is a graph with a residual add and without attention: no function or
module whose name says attention, no matrix product of two tensors that both depend on the input. Names of models play no part. A
candidate *spans a block* if it is composed or fitted (not dropped) and its segment's expression has a sum with a convolution that
only one of the operands has behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from tqdm import tqdm

import fxmerge
from benchmarks.zoo_models import Entry, entries
from fxmerge.core.expression import Expression
from fxmerge.graph.meta import facts
from fxmerge.operators import Activation, Opaque

Row: TypeAlias = dict[str, Any]

#: Largest difference allowed, over the largest value of the reference.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
#: How often a model's weights are in memory at a time: the model, its copy to be traced; the graph, the merged network.
COPIES = 2.6
#: Weights that the merged convolutions of one plan may have together; larger candidates are counted and not drawn.
PLAN_WEIGHTS = 16_000_000
PLANS = 3
SOURCE = Path(fxmerge.__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="regular expression on zoo:name")
    parser.add_argument("--limit", type=int, help="run no more than so many models")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one model")
    parser.add_argument("--memory", type=float, help="GiB for all workers; most of the machine's if not given")
    parser.add_argument("--again", action="store_true", help="run anew what the store holds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "zoo.md")
    parser.add_argument("--store", type=Path, help="rows as JSON lines; zoo.jsonl beside this file if not given")
    options = parser.parse_args()
    store = options.store or Path(__file__).parent / "zoo.jsonl"
    run(options, store)
    report = "\n\n".join(_report(entries(), _stored(store)))
    options.out.write_text(report + "\n", encoding="utf-8")
    print(report.partition("\n## ")[0])  # noqa: T201


def run(options: argparse.Namespace, store: Path) -> None:
    """Run what the store lacks, several models at a time, and append their rows to it."""
    done = set() if options.again else _stored(store).keys()
    wanted = [entry.id for entry in entries() if re.search(options.only, entry.id) and entry.id not in done]
    wanted = wanted[: options.limit]
    memory = options.memory or _machine_memory()
    _source()
    heavy: list[str] = []
    with store.open("a", encoding="utf-8") as lines, tqdm(total=len(wanted)) as bar:

        def one(name: str, share: float, alone: bool) -> None:
            row = _in_a_process(name, options.timeout, share, alone)
            if row.get("memory") and not alone:
                heavy.append(name)
                return
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            bar.set_postfix_str(f"{name}: {_status(row)}, law {_law_text(row)}")
            bar.update()

        with ThreadPoolExecutor(options.workers) as pool:
            jobs = [pool.submit(one, name, memory / options.workers, options.workers == 1) for name in wanted]
            try:
                for job in jobs:
                    job.result()
            except BaseException:  # what has begun is finished and kept
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        for name in heavy:
            one(name, memory, alone=True)


def _machine_memory() -> float:
    return 0.85 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _stored(store: Path) -> dict[str, Row]:
    """The newest row of every model; a line that an interruption cut off does not count."""
    rows: dict[str, Row] = {}
    for line in store.read_text(encoding="utf-8").splitlines() if store.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows[row["id"]] = row
    return rows


# One model, its process


def _in_a_process(name: str, timeout: float, memory: float, alone: bool) -> Row:
    """What a process of its own finds out about a model, as far as it gets."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fxmerge", "timm", "segmentation_models_pytorch", "diffusers"])  # imported once for all
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, memory, alone, sender), daemon=True)
    start = time.perf_counter()
    process.start()
    sender.close()
    row: Row = {"id": name, "source": _source(), "began": time.time(), "stage": "start"}
    try:
        while receiver.poll(max(0.0, timeout - time.perf_counter() + start)):
            row.update(receiver.recv())
        row["fault"] = f"not done within {timeout:.0f} s"
    except EOFError:
        process.join(10)
        if row["stage"] != "done" and "fault" not in row:
            row |= {"fault": f"the process ended with code {process.exitcode}", "memory": process.exitcode == -signal.SIGKILL}
    finally:
        process.kill()
        process.join()
    return row | {"seconds": time.perf_counter() - start}


@cache
def _source() -> str:
    """A hash of fxmerge's source as it is when the run begins: rows of one table may stem from several states of it."""
    digest = hashlib.sha256()
    for path in sorted(SOURCE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def _work(name: str, memory: float, alone: bool, sender: Any) -> None:
    """The process: send what is known as it comes to be known, and a fault, if there is one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        entry = next(entry for entry in entries() if entry.id == name)
        for news in examine(entry, memory, alone=alone):
            sender.send(news)
    except Exception as fault:
        sender.send(_fault(fault))
    sender.send({"cpu_seconds": time.process_time()})


def _fault(fault: Exception) -> Row:
    """What went wrong: fxmerge's own words where it refuses, else the line as well; and whether memory was short."""
    refused = isinstance(fault, fxmerge.FxMergeError)
    where = traceback.extract_tb(fault.__traceback__)[-1]
    text = str(fault)[:200] if refused else f"{type(fault).__name__} at {where.filename}:{where.lineno}: {fault}"[:300]
    return {"fault": text, "refused": refused, "memory": isinstance(fault, MemoryError) or "allocate memory" in str(fault)}


# One model


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
    _randomise(model, example)
    yield {"stage": "trace"}
    with _clock("trace") as seconds:
        graph = fxmerge.trace(model, example)
    del model
    yield {"stage": "find", "front_end": graph.meta.get("fxmerge_front_end", "?"), **seconds}
    with _clock("find") as seconds:
        findings = fxmerge.find_segments(graph)
    yield {"stage": "propose", **_found(findings), **seconds}
    with _clock("propose") as seconds:
        proposals = fxmerge.propose(findings)
    exact = fxmerge.propose(findings, fxmerge.Space.named("exact"))
    weights = [math.prod(c.geometry.weight_shape) for p in proposals for c in p.candidates]
    yield {"candidates": len(weights), "too_large_to_draw": sum(n > PLAN_WEIGHTS for n in weights), "exact": len(exact), **seconds}
    yield {"stage": "blocks", **_blocks(findings, proposals)}
    yield {"stage": "law"}
    inputs = _accepted(graph, entry, example, size, dtype)
    with _clock("law") as seconds:
        yield from _law(findings, proposals, [example, *inputs.values()], dtype)
    yield {"stage": "done", "compared": ["example", *inputs], **seconds}


@contextlib.contextmanager
def _clock(stage: str) -> Iterator[dict[str, float]]:
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    yield seconds
    seconds[f"seconds_{stage}"] = time.perf_counter() - start


def _arguments(entry: Entry, batch: int, size: tuple[int, int], dtype: torch.dtype) -> tuple[Any, ...]:
    """The model's arguments, floating point tensors in the type asked for."""
    return _mapped(lambda x: x.to(dtype) if x.is_floating_point() else x, entry.inputs(batch, size))


def _mapped(function: Callable[[Tensor], Tensor], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(pytree.tree_map_only(Tensor, function, arguments))


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


# Weights


def _randomise(model: nn.Module, example: tuple[Any, ...]) -> None:
    """Random numbers wherever there is a constant; statistics and, where need be, weights that keep values of order one."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            _draw(parameter.data)
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            for name in ("weight", "bias"):
                value = getattr(module, name, None)
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    _draw(value)  # a frozen norm's
    _observed(model, example, _set_statistics)
    scale = _largest(model, example)
    if not 1e-4 < scale < 1e4:
        _observed(model, example, _scale_layer)
        scale = _largest(model, example)
    if not 0 < scale < math.inf:
        raise ValueError(f"the largest output is {scale}; no random weights were found that mend that")


def _draw(value: Tensor) -> None:
    """Random numbers in place of a constant: near one for one, of moderate size for anything smaller."""
    constant = float(value.flatten()[0])
    if abs(constant) >= 0.5:
        value.copy_(constant * (0.5 + torch.rand_like(value)))
    elif value.squeeze().dim() > 1:  # a layer that begins as zero
        value.copy_(torch.randn_like(value) / math.sqrt(value[0].numel()))
    else:
        value.copy_(0.1 + 0.4 * torch.rand_like(value)).mul_(torch.randint_like(value, 2) * 2 - 1)


def _set_statistics(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Give a batch norm the statistics of what it sees, disturbed, and let what follows see the result."""
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor) or not inputs or inputs[0].shape[1] != len(mean):
        return None
    axes = [axis for axis in range(inputs[0].dim()) if axis != 1]
    found, average = torch.var_mean(inputs[0], axes, correction=0)
    found = torch.where(found > 1e-3 * found.mean(), found, found.mean()).clamp_min(1e-6)
    mean.copy_(average + 0.3 * found.sqrt() * torch.randn_like(mean))
    variance.copy_(found * (0.5 + torch.rand_like(variance)))
    return module.forward(*inputs)


def _scale_layer(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Give a layer with weights an output of order one."""
    if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or not isinstance(output, Tensor):
        return None
    scale = float(output.std())
    if not 0 < scale < math.inf:
        return None
    for parameter in module.parameters(recurse=False):
        parameter.data.div_(scale)
    return module.forward(*inputs)


def _observed(model: nn.Module, example: tuple[Any, ...], hook: Callable[..., Any]) -> None:
    handles = [module.register_forward_hook(hook) for module in model.modules()]
    with torch.no_grad():
        model(*_mapped(torch.clone, example))
    for handle in handles:
        handle.remove()


def _largest(model: nn.Module, example: tuple[Any, ...]) -> float:
    """The largest value among all outputs; infinite where one is not finite, 0 where there is none."""
    outputs = [x.abs().max() for x in _outputs(model, example) if x.is_floating_point() and x.numel()]
    return float(torch.stack(outputs).nan_to_num(math.inf).max()) if outputs else 0.0


def _outputs(module: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that a module returns for copies of these arguments."""
    with torch.no_grad():
        values = module(*_mapped(torch.clone, arguments))
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


# The law


def _accepted(
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
                _outputs(graph, arguments)
                taken[what] = arguments
                break
    return taken


def _law(
    findings: fxmerge.Findings, proposals: Sequence[fxmerge.Proposal], inputs: Sequence[tuple[Any, ...]], dtype: torch.dtype
) -> Iterator[Row]:
    """For each of some random plans its merges by kind and the largest error; a plan whose student overflows is drawn again.

    Where the law is broken, ``response`` says how far the student itself moves if its input is disturbed by rounding.
    """
    errors: list[float] = []
    merges: Counter[str] = Counter()
    response: list[float] = []
    rng = random.Random(0)
    for _ in range(3 * PLANS if proposals else 0):
        plan = _random_plan(findings, proposals, rng)
        error = _plan_error(findings.graph, plan, inputs) if plan.merges else None
        if error is not None:
            errors.append(error)
            merges.update(merge.kind for merge in plan.merges)
            if not error <= TOLERANCE[dtype]:
                response.append(_response(findings.graph, plan, inputs[0], dtype))
            yield {"errors": errors, "merges": merges, "tolerance": TOLERANCE[dtype], "response": response}
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


def _plan_error(graph: GraphModule, plan: fxmerge.Plan, inputs: Sequence[tuple[Any, ...]]) -> float | None:
    """The largest error of a plan's merged network over its student's largest value; None if the student is not finite."""
    student = fxmerge.Linearize(own=False).apply(fxmerge.annotate(graph, plan))
    merged = fxmerge.fuse(student)
    worst = 0.0
    for arguments in inputs:
        expected, found = _outputs(student, arguments), _outputs(merged, arguments)
        if not all(bool(x.isfinite().all()) for x in expected):
            return None
        worst = max([worst, *(relative_error(a, b) for a, b in zip(expected, found, strict=True))])
    return worst


def _response(graph: GraphModule, plan: fxmerge.Plan, arguments: tuple[Any, ...], dtype: torch.dtype) -> float:
    student = fxmerge.Linearize(own=False).apply(fxmerge.annotate(graph, plan))
    eps = torch.finfo(dtype).eps
    disturbed = _mapped(lambda x: x * (1 + eps * torch.randn_like(x)) if x.is_floating_point() else x, arguments)
    pairs = zip(_outputs(student, arguments), _outputs(student, disturbed), strict=True)
    return max(relative_error(a, b) for a, b in pairs)


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Largest difference over the largest value expected (over 1 where that is 0); infinite where shapes differ, or for NaN."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf
    if not expected.numel():
        return 0.0
    a, b = expected.double(), found.double()
    error = float((a - b).abs().max()) / (float(a.abs().max()) or 1.0)
    return error if error == error else math.inf


# What is in a graph


def _found(findings: fxmerge.Findings) -> Row:
    """Counts of nodes, and of refusals by reason; opaque ones by what they are."""
    graph, verdicts = findings.graph, findings.verdicts
    layers = {node.name for node in graph.graph.nodes if _is_convolution(graph, node)}
    activations = {node.name for node, verdict in verdicts.items() if isinstance(verdict, Activation)}
    told = {name for s in findings.segments for name in s.nodes} | {refusal.node for refusal in findings.refusals}
    opaque = [r for r in findings.refusals if r.reason is fxmerge.Reason.OPAQUE]
    return {
        "nodes": len(graph.graph.nodes),
        "convolutions": len(layers),
        "activations": len(activations),
        "segments": len(findings.segments),
        "refusals": Counter(refusal.reason.name.lower() for refusal in findings.refusals),
        "opaque": Counter(refusal.detail for refusal in opaque),
        "untold": sorted((layers | activations) - told),
    }


def _blocks(findings: fxmerge.Findings, proposals: Sequence[fxmerge.Proposal]) -> Row:
    """Residual adds, those within a candidate, what stands in the others, and whether there is attention."""
    paths = _Paths(findings.graph, findings.verdicts)
    residual = {node.name: block for node in findings.graph.graph.nodes if (block := paths.residual_block(node)) is not None}
    merging = [p for p in proposals if any(c.kind != "identity" for c in p.candidates)]
    spanned = {name for p in merging for name in _sums_over_convolutions(p.segment.expression)}
    obstacles = Counter(what for name in residual.keys() - spanned for what in paths.obstacles(residual[name]))
    return {
        "residual_adds": len(residual),
        "residual_adds_spanned": len(residual.keys() & spanned),
        "spans_block": bool(spanned),
        "attention": sorted(paths.attention()),
        "gated": any(paths.is_gate(node) for block in residual.values() for node in block),
        "obstacles": dict(obstacles.most_common(4)),
    }


def _sums_over_convolutions(expression: Expression) -> Iterator[str]:
    """The sums of an expression with a convolution that only one of the operands has behind it."""
    behind: list[set[int]] = []
    for index, step in enumerate(expression.steps):
        sets = [behind[i] for i in step.operands]
        behind.append(set().union(*sets) | ({index} if step.role == "convolution" else set()))
        if step.kind == "sum" and set().union(*sets) != set.intersection(*sets):
            yield step.name


@dataclass(frozen=True)
class _Paths:
    """The paths of a graph from its inputs on; parameters, and what is computed from them alone, are not on them."""

    graph: GraphModule
    verdicts: Mapping[Node, object]

    @cached_property
    def operands(self) -> dict[Node, list[Node]]:
        """For every node that depends on an input, its operands that do. Sizes do not."""
        found: dict[Node, list[Node]] = {}
        for node in self.graph.graph.nodes:
            before = [n for n in node.all_input_nodes if n in found]
            if (before or node.op == "placeholder") and not _is_size(self.graph, node):
                found[node] = before
        return found

    def residual_block(self, node: Node) -> set[Node] | None:
        """The nodes between the fork and a residual add; None for other nodes."""
        operands = self.operands.get(node, [])
        shapes = {facts(n).shape for n in operands}
        if _kind(self.graph, node) not in ("add", "iadd", "add_relu") or len(operands) != 2:
            return None
        if len(shapes) != 1 or len(next(iter(shapes)) or ()) < 3:
            return None
        for shortcut, other in (operands, operands[::-1]):
            fork = self._fork(shortcut, self._before(other))
            branch = self._between(fork, other) if fork is not None else set()
            if fork is not None and any(_is_convolution(self.graph, n) for n in branch):
                block = branch | self._between(fork, shortcut)
                return None if any(_kind(self.graph, n) in _ENLARGING for n in block) else block
        return None

    def _fork(self, node: Node, before_other: set[Node]) -> Node | None:
        """The first node, going back in a row of layers without an activation or maximum, that the other operand comes from."""
        while node not in before_other:
            operands = self.operands[node]
            maximum = "maxpool" in _kind(self.graph, node).replace("_", "").lower()
            if maximum or isinstance(self.verdicts.get(node), Activation) or len(operands) != 1:
                return None
            node = operands[0]
        return node

    def _before(self, end: Node) -> set[Node]:
        """Everything that a node is computed from."""
        seen: set[Node] = set()
        waiting = [*self.operands[end]]
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting.extend(self.operands[node])
        return seen

    def _between(self, fork: Node, end: Node) -> set[Node]:
        """The nodes on a path from the fork to a node, that node counted and the fork not."""
        behind = {fork}
        for node in self.graph.graph.nodes:
            if not behind.isdisjoint(self.operands.get(node, ())):
                behind.add(node)
        return (behind & (self._before(end) | {end})) - {fork}

    def attention(self) -> set[str]:
        """Kinds of nodes that are attention."""
        kinds = {node: _kind(self.graph, node) for node in self.operands}
        named = {kind for kind in kinds.values() if "attention" in kind.lower()}
        return named | {kind for node, kind in kinds.items() if kind in _PRODUCTS and self._multiplies(node)}

    def is_gate(self, node: Node) -> bool:
        """Whether a node multiplies two tensors, pixel by pixel, that both depend on the input."""
        return _kind(self.graph, node) in ("mul", "imul") and self._multiplies(node)

    def _multiplies(self, node: Node) -> bool:
        return len(self.operands[node]) > 1

    def obstacles(self, block: set[Node]) -> set[str]:
        """What is opaque in a block; its sum where nothing is."""
        verdicts = [self.verdicts.get(node) for node in block]
        return {v.detail or v.reason.value for v in verdicts if isinstance(v, Opaque)} or {"nothing opaque"}


_ENLARGING = {"interpolate", "upsample", "Upsample", "pixel_shuffle", "PixelShuffle"} | {
    f"{name}{n}d" for name in ("conv_transpose", "ConvTranspose", "upsample_nearest", "upsample_bilinear") for n in (1, 2, 3)
}
_PRODUCTS = {"matmul", "bmm", "mm", "einsum", "baddbmm", "rmatmul"}


def _is_size(graph: GraphModule, node: Node) -> bool:
    """Whether a node reads a size, not values."""
    kind = _kind(graph, node)
    return kind in ("size", "sym_size", "dim", "len") or (kind == "getattr" and "T" not in node.args)


def _kind(graph: GraphModule, node: Node) -> str:
    """The type of module, or the name of the function, without underscores and overloads: conv2d for aten.conv2d.default."""
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))).__name__
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name.partition(".")[0].strip("_")


def _is_convolution(graph: GraphModule, node: Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return node.op.startswith("call_") and _kind(graph, node) in ("conv1d", "conv2d", "conv3d", "convolution")


# The report


def _status(row: Row) -> str:
    """``traced``, ``refused`` as a whole, ``not built`` (our fault), or ``failed``: a crash, too slow, or too large."""
    if row["stage"] in ("blocks", "law", "done"):
        return "traced"
    if row["stage"] in ("start", "build"):
        return "not built"
    return "refused" if row.get("refused") else "failed"


def _law_text(row: Row) -> str:
    """``held`` for three plans, ``BROKEN`` for one, ``n/a`` without candidates; else ``raised`` or ``not finished``."""
    errors = row.get("errors", [])
    if any(error > row["tolerance"] for error in errors):
        return "BROKEN"
    if row["stage"] == "done":
        return "n/a" if not row["candidates"] else "held" if len(errors) == PLANS else "not finished"
    if row["stage"] == "law":
        return "raised" if "refused" in row and not row["memory"] else "not finished"
    return ""


def _residual(row: Row) -> bool:
    return row.get("residual_adds", 0) > 0 and not row["attention"]


def _report(zoo: Sequence[Entry], stored: Mapping[str, Row]) -> Iterator[str]:
    """The whole report, part by part."""
    rows = [stored[entry.id] for entry in zoo if entry.id in stored]
    yield "# The zoo"
    yield _preamble(len(zoo), rows)
    yield _totals(rows)
    yield from _lists(rows)
    yield "## Residual CNNs\n\n" + _residual_text([row for row in rows if _residual(row)])
    yield "## Models\n\n" + _models(rows)
    yield "## Opaque operators\n\n" + _opaque(rows)


def _preamble(models: int, rows: Sequence[Row]) -> str:
    packages = ("torch", "torchvision", "timm", "diffusers", "segmentation_models_pytorch", "fxmerge")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    sources = ", ".join(f"{source} ({count} rows)" for source, count in Counter(row["source"] for row in rows).most_common())
    ends = ", ".join(f"{end} {count}" for end, count in Counter(r["front_end"] for r in rows if "front_end" in r).most_common())
    wall, cpu = _wall(rows) / 60, sum(row.get("cpu_seconds", 0.0) for row in rows) / 60
    trivial = sum(_law_text(row) == "held" and not any(row["errors"]) for row in rows)
    large, candidates = (sum(row.get(key, 0) for row in rows) for key in ("too_large_to_draw", "candidates"))
    return (
        f"`python -m benchmarks.zoo`, Python {platform.python_version()}, {versions}; one thread a model; fxmerge's source: "
        f"{sources}. {len(rows)} of {models} models run, in {wall:.0f} minutes ({cpu:.0f} of processor time). Front ends: {ends}. "
        f"The law was not tested on {large} of {candidates} candidates, of more than {PLAN_WEIGHTS / 1e6:.0f} M weights each; in "
        f"{trivial} models it holds with an error of exactly 0, for no plan drawn multiplied anything out. What is counted, and "
        "how, is told in `benchmarks/zoo.py`."
    )


def _wall(rows: Sequence[Row]) -> float:
    """Seconds during which any model was being run."""
    total = reached = 0.0
    for start, stop in sorted((row["began"], row["began"] + row["seconds"]) for row in rows):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def _table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def _totals(rows: Sequence[Row]) -> str:
    """One line for every zoo, and one for all."""
    zoos = list(dict.fromkeys(row["id"].partition(":")[0] for row in rows))
    lines = [_total(zoo, [row for row in rows if row["id"].partition(":")[0] == zoo]) for zoo in zoos]
    lines.append(_total("**all**", rows))
    whole = "torchvision detection, whole"
    lines.append(_total("**all but whole detectors**", [row for row in rows if not row["id"].startswith(whole)]))
    heads = ("zoo", "models", "traced", "refused", "failed", "not built", "law held", "broken", "raised", "not finished", "n/a")
    return _table((*heads, "worst float64", "worst float32", "residual CNNs", "block spanned"), lines)


def _total(name: str, rows: Sequence[Row]) -> tuple[object, ...]:
    status = Counter(map(_status, rows))
    law = Counter(map(_law_text, rows))
    residual = [row for row in rows if _residual(row)]
    return (
        name,
        len(rows),
        *(status[key] for key in ("traced", "refused", "failed", "not built")),
        *(law[key] for key in ("held", "BROKEN", "raised", "not finished", "n/a")),
        *(_worst([row for row in rows if row.get("dtype") == dtype]) for dtype in ("float64", "float32")),
        len(residual),
        _share(sum(row["spans_block"] for row in residual), len(residual)),
    )


def _worst(rows: Sequence[Row]) -> str:
    errors = [error for row in rows for error in row.get("errors", [])]
    return f"{max(errors):.1e}" if errors else ""


def _share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.1f} %)" if whole else ""


def _lists(rows: Sequence[Row]) -> Iterator[str]:
    """What did not go well, model by model."""
    parts: tuple[tuple[str, Callable[[Row], bool], Callable[[Row], str]], ...] = (
        ("Refused as a whole", lambda r: _status(r) == "refused", lambda r: r["fault"]),
        ("Failed", lambda r: _status(r) == "failed", lambda r: f"{r['stage']}: {r['fault']}"),
        ("Not built", lambda r: _status(r) == "not built", lambda r: r["fault"]),
        ("Law broken, raised or not finished", lambda r: _law_text(r) in ("BROKEN", "raised", "not finished"), _law_fault),
        ("Convolutions or activations in no segment and no refusal", lambda r: bool(r.get("untold")), _untold),
    )
    for title, chosen, text in parts:
        lines = [f"- {row['id']}: {' '.join(text(row).split())}" for row in rows if chosen(row)]
        if lines:
            yield f"## {title}\n\n" + "\n".join(lines)


def _law_fault(row: Row) -> str:
    errors = ", ".join(f"{error:.1e}" for error in row.get("errors", []))
    moved = ", ".join(f"{error:.1e}" for error in row.get("response", []))
    control = f"; the student itself, its input disturbed by rounding, moves by {moved}" if moved else ""
    return f"{_law_text(row)}, errors [{errors}] {row.get('fault', '')}{control}"


def _untold(row: Row) -> str:
    return f"{len(row['untold'])}: {', '.join(row['untold'][:5])}"


def _residual_text(rows: Sequence[Row]) -> str:
    free = [row for row in rows if not row["gated"]]
    lines = [_spanned("residual CNNs", rows), _spanned("of these whose blocks hold no gate (product of two tensors)", free)]
    without = [row for row in rows if not row["spans_block"]]
    if without:
        lines.append("Without one, and what is opaque in how many of their blocks:")
        lines.append("\n".join(map(_obstructed, without)))
    return "\n\n".join(lines)


def _spanned(what: str, rows: Sequence[Row]) -> str:
    return (
        f"{len(rows)} {what}: {_share(sum(row['spans_block'] for row in rows), len(rows))} have a candidate that spans a residual "
        f"block; {sum(row['residual_adds_spanned'] for row in rows)} of their {sum(row['residual_adds'] for row in rows)} residual "
        "adds lie in one."
    )


def _obstructed(row: Row) -> str:
    found = ", ".join(f"{what} {count}" for what, count in row["obstacles"].items())
    return f"- {row['id']} ({row['residual_adds']} blocks): {found}"


def _models(rows: Sequence[Row]) -> str:
    heads = ["model", "pixels", "dtype", "M params", "front end", "nodes", "conv", "act", "segments", "candidates", "exact"]
    heads += ["refusals", "residual adds", "spanned", "law", "worst error", "composed / fitted / dropped", "compared on"]
    return _table([*heads, "s trace", "s find", "s law", "s all", "s CPU"], [_line(row) for row in rows])


def _line(row: Row) -> tuple[object, ...]:
    begun = (row["id"], row.get("size", ""), row.get("dtype", ""), f"{row.get('parameters', math.nan) / 1e6:.1f}")
    if _status(row) != "traced":
        return (*begun, _status(row), *[""] * 16, f"{row['seconds']:.1f}", f"{row.get('cpu_seconds', math.nan):.1f}")
    counts = [row[key] for key in ("nodes", "convolutions", "activations", "segments", "candidates", "exact")]
    by_reason: Counter[str] = Counter(row["refusals"])
    refusals = ", ".join(f"{reason} {count}" for reason, count in by_reason.most_common())
    kind = f"{row.get('residual_adds', '')}{' (attention)' if row.get('attention') else ''}"
    drawn = row.get("merges", {})
    found = row["seconds_find"] + row["seconds_propose"]
    seconds = (row["seconds_trace"], found, *(row.get(key, math.nan) for key in ("seconds_law", "seconds", "cpu_seconds")))
    return (
        *(*begun, row["front_end"], *counts, refusals, kind, row.get("residual_adds_spanned", "")),
        *(_law_text(row), _worst([row]), " / ".join(str(drawn.get(kind, 0)) for kind in ("composed", "fitted", "identity"))),
        *(", ".join(row.get("compared", [])), *(f"{s:.1f}" for s in seconds)),
    )


def _opaque(rows: Sequence[Row]) -> str:
    occurrences: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for row in rows:
        occurrences.update(row.get("opaque", {}))
        models.update(row.get("opaque", {}).keys())
    return _table(("operator", "refusals", "models"), [(what, n, models[what]) for what, n in occurrences.most_common()])


if __name__ == "__main__":
    main()
