"""Side inputs that are constant over space (time embeddings) pass through a merge as a matrix."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxmerge import Reconstruction, Space, annotate, compress, find_segments, fuse, linearize, propose, trace
from fxmerge.core.plan import Plan
from fxmerge.measure.divergence import divergence
from tests.fakes import PriceTimer
from tests.laws import fitted_and_scored, relative_error
from tests.zoo import conv, images, randomise_


class Embedded(nn.Module):
    """Blocks of a diffusion network without its norms: an embedding of the time step is added inside every block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.time = conv(3, 4), nn.Sequential(nn.Linear(5, 8), nn.SiLU())
        self.first = nn.ModuleList([conv(4, 6, stride=2), conv(6, 6, groups=2)])
        self.project = nn.ModuleList([nn.Linear(8, 6), nn.Linear(8, 6)])
        self.norm = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6)])
        self.second = nn.ModuleList([conv(6, 6, 5, padding=2), conv(6, 6)])
        self.skip = nn.ModuleList([conv(4, 6, 1, stride=2, padding=0), nn.Identity()])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, t = F.silu(self.stem(x)), self.time(t)
        for i in range(2):
            y = self.first[i](x) + self.project[i](t)[:, :, None, None]
            x = F.silu(self.second[i](F.silu(self.norm[i](y))) + self.skip[i](x))
        return x


def embedded() -> nn.Module:
    torch.manual_seed(0)
    model = Embedded().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomise_(module, 0, torch.randn(4, 6, 5, 5, dtype=torch.float64))
    return model.eval()


def inputs(batch: int = 2, size: tuple[int, int] = (12, 12)) -> tuple[Tensor, Tensor]:
    return images(batch=batch, size=size), torch.randn(batch, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("front_end", ["symbolic_trace", "export"])
def test_a_block_with_a_side_input_is_one_segment(front_end: Any) -> None:
    graph = trace(embedded(), inputs(), front_end=front_end)
    findings = find_segments(graph)
    whole = [s for s in findings.segments if s.exit == "add_3"]
    assert max(len(s.convolutions) for s in whole) >= 5
    assert {len(s.expression.sides) for s in whole} == {1, 2}


def test_what_takes_side_inputs_is_fitted_with_their_matrices() -> None:
    for proposal in propose(find_segments(trace(embedded(), inputs()))):
        for candidate in proposal.candidates:
            assert candidate.sides == (proposal.segment.expression.sides if candidate.kind == "fitted" else ())


def test_the_law_holds_for_every_candidate_and_for_plans() -> None:
    graph = trace(embedded(), inputs())
    findings = find_segments(graph)
    candidates = [c for p in propose(findings, Space(fitted=False)) for c in p.candidates]
    assert any(c.removed for c in candidates)
    for candidate in random.Random(0).sample(candidates, min(40, len(candidates))):
        student = linearize(annotate(graph, Plan(findings.fingerprint, (candidate,))))
        merged = fuse(student)
        for given in (inputs(), inputs(3, (9, 14))):
            assert relative_error(student(*given), merged(*given)) < 1e-12


def test_what_is_scored_is_what_is_built() -> None:
    graph, given = trace(embedded(), inputs()), inputs(4)
    findings = find_segments(graph)
    candidates = [c for p in propose(findings) if p.segment.expression.sides for c in p.candidates if c.kind == "composed"]
    for candidate in (candidates[0], candidates[-1]):
        plan = Plan(findings.fingerprint, (candidate,))
        _, loss = fitted_and_scored(Reconstruction(), findings, plan, [given])
        merged = fuse(linearize(annotate(graph, plan)))
        assert loss == pytest.approx(float(divergence(graph(*given), merged(*given), images=4).mean().detach()), rel=1e-9)


def test_a_network_with_side_inputs_is_compressed() -> None:
    given = [inputs(4) for _ in range(8)]
    result = compress(embedded(), inputs(), speedup=1.4, calibration=given, timer=PriceTimer())
    assert result.plan.merges


def test_a_side_input_made_of_the_image_itself_stays_outside_what_it_is_made_of() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 4), conv(4, 4), conv(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y: Tensor = self.c(self.b(x) + x.mean((2, 3), keepdim=True))
            return y

    graph = trace(Gated().double(), images())
    findings = find_segments(graph)
    spans = {str(s) for s in findings.segments if s.expression.sides}
    assert not any(span.startswith("x ->") for span in spans)
    for candidate in (c for p in propose(findings) for c in p.candidates):
        student = linearize(annotate(graph, Plan(findings.fingerprint, (candidate,))))
        assert relative_error(student(images(seed=2)), fuse(student)(images(seed=2))) < 1e-12
