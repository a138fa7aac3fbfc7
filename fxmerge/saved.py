"""Students on disk: one safetensors file with weights, plan and a checksum; no pickle, and nothing half written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule

from fxmerge.core.files import replacing
from fxmerge.core.plan import Plan
from fxmerge.core.tensors import apart, checksum
from fxmerge.errors import PlanError, PlanMismatchError
from fxmerge.graph.meta import origin
from fxmerge.graph.trace import as_arguments, check_finite, trace
from fxmerge.operators import Operators
from fxmerge.passes.adjust import give_biases
from fxmerge.passes.annotate import annotate, merges
from fxmerge.passes.fuse_segments import fuse
from fxmerge.passes.linearize import added_norms, linearize

#: All that is loaded is in the first, so that it is replaced whole or not at all; the others are for people.
STUDENT, PLAN, REPORT = "student.safetensors", "plan.json", "report.txt"

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Loaded:
    """What :func:`load` read: the merged network, its student, the plan."""

    model: GraphModule
    student: GraphModule
    plan: Plan


def save_student(
    student: GraphModule, plan: Plan, example_inputs: Any, directory: str | os.PathLike[str], *, report: str = ""
) -> None:
    """Write a student, trained or not, so that :func:`load` can make it again from the original model.

    Interrupted at any moment, it leaves a folder that loads as it was before, or as it is after.

    Args:
        student: from :func:`fxmerge.linearize`.
        plan: what it was made with.
        example_inputs: of the network; their sizes are written, not their values.
        directory: made if need be.
        report: a text to put beside.

    Raises:
        PlanMismatchError: the student was not made with this plan, or it went through pickle and no longer knows its plan.
        NotFiniteError: one of its weights is NaN or infinite.
    """
    _check_made_with(student, plan)
    check_finite(student)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: apart(tensor) for name, tensor in _held(student).items()}
    about = json.dumps(
        {
            "format": FORMAT,
            "norms": bool(added_norms(student)),
            "inputs": [_described(value) for value in as_arguments(example_inputs)],
            "plan": plan.to_json(),
        }
    )
    with replacing(folder / STUDENT) as scratch:
        save_file(tensors, scratch, metadata={"about": about, "sha256": checksum(about, tensors)})
    plan.save(folder / PLAN)
    (folder / REPORT).write_text(report + "\n", encoding="utf-8")


def load(
    directory: str | os.PathLike[str], model: nn.Module, example_inputs: Any = None, *, operators: Operators | None = None
) -> Loaded:
    """Make student and merged network again from the original model and a saved folder. Nothing is unpickled.

    Args:
        directory: written by :meth:`Result.save` or :func:`save_student`; its ``student.safetensors`` is all that is read.
        model: the original network, as it was compressed; its weights do not matter.
        example_inputs: to trace it with; None for noise in 0..1 of the sizes and dtypes saved (integers: zeros).
        operators: what was known of operators when the plan was made; None for the default table.

    Raises:
        PlanError: the file is damaged or missing.
        PlanMismatchError: the plan or the weights belong to another model, or to one of another dtype.
    """
    path = Path(directory) / STUDENT
    about, tensors = _read(path)
    plan, norms, inputs = _understood(path, about, example_inputs)
    with torch.random.fork_rng(devices=[]):  # new layers are initialised before they get what was saved
        graph = trace(model, inputs, leaves=operators.modules if operators else ())
        student = linearize(annotate(graph, plan), norms=norms, operators=operators)
    _restore(student, tensors, path)
    check_finite(student)
    return Loaded(fuse(student, operators=operators), student, plan)


def _check_made_with(student: GraphModule, plan: Plan) -> None:
    if origin(student) is None:
        raise PlanMismatchError(
            "this graph is no student, or it went through pickle, which loses what the plan wrote on it: "
            "save the student that linearize() returned; load() makes it again"
        )
    if origin(student) != plan.fingerprint or {merge for _, merge in merges(student)} != set(plan.merges):
        raise PlanMismatchError("this student was made with another plan: save it with the plan that annotate() was given")


def _held(student: GraphModule) -> dict[str, Tensor]:
    """Every parameter and buffer, those included that a state dict leaves out, under every name it has."""
    return {**dict(student.named_parameters(remove_duplicate=False)), **dict(student.named_buffers(remove_duplicate=False))}


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The description and the weights in a file, as they were written."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except FileNotFoundError as fault:
        raise PlanError(f"{path} is missing: {path.parent} was not written by fxmerge, or not to the end") from fault
    except (OSError, SafetensorError) as fault:
        raise PlanError(f"{path} cannot be read, or is damaged: {fault}") from fault
    about = notes.get("about", "")
    if notes.get("sha256") != checksum(about, tensors):
        raise PlanError(f"{path} is damaged, or was not written by fxmerge: it has not the checksum that it was saved with")
    return about, tensors


def _understood(path: Path, about: str, example_inputs: Any) -> tuple[Plan, bool, Any]:
    """The plan, whether there are norms, and inputs to trace with."""
    try:
        data = json.loads(about)
        if data["format"] != FORMAT:
            raise PlanError(f"it is of format {data['format']!r:.40}, this version reads {FORMAT}")
        generator = torch.Generator().manual_seed(0)
        inputs = tuple(_example(value, generator) for value in data["inputs"]) if example_inputs is None else example_inputs
        return Plan.from_json(data["plan"]), bool(data["norms"]), inputs
    except PlanError as fault:
        raise PlanError(f"{path} cannot be used: {fault}") from fault
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError, RuntimeError) as fault:
        raise PlanError(f"{path} is damaged: {fault!r}") from fault


def _restore(student: GraphModule, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put saved weights in; in place, so that layers which share them still do."""
    give_biases(student, tensors.keys() - _held(student).keys())
    own = _held(student)
    strange = sorted(own.keys() ^ tensors.keys())
    if strange:
        raise PlanMismatchError(f"the weights in {path} do not fit this model: {strange[0]} is in one of them only")
    for name, mine in own.items():
        saved = tensors[name]
        if (mine.shape, mine.dtype) != (saved.shape, saved.dtype):
            raise PlanMismatchError(
                f"the weights in {path} do not fit this model: {name} is {tuple(saved.shape)} {saved.dtype} there and "
                f"{tuple(mine.shape)} {mine.dtype} here. Give the model as it was compressed, its dtype included."
            )
        mine.data = torch.empty_like(mine).copy_(saved)  # not copy_ alone: expanded buffers cannot be written


def _described(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_described(item) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    return {"unknown": type(value).__name__}


def _example(described: Mapping[str, Any], generator: torch.Generator) -> Any:
    for kind in (list, tuple):
        if kind.__name__ in described:
            return kind(_example(item, generator) for item in described[kind.__name__])
    if "unknown" in described:
        raise PlanError(f"an argument of type {described['unknown']} is not saved; give load() example_inputs")
    if "value" in described:
        return described["value"]
    dtype = getattr(torch, described["dtype"])
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.zeros(described["shape"], dtype=dtype)
    return torch.rand(described["shape"], dtype=dtype, generator=generator)
