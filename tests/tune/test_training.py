"""The recipe trains a copy, stays near its teacher, keeps the best, goes on where it was killed; and the law holds afterwards."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import fxmerge
from fxmerge.core.tensors import checksum
from fxmerge.errors import InputError
from fxmerge.measure.divergence import divergence
from fxmerge.testing import assert_equivalent, assert_untouched, snapshot
from fxmerge.tune import Distillation, Epoch, Recipe, calibrate_norms, fine_tune
from tests.small import images
from tests.tune.small import disturbed, made

LABELS = torch.arange(16) % 5


def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
    for seed in range(3):
        yield images(16, 10 * epoch + seed), LABELS


def distance(student: nn.Module) -> float:
    with torch.no_grad():
        return float(divergence(made().network(images(64, 11)), student(images(64, 11))).mean())


@pytest.mark.parametrize("kind", ["layer by layer", "merged already"])
def test_training_changes_a_copy_and_what_is_trained_obeys_the_law(kind: str) -> None:
    student = made().with_norms if kind == "merged already" else made().composed
    calibrate_norms(student, [(images(64),)])
    before = snapshot(student)
    trained = fine_tune(student, batches, teacher=made().graph, recipe=Recipe(epochs=2))
    assert_untouched(student, before)
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), student.parameters(), strict=True))
    assert not trained.training
    again = fxmerge.annotate(trained, made().plan if kind == "merged already" else made().composed_plan)
    merged = fxmerge.fuse(again)
    assert_equivalent(trained, merged, [images(5, 9)], tolerance=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in merged.modules())
    trained.double()
    again.double()
    assert_equivalent(trained, fxmerge.fuse(again), [images(5, 9).double(), torch.randn(1, 3, 9, 17, dtype=torch.float64)])


@pytest.mark.parametrize("teacher", ["graph", "network"])
def test_distillation_brings_the_student_nearer_to_its_teacher(teacher: str) -> None:
    student = disturbed(made().with_norms)
    calibrate_norms(student, [(images(64),)])
    unlabelled = [(images(32, seed), None) for seed in range(4)]
    recipe = Recipe(epochs=10, learning_rate=0.002)
    told: list[Epoch] = []
    trained = fine_tune(student, unlabelled, teacher=getattr(made(), teacher), recipe=recipe, report=told.append)
    assert distance(trained) < 0.7 * distance(student)
    assert [epoch.step for epoch in told] == [4 * (i + 1) for i in range(10)]


def test_tensors_at_the_cuts_teach_where_the_teacher_is_the_graph_of_the_student() -> None:
    def after(features: float) -> list[Tensor]:
        recipe = Recipe(epochs=1, distillation=Distillation(share=0.0, features=features))
        return list(fine_tune(made().with_norms, batches, teacher=made().graph, recipe=recipe).parameters())

    assert any(not torch.equal(a, b) for a, b in zip(after(0.0), after(1.0), strict=True))


def test_the_best_by_the_validation_data_is_returned_be_it_the_student_as_it_was() -> None:
    told: list[Epoch] = []
    validation = [(images(32, 5), made().with_norms(images(32, 5)).argmax(1))]
    recipe = Recipe(epochs=2, learning_rate=0.5)
    trained = fine_tune(made().with_norms, batches, recipe=recipe, validation=validation, report=told.append)
    assert [epoch.number for epoch in told] == [0, 1, 2]
    assert told[0].metric == 1.0
    assert all(epoch.metric is not None and epoch.metric < 1.0 for epoch in told[1:])
    assert_untouched(trained, snapshot(made().with_norms))


def test_a_metric_and_a_loss_of_ones_own_serve_other_tasks() -> None:
    def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
        return (outputs - wanted).square().mean()

    pairs = [(images(16, seed), torch.zeros(16, 5)) for seed in range(2)]
    told: list[Epoch] = []
    recipe = Recipe(epochs=4, loss=loss, metric=lambda outputs, wanted: -(outputs - wanted).square().mean(1))
    fine_tune(made().with_norms, pairs, recipe=recipe, validation=pairs, report=told.append)
    assert told[-1].metric is not None
    assert told[0].metric is not None
    assert told[-1].metric > told[0].metric


def test_the_average_lags_behind_what_is_trained() -> None:
    last, averaged = (fine_tune(made().with_norms, batches, recipe=Recipe(epochs=2, average=average)) for average in (0.0, 0.9))
    start = dict(made().with_norms.named_parameters())

    def moved(student: nn.Module) -> float:
        return sum(float((p - start[name]).detach().square().sum()) for name, p in student.named_parameters())

    assert 0 < moved(averaged) < moved(last)


def test_random_numbers_are_the_same_before_and_after_and_from_run_to_run() -> None:
    data = DataLoader(TensorDataset(images(32), torch.arange(32) % 5), batch_size=8, shuffle=True)
    torch.manual_seed(5)  # another than the recipe's
    before = torch.get_rng_state()
    one = fine_tune(made().with_norms, data, recipe=Recipe(epochs=1))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    two = fine_tune(made().with_norms, data, recipe=Recipe(epochs=1))
    other = fine_tune(made().with_norms, data, recipe=Recipe(epochs=1, seed=1))
    assert_untouched(one, snapshot(two))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_no_epochs_give_a_copy() -> None:
    trained = fine_tune(made().fitted, batches, recipe=Recipe(epochs=0))
    assert trained is not made().fitted
    assert_untouched(trained, snapshot(made().fitted))


def test_no_data_is_told() -> None:
    with pytest.raises(fxmerge.InputError, match="data gives no batches"):
        fine_tune(made().fitted, [])


def test_data_that_serves_once_is_told() -> None:
    with pytest.raises(fxmerge.InputError, match="can be gone through once only"):
        fine_tune(made().fitted, iter([(images(2), LABELS[:2])]))


def test_data_without_labels_is_told() -> None:
    with pytest.raises(fxmerge.InputError, match="must give .inputs, labels. pairs"):
        fine_tune(made().fitted, [images(2)])


def test_a_loss_that_diverges_is_told() -> None:
    with pytest.raises(fxmerge.InputError, match="lower learning_rate"):
        fine_tune(made().fitted, batches, recipe=Recipe(epochs=20, learning_rate=1e9, clip=None))


def test_the_teacher_is_not_the_student() -> None:
    with pytest.raises(fxmerge.InputError, match="the teacher is the student itself"):
        fine_tune(made().fitted, batches, teacher=made().fitted)
    with pytest.raises(fxmerge.InputError, match="the teacher must be a network or None, found str"):
        fine_tune(made().fitted, batches, teacher="resnet34")  # type: ignore[arg-type]
    with pytest.raises(fxmerge.InputError, match="student must be a GraphModule, .*, found Linear"):
        fine_tune(nn.Linear(1, 1), batches)  # type: ignore[arg-type]


def test_without_accelerate_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(fxmerge.InputError, match=r"pip install 'fxmerge\[train\]'"):
        fine_tune(made().fitted, batches)


def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Three processes: one goes through, one is killed in the midst of an epoch, one goes on."""
    whole = run(tmp_path / "whole")
    whole.wait(timeout=300)
    assert whole.returncode == 0
    killed = run(tmp_path / "killed", pause=True)
    checkpoint = tmp_path / "killed" / "training.safetensors"
    while steps_in(checkpoint) < 9:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert 9 <= steps_in(checkpoint) < 12
    resumed = run(tmp_path / "killed")
    assert resumed.wait(timeout=300) == 0
    assert tensors(tmp_path / "whole" / "final.safetensors") == tensors(tmp_path / "killed" / "final.safetensors")
    assert tensors(tmp_path / "whole" / "training.safetensors") == tensors(checkpoint)


