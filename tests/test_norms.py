"""Norms that depend on their input: kept behind a merge, moved behind it, or a fixed scale and shift in their place."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge.analysis.candidates import Space, propose
from fxmerge.analysis.segments import Findings, find_segments
from fxmerge.core.plan import Plan
from fxmerge.core.segment import Candidate
from fxmerge.errors import PlanError, PlanMismatchError
from fxmerge.graph.trace import trace
from fxmerge.measure.divergence import divergence
from fxmerge.measure.reconstruction import Reconstruction
from fxmerge.measure.resources import count_resource
from fxmerge.passes.annotate import annotate
from fxmerge.passes.fuse_segments import fuse
from fxmerge.passes.linearize import Linearize, linearize
from fxmerge.saved import load, save_student
from tests.fakes import PriceTimer
from tests.laws import fitted_and_scored, relative_error
from tests.zoo import Net, conv, images


class Blocks(nn.Module):
    """One block with its norms behind the convolutions, one as in diffusion: before them, with an embedding added inside."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.last = conv(3, 4), conv(4, 6, stride=2), conv(6, 6), conv(6, 4, 1)
        self.norm_a, self.norm_b, self.skip = norm(6), norm(6), conv(4, 6, 1, stride=2, padding=0)
        self.c, self.d, self.norm_c, self.norm_d, self.time = conv(6, 6), conv(6, 6), norm(6), norm(6), nn.Linear(5, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.skip(x) + self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))))
        y = self.c(F.silu(self.norm_c(x))) + self.time(t)[:, :, None, None]
        x = x + self.d(F.silu(self.norm_d(y)))
        return self.last(x)  # type: ignore[no-any-return]


class ChannelsLast(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": lambda channels: nn.GroupNorm(2, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "instance without scale": nn.InstanceNorm2d,
    "layer": ChannelsLast,
}


