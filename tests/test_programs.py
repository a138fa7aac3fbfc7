"""Random graphs from all operators: they are traced and searched without a crash, refused by name, and obey the law.

FXMERGE_EXAMPLES sets how many graphs there are (100 by default; a twentieth of it, ten at most, go through torch.export, which is
slow). They come in batches of 50, each a test with a seed of its own, so that a failure of a long run can be had again quickly:

    FXMERGE_EXAMPLES=20000 python -m pytest -q -x tests/test_programs.py
    FXMERGE_EXAMPLES=20000 python -m pytest -q "tests/test_programs.py::test_random_programs[217]"
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import pytest
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxmerge import explain
from fxmerge.analysis.candidates import propose
from fxmerge.analysis.segments import Findings, find_segments
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate, Proposal
from fxmerge.graph.activations import ACTIVATIONS
from fxmerge.graph.meta import facts, front_end
from fxmerge.graph.query import is_tensor, module_of
from fxmerge.graph.trace import trace
from fxmerge.operators import Activation, Map, Norm, Opaque
from fxmerge.passes import fuse_segments
from fxmerge.passes.annotate import annotate
from fxmerge.passes.fuse_segments import FuseSegments, fuse
from fxmerge.passes.linearize import Linearize
from tests.laws import random_plan
from tests.programs import OPERATIONS, Program, do, programs

EXAMPLES = int(os.environ.get("FXMERGE_EXAMPLES", "100"))
BATCH = 50
#: Batch and image: what is traced, and what it has to compute as well.
EXAMPLE = (2, (16, 13))
OTHER = (3, (15, 17))
TOLERANCE = 1e-9
#: Seconds of processor time for finding and proposing in 30 nodes; it takes a fraction of one.
PATIENCE = 10.0

# torch says so of a layer that it is asked to compute with.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@dataclass(frozen=True, eq=False)
class Case:
    """A program that has been traced and searched."""

    program: Program
    model: nn.Module
    graph: GraphModule
    findings: Findings
    proposals: tuple[Proposal, ...]

    @classmethod
    def of(cls, program: Program, capture: Literal["any", "export"] = "any") -> Case:
        model = program.build()
        graph = trace(model, program.inputs(*EXAMPLE), front_end=capture)
        start = time.process_time()
        findings = find_segments(graph)
        proposals = propose(findings)
        taken = time.process_time() - start
        assert taken < PATIENCE, f"searching {len(graph.graph.nodes)} nodes took {taken:.1f} s"
        return cls(program, model, graph, findings, proposals)

    @cached_property
    def inputs(self) -> tuple[tuple[Tensor, ...], ...]:
        return self.program.inputs(*EXAMPLE, seed=1), self.program.inputs(*OTHER, seed=2)

    @cached_property
    def composed(self) -> list[Proposal]:
        """The proposals whose kernels are computed, not fitted: with these the law is hard to obey."""
        narrowed = [replace(p, candidates=tuple(c for c in p.candidates if c.kind == "composed")) for p in self.proposals]
        return [proposal for proposal in narrowed if proposal.candidates]

    def check(self, plans: random.Random) -> None:
        """All that is asked of every program."""
        self.assert_traced()
        self.assert_refusals_name_nodes()
        self.assert_all_accounted_for()
        self.assert_law(random_plan(self.findings, self.proposals, plans), norms=True)
        self.assert_law(random_plan(self.findings, self.composed, plans), norms=False)
        self.assert_exact_candidates_keep_the_function()

    def assert_traced(self) -> None:
        """The graph computes what the model does."""
        for inputs in self.inputs:
            _assert_close(_outputs(self.model, inputs), _outputs(self.graph, inputs), _largest(self.graph, inputs), "traced graph")

    def assert_refusals_name_nodes(self) -> None:
        names = {node.name for node in self.graph.graph.nodes}
        for refusal in self.findings.refusals:
            assert refusal.node in names, f"{refusal} names no node"
            assert refusal.target, f"{refusal} names no module or function"
        text = str(explain(self.findings))
        assert all(refusal.node in text for refusal in self.findings.refusals)

    def assert_all_accounted_for(self) -> None:
        """Every convolution, activation and norm, and whatever else is opaque, is in a segment or refused."""
        held = {name for segment in self.findings.segments for name in segment.nodes}
        held |= {refusal.node for refusal in self.findings.refusals}
        for node, verdict in self.findings.verdicts.items():
            layer = isinstance(verdict, (Activation, Norm)) or (isinstance(verdict, Map) and verdict.role == "convolution")
            opaque = isinstance(verdict, Opaque) and node.op.startswith("call_") and is_tensor(node)
            if layer or opaque or self._is_layer(node):
                assert node.name in held, f"{node.name} ({verdict}) is in no segment and not refused"

    def _is_layer(self, node: Node) -> bool:
        """Whether a node is a convolution or an activation, as one sees without asking fxmerge's operators."""
        activations = {function for function, _ in ACTIVATIONS.values()}
        return isinstance(module_of(self.graph, node), nn.modules.conv._ConvNd) or node.target in activations

    def assert_law(self, plan: Plan, *, norms: bool) -> None:
        """Student and merged network agree, in their outputs and in every tensor that both have.

        And outside the merges the student is the original: given what the merges compute, that gives all other tensors.
        """
        annotated = annotate(self.graph, plan)
        outside = {node.name for node in annotated.graph.nodes if not facts(node).role}
        student = Linearize(norms=norms, own=False).apply(annotated)
        merged, bare = fuse(student), FuseSegments().apply(student)
        for inputs in self.inputs:
            given = [value.clone() for value in inputs]
            expected, found = _values(student, inputs), _values(bare, inputs)
            original = _values(self.graph, inputs, {merge.exit: expected[merge.exit] for merge in plan.merges})
            largest = max(map(_size, expected.values()))
            exits = {merge.exit for merge in plan.merges if merge.kind != "identity"}
            assert exits <= expected.keys() & found.keys(), "a merge's exit is not in both networks"
            for name in expected.keys() & found.keys():
                _assert_close([expected[name]], [found[name]], largest, f"{name} of {[merge.id for merge in plan.merges]}")
            for name in outside & expected.keys():
                _assert_close([original[name]], [expected[name]], largest, f"{name}, outside {[m.id for m in plan.merges]}")
            _assert_close(_outputs(student, inputs), _outputs(merged, given), largest, f"{[merge.id for merge in plan.merges]}")
            same = all(torch.equal(a, b) for a, b in zip(inputs, given, strict=True))
            assert same, "the merged network has overwritten its input"

    def assert_exact_candidates_keep_the_function(self) -> None:
        exact = [p for p in self.proposals if any(c.exact for c in p.candidates)]
        taken: set[str] = set()
        chosen: list[Candidate] = []
        for proposal in sorted(exact, key=lambda p: -len(p.segment.nodes)):
            if taken.isdisjoint(proposal.segment.nodes):
                taken |= {*proposal.segment.nodes}
                chosen.append(next(c for c in proposal.candidates if c.exact))
        if chosen:
            merged = fuse(Linearize(own=False).apply(annotate(self.graph, Plan(self.findings.fingerprint, tuple(chosen)))))
            for inputs in self.inputs:
                text = f"exact {[candidate.id for candidate in chosen]}"
                _assert_close(_outputs(self.model, inputs), _outputs(merged, inputs), _largest(self.graph, inputs), text)


