"""The walk: errors do not add up, what stays makes up for what was merged, and nothing is worse on images it never saw."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.algebra.affine import Affine
from fxmerge.algebra.least_squares import NormalEquations, patches
from fxmerge.algebra.through import Rows
from fxmerge.measure.divergence import divergence
from fxmerge.measure.reconstruction import images_for
from fxmerge.measure.refit import with_weights
from fxmerge.measure.shelf import Shelf
from fxmerge.operators import Map, Site, default_operators
from fxmerge.passes.adjust import adjust, layers_of
from fxmerge.search import build_networks
from tests.laws import fitted_and_scored


class Net(nn.Module):
    """Two residual blocks, a projection, a convolution without norm and bias, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.a1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.n1 = nn.BatchNorm2d(8)
        self.a2 = nn.Conv2d(8, 8, 3, padding=1)
        self.b1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2)
        self.m1 = nn.BatchNorm2d(16)
        self.b2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.short = nn.Conv2d(8, 16, 1, stride=2, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.a2(self.n1(self.a1(x)).relu())).relu()
        x = (self.short(x) + self.b2(self.m1(self.b1(x)).relu())).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def found() -> tuple[fxmerge.Findings, dict[str, fxmerge.Candidate]]:
    torch.manual_seed(0)
    model = Net().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    findings = fxmerge.find_segments(fxmerge.trace(model, images(2)))
    return findings, {c.id: c for p in fxmerge.propose(findings) for c in p.candidates}


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 13, 12, generator=torch.Generator().manual_seed(seed))


def first_block(candidates: dict[str, fxmerge.Candidate]) -> fxmerge.Candidate:
    return next(c for c in candidates.values() if c.kind == "fitted" and c.entry == "relu" and c.exit == "add")


def loss(findings: fxmerge.Findings, plan: fxmerge.Plan, data: Tensor, scorer: fxmerge.Reconstruction) -> float:
    weights = fxmerge.fit(findings, plan, data, scorer=scorer)
    _, merged = build_networks(findings, plan, weights)
    unseen = images(64, seed=2)
    with torch.no_grad():
        return float(divergence(findings.graph(unseen), merged(unseen)).mean())


def test_of_the_layers_that_stay_those_that_are_named_are_fitted(found) -> None:  # type: ignore[no-untyped-def]
    findings, candidates = found
    plan = fxmerge.Plan(findings.fingerprint, (first_block(candidates),))
    everything = fxmerge.fit(findings, plan, images(256))
    assert {"head", "add_1"} - set(everything) == {"add_1"}
    some = fxmerge.fit(findings, plan, images(256), scorer=fxmerge.Reconstruction(stay=("head",)))
    assert set(some) == {plan.merges[0].id, "head"}
    assert len(everything) > 2
    assert torch.equal(some[plan.merges[0].id].weight, everything[plan.merges[0].id].weight)
    assert not torch.equal(some["head"].weight, everything["head"].weight), "what it is fed differs"


def test_layers_to_fit_that_are_not_there_are_told(found) -> None:  # type: ignore[no-untyped-def]
    findings, candidates = found
    plan = fxmerge.Plan(findings.fingerprint, (first_block(candidates),))
    with pytest.raises(fxmerge.InputError, match="stay names 'nowhere', which is no layer of this graph"):
        fxmerge.fit(findings, plan, images(8), scorer=fxmerge.Reconstruction(stay=("nowhere", "head", "add")))
    with pytest.raises(fxmerge.InputError, match="stay names 'b1', which is no layer .* give 'm1', the norm behind it"):
        fxmerge.fit(findings, plan, images(8), scorer=fxmerge.Reconstruction(stay=["b1"]))
    for wrong in ("head", 1, (1,)):
        with pytest.raises(fxmerge.InputError, match="stay must be True, False or the names"):
            fxmerge.Reconstruction(stay=wrong)  # type: ignore[arg-type]


