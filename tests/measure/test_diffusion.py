"""Noise prediction as a score, inputs along a sampler's trajectory, images that count by their time step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import InputError, NoisePrediction, Reconstruction, TimeShares, measure_importance, recorded_inputs
from fxmerge.core.leaves import leaves
from fxmerge.core.plan import Plan
from fxmerge.measure.calibration import as_batches
from tests.fakes import PriceTimer
from tests.laws import fitted_and_scored
from tests.test_norms import NORMS, shaken
from tests.zoo import conv

STEPS = 40
SIGNAL = torch.cos(torch.linspace(0.0, 1.5, STEPS)) ** 2


class Denoiser(nn.Module):
    def __init__(self, labels: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.norm = conv(3, 6), conv(6, 6), conv(6, 3), NORMS["group"](6)
        self.time, self.label = nn.Embedding(STEPS, 6), nn.Embedding(5, 6) if labels else None

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        y = self.time(t if t.dim() else t[None])
        if self.label is not None:
            y = y + self.label(label)
        x = torch.relu(self.a(x))
        return self.c(torch.relu(self.norm(self.b(x) + y[:, :, None, None])))  # type: ignore[no-any-return]


def model(labels: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return shaken(Denoiser(labels)).double()


def clean(count: int = 12, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def data(count: int = 16) -> tuple[Tensor, Tensor]:
    return clean(count, 2), torch.arange(count) % STEPS


def searched(network: nn.Module, *example: Tensor) -> tuple[fxmerge.Findings, tuple[fxmerge.Proposal, ...]]:
    findings = fxmerge.find_segments(fxmerge.trace(network, example))
    return findings, fxmerge.propose(findings, fxmerge.Space(max_kernel=3))


class TestTheHoldOut:
    def test_times_are_stratified_and_noise_is_as_the_signal_says(self) -> None:
        findings, _ = searched(model(), clean(2), torch.tensor([1, 2]))
        [(batch, noise)] = NoisePrediction(images=clean(), signal=SIGNAL).holdout(findings)
        noisy, times = batch
        assert (times * len(times) // STEPS - torch.arange(len(times))).abs().max() <= 1
        assert len(set(times.tolist())) == len(times)
        share = SIGNAL.double()[times].view(-1, 1, 1, 1)
        assert torch.allclose(noisy, share.sqrt() * clean() + (1 - share).sqrt() * noise)

    @pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
    def test_the_target_is_what_gives_the_image_back(self, prediction: Any) -> None:
        findings, _ = searched(model(), clean(2), torch.tensor([1, 2]))
        scorer = NoisePrediction(images=clean(), signal=SIGNAL, prediction=prediction)
        [((noisy, times), target)] = scorer.holdout(findings)
        share = SIGNAL.double()[times].view(-1, 1, 1, 1)
        image = {
            "epsilon": lambda: (noisy - (1 - share).sqrt() * target) / share.sqrt(),
            "sample": lambda: target,
            "v_prediction": lambda: share.sqrt() * noisy - (1 - share).sqrt() * target,
        }[prediction]()
        assert torch.allclose(image, clean())

    def test_it_is_the_same_every_time_and_another_for_another_seed(self) -> None:
        findings, _ = searched(model(), clean(2), torch.tensor([1, 2]))
        first, again, other = (
            next(iter(NoisePrediction(images=clean(), signal=SIGNAL, seed=seed).holdout(findings))) for seed in (0, 0, 1)
        )
        assert torch.equal(first[1], again[1])
        assert torch.equal(first[0][1], again[0][1])
        assert not torch.equal(first[1], other[1])

    def test_one_time_for_all_images_of_a_batch_will_do(self) -> None:
        findings, _ = searched(model(), clean(2), torch.tensor(3))
        batches = list(NoisePrediction(images=clean(), signal=SIGNAL).holdout(findings))
        assert [batch[1].dim() for batch, _ in batches] == [0] * 12
        assert sum(len(noise) for _, noise in batches) == 12


@pytest.mark.parametrize("against", ["target", "original"])
@pytest.mark.parametrize("labels", [False, True])
def test_a_score_is_what_the_merged_network_adds_to_the_loss(labels: bool, against: Any) -> None:
    network, conditions = model(labels), (torch.arange(12) % 5,) if labels else ()
    findings, proposals = searched(network, clean(2), torch.tensor([1, 2]), *(c[:2] for c in conditions))
    scorer = NoisePrediction(images=clean(), signal=SIGNAL, conditions=conditions, against=against)
    calibration = (*data(12), *conditions)
    table = measure_importance(findings, proposals, [calibration], scorer=scorer)
    [(given, noise)] = scorer.holdout(findings)

    def change(graph: nn.Module) -> float:
        with torch.no_grad():
            before, after = network(*given), graph(*given)
        if against == "original":
            return float((after - before).pow(2).mean())
        return float((after - noise).pow(2).mean() - (before - noise).pow(2).mean())

    for candidate in [c for p in proposals for c in p.candidates][::3]:
        plan = Plan(findings.fingerprint, (candidate,))
        weights = fxmerge.fit(findings, plan, [calibration], scorer=Reconstruction().alone())
        merged = fxmerge.fuse(fxmerge.linearize(fxmerge.annotate(findings.graph, plan), weights=weights))
        assert table.loss(candidate.id) == pytest.approx(change(merged), rel=1e-6, abs=1e-9), candidate.id
        assert table.candidates[candidate.id].scorer == "noise prediction"


def test_it_serves_compress_and_other_processes() -> None:
    scorer = NoisePrediction(images=clean().float(), signal=SIGNAL, fit=Reconstruction(score_images=8))
    assert pickle.loads(pickle.dumps(scorer)).settings == scorer.settings
    given = [(clean(8, seed=i).float(), torch.arange(8) * 5) for i in range(8)]
    result = fxmerge.compress(
        model().float(),
        given[0],
        speedup=1.2,
        calibration=given,
        scorer=scorer,
        timer=PriceTimer(),
        space=fxmerge.Space(max_kernel=3, identity=False),
    )
    assert {importance.scorer for importance in result.importance.candidates.values()} <= {"noise prediction", "exact"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prediction": "noise"}, "prediction must be one of epsilon, sample, v_prediction, found 'noise'"),
        ({"against": "noise"}, "against must be one of original, target, found 'noise'"),
        ({"images": [0.0]}, "images must be given as tensors, found list"),
        ({"signal": [0.9, 0.1]}, "signal must be given as tensors, found list"),
        ({"signal": torch.zeros(0)}, r"signal must hold a number from 0 to 1 for every time step, found \(0,\)"),
        ({"images": torch.zeros(3, 8)}, r"images must be \(N, C, \*space\)"),
        ({"conditions": (torch.zeros(2),)}, r"conditions one for each, found \(12, 3, 8, 8\), \(2,\)"),
        ({"signal": SIGNAL + 1}, "a number from 0 to 1 for every time step"),
    ],
)
def test_what_makes_no_hold_out_is_told(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        NoisePrediction(**{"images": clean(), "signal": SIGNAL, **options})


def test_a_network_that_predicts_something_else_is_told() -> None:
    network = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4)).double().eval()
    findings, proposals = searched(_Untimed(network), clean(2), torch.tensor([1, 2]))
    with pytest.raises(InputError, match=r"output is of shape \(12, 4, 8, 8\), and what it should predict of \(12, 3, 8, 8\)"):
        measure_importance(findings, proposals, [data(4)], scorer=NoisePrediction(images=clean(), signal=SIGNAL))


class _Untimed(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x + 0 * t[:, None, None, None])  # type: ignore[no-any-return]


@dataclass
class Answer:
    """As U-Nets give it; torch's own helpers do not look inside."""

    sample: Tensor