def inputs(batch: int = 2, size: tuple[int, int] = (12, 12), seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return images(batch=batch, size=size, seed=seed), torch.randn(batch, 5, dtype=torch.float64, generator=generator)


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


@cache
def blocks(norm: str) -> Findings:
    torch.manual_seed(0)
    return find_segments(trace(shaken(Blocks(NORMS[norm]).double()), inputs()))


@cache
def offered(norm: str) -> tuple[Candidate, ...]:
    return tuple(c for p in propose(blocks(norm)) for c in p.candidates)


def spans(model: nn.Module) -> set[tuple[str, str, str, tuple[str, ...]]]:
    found = find_segments(trace(model.double().eval(), images()))
    return {(s.entry, s.exit, s.end, s.norms) for s in found.segments}


class TestWhatIsFound:
    def test_a_norm_behind_a_convolution_is_kept_or_part_of_the_segment(self) -> None:
        model = Net(lambda s, x: F.relu(s.n(s.b(F.relu(s.a(x))))), a=conv(3, 4), b=conv(4, 4), n=nn.GroupNorm(2, 4))
        found = spans(model)
        assert ("x", "b", "relu_1", ()) in found
        assert ("x", "n", "relu_1", ("n",)) in found
        assert ("relu", "b", "relu_1", ()) in found
        assert ("relu", "n", "relu_1", ("n",)) in found

    def test_a_norm_inside_is_taken_out_or_moved(self) -> None:
        model = Net(lambda s, x: s.b(F.relu(s.n(s.a(x)))), a=conv(3, 4), b=conv(4, 6), n=nn.GroupNorm(2, 4))
        findings = find_segments(trace(model.double().eval(), images()))
        [whole] = [p for p in propose(findings) if (p.segment.entry, p.segment.end) == ("x", "b")]
        kinds = [(c.kind, str(c.geometry), c.norms, c.moved) for c in whole.candidates]
        assert ("composed", "3->6 5x5", ("n",), "") in kinds
        assert ("fitted", "3->6 3x3", ("n",), "") in kinds
        assert ("fitted", "3->6 3x3", ("n",), "n") in kinds

    def test_a_norm_by_itself_becomes_a_scale_and_a_shift(self) -> None:
        model = Net(lambda s, x: F.max_pool2d(s.n(F.max_pool2d(s.a(x), 2)), 2), a=conv(3, 4), n=nn.GroupNorm(2, 4))
        findings = find_segments(trace(model.double().eval(), images()))
        [alone] = [p for p in propose(findings) if p.segment.exit == "n"]
        assert [(c.kind, str(c.geometry)) for c in alone.candidates] == [("identity", "4->4 1x1 dw"), ("composed", "4->4 1x1 dw")]

    def test_no_norm_is_taken_out_where_that_is_not_asked_for(self) -> None:
        candidates = [c for p in propose(blocks("group"), Space(norms=False)) for c in p.candidates]
        assert candidates
        assert not any(c.norms for c in candidates)

    @pytest.mark.parametrize("norm", NORMS)
    def test_nothing_that_takes_a_norm_out_is_exact(self, norm: str) -> None:
        assert any(c.norms for c in offered(norm))
        assert not any(c.exact for c in offered(norm) if c.norms)

    def test_candidates_have_names_of_their_own_and_survive_json(self) -> None:
        for norm in NORMS:
            names = [c.id for c in offered(norm)]
            assert len(names) == len(set(names))
            for candidate in offered(norm):
                assert Candidate.from_json(json.loads(json.dumps(candidate.to_json()))) == candidate

    @pytest.mark.parametrize("damage", [{"norms": [3]}, {"moved": 3}, {"sides": [None]}, {"norms": 3}])
    def test_damage_to_what_is_said_of_norms_is_told(self, damage: Any) -> None:
        data = {**offered("group")[0].to_json(), **damage}
        with pytest.raises(PlanError, match="^not a candidate: "):
            Candidate.from_json(data)


class TestTheLaw:
    @pytest.mark.parametrize("norm", NORMS)
    def test_every_candidate(self, norm: str) -> None:
        findings = blocks(norm)
        torch.manual_seed(0)
        for number, candidate in enumerate(offered(norm)):
            plan = Plan(findings.fingerprint, (candidate,))
            student = Linearize(norms=number % 2 == 0, own=False).apply(annotate(findings.graph, plan))
            for name, buffer in student.named_buffers():
                if name.endswith("running_mean"):
                    buffer += 0.3  # norms behind fitted convolutions that are no identities
            merged = fuse(student)
            for given in (inputs(), inputs(3, (9, 14), 1)):
                with torch.no_grad():
                    assert relative_error(student(*given), merged(*given)) <= 1e-9, candidate.id

    def test_one_convolution_is_left(self) -> None:
        """Of a stretch of two, whatever becomes of the norm; and a matrix for the side input, on one pixel."""
        findings = blocks("group")
        for candidate in offered("group"):
            if candidate.kind == "fitted" and candidate.sides and (candidate.entry, candidate.exit) == ("relu_2", "add_2"):
                merged = fuse(linearize(annotate(findings.graph, Plan(findings.fingerprint, (candidate,))), norms=True))
                made = [m for name, m in merged.named_modules() if name.startswith("merged.") and isinstance(m, nn.Conv2d)]
                assert len(made) == 2, candidate.id
                assert sum(isinstance(m, nn.GroupNorm) for m in merged.modules()) == 2 + bool(candidate.moved)


class TestWeights:
    @pytest.mark.parametrize("norm", NORMS)
    def test_what_is_scored_is_what_is_built(self, norm: str) -> None:
        findings, given = blocks(norm), inputs(4, seed=3)
        drawn: dict[tuple[object, ...], Candidate] = {}
        for candidate in offered(norm):
            drawn[candidate.kind, bool(candidate.norms), bool(candidate.moved), bool(candidate.sides)] = candidate
        assert len(drawn) >= 6
        for candidate in drawn.values():
            plan = Plan(findings.fingerprint, (candidate,))
            weights, loss = fitted_and_scored(Reconstruction(), findings, plan, [given])
            merged = fuse(linearize(annotate(findings.graph, plan), weights=weights))
            with torch.no_grad():
                expected = float(divergence(findings.graph(*given), merged(*given), images=4).mean())
            assert loss == pytest.approx(expected, rel=1e-9), candidate.id

    def test_on_one_image_a_norm_is_a_scale_and_a_shift(self) -> None:
        """So there the fixed one loses nothing: the convolution before it takes it up."""
        findings, given = blocks("group"), inputs(1)
        [folded] = [c for c in offered("group") if c.kind == "composed" and c.exit == "norm_a" and c.entry == "relu"]
        weights, loss = fitted_and_scored(Reconstruction(), findings, Plan(findings.fingerprint, (folded,)), [given])
        assert loss < 1e-20
        assert set(weights) == {folded.part("norm_a")}

    def test_a_moved_norm_is_fitted_to_what_the_original_computes(self) -> None:
        """Its scale and shift, shaken, do worse on the data."""
        findings, given = blocks("group"), inputs(8)
        moved = next(c for c in offered("group") if c.moved and c.sides)
        plan = Plan(findings.fingerprint, (moved,))
        weights = fxmerge.fit(findings, plan, [given])
        assert set(weights) == {moved.id, moved.part(moved.moved), *(moved.part(side) for side in moved.sides)}

        def error(shift: float) -> float:
            student = linearize(annotate(findings.graph, plan), weights=weights)
            [norm] = [m for name, m in student.named_modules() if name.startswith("merged.") and isinstance(m, nn.GroupNorm)]
            norm.bias.data += shift
            with torch.no_grad():
                outputs = [_value(graph, moved.exit, given) for graph in (findings.graph, student)]
            return float((outputs[0] - outputs[1]).pow(2).mean())

        assert error(0.0) < min(error(0.05), error(-0.05))

    def test_the_matrix_of_a_side_input_is_found_with_the_convolution(self) -> None:
        """Two convolutions of 1x1 with nothing between them but the embedding: the fit finds the product."""
        torch.manual_seed(0)
        model = Embedded().double().eval()
        findings = find_segments(trace(model, inputs()))
        fitted = next(c for p in propose(findings) for c in p.candidates if c.kind == "fitted" and c.sides and c.exit == "b")
        plan = Plan(findings.fingerprint, (fitted,))
        _, loss = fitted_and_scored(Reconstruction(ridge=1e-12), findings, plan, [inputs(32)])
        assert loss < 1e-12


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.time = conv(3, 4, 1), conv(4, 4, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.b(self.a(x) + self.time(t)[:, :, None, None])  # type: ignore[no-any-return]


def _value(graph: fxmerge.Findings | Any, name: str, given: tuple[Tensor, ...]) -> Tensor:
    interpreter = torch.fx.Interpreter(graph, garbage_collect_values=False)
    interpreter.run(*given)
    return next(value for node, value in interpreter.env.items() if node.name == name)  # type: ignore[no-any-return]


class TestTheRest:
    def test_what_is_timed_says_what_becomes_of_the_norm(self) -> None:
        findings = blocks("group")
        proposals = propose(findings)
        table = fxmerge.measure_latency(findings, proposals, inputs(), timer=PriceTimer())
        keys = {c.id: table.candidates[c.id] for c in offered("group")}
        moved = [c for c in offered("group") if c.moved]
        assert all("GroupNorm" in keys[c.id] for c in moved)
        swallowed = [c for c in offered("group") if c.kind == "fitted" and c.exit == "norm_a"]
        kept = [c for c in offered("group") if c.kind == "fitted" and c.exit == "a" and c.end == swallowed[0].end]
        assert kept
        assert not any("GroupNorm" in keys[c.id] for c in swallowed)
        assert all("GroupNorm" in keys[c.id] for c in kept)

    @pytest.mark.parametrize("name", ["parameters", "multiply_adds"])
    def test_what_is_counted_is_what_is_built(self, name: Any) -> None:
        findings = blocks("group")
        proposals = propose(findings)
        counted = count_resource(findings, proposals, name)
        if name == "multiply_adds":
            assert {c.id for c in offered("group")} == set(counted.candidates)
            return
        folded = sum(p.numel() for p in findings.graph.parameters())
        units = {unit.end: unit for unit in findings.region.walk()}
        for proposal in proposals:
            inside = set(proposal.segment.nodes)
            alone = sum(counted.units[end] for end, unit in units.items() if unit.nodes and inside.issuperset(unit.nodes))
            for candidate in proposal.candidates:
                if candidate.kind == "identity" and proposal.segment.expression.sides:
                    continue  # what computes the side inputs is not read any more
                merged = fuse(linearize(annotate(findings.graph, Plan(findings.fingerprint, (candidate,)))))
                found = sum(p.numel() for p in merged.parameters())
                assert found == folded - alone + counted.candidates[candidate.id], candidate.id

    def test_a_student_is_saved_and_loaded(self, tmp_path: Path) -> None:
        findings, given = blocks("group"), inputs(8)
        for wanted in ("moved", "norms"):
            candidate = next(c for c in offered("group") if getattr(c, wanted) and (c.kind == "composed") == (wanted == "norms"))
            plan = Plan(findings.fingerprint, (candidate,))
            student = linearize(annotate(findings.graph, plan), weights=fxmerge.fit(findings, plan, [given]))
            save_student(student, plan, given, tmp_path)
            torch.manual_seed(1)
            loaded = load(tmp_path, Blocks(NORMS["group"]).double())
            assert relative_error(fuse(student)(*given), loaded.model(*given)) < 1e-12

    def test_a_plan_that_leaves_a_norm_inside_is_refused(self) -> None:
        findings = blocks("group")
        candidate = next(c for c in offered("group") if c.kind == "fitted" and c.norms and not c.moved)
        data = {**candidate.to_json(), "norms": []}
        with pytest.raises(PlanMismatchError, match="leaves norm_a(, norm_b)? inside its segment"):
            linearize(annotate(findings.graph, Plan(findings.fingerprint, (Candidate.from_json(data),))))

    def test_a_plan_without_the_side_inputs_is_refused(self) -> None:
        findings = blocks("group")
        candidate = next(c for c in offered("group") if c.kind == "fitted" and c.sides)
        data = {**candidate.to_json(), "sides": []}
        with pytest.raises(PlanMismatchError, match="is added inside, or is no side input"):
            annotate(findings.graph, Plan(findings.fingerprint, (Candidate.from_json(data),)))

    def test_moving_what_is_no_norm_is_refused(self) -> None:
        findings = blocks("group")
        candidate = next(c for c in offered("group") if c.moved and c.entry == "relu")
        data = {**candidate.to_json(), "moved": "a"}
        with pytest.raises(PlanMismatchError, match="a is no norm that can stand elsewhere"):
            linearize(annotate(findings.graph, Plan(findings.fingerprint, (Candidate.from_json(data),))))

    def test_a_network_of_group_norms_is_compressed_and_a_front_is_told(self) -> None:
        torch.manual_seed(0)
        model = shaken(Blocks(NORMS["group"]))
        data = [(x.float(), t.float()) for x, t in (inputs(8, seed=i) for i in range(16))]
        space = Space(max_kernel=3)
        result = fxmerge.compress(model, data[0], speedup=1.3, calibration=data, space=space, timer=PriceTimer())
        assert result.plan.merges
        text = fxmerge.explain(propose(result.findings))
        assert all(words in text for words in ("composed, norm fixed", "fitted, norm out", "fitted, norm moved"))
