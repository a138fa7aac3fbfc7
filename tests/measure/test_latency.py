"""The latency table: what is timed for a candidate, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.core.table import Measurement, Target
from fxmerge.measure.latency import worthwhile
from fxmerge.measure.timer import Timed
from tests.fakes import PriceTimer
from tests.small import images, network


def found(model: nn.Module, x: Any) -> tuple[fxmerge.Findings, tuple[fxmerge.Proposal, ...]]:
    findings = fxmerge.find_segments(fxmerge.trace(model.eval(), x))
    return findings, fxmerge.propose(findings)


def test_an_activation_that_is_a_module_is_timed_with_its_candidate() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.PReLU(4), nn.Conv2d(4, 4, 3))
    timer = PriceTimer()
    findings, proposals = found(model, images(2))
    table = fxmerge.measure_latency(findings, proposals, (images(2),), timer=timer)
    assert table.candidates
    assert any("Conv" in asked and "PReLU" not in asked for asked in timer.asked)


def test_the_inputs_may_be_one_tensor() -> None:
    findings, proposals = found(network(), images(4))
    tables = [fxmerge.measure_latency(findings, proposals[:1], x, timer=PriceTimer()) for x in (images(4), (images(4),))]
    assert tables[0] == tables[1]


def test_a_norm_behind_a_convolution_that_enters_a_segment_leaves_that_tensor_in_the_tables_network() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4)
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.relu(self.a(torch.relu(self.norm(self.up(x))))))
            return y

    model = Decoder().eval()
    result = fxmerge.compress(model, images(2), speedup=1.1, calibration=images(32), timer=PriceTimer())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.baseline.modules())
    fxmerge.testing.assert_equivalent(model, result.baseline, [images(2)])


def test_what_is_timed_for_an_upsampling_is_the_transposed_convolution_that_is_built() -> None:
    model = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 3, padding=1)).eval()
    findings = fxmerge.find_segments(fxmerge.trace(model, images(2)))
    proposals = fxmerge.propose(findings, fxmerge.Space(fitted=False))
    table = fxmerge.measure_latency(findings, proposals, images(2), timer=PriceTimer())
    [[candidate]] = [p.candidates for p in proposals]
    assert table.candidates[candidate.id].startswith("ConvTranspose(3, 4, kernel_size=(4, 4), stride=(2, 2), padding=(1, 1)")


def test_a_convolution_and_a_transposed_one_of_the_same_settings_are_timed_apart() -> None:
    same = (4, 4, 4, 2, 1)
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.ReLU(), nn.Conv2d(*same), nn.ReLU(), nn.ConvTranspose2d(*same))
    findings = fxmerge.find_segments(fxmerge.trace(model.eval(), images(2)))
    table = fxmerge.measure_latency(findings, fxmerge.propose(findings), images(2), timer=PriceTimer())
    keys = [key for key in table.measurements if "kernel_size=(4, 4), stride=(2, 2), padding=(1, 1)" in key]
    assert {key.partition("(")[0] for key in keys} == {"Conv", "ConvTranspose"}


def test_worthwhile_refuses_the_table_of_another_network() -> None:
    findings, proposals = found(network(), images(2))
    other, others = found(network(blocks=2), images(2))
    table = fxmerge.measure_latency(findings, proposals, images(2), timer=PriceTimer())
    with pytest.raises(fxmerge.InputError, match=r"the table has no latency of .*: proposals, table and region must come from one"):
        worthwhile(others, table, other.region)
    with pytest.raises(fxmerge.InputError, match="the region has no stretch"):
        worthwhile(proposals, table, other.region)


def test_arguments_that_are_no_tensors_are_given_as_they_are() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor, factor: float, pair: list[Tensor]) -> Tensor:
            assert isinstance(factor, float)
            return x * factor + pair[0].mul_(0) + pair[1]

    pair = [torch.ones(1), torch.ones(1)]
    timer = fxmerge.InterleavedTimer(rounds=2)
    [measured] = timer([Timed(Odd().eval(), ((2, 3), 2.0, pair))], target=fxmerge.Target())  # type: ignore[arg-type]
    assert measured.median_ns > 0
    assert pair[0] == 1  # each run had a copy


@pytest.mark.parametrize(
    "give", [lambda n: (), lambda n: [3] * n, lambda n: None, lambda n: (Measurement(-1, 0, 1, Target()),) * n]
)
def test_a_timer_that_gives_nonsense_is_told(give: Callable[[int], Any]) -> None:
    def nonsense(modules: Sequence[Timed], **_: Any) -> Any:
        return give(len(modules))

    findings, proposals = found(network(blocks=1), images(4))
    with pytest.raises(
        fxmerge.InputError, match="the timer function must give a measurement of 0 ns or more for each of [0-9]+ modules"
    ):
        fxmerge.measure_latency(findings, proposals, images(4), timer=nonsense)


def test_global_random_numbers_are_not_used_up() -> None:
    findings = fxmerge.find_segments(fxmerge.trace(network(), images(2)))
    torch.manual_seed(3)
    fxmerge.measure_latency(findings, fxmerge.propose(findings), (images(2),), timer=PriceTimer())
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