class _Answering(_Untimed):
    def forward(self, x: Tensor, t: Tensor) -> Answer:  # type: ignore[override]
        return Answer(super().forward(x, t))


def test_a_prediction_inside_a_dataclass_is_scored_like_any_other() -> None:
    found = []
    for kind in (_Untimed, _Answering):
        torch.manual_seed(0)
        network = kind(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 3))).double().eval()
        findings, proposals = searched(network, clean(2), torch.tensor([1, 2]))
        table = measure_importance(findings, proposals, [data(4)], scorer=NoisePrediction(images=clean(), signal=SIGNAL))
        found.append([importance.loss for importance in table.candidates.values()])
    assert found[0] == pytest.approx(found[1])
    assert len(found[0]) > 1


class TestRecordedInputs:
    def test_a_trajectory_becomes_calibration_data(self) -> None:
        network = model()

        def sample() -> None:
            x = clean(4)
            for t in (30, 20, 10, 0):
                x = x - 0.1 * network(x, t=torch.tensor(t))

        calls = recorded_inputs(network, torch.no_grad()(sample))
        assert [int(t) for _, t in calls] == [30, 20, 10, 0]
        assert not torch.equal(calls[0][0], calls[-1][0])
        findings, _ = searched(network, clean(2), torch.tensor([1, 2]))
        [batch] = as_batches(calls, findings.graph)
        assert sorted(batch[1].tolist()) == [t for t in (0, 10, 20, 30) for _ in range(4)]
        assert batch[1].tolist() != sorted(batch[1].tolist())  # scores on a part of it are of all times

    def test_a_model_that_takes_any_arguments_is_recorded_too(self) -> None:
        class Wrapped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(2, 2)

            def forward(self, *args: Any, **kwargs: Any) -> Tensor:
                return self.inner(*args) + kwargs["add"]  # type: ignore[no-any-return]

        layer = Wrapped()
        [(x, add)] = recorded_inputs(layer, lambda: layer(torch.ones(3, 2), add=2.0))
        assert (x.shape, add) == ((3, 2), 2.0)

    def test_tensors_in_dictionaries_and_lists_are_recorded_too(self) -> None:
        class Conditioned(nn.Module):
            def forward(self, x: Tensor, more: dict[str, Tensor], *, levels: list[Tensor]) -> Tensor:
                return x + more["time"] + levels[0]

        layer = Conditioned()
        [found] = recorded_inputs(layer, lambda: layer(torch.zeros(2), {"time": torch.ones(2)}, levels=[torch.full((2,), 2.0)]))
        assert [x.tolist() for x in found] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]

    def test_a_call_without_a_tensor_or_a_number_is_told(self) -> None:
        class Named(nn.Module):
            def forward(self, name: str) -> Tensor:
                return torch.zeros(len(name))

        layer = Named()
        with pytest.raises(InputError, match="the Named was called with no tensor and no number"):
            recorded_inputs(layer, lambda: layer("two"))

    def test_some_of_many_calls_are_spread_over_all(self) -> None:
        layer = nn.Linear(1, 1)
        calls = recorded_inputs(layer, lambda: [layer(torch.full((1, 1), float(i))) for i in range(11)], most=3)
        assert [float(x) for (x,) in calls] == [0.0, 5.0, 10.0]

    def test_the_model_is_left_as_it_was(self) -> None:
        layer = nn.Linear(1, 1)
        before = copy.copy(layer.__dict__)
        with pytest.raises(ZeroDivisionError):
            recorded_inputs(layer, lambda: 1 / 0)
        assert not layer._forward_pre_hooks
        assert layer.__dict__.keys() == before.keys()

    def test_a_model_that_is_not_called_is_told(self) -> None:
        with pytest.raises(InputError, match="the Linear was not called"):
            recorded_inputs(nn.Linear(1, 1), lambda: None)

    def test_no_call_at_all_cannot_be_asked_for(self) -> None:
        with pytest.raises(InputError, match="most must be a whole number from 1 on, found 0"):
            recorded_inputs(nn.Linear(1, 1), lambda: None, most=0)


