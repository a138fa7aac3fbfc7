"""The law: a student and its merged network compute the same, whatever the plan, the image size and the batch."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from fxmerge.algebra.affine import Affine
from fxmerge.algebra.module import convolution, separate_padding
from fxmerge.analysis.segments import Findings
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate, Proposal
from fxmerge.graph.constants import constant_value
from fxmerge.graph.layout import to_last, turns
from fxmerge.graph.meta import facts
from fxmerge.graph.query import module_of, node_named
from fxmerge.measure.calibration import Batch, as_batches
from fxmerge.measure.reconstruction import Reconstruction
from fxmerge.operators import is_linear
from fxmerge.passes.annotate import annotate, merges, stretch
from fxmerge.passes.fuse_segments import fuse
from fxmerge.passes.linearize import Linearize

#: Largest difference allowed, over the largest value of the reference.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def fitted_and_scored(
    scorer: Reconstruction, findings: Findings, plan: Plan, batches: Sequence[Batch]
) -> tuple[dict[str, Affine], float]:
    """Weights of a plan, and how far its merged network is from the original on the images that they were fitted to."""
    weights = scorer.fit(findings, plan, batches)
    return weights, scorer.work(findings, batches).loss_of(plan, weights)


def held_out(data: Tensor, graph: GraphModule, most: int = 64) -> tuple[Tensor, Tensor]:
    """The images that scorers judge on, and those that they fit weights to."""
    mixed = torch.cat([batch[0] for batch in as_batches(data, graph)])
    count = min(most, len(mixed) // 4)
    return mixed[:count], mixed[count:]


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Largest difference over the largest value expected (over 1 where that is 0); infinite where a value is NaN."""
    assert expected.shape == found.shape
    assert expected.dtype == found.dtype
    expected, found = expected.detach(), found.detach()
    error = float((expected - found).abs().max()) / (float(expected.abs().max()) or 1.0)
    return error if error == error else float("inf")


def random_plan(findings: Findings, proposals: Sequence[Proposal], rng: random.Random) -> Plan:
    """A plan of candidates that do not overlap; most plans take all that fits, some stop early."""
    free: set[str] = set()
    chosen: list[Candidate] = []
    for proposal in rng.sample(proposals, len(proposals)):
        if free.isdisjoint(proposal.segment.nodes):
            free.update(proposal.segment.nodes)
            chosen.append(rng.choice(proposal.candidates))
        if rng.random() < 0.02:
            break
    return Plan(findings.fingerprint, tuple(chosen))


def covering_plans(findings: Findings, proposals: Sequence[Proposal], candidates: Collection[Candidate]) -> list[Plan]:
    """Plans that together hold every one of these candidates once.

    Segments are intervals, nearly: taken by their start and put where they first fit, they need the fewest plans.
    """
    plans: list[tuple[set[str], list[Candidate]]] = []
    position = {node.name: index for index, node in enumerate(findings.graph.graph.nodes)}
    pairs = [(set(p.segment.nodes), c) for p in proposals for c in p.candidates if c in candidates]
    for nodes, candidate in sorted(pairs, key=lambda pair: min(map(position.__getitem__, pair[0]))):
        for taken, members in plans:
            if taken.isdisjoint(nodes):
                taken |= nodes
                members.append(candidate)
                break
        else:
            plans.append((set(nodes), [candidate]))
    return [Plan(findings.fingerprint, tuple(members)) for _, members in plans]


def filled(plans: Sequence[Plan], proposals: Sequence[Proposal], count: int, rng: random.Random) -> list[Plan]:
    """These plans with other candidates in their gaps, none twice, and more such plans, until there are so many candidates."""
    nodes = {c: set(p.segment.nodes) for p in proposals for c in p.candidates}
    left = [c for c in rng.sample([*nodes], len(nodes)) if not any(c in plan.merges for plan in plans)]
    count -= sum(len(plan.merges) for plan in plans)
    result: list[Plan] = []
    while len(result) < len(plans) or (left and count > 0):
        given = plans[min(len(result), len(plans) - 1)]
        members = list(given.merges) if len(result) < len(plans) else []
        taken = {name for merge in members for name in nodes[merge]}
        for candidate in [*left]:
            if count > 0 and taken.isdisjoint(nodes[candidate]):
                taken |= nodes[candidate]
                members.append(candidate)
                left.remove(candidate)
                count -= 1
        result.append(Plan(given.fingerprint, tuple(members)))
    return result


def assert_law(graph: GraphModule, plan: Plan, inputs: Sequence[Tensor], *, norms: bool = False, float32: bool = False) -> None:
    """A plan's student and merged network agree, as wholes on ``inputs`` and merge by merge on noise of many pixels.

    The second shows what the first may not: taps that see nothing but padding because the image has become small, and
    which of the merges is at fault.

    Args:
        graph: traced, in float64 or float32.
        plan: for it.
        inputs: images of the graph's dtype.
        norms: whether fitted convolutions get a norm.
        float32: whether to compare student and merged network once more, both cast to float32.
    """
    student = Linearize(norms=norms, own=False).apply(annotate(graph, plan))
    merged = fuse(student)
    for _, merge in merges(student):
        if merge.kind != "identity":
            _assert_as_promised(merged, _exit(merged, merge), merge)
    _assert_equal(student, merged, inputs, lambda x: _blame(graph, plan, x, norms=norms))
    if float32:
        pair = copy.deepcopy(student).float(), copy.deepcopy(merged).float()
        _assert_equal(*pair, [x.float() for x in inputs], lambda x: iter(merge.id for merge in plan.merges))