class _Recorder(fx.Interpreter):
    """Keeps the value of every tensor; those that are given take the place of those computed."""

    def __init__(self, graph: GraphModule, given: Mapping[str, Tensor]) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.extra_traceback = False
        self.given = given

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        return self.given.get(n.name, value)

    def tensors(self) -> dict[str, Tensor]:
        return {node.name: value for node, value in self.env.items() if isinstance(value, Tensor) and node.op.startswith("call_")}


def _values(graph: GraphModule, inputs: Sequence[Tensor], given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every tensor computed, by the name of its node; the input, too, so that there is one."""
    recorder = _Recorder(graph, given or {})
    with torch.no_grad():
        recorder.run(*[value.clone() for value in inputs], enable_io_processing=False)
    return {"": inputs[0], **recorder.tensors()}


def _outputs(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        result = model(*inputs if isinstance(inputs, list) else [value.clone() for value in inputs])
    leaves: list[Any] = pytree.tree_leaves(result)
    return leaves


def _largest(graph: GraphModule, inputs: Sequence[Tensor]) -> float:
    return max(map(_size, _values(graph, inputs).values()))


def _size(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() and value.is_floating_point() else 0.0


def _assert_close(expected: Sequence[Tensor], found: Sequence[Tensor], largest: float, what: str) -> None:
    """1e-9 of the largest value. Where all cancels (x - x) nothing but rounding is left, that of the largest value anywhere."""
    assert len(expected) == len(found), what
    for a, b in zip(expected, found, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{what}: {tuple(b.shape)} in place of {tuple(a.shape)}"
        error = float((a - b).abs().max()) / max(_size(a), 1e-4 * largest)
        assert error <= TOLERANCE, f"{what}: off by {error:.3g} of the largest value"


#: The number of each batch, and how many programs it holds.
BATCHES = [(number, min(BATCH, EXAMPLES - number * BATCH)) for number in range(-(-EXAMPLES // BATCH))]


@pytest.mark.parametrize(("batch", "count"), BATCHES, ids=[str(number) for number, _ in BATCHES])
def test_random_programs(batch: int, count: int) -> None:
    @seed(batch)
    @settings(max_examples=count)
    @given(programs(), st.integers(0, 2**32 - 1))
    def check(program: Program, plans: int) -> None:
        case = Case.of(program)
        assert front_end(case.graph) == "symbolic_trace", "symbolic tracing has failed"
        case.check(random.Random(plans))

    check()


def test_random_programs_through_export() -> None:
    @seed(0)
    @settings(max_examples=min(10, max(1, EXAMPLES // 20)))
    @given(programs(most=12), st.integers(0, 2**32 - 1))
    def check(program: Program, plans: int) -> None:
        case = Case.of(program, "export")
        assert front_end(case.graph) == "export"
        case.check(random.Random(plans))

    check()


def test_every_operation_is_drawn() -> None:
    drawn: Counter[str] = Counter()

    @settings(max_examples=800, phases=[Phase.generate])
    @given(programs())
    def count(program: Program) -> None:
        drawn.update(instruction.operation for instruction in program.instructions)

    count()
    pointwise = {*ACTIVATIONS, "other", "prelu", "rrelu"}
    assert {*OPERATIONS, "again", "tied"} - pointwise <= {*drawn}
    assert len(pointwise & {*drawn}) > 12


class TestTheChecksCanFail:
    """One residual block and something opaque; then a fault in every part."""

    PROGRAM = Program(
        (
            do("conv", (0,), spelling="padding", out=3, kernel=(3, 3), stride=(1, 1), dilation=(1, 1), padding=((1, 1), (1, 1)),
               groups=1, bias=True),
            do("relu", (1,), spelling="module"),
            do("conv", (2,), spelling="padding", out=3, kernel=(3, 3), stride=(1, 1), dilation=(1, 1), padding=((1, 1), (1, 1)),
               groups=1, bias=False),
            do("add", (3, 0), spelling="+"),
            do("relu", (4,), spelling="module"),
            do("input norm", (5,), spelling="batch"),
            do("sigmoid", (6,), spelling="method"),
        ),
        (7, 5),
        "dict",
    )  # fmt: skip

    @pytest.fixture
    def case(self) -> Case:
        return Case.of(self.PROGRAM)

    def plan(self, case: Case) -> Plan:
        whole = next(c for p in case.proposals for c in p.candidates if c.exit == "add" and c.kind == "composed" and not c.removed)
        return Plan(case.findings.fingerprint, (whole,))

    def test_all_is_well(self, case: Case) -> None:
        case.check(random.Random(0))
        case.assert_law(self.plan(case), norms=False)

    def test_a_tap_that_is_wrong(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        built: Any = vars(fuse_segments)["convolution_with"]

        def disturbed(*args: Any, **options: Any) -> nn.Module:
            module: nn.Module = built(*args, **options)
            module.get_parameter("weight").data[0, 0, 0, 0] += 1e-6
            return module

        monkeypatch.setattr(fuse_segments, "convolution_with", disturbed)
        with pytest.raises(AssertionError, match=r"off by \S+e-0\d of the largest value"):
            case.assert_law(self.plan(case), norms=False)

    def test_a_graph_that_computes_something_else(self, case: Case) -> None:
        for parameter in case.graph.parameters():
            parameter.data += 1e-6
        with pytest.raises(AssertionError, match="traced graph: off by"):
            case.assert_traced()

    def test_a_candidate_that_is_not_exact(self, case: Case) -> None:
        wrong = [replace(p, candidates=tuple(replace(c, exact=c.kind == "fitted") for c in p.candidates)) for p in case.proposals]
        with pytest.raises(AssertionError, match="exact .*: off by"):
            replace(case, proposals=tuple(wrong)).assert_exact_candidates_keep_the_function()

    def test_a_node_that_is_forgotten(self, case: Case) -> None:
        with pytest.raises(AssertionError, match="is in no segment and not refused"):
            replace(case, findings=replace(case.findings, refusals=())).assert_all_accounted_for()
        with pytest.raises(AssertionError, match="is in no segment and not refused"):
            replace(case, findings=replace(case.findings, segments=())).assert_all_accounted_for()

    def test_a_refusal_of_something_that_is_not_there(self, case: Case) -> None:
        refusal = replace(case.findings.refusals[0], node="nowhere")
        with pytest.raises(AssertionError, match="names no node"):
            replace(case, findings=replace(case.findings, refusals=(refusal,))).assert_refusals_name_nodes()
