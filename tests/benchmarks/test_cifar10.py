"""The CIFAR-10 benchmark from one end to the other: a tiny archive of pictures made here, a small ResNet that it trains itself."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import fxmerge
from benchmarks import ablation, cifar10, contest, networks, rivals
from benchmarks.batches import Augmented, moved
from benchmarks.kept import Kept
from benchmarks.made_up import MadeUp
from tests.fakes import PriceTimer

CLASSES = [f"class{number}" for number in range(10)]
SMALL = (
    *("--network", "resnet8", "--images", "16", "--batch", "16", "--epochs", "1", "--pretrain-epochs", "1", "--latency-batch", "2"),
    *("--steps", "2", "--scorer-steps", "1", "--speedups", "1.2", "--seeds", "0", "1"),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive as the real one: six pictures of each class to train on, two to be judged by."""
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{number}.jpg")
    with tarfile.open(root / "cifar10-jpeg.tar.xz", "w:xz") as archive:
        for split in ("train", "test"):
            archive.add(root / split, split)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tables and rows are kept: measured once for all tests."""
    return tmp_path_factory.mktemp("tables")


@pytest.fixture
def benchmark(pictures: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The benchmark on this data; latencies are counted, losses made up."""
    monkeypatch.setattr(networks, "DATA", pictures)
    monkeypatch.setattr(networks, "WEIGHTS", pictures)
    monkeypatch.setenv("FXMERGE_CACHE", str(pictures / "cache"))
    monkeypatch.setattr(contest, "TIMER", PriceTimer())
    monkeypatch.setattr(contest, "SCORER", MadeUp())
    return lambda *more: cifar10.main([*SMALL, "--tables", str(folder), *more])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "resnet8.rows.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.filterwarnings("ignore:.*too few")