def run(folder: Path, *, pause: bool = False) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.tune.killed_run", str(folder), *(["pause"] if pause else [])]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"})


def steps_in(path: Path) -> int:
    import json

    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(json.loads(file.metadata()["about"])["position"]["step"])


def tensors(path: Path) -> dict[str, bytes]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    fine_tune(made().fitted, batches, recipe=Recipe(epochs=1), checkpoints=tmp_path)
    with pytest.raises(fxmerge.PlanMismatchError, match="was written with learning_rate = 0.01, now it is 0.02"):
        fine_tune(made().fitted, batches, recipe=Recipe(epochs=1, learning_rate=0.02), checkpoints=tmp_path)


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "training.safetensors").write_bytes(b"nothing")
    with pytest.raises(fxmerge.PlanError, match="is damaged, or no checkpoint"):
        fine_tune(made().fitted, batches, checkpoints=tmp_path)


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None], *, honest: bool) -> None:
    """Change what a checkpoint says; an honest one has the checksum of what it says now."""
    with safe_open(path, framework="pt") as file:
        notes = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = json.loads(notes["about"])
    change(about, tensors)
    notes["about"] = json.dumps(about)
    save_file(tensors, path, metadata=notes | ({"sha256": checksum(notes["about"], tensors)} if honest else {}))