class TestShares:
    def fitted(self, shares: Callable[..., Tensor] | None, given: tuple[Tensor, Tensor]) -> tuple[Any, float]:
        findings, proposals = searched(model(), clean(2), torch.tensor([1, 2]))
        candidate = next(c for p in proposals for c in p.candidates if c.moved and c.sides)
        plan = Plan(findings.fingerprint, (candidate,))
        scorer = Reconstruction(shares=shares)
        weights, loss = fitted_and_scored(scorer, findings, plan, as_batches([given], findings.graph))
        return {name: affine.weight for name, affine in weights.items()}, loss

    def test_an_image_that_counts_for_nothing_is_as_if_it_were_not_there(self) -> None:
        x, t = data()
        without, loss = self.fitted(None, (x[t < 9], t[t < 9]))
        found, same = self.fitted(TimeShares((torch.arange(STEPS) < 9).float()), (x, t))
        assert same == pytest.approx(loss, rel=1e-9)
        for name, weight in without.items():
            assert torch.allclose(found[name], weight, rtol=1e-9, atol=1e-12), name

    def test_an_image_that_counts_twice_is_as_if_it_were_there_twice(self) -> None:
        x, t = data()
        twice, loss = self.fitted(None, (torch.cat((x, x[:4])), torch.cat((t, t[:4]))))
        found, same = self.fitted(TimeShares(1.0 + (torch.arange(STEPS) < 4)), (x, t))
        assert same == pytest.approx(loss, rel=1e-9)
        for name, weight in twice.items():
            assert torch.allclose(found[name], weight, rtol=1e-9, atol=1e-12), name

    @pytest.mark.parametrize(
        ("shares", "text"),
        [
            (lambda batch: torch.ones(17), r"a number from 0 on for each of \d+ images"),
            (lambda batch: [1.0] * len(batch[0]), r"a number from 0 on for each of \d+ images"),
            (lambda batch: -torch.ones(len(batch[0])), r"a number from 0 on for each of \d+ images"),
            (lambda batch: torch.zeros(len(batch[0])), "images counts: shares gave 0 for all"),
        ],
    )
    def test_other_shares_are_refused(self, shares: Any, text: str) -> None:
        with pytest.raises(InputError, match=text):
            self.fitted(shares, data())

    def test_a_time_step_without_a_share_is_told(self) -> None:
        batch = clean(2), torch.tensor([0, 3])
        with pytest.raises(InputError, match="there are shares for time steps 0 to 2, found 0 to 3"):
            TimeShares(torch.ones(3))(batch)
        with pytest.raises(InputError, match="the network has 2 arguments; number 2, from 0, is said to be the time step"):
            TimeShares(torch.ones(4), argument=2)(batch)

    def test_they_are_part_of_what_decides_a_score(self) -> None:
        plain, early, late = (Reconstruction(shares=s).settings for s in (None, TimeShares(SIGNAL), TimeShares(1 - SIGNAL)))
        assert len({plain, early, late}) == 3
        assert replace(Reconstruction(), shares=None).settings == Reconstruction().settings