@pytest.mark.parametrize(
    ("method", "regimes"),
    [
        ("fxmerge", ["closed form", "tuned", "merged", "merged"]),
        ("activations", ["closed form", "tuned", "merged", "merged", "layers", "layers"]),
        ("layermerge", ["closed form", "merged", "merged"]),
        ("narrower", ["merged", "merged"]),
        ("channels", ["closed form", "merged", "merged"]),
    ],
)
def test_every_method_gives_its_rows_and_they_are_kept(
    method: str, regimes: list[str], benchmark: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "channels":
        pytest.importorskip("torch_pruning", reason="needs the extra `bench`: pip install torch-pruning==1.6.1")
    report = benchmark("--methods", method)
    mine = [row for row in rows(folder) if row["method"] == method]
    if method == "fxmerge" and mine[0]["composed"]:  # what is taken among all candidates is for the fits to say
        regimes = [*regimes, "layers", "layers"]
    assert [row["regime"] for row in mine] == regimes
    assert all(row["speedup"] >= 1.2 / 1.03 and 0 <= row["top1"] <= 100 for row in mine)
    line = next(line for line in report.splitlines() if line.startswith(f"| {contest.METHODS[method].label}"))
    assert line.count("2 seeds") == len(set(regimes) & {"merged", "layers"})
    monkeypatch.setattr(contest.Contest, "network_of", None)  # nothing is left to do
    assert line in benchmark("--methods", method).splitlines()


def test_a_single_row_can_be_run_and_one_that_cannot_be_had_says_so(benchmark: Callable[..., str], folder: Path) -> None:
    report = benchmark("--rows", "layers@1.1", "layers@50", "--regimes", "closed form")
    assert [row["asked"] for row in rows(folder) if row["method"] == "layers"] == [1.1, 50.0]
    assert "cannot; fastest" in report


def test_a_run_that_died_goes_on_with_the_start_that_it_had(
    benchmark: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the midst of training: neither searched again, nor trained from the beginning."""

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(contest, "fine_tune", killed)
        with pytest.raises(KeyboardInterrupt):
            benchmark("--rows", "composed@1.2", "--regimes", "closed form", "merged")
    monkeypatch.setattr(contest, "Search", None)
    benchmark("--rows", "composed@1.2", "--regimes", "closed form", "merged")
    assert [row["regime"] for row in rows(folder) if row["method"] == "composed"] == ["closed form", "merged", "merged"]


def test_both_students_start_as_the_closed_form_is(benchmark: Callable[..., str], folder: Path) -> None:
    benchmark("--rows", "activations@1.2", "--regimes", "closed form")
    model = networks.made("resnet8").eval()
    students = [
        fxmerge.load(folder / "resnet8" / "activations-1.2" / kind, model).student for kind in ("closed form", "merged", "layers")
    ]
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        wanted, *found = (student.double()(images.double()) for student in students)
    for outputs in found:
        assert torch.allclose(wanted, outputs, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_shortcuts_written_as_convolutions_compute_what_they_did() -> None:
    network = networks.made("resnet8").eval()
    images = torch.randn(2, 3, 32, 32)
    twin = rivals.prunable(network)
    assert sum(isinstance(m, nn.Conv2d) for m in twin.modules()) == 2 + sum(isinstance(m, nn.Conv2d) for m in network.modules())
    assert torch.allclose(network(images), twin(images), atol=1e-5)


def test_bisection_takes_the_largest_network_that_is_fast_enough() -> None:
    original = fxmerge.baseline(fxmerge.trace(networks.made("resnet8").eval(), torch.zeros(2, 3, 32, 32)))
    example, timer = torch.zeros(2, 3, 32, 32), PriceTimer()
    found = rivals.nearest(lambda width: networks.made("resnet8", width), original, example, 1.3, timer)
    wider = fxmerge.trace(networks.made("resnet8", found.number + 0.1).eval(), example)
    slower = timer(
        [fxmerge.Timed(original, (example,)), fxmerge.Timed(fxmerge.baseline(wider), (example,))], target=fxmerge.Target()
    )
    assert found.speedup >= 1.3 / 1.03 > slower[0].median_ns / slower[1].median_ns
    with pytest.raises(LookupError, match="none of 10 networks is 1000.00 times as fast"):
        rivals.nearest(lambda width: networks.made("resnet8", width), original, example, 1000.0, timer)


def test_statistics_of_other_images_need_no_labels() -> None:
    torch.manual_seed(0)
    graph = fxmerge.trace(networks.made("resnet8").eval(), torch.zeros(2, 3, 32, 32))
    images = torch.randn(64, 3, 32, 32) + 3
    seen = rivals.with_statistics(graph, images)
    stem = graph.get_submodule("conv1")(images)
    assert torch.allclose(seen.get_submodule("bn1").running_mean, stem.mean((0, 2, 3)), atol=1e-4)
    assert float(graph.get_submodule("bn1").running_mean.abs().max()) == 0.0
    assert not seen.training


def test_images_are_shifted_and_mirrored_each_by_its_own() -> None:
    pixels = torch.arange(64 * 3 * 6 * 6).remainder(251).to(torch.uint8).view(64, 3, 6, 6)
    changed = moved(pixels, 2)
    padded = nn.functional.pad(pixels, (2,) * 4)
    places = set()
    for image, whole in zip(changed, padded, strict=True):
        fits = [
            (down, right, mirrored)
            for down in range(5)
            for right in range(5)
            for mirrored in (False, True)
            if torch.equal(image.flip(2) if mirrored else image, whole[:, down : down + 6, right : right + 6])
        ]
        assert fits
        places.update(fits)
    assert len(places) > 20


def test_an_epoch_holds_whole_batches_of_different_images() -> None:
    data = Augmented(torch.zeros(10, 3, 6, 6, dtype=torch.uint8), torch.arange(10), batch=4)
    batches = [labels.tolist() for _, labels in data(0)]
    assert len(data) == len(batches) == 2
    assert len({label for labels in batches for label in labels}) == 8


def test_a_row_that_was_half_written_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    Kept(file).add({"a": 1, "top1": 2.0})
    with file.open("a", encoding="utf-8") as end:
        end.write('{"a": 2, "to')
    kept = Kept(file)
    assert kept.found({"a": 1}) == {"a": 1, "top1": 2.0}
    assert kept.found({"a": 2}) is None
    kept.add({"a": 3})
    assert Kept(file).found({"a": 3}) == {"a": 3}


def test_mobilenet_has_a_stem_for_small_images() -> None:
    network = networks.made("mobilenet_v2", 0.5).eval()
    assert network.features[0](torch.zeros(1, 3, 32, 32)).shape[2:] == (32, 32)
    with pytest.raises(ValueError, match="--network is resnet21; give mobilenet_v2"):
        networks.made("resnet21")


@pytest.mark.filterwarnings("ignore:.*too few")
def test_the_fit_is_taken_apart(benchmark: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole fit's row is the closed form's of the main table; the plan taken is on no row's place of another."""
    fits: list[tuple[fxmerge.Reconstruction, fxmerge.Plan]] = []
    fit = fxmerge.Reconstruction.fit

    def noted(self: fxmerge.Reconstruction, findings: Any, plan: fxmerge.Plan, *more: Any, **options: Any) -> Any:
        fits.append((self, plan))
        return fit(self, findings, plan, *more, **options)

    whole = benchmark("--methods", "fxmerge", "--regimes", "closed form")
    expected = next(line for line in whole.splitlines() if line.startswith("| fxmerge")).split("|")[6].strip()
    monkeypatch.setattr(fxmerge.Reconstruction, "fit", noted)
    report = benchmark("--ablation")
    found = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in report.splitlines() if line.startswith("|")}
    assert {*ablation.PARTS} < {*found}
    assert found[ablation.WHOLE] == expected
    assert f"{ablation.WHOLE}, then tuned" in found
    assert [scorer for scorer, _ in fits][: len(ablation.PARTS)] == [*ablation.PARTS.values()]
    taken = fits[0][1]
    assert all(plan == taken for _, plan in fits[: len(ablation.PARTS)])
    put = [plan for _, plan in fits if any(merge.added for merge in plan.merges)]
    assert len(put) == ("activations put behind merges that end in none" in found)