def _assert_equal(
    student: GraphModule, merged: GraphModule, inputs: Sequence[Tensor], blame: Callable[[Tensor], Iterator[str]]
) -> None:
    tolerance = TOLERANCE[inputs[0].dtype]
    with torch.no_grad():
        for x in inputs:
            given = x.clone()
            error = relative_error(student(x), merged(given))
            text = f"student and merged network differ by {error:.3g} of the largest output at {tuple(x.shape)}"
            assert error <= tolerance, "\n".join((text, *blame(x)))
            assert torch.equal(x, given), "the merged network has overwritten its input"
        for exit_node, merge in merges(student):
            if merge.kind != "identity":
                _assert_piece(student, merged, exit_node, merge, tolerance)


def _exit(merged: GraphModule, merge: Candidate) -> Node:
    """The one convolution that a merge has become; it bears the name of the merge's exit."""
    node = node_named(merged, merge.exit)
    assert node is not None, f"{merge.id} is not to be found in the merged network"
    return node


def _blame(graph: GraphModule, plan: Plan, x: Tensor, *, norms: bool) -> Iterator[str]:
    """Every merge of a plan on its own."""
    for merge in plan.merges:
        alone = annotate(graph, Plan(plan.fingerprint, (merge,)))
        student = Linearize(norms=norms, own=False).apply(alone)
        yield f"{relative_error(student(x), fuse(student)(x)):9.2g}  {merge.id}"


def _assert_as_promised(merged: GraphModule, exit_node: Node, merge: Candidate) -> None:
    """What was built is what the candidate said, for that is what is timed."""
    layers = _layers(exit_node, merge)
    entry, exit_facts = layers[0].all_input_nodes[0], facts(exit_node)
    linear = is_linear(merge.geometry, facts(entry), exit_facts)
    assert any(turns(node) for node in layers) == (not linear and (facts(entry).channels_last or exit_facts.channels_last)), (
        merge.id
    )
    [built] = [module for node in layers if (module := module_of(merged, node)) is not None]
    assert bool(separate_padding(merge.geometry)) == any(node.target is F.pad for node in layers), f"padding of {merge.id}"
    if linear:
        assert isinstance(built, nn.Linear), f"{merge.id} became {built}"
        assert (built.in_features, built.out_features) == (merge.geometry.in_channels, merge.geometry.out_channels), merge.id
        assert built.bias is None or merge.geometry.bias, f"{merge.id} has grown a bias"
        return
    promised = convolution(merge.geometry, device="meta")
    assert isinstance(built, nn.modules.conv._ConvNd), f"{merge.id} became {built}"
    for fact in ("kernel_size", "stride", "padding", "groups", "in_channels", "out_channels"):
        assert getattr(built, fact) == getattr(promised, fact), f"{fact} of {merge.id}"
    taps = zip(built.kernel_size, built.dilation, promised.dilation, strict=True)
    assert all(found == dilation for size, found, dilation in taps if size > 1), f"dilation of {merge.id}"
    assert built.bias is None or merge.geometry.bias, f"{merge.id} has grown a bias"


def _layers(exit_node: Node, merge: Candidate) -> list[Node]:
    """What a merge has become: a convolution, and before it a permutation and a pad, behind it a permutation, if there are any.

    The model's own pads and permutations may stand there as well.
    """
    layers = [exit_node]
    if turns(exit_node):
        layers.insert(0, exit_node.all_input_nodes[0])
    operand = layers[0].all_input_nodes[0]
    amounts = separate_padding(merge.geometry)
    if amounts and operand.target is F.pad and operand.args[1] == amounts:
        layers.insert(0, operand)
        operand = operand.all_input_nodes[0]
    return [operand, *layers] if turns(operand) and operand.name != merge.entry else layers


def _assert_piece(student: GraphModule, merged: GraphModule, exit_node: Node, merge: Candidate, tolerance: float) -> None:
    """The stretch in the student and the one convolution agree on an image larger than the kernel, and on one smaller."""
    entry, nodes = stretch(student, exit_node, merge)
    made = _exit(merged, merge)
    layers = _layers(made, merge)
    operand = layers[0].all_input_nodes[0]
    like = next(merged.parameters())
    for extra in (2, 0):
        size = [axis.extent + axis.stride * extra + i for i, axis in enumerate(merge.geometry.axes)]
        if extra == 0:
            size = [max(1, n // 2) for n in size]
        cropped = [max(0, -lo, -hi) for lo, hi in merge.geometry.padding]
        if min(merge.geometry.outputs(size)) < 1 or any(crop > n for crop, n in zip(cropped, size, strict=True)):
            continue
        generator = torch.Generator().manual_seed(len(merge.id))
        x = torch.randn(2, merge.geometry.in_channels, *size, generator=generator, dtype=like.dtype)
        x = x.permute(to_last(x.dim())) if facts(entry).channels_last else x
        expected, found = _run(student, entry, nodes, x), _run(merged, operand, layers, x)
        space = expected.shape[1:-1] if facts(exit_node).channels_last else expected.shape[2:]
        assert tuple(space) == merge.geometry.outputs(size), merge.id
        error = relative_error(expected, found)
        assert error <= tolerance, f"{merge.id} is off by {error:.3g} on its own, at {tuple(x.shape)}"


def _run(graph: GraphModule, entry: Node, nodes: Sequence[Node], x: Tensor) -> Tensor:
    """The last of these nodes, computed from a value for ``entry``."""
    interpreter = fx.Interpreter(graph)
    interpreter.env[entry] = x
    for node in nodes:
        for constant in node.all_input_nodes:
            if constant not in interpreter.env:
                interpreter.env[constant] = constant_value(graph, constant)
        interpreter.env[node] = interpreter.run_node(node)
    result = interpreter.env[nodes[-1]]
    assert isinstance(result, Tensor)
    return result