def test_layers_that_stay_make_up_for_a_merge_on_images_they_never_saw(found) -> None:  # type: ignore[no-untyped-def]
    findings, candidates = found
    plan = fxmerge.Plan(findings.fingerprint, (first_block(candidates),))
    kept = loss(findings, plan, images(200), fxmerge.Reconstruction(stay=False))
    refit = loss(findings, plan, images(200), fxmerge.Reconstruction())
    assert refit < 0.8 * kept


def test_weights_are_scored_as_they_are_built(found) -> None:  # type: ignore[no-untyped-def]
    findings, candidates = found
    plan = fxmerge.Plan(findings.fingerprint, (first_block(candidates),))
    data = images(100)
    batches = fxmerge.as_batches(data, findings.graph)
    weights, scored = fitted_and_scored(fxmerge.Reconstruction(), findings, plan, batches)
    stayed = weights.keys() & layers_of(findings.graph).keys()
    assert stayed >= {"m1", "b2", "short"}
    student, merged = build_networks(findings, plan, weights)
    for network in (student, merged):
        with torch.no_grad():
            assert float(divergence(findings.graph(data), network(data)).mean()) == pytest.approx(scored, rel=1e-3)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("norm", [False, True])
def test_a_transposed_convolution_that_stays_is_built_as_it_was_fitted(stride: int, groups: int, norm: bool) -> None:
    torch.manual_seed(0)
    layers = (nn.ConvTranspose2d(6, 4, 4, stride, padding=1, groups=groups), nn.BatchNorm2d(4))
    graph = fxmerge.trace(nn.Sequential(*layers[: 1 + norm]).eval(), (x := torch.randn(2, 6, 9, 8),))
    verdict = default_operators().verdict(Site(graph, list(graph.graph.nodes)[1]))
    assert isinstance(verdict, Map)
    affine = Affine(replace(verdict.geometry, bias=True), torch.randn(4, 6 // groups, 4, 4).double(), torch.randn(4).double())
    name = list(graph.graph.nodes)[-2].name
    student = copy.deepcopy(graph)
    adjust(student, {name: affine})
    with torch.no_grad():
        assert torch.allclose(student(x), with_weights(affine, x), atol=1e-5)


def test_student_and_merged_network_are_equal_and_the_original_is_as_it_was(found) -> None:  # type: ignore[no-untyped-def]
    findings, candidates = found
    before = {name: value.clone() for name, value in findings.graph.state_dict().items()}
    plan = fxmerge.Plan(findings.fingerprint, (first_block(candidates),))
    weights = fxmerge.fit(findings, plan, images(100))
    student, _ = build_networks(findings, plan, weights)
    x = torch.randn(3, 3, 17, 11, dtype=torch.float64)
    with torch.no_grad():
        one, other = student.double()(x), fxmerge.fuse(student.double())(x)
    assert float((one - other).abs().max()) <= 1e-9 * float(one.abs().max())
    assert all(torch.equal(value, before[name]) for name, value in findings.graph.state_dict().items())
    assert set(student.state_dict()) >= {"m1.running_mean", "b1.weight", "head.weight"}


def test_a_student_with_fitted_layers_is_saved_and_loaded(found, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    findings, candidates = found
    plan = fxmerge.Plan(findings.fingerprint, (first_block(candidates),))
    student, merged = build_networks(findings, plan, fxmerge.fit(findings, plan, images(100)))
    fxmerge.save_student(student, plan, images(2), tmp_path)
    torch.manual_seed(5)
    loaded = fxmerge.load(tmp_path, Net().eval())
    with torch.no_grad():
        assert torch.allclose(loaded.model(images(3)), merged(images(3)), atol=1e-5)


def test_few_images_leave_layers_as_they_are_rather_than_make_them_worse(found) -> None:  # type: ignore[no-untyped-def]
    findings, candidates = found
    plan = fxmerge.Plan(findings.fingerprint, (first_block(candidates),))
    assert set(fxmerge.fit(findings, plan, images(1))) == {plan.merges[0].id}
    scorers = (fxmerge.Reconstruction(stay=False), fxmerge.Reconstruction())
    kept, refit = (loss(findings, plan, images(10), scorer) for scorer in scorers)
    assert refit < 1.1 * kept


class Odd(nn.Module):
    """Linear layers on one vector, on tokens before images, and on windows among the images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
        self.all, self.tokens, self.more, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        x = self.third(x + self.all(x.mean((0, 2, 3)))[None, :, None, None]).relu()
        tokens = self.more(self.tokens(x.flatten(2).permute(2, 0, 1)).relu())
        windows = tokens.permute(1, 0, 2).reshape(-1, 8, 8)
        return self.last(windows.mean(1)).reshape(-1, 72)


@pytest.mark.parametrize("shares", [None, lambda batch: torch.arange(len(batch[0])).float()])
def test_layers_on_tensors_whose_first_dimension_is_not_that_of_the_images(shares) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    findings = fxmerge.find_segments(fxmerge.trace(Odd().eval(), images(3)))
    fitted = [c for p in fxmerge.propose(findings) for c in p.candidates if c.kind == "fitted"]
    for candidate in fitted:
        plan = fxmerge.Plan(findings.fingerprint, (candidate,))
        scorer = fxmerge.Reconstruction(shares=shares)
        weights, scored = fitted_and_scored(scorer, findings, plan, fxmerge.as_batches(images(30), findings.graph))
        assert candidate.id in weights
        assert scored < 1


def test_what_does_not_fit_into_memory_is_fitted_from_files(found, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    findings, candidates = found
    plan = fxmerge.Plan(findings.fingerprint, (first_block(candidates),))
    roomy = fxmerge.fit(findings, plan, images(100))
    monkeypatch.setattr("fxmerge.measure.reconstruction.Shelf", lambda limit: Shelf(limit // 100_000))
    tight = fxmerge.fit(findings, plan, images(100))
    assert roomy.keys() == tight.keys()
    for name, affine in roomy.items():
        assert torch.allclose(affine.weight, tight[name].weight, rtol=1e-4, atol=1e-6)


def test_an_exact_merge_leaves_all_others_as_they_are() -> None:
    layers = (nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1))
    findings = fxmerge.find_segments(fxmerge.trace(nn.Sequential(*layers).eval(), images(2)))
    exact = [c for p in fxmerge.propose(findings, fxmerge.Space.named("exact")) for c in p.candidates if c.exact]
    assert exact
    for candidate in exact:
        plan = fxmerge.Plan(findings.fingerprint, (candidate,))
        assert not fxmerge.fit(findings, plan, images(50)).keys() & layers_of(findings.graph).keys()


def test_images_that_all_count_twice_give_the_same_weights(found) -> None:  # type: ignore[no-untyped-def]
    findings, candidates = found
    plan = fxmerge.Plan(findings.fingerprint, (first_block(candidates),))
    plain = fxmerge.fit(findings, plan, images(100))
    for share in (0.5, 2.0):
        scorer = fxmerge.Reconstruction(shares=lambda batch, share=share: torch.full((len(batch[0]),), share))
        shared = fxmerge.fit(findings, plan, images(100), scorer=scorer)
        assert shared.keys() == plain.keys()
        for name, affine in plain.items():
            assert torch.allclose(affine.weight, shared[name].weight, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("options", [{"through": -1}, {"through": "a"}, {"ridge": -1.0}, {"memory_bytes": 0.5}, {"hopeless": None}])
def test_options_out_of_range_are_told_by_name(options: dict[str, object]) -> None:
    with pytest.raises(fxmerge.InputError, match=next(iter(options))):
        fxmerge.Reconstruction(**options)  # type: ignore[arg-type]


def test_what_a_merge_reads_is_gathered_and_its_gram_matrix_factored_once(found, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    findings, candidates = found
    counts = dict.fromkeys(("patches", "factored"), 0)

    def counted(name: str, function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for module in ("least_squares", "through"):
        monkeypatch.setattr(f"fxmerge.algebra.{module}.patches", counted("patches", patches))
    monkeypatch.setattr(NormalEquations, "factored", counted("factored", NormalEquations.factored))
    plan = fxmerge.Plan(findings.fingerprint, (first_block(candidates),))
    batches = fxmerge.as_batches(images(100), findings.graph, batch_size=20)
    fxmerge.Reconstruction(stay=False).fit(findings, plan, batches)
    assert counts == {"patches": len(batches), "factored": 1}


def test_a_merge_that_is_too_large_to_be_looked_at_twice_is_fitted_by_plain_least_squares(
    found,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    findings, candidates = found
    plan = fxmerge.Plan(findings.fingerprint, (first_block(candidates),))
    batches = fxmerge.as_batches(images(100), findings.graph, batch_size=20)
    plain = fxmerge.Reconstruction(stay=False, through=0).fit(findings, plan, batches)
    through = fxmerge.Reconstruction(stay=False).fit(findings, plan, batches)
    monkeypatch.setattr("fxmerge.measure.fitting.Rows", lambda geometry, memory: Rows(geometry, 10_000_000))  # one batch of five
    tight = fxmerge.Reconstruction(stay=False).fit(findings, plan, batches)
    for name, affine in plain.items():
        assert torch.allclose(affine.weight, tight[name].weight, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(affine.weight, through[name].weight, rtol=1e-3)


def test_a_rough_fit_is_judged_on_images_that_it_never_saw(found) -> None:  # type: ignore[no-untyped-def]
    findings, candidates = found
    plan = fxmerge.Plan(findings.fingerprint, (first_block(candidates),))
    data = images(90)
    batches = fxmerge.as_batches(data, findings.graph, batch_size=32, seed=None)
    few = fxmerge.Reconstruction(least_rows=4096, rows_per_unknown=4)
    weights = few.fit(findings, plan, fxmerge.as_batches(data[:60], findings.graph, batch_size=32, seed=None))
    unseen = few.work(findings, fxmerge.as_batches(data[60:], findings.graph, seed=None)).loss_of(plan, weights)
    assert fxmerge.Reconstruction().rough(findings, batches)(plan) == pytest.approx(unseen, rel=1e-3)


@pytest.mark.parametrize(("most", "images_fitted_to"), [(8, 16), (1000, 60)])
def test_a_rough_fit_takes_as_many_images_as_the_smallest_maps_need(found, monkeypatch, most: int, images_fitted_to: int) -> None:  # type: ignore[no-untyped-def]
    findings, candidates = found
    plan = fxmerge.Plan(findings.fingerprint, (first_block(candidates),))
    monkeypatch.setattr("fxmerge.measure.reconstruction._ROUGH_IMAGES", 16)
    monkeypatch.setattr("fxmerge.measure.reconstruction.images_for", lambda *_: most)
    gathered = list[int]()
    monkeypatch.setattr(fxmerge.Reconstruction, "work", watched(fxmerge.Reconstruction.work, gathered))
    fxmerge.Reconstruction().rough(findings, fxmerge.as_batches(images(76), findings.graph))(plan)
    assert gathered == [images_fitted_to, 16]


def watched(work, gathered: list[int]):  # type: ignore[no-untyped-def]
    """Notes how many images each piece of work is given."""

    def call(self, findings, batches):  # type: ignore[no-untyped-def]
        gathered.append(sum(len(batch[0]) for batch in batches))
        return work(self, findings, batches)

    return call


@pytest.mark.parametrize(("size", "wanted"), [(8, 2), (4, 7), (2, 28)])
def test_small_maps_ask_for_more_images(size: int, wanted: int) -> None:
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 1))
    findings = fxmerge.find_segments(fxmerge.trace(layers, torch.zeros(1, 3, size, size)))
    assert images_for(findings, 4) == wanted  # 27 weights and a bias, four times, over the positions of a map


@pytest.mark.parametrize("shares", [None, lambda batch: (batch[0][:, 0, 0, 0] == 77).float()])
def test_a_rough_fit_does_with_what_there_is(found, shares) -> None:  # type: ignore[no-untyped-def]
    findings, candidates = found
    plan = fxmerge.Plan(findings.fingerprint, (first_block(candidates),))
    for count in (1, 2, 5):
        data = images(count)
        data[0, 0, 0, 0] = 77  # the only image that counts, where shares say so
        assert fxmerge.Reconstruction(shares=shares).rough(findings, fxmerge.as_batches(data, findings.graph))(plan) > 0
