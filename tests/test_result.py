"""Saving and loading: what comes back is what was written, and damage is told."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxmerge
from fxmerge.core.tensors import checksum
from fxmerge.operators import default_operators
from fxmerge.testing import assert_equivalent
from tests.fakes import PriceTimer
from tests.small import images, network
from tests.test_compress import Gain, GainOperator, with_gain


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, fxmerge.Result]:
    result = fxmerge.compress(network(), images(4), speedup=1.4, calibration=images(64), timer=PriceTimer())
    folder = tmp_path_factory.mktemp("saved") / "out"
    result.save(folder)
    return folder, result


def write(folder: Path, file: bytes) -> Path:
    folder.mkdir()
    (folder / "student.safetensors").write_bytes(file)
    return folder


def forged(saved: Path, to: Path, change: Callable[[Any], Any]) -> Path:
    """A folder with another description of its weights, and a checksum that fits."""
    path = saved / "student.safetensors"
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    tensors, text = load_file(path), json.dumps(change(about) or about)
    to.mkdir()
    save_file(tensors, to / path.name, metadata={"about": text, "sha256": checksum(text, tensors)})
    return to


def students(count: int = 2) -> list[tuple[fxmerge.Plan, torch.fx.GraphModule]]:
    """Students of one network by plans whose weights have the same names and shapes, each trained a little."""
    graph = fxmerge.trace(plain(), images(2))
    findings = fxmerge.find_segments(graph)
    candidates = [c for p in fxmerge.propose(findings) for c in p.candidates if c.kind == "composed" and not c.removed]
    made = []
    for candidate in [c for c in candidates if len(c.activations) == 1][:count]:
        plan = fxmerge.Plan(findings.fingerprint, (candidate,))
        student = fxmerge.linearize(fxmerge.annotate(graph, plan))
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1 + 0.1 * len(made))
        made.append((plan, student))
    return made


def plain() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for width in (3, 8, 8, 8) for layer in (nn.Conv2d(width, 8, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers).eval()


def test_what_is_loaded_computes_what_was_saved(saved: tuple[Path, fxmerge.Result]) -> None:
    folder, result = saved
    loaded = fxmerge.load(folder, model=network(seed=7))
    assert loaded.plan == result.plan
    assert_equivalent(result.model, loaded.model, [images(3)], tolerance=1e-6)
    assert {file.name for file in folder.iterdir()} == {"plan.json", "student.safetensors", "report.txt"}
    assert fxmerge.Plan.load(folder / "plan.json") == result.plan


def test_a_trained_student_with_norms_comes_back_too(saved: tuple[Path, fxmerge.Result], tmp_path: Path) -> None:
    _, result = saved
    student = result.student_with_norms()
    fxmerge.tune.calibrate_norms(student, [(images(32),)])
    fxmerge.save_student(student, result.plan, result.example_inputs, tmp_path / "out")
    loaded = fxmerge.load(tmp_path / "out", model=network())
    assert_equivalent(student, loaded.student, [images(3)], tolerance=1e-6)


def test_another_model_is_a_mismatch(saved: tuple[Path, fxmerge.Result]) -> None:
    with pytest.raises(fxmerge.PlanMismatchError, match="made for a graph with fingerprint"):
        fxmerge.load(saved[0], model=network(blocks=2))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(5))
def test_a_save_that_is_killed_leaves_the_old_or_the_new(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (old_plan, old), (new_plan, new) = students()
    fxmerge.save_student(old, old_plan, images(2), tmp_path)
    left = step

    def mortal(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return work(*arguments, **options)

        return run

    with monkeypatch.context() as patch:
        patch.setattr("fxmerge.saved.save_file", mortal(save_file))
        for name in ("write_text", "replace"):
            patch.setattr(Path, name, mortal(getattr(Path, name)))
        with pytest.raises(Killed, match="^$"):
            fxmerge.save_student(new, new_plan, images(2), tmp_path)
    loaded = fxmerge.load(tmp_path, plain())
    plan, student = (old_plan, old) if step < 2 else (new_plan, new)
    assert loaded.plan == plan
    assert_equivalent(student, loaded.student, [images(2)], tolerance=0.0)


def test_weights_of_another_save_bring_their_own_plan(tmp_path: Path) -> None:
    (plan, student), (other_plan, other) = students()
    fxmerge.save_student(student, plan, images(2), tmp_path / "a")
    fxmerge.save_student(other, other_plan, images(2), tmp_path / "b")
    (tmp_path / "b" / "student.safetensors").replace(tmp_path / "a" / "student.safetensors")
    loaded = fxmerge.load(tmp_path / "a", plain())
    assert loaded.plan == other_plan
    assert_equivalent(other, loaded.model, [images(2)])


@pytest.mark.parametrize("place", [8, 40, 2000, -3])
def test_a_flipped_bit_is_told(saved: tuple[Path, fxmerge.Result], tmp_path: Path, place: int) -> None:
    data = bytearray((saved[0] / "student.safetensors").read_bytes())
    data[place] ^= 0x02
    with pytest.raises(fxmerge.PlanError, match=r"student\.safetensors .*is damaged"):
        fxmerge.load(write(tmp_path / "x", bytes(data)), model=network())


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_weights_that_were_cut_off_are_told(saved: tuple[Path, fxmerge.Result], tmp_path: Path, size: int) -> None:
    data = (saved[0] / "student.safetensors").read_bytes()[:size]
    with pytest.raises(fxmerge.PlanError, match=r"student\.safetensors cannot be read, or is damaged"):
        fxmerge.load(write(tmp_path / "x", data), model=network())


def test_weights_that_someone_else_wrote_are_told(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3)}, tmp_path / "student.safetensors")
    with pytest.raises(fxmerge.PlanError, match="was not written by fxmerge"):
        fxmerge.load(tmp_path, network())


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    with pytest.raises(fxmerge.PlanError, match=r"student\.safetensors is missing"):
        fxmerge.load(tmp_path / "nowhere", model=network())


def test_a_file_in_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(fxmerge.PlanError, match="cannot be read|is missing"):
        fxmerge.load(tmp_path / "file", model=network())


def test_a_folder_in_place_of_the_weights_is_told(tmp_path: Path) -> None:
    (tmp_path / "student.safetensors").mkdir()
    with pytest.raises(fxmerge.PlanError, match="cannot be read"):
        fxmerge.load(tmp_path, model=network())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda about: about.update(format=2), "it is of format 2, this version reads 1"),
        (lambda about: about["plan"].update(format=7), "not a plan of format 1"),
        (lambda about: about["plan"].update(merges=3), "not a plan"),
        (lambda about: about.__delitem__("norms"), "damaged: KeyError"),
        (lambda about: about.update(inputs=3), "damaged: TypeError"),
        (lambda about: about["inputs"][0].update(dtype="float31"), "damaged: AttributeError"),
        (lambda about: about["inputs"][0].update(dtype="nn"), "damaged: AttributeError"),
        (lambda about: about["inputs"][0].update(shape=[-1, 3, 12, 12]), "damaged: RuntimeError"),
        (lambda about: about["inputs"][0].update(shape="x"), "damaged: TypeError"),
        (lambda about: [about], "damaged: TypeError"),
    ],
)
def test_a_description_that_makes_no_sense_is_told(
    saved: tuple[Path, fxmerge.Result], tmp_path: Path, change: Callable[[Any], Any], text: str
) -> None:
    folder = forged(saved[0], tmp_path / "x", change)
    with pytest.raises(fxmerge.PlanError, match=text):
        fxmerge.load(folder, model=network())


def test_a_description_nested_too_deep_is_told(tmp_path: Path) -> None:
    text = "[" * 100_000
    save_file({}, tmp_path / "student.safetensors", metadata={"about": text, "sha256": checksum(text, {})})
    with pytest.raises(fxmerge.PlanError, match="damaged: RecursionError"):
        fxmerge.load(tmp_path, model=network())


def test_a_plan_that_names_a_node_which_is_not_there_is_a_mismatch(saved: tuple[Path, fxmerge.Result], tmp_path: Path) -> None:
    folder = forged(saved[0], tmp_path / "x", lambda about: about["plan"]["merges"][0].update(exit="nowhere"))
    with pytest.raises(fxmerge.PlanMismatchError, match="names node 'nowhere'"):
        fxmerge.load(folder, model=network())


def test_weights_of_other_layers_are_a_mismatch(saved: tuple[Path, fxmerge.Result], tmp_path: Path) -> None:
    folder = forged(saved[0], tmp_path / "x", lambda about: about["plan"].update(merges=[]))
    with pytest.raises(fxmerge.PlanMismatchError, match="is in one of them only"):
        fxmerge.load(folder, model=network())


def test_a_model_of_another_dtype_is_a_mismatch(saved: tuple[Path, fxmerge.Result]) -> None:
    with pytest.raises(fxmerge.PlanMismatchError, match=r"is \(8, 3, 3, 3\) torch.float32 there and .* torch.float64 here"):
        fxmerge.load(saved[0], model=network().double(), example_inputs=images(2).double())


def test_a_student_saved_with_another_plan_is_told(tmp_path: Path) -> None:
    (_, student), (other, _) = students()
    with pytest.raises(fxmerge.PlanMismatchError, match="made with another plan"):
        fxmerge.save_student(student, other, images(2), tmp_path)


def test_a_student_that_went_through_pickle_is_told(tmp_path: Path) -> None:
    plan, student = students()[0]
    file = io.BytesIO()
    torch.save(student, file)
    file.seek(0)
    with pytest.raises(fxmerge.PlanMismatchError, match="went through pickle, which loses what the plan wrote"):
        fxmerge.save_student(torch.load(file, weights_only=False), plan, images(2), tmp_path)


def test_a_student_whose_training_diverged_leaves_the_old_save(tmp_path: Path) -> None:
    (plan, student), _ = students()
    fxmerge.save_student(student, plan, images(2), tmp_path)
    broken = copy.deepcopy(student)
    next(broken.parameters()).data[0] = float("nan")
    with pytest.raises(fxmerge.NotFiniteError, match="are NaN or infinite"):
        fxmerge.save_student(broken, plan, images(2), tmp_path)
    assert_equivalent(student, fxmerge.load(tmp_path, plain()).student, [images(2)], tolerance=0.0)


class Around(nn.Module):
    """The plain network with something before it."""

    def __init__(self, before: Callable[..., Tensor], **buffers: Tensor) -> None:
        super().__init__()
        self.net, self.before = plain(), before
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=name != "fleeting")

    def forward(self, x: Any) -> Any:
        return self.net(self.before(self, x))


def student_of(model: nn.Module, inputs: Any) -> tuple[fxmerge.Plan, torch.fx.GraphModule]:
    graph = fxmerge.trace(model.eval(), inputs)
    findings = fxmerge.find_segments(graph)
    candidate = next(c for p in fxmerge.propose(findings) for c in p.candidates if c.kind == "composed")
    plan = fxmerge.Plan(findings.fingerprint, (candidate,))
    return plan, fxmerge.linearize(fxmerge.annotate(graph, plan))


def standardised(model: Any, x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std()


def test_a_network_that_cannot_take_zeros_is_loaded(tmp_path: Path) -> None:
    plan, student = student_of(Around(standardised), images(2))
    fxmerge.save_student(student, plan, images(2), tmp_path)
    assert_equivalent(student, fxmerge.load(tmp_path, Around(standardised).eval()).student, [images(2)])


def test_inputs_in_lists_are_saved(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return Around(lambda model, x: x[0] + x[1]).eval()

    plan, student = student_of(model(), ([images(2), images(2)],))
    fxmerge.save_student(student, plan, ([images(2), images(2)],), tmp_path)
    assert_equivalent(student, fxmerge.load(tmp_path, model()).student, [([images(2), images(1)],)])


def test_an_argument_that_cannot_be_saved_is_asked_for(tmp_path: Path) -> None:
    plan, student = students()[0]
    fxmerge.save_student(student, plan, (torch.float32,), tmp_path)
    with pytest.raises(fxmerge.PlanError, match="an argument of type dtype is not saved; give load\\(\\) example_inputs"):
        fxmerge.load(tmp_path, plain())
    assert fxmerge.load(tmp_path, plain(), images(2)).plan == plan


def shifted(model: Any, x: Tensor) -> Tensor:
    return x * (model.one + model.two) + model.wide + model.fleeting


def test_buffers_that_are_views_or_not_in_the_state_dict_are_saved(tmp_path: Path) -> None:
    def model(seed: int) -> nn.Module:
        both = torch.rand(6, 1, 1, generator=torch.Generator().manual_seed(seed))
        wide = torch.full((1, 1, 1), 1.0 + seed).expand(3, 1, 1)
        return Around(shifted, one=both[:3], two=both[3:], wide=wide, fleeting=both[1:4].clone()).eval()

    plan, student = student_of(model(1), images(2))
    fxmerge.save_student(student, plan, images(2), tmp_path)
    assert_equivalent(student, fxmerge.load(tmp_path, model(2)).model, [images(2)])


def test_layers_that_share_weights_still_share_them(tmp_path: Path) -> None:
    def model() -> nn.Module:
        made: Any = plain()
        made[2].weight = made[4].weight
        return made  # type: ignore[no-any-return]

    plan, student = student_of(model(), images(2))
    fxmerge.save_student(student, plan, images(2), tmp_path)
    loaded = fxmerge.load(tmp_path, model()).student
    names = [name for name, _ in loaded.named_parameters(remove_duplicate=False)]
    assert len(names) == 1 + len(list(loaded.parameters()))


def test_a_plan_is_annotated_again_on_a_trained_student(saved: tuple[Path, fxmerge.Result]) -> None:
    _, result = saved
    with torch.no_grad():
        for parameter in result.student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    student = result.student.double()
    for node in student.graph.nodes:
        node.meta["fxmerge"] = fxmerge.graph.meta.replace(fxmerge.graph.meta.facts(node), role="", merge=None)  # type: ignore[attr-defined]
    merged = fxmerge.fuse(fxmerge.annotate(student, result.plan))
    assert_equivalent(student, merged, [images(3).double()])
    assert len(list(merged.graph.nodes)) < len(list(student.graph.nodes))


def test_what_was_made_with_operators_of_ones_own_is_loaded_trained_and_fused_with_them(tmp_path: Path) -> None:
    table = default_operators().extended(modules={Gain: GainOperator()})
    model, x = with_gain(nn.ReLU(), Gain()), images(2).double()
    result = fxmerge.compress(
        model, x, speedup=1.6, calibration=images(32).double(), space="composed", timer=PriceTimer(), operators=table
    )
    result.save(tmp_path / "out")
    torch.manual_seed(3)
    loaded = fxmerge.load(tmp_path / "out", model, operators=table)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))  # no random numbers are used up
    assert_equivalent(loaded.model, result.model, [x])
    assert_equivalent(result.student_with_norms(), result.student, [x])
    with pytest.raises(fxmerge.PassError, match=r"cannot be multiplied out.* Give fuse\(\) the operators"):
        fxmerge.fuse(result.student)