def _a_weight(about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    next(tensor for name, tensor in tensors.items() if name.startswith("optimiser/")).view(-1)[0] += 1.0


def test_every_damage_of_a_checkpoint_is_told(tmp_path: Path) -> None:
    def train() -> None:
        fine_tune(made().fitted, batches, recipe=Recipe(epochs=1), checkpoints=tmp_path)

    train()
    path = tmp_path / "training.safetensors"
    whole = path.read_bytes()
    for key in ("groups", "optimiser", "random", "scaler", "position", "settings", "format"):
        rewritten(path, lambda about, tensors, key=key: about.pop(key), honest=True)  # type: ignore[misc]
        with pytest.raises(fxmerge.PlanError, match=f"is damaged, or no checkpoint of fxmerge: .*{key}.*. Remove it to start anew"):
            train()
        path.write_bytes(whole)
    for change in (_a_weight, lambda about, tensors: about["random"][0].pop("torch"), lambda about, tensors: about["random"].pop()):
        rewritten(path, change, honest=False)
        with pytest.raises(fxmerge.PlanError, match="it has not the checksum that it was written with. Remove it to start anew"):
            train()
        path.write_bytes(whole)
    rewritten(path, lambda about, tensors: about.update(format=1), honest=True)
    with pytest.raises(fxmerge.PlanError, match="is of format 1, this version reads 3"):
        train()
    path.write_bytes(whole)
    train()


def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path: Path) -> None:
    def train(kind: type[Optimizer]) -> None:
        recipe = Recipe(epochs=1, optimiser=lambda parameters: kind(parameters, lr=0.01))  # type: ignore[call-arg]
        fine_tune(made().fitted, batches, recipe=recipe, checkpoints=tmp_path)

    train(torch.optim.Adam)
    with pytest.raises(fxmerge.PlanMismatchError, match="was written with optimiser_class = Adam, now it is SGD"):
        train(torch.optim.SGD)


class Learning(torch.optim.SGD):
    """Keeps what it learns among the numbers of its groups, as some do that need no learning rate."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["weight_decay"] = group["weight_decay"] * 1.5 + 1e-3
        return super().step(closure)


def test_numbers_that_an_optimiser_changes_are_kept(tmp_path: Path) -> None:
    def train(folder: Path | None, progress: Callable[[int, int], None] | None = None) -> nn.Module:
        recipe = Recipe(epochs=1, optimiser=lambda parameters: Learning(parameters, lr=0.01), checkpoint_steps=2)
        return fine_tune(made().fitted, batches, recipe=recipe, checkpoints=folder, progress=progress)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop)
    assert_untouched(train(tmp_path), snapshot(train(None)))


def test_a_run_that_is_finished_gives_its_result_again(tmp_path: Path) -> None:
    one = fine_tune(made().with_norms, batches, recipe=Recipe(epochs=1), checkpoints=tmp_path)
    told: list[Epoch] = []
    two = fine_tune(made().with_norms, batches, recipe=Recipe(epochs=1), checkpoints=tmp_path, report=told.append)
    assert_untouched(one, snapshot(two))
    assert told == []


def test_what_cannot_be_trained_is_told(tmp_path: Path) -> None:
    student, data = made().fitted, [(images(8), torch.arange(8) % 5)]
    with pytest.raises(InputError, match="requires a gradient"):
        fine_tune(copy.deepcopy(student).requires_grad_(False), data)
    with pytest.raises(InputError, match="found Sequential"):
        fine_tune(made().network, data)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the teacher must be a network or None, found int"):
        fine_tune(student, data, teacher=3)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="checkpoints must be a folder that can be written, and .*file is none"):
        fine_tune(student, data, checkpoints=tmp_path / "file")


@pytest.mark.parametrize("other", ["student", "teacher", "validation", "rate"])
def test_a_finished_run_is_not_taken_for_another(other: str, tmp_path: Path) -> None:
    """Of the same structure, with other weights; or judged by what there was not; or with other numbers in its optimiser."""

    def adam(rate: float) -> Callable[[Any], Optimizer]:
        return lambda parameters: torch.optim.Adam(parameters, rate)

    options: dict[str, Any] = {"teacher": made().graph, "checkpoints": tmp_path, "recipe": Recipe(epochs=1, optimiser=adam(1e-4))}
    fine_tune(made().composed, batches, **options)
    changed: dict[str, Any] = {
        "student": {},
        "teacher": {"teacher": disturbed(made().graph)},
        "validation": {"validation": list(batches(0))},
        "rate": {"recipe": Recipe(epochs=1, optimiser=adam(1e-2))},
    }[other]
    student = disturbed(made().composed) if other == "student" else made().composed
    with pytest.raises(fxmerge.PlanMismatchError, match="was written with"):
        fine_tune(student, batches, **options | changed)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="checkpoints must be a folder that can be written"):
        fine_tune(made().composed, lambda epoch: pytest.fail("trained"), checkpoints=tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"accelerator": lambda: Accelerator(gradient_accumulation_steps=4)}, "gathers gradients over 4 batches"),
        ({"accelerator": "cpu"}, "accelerator must be an Accelerator"),
        ({"recipe": {"epochs": 1}}, "recipe must be a Recipe"),
        ({"recipe": Recipe(epochs=1, optimiser=lambda p: None)}, "it made NoneType"),  # type: ignore[arg-type, return-value]
        ({"recipe": Recipe(epochs=1, optimiser=lambda p: torch.optim.LBFGS(p))}, "it made LBFGS"),
    ],
)
def test_options_that_cannot_be_used_are_told(options: dict[str, Any], told: str) -> None:
    ready = {name: value() if callable(value) else value for name, value in options.items()}
    with pytest.raises(InputError, match=told):
        fine_tune(made().composed, batches, **ready)