def test_candidates_are_told_apart_on_few_images_with_conditions() -> None:
    fit = Reconstruction(score_images=8, coarse_images=4)
    scorer = NoisePrediction(images=torch.randn(16, 3, 8, 8), signal=SIGNAL, conditions=(torch.arange(16),), fit=fit)
    coarse = scorer.coarse()
    assert coarse is not None
    assert torch.equal(coarse.images, scorer.images[:4])
    assert torch.equal(coarse.conditions[0], torch.arange(4))
    assert coarse.fit == fit.coarse()
    assert coarse.settings != scorer.settings
    assert coarse.coarse() is None


def test_in_half_precision_the_first_time_steps_have_their_noise() -> None:
    """1 - 0.9999 is 0 where a_t is rounded first."""
    torch.manual_seed(0)
    findings, _ = searched(model().to(torch.bfloat16), clean(2).bfloat16(), torch.tensor([1, 2]))
    still = torch.full((STEPS,), 0.9999)
    images_ = torch.zeros(12, 3, 8, 8, dtype=torch.bfloat16)
    [((noisy, _), _)] = NoisePrediction(images=images_, signal=still).holdout(findings)
    assert noisy.float().std() == pytest.approx(0.01, rel=0.1)


def test_shares_count_in_the_score_as_well() -> None:
    findings, proposals = searched(model(), clean(2), torch.tensor([1, 2]))
    late = TimeShares((torch.arange(STEPS) >= STEPS // 2).double())

    def losses(images_: Tensor, fit: Reconstruction, seed: int = 0) -> list[float]:
        scorer = NoisePrediction(images=images_, signal=SIGNAL, fit=fit, seed=seed)
        return [i.loss for i in measure_importance(findings, proposals[:2], [data(40)], scorer=scorer).candidates.values()]

    fit = Reconstruction(shares=late)
    scorer = NoisePrediction(images=clean(), signal=SIGNAL, fit=fit)
    work = fit.work(findings, as_batches([data(40)], findings.graph))
    maps = work.weights(proposals[:2])
    [(batch, _)] = scorer.holdout(findings)
    env = work.original(batch)
    expected = []
    with torch.no_grad():
        for proposal in proposals[:2]:
            for candidate in proposal.candidates:
                value = work.replay.computed(work.replacement(proposal.segment, candidate, maps), env)
                [changed], [original] = leaves(work.replay.output_with(env, candidate.exit, value)), leaves(env[work.replay.output])
                off = changed - original
                expected.append(float(off.square().flatten(1).mean(1)[batch[1] >= STEPS // 2].mean()))
    assert losses(clean(), fit) == pytest.approx(expected)
    assert losses(clean(), Reconstruction()) != pytest.approx(expected)


def test_conditions_that_the_network_does_not_take_are_told() -> None:
    findings, proposals = searched(model(), clean(2), torch.tensor([1, 2]))
    scorer = NoisePrediction(images=clean(), signal=SIGNAL, conditions=(torch.zeros(12, dtype=torch.long),))
    with pytest.raises(InputError, match=r"the network takes 2 arguments \(x, t\).*; 1 conditions are given"):
        measure_importance(findings, proposals, [data(4)], scorer=scorer)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: NoisePrediction(images=clean(), signal=SIGNAL, seed="a"), "seed must be a whole number"),  # type: ignore[arg-type]
        (lambda: NoisePrediction(images=clean(), signal=SIGNAL, fit=None), "fit must be a Reconstruction"),  # type: ignore[arg-type]
        (lambda: TimeShares([1.0, 2.0]), "shares must be a tensor"),  # type: ignore[arg-type]
        (lambda: TimeShares(torch.ones(2, 2)), r"shares must be a tensor .*, found \(2, 2\)"),
    ],
)
def test_options_of_another_kind_are_told(build: Callable[[], object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        build()


def test_where_only_few_images_count_plans_are_still_fitted_and_judged() -> None:
    """Shares of 0 for all but a few, which may all be among those that a fit sees, or those that judge."""
    network = model()
    shares = TimeShares((torch.arange(STEPS) == 3).double())
    for count in (STEPS, 3 * STEPS):
        result = fxmerge.compress(
            network, data(2), speedup=1.1, calibration=[data(count)], scorer=Reconstruction(shares=shares, score_images=count),
            space=fxmerge.Space(max_kernel=3), timer=PriceTimer(), trials=2,
        )  # fmt: skip
        assert result.plan.merges


def test_where_no_image_counts_it_is_told() -> None:
    findings, proposals = searched(model(), clean(2), torch.tensor([1, 2]))
    plan = Plan(findings.fingerprint, (next(c for p in proposals for c in p.candidates if c.kind == "fitted"),))
    with pytest.raises(InputError, match="none of the 16 calibration images counts"):
        fxmerge.fit(findings, plan, [data(16)], scorer=Reconstruction(shares=TimeShares(torch.zeros(STEPS))))
