"""A training run on disk: one safetensors file, replaced whole, that a killed run goes on from bit by bit.

Tensors are what is trained, its average, the best state, and the optimiser's; all else is JSON beside them: how far the run is, the
random numbers of every process, the settings. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from fxmerge.core.files import replacing
from fxmerge.core.tensors import apart, checksum
from fxmerge.errors import PlanError, PlanMismatchError

FILE, FORMAT = "training.safetensors", 3


@dataclass(frozen=True, slots=True)
class Epoch:
    """What was reported at the end of an epoch.

    Args:
        number: from 1; 0 for the student as it was given.
        step: how many steps were done by then.
        loss: the mean training loss of the epoch; None before the first, and where the run was resumed in the midst of it
            the mean of what came after.
        metric: on the validation data; None without.
    """

    number: int
    step: int
    loss: float | None
    metric: float | None


@dataclass(frozen=True, slots=True)
class Position:
    """How far a run is: whole epochs done, steps into the next, steps in all, and what was reported."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float | None = None
    history: tuple[Epoch, ...] = ()

    def next_step(self) -> Position:
        return replace(self, batch=self.batch + 1, step=self.step + 1)


def held(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, those included that a state dict leaves out."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def write_checkpoint(
    folder: Path,
    networks: Mapping[str, Mapping[str, Tensor]],
    optimiser: Optimizer,
    position: Position,
    about: Mapping[str, Any],
) -> None:
    """Put a run on disk, whole or not at all.

    Args:
        folder: made if need be.
        networks: sets of tensors by name: the student's, its average's, the best.
        optimiser: torch's own, not wrapped.
        position: how far the run is.
        about: anything else that ``json`` can write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {}
    tensors = {f"{kind}/{name}": tensor for kind, state in networks.items() for name, tensor in state.items()}
    saved = optimiser.state_dict()
    for index, values in saved["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser/{index}/{key}"] = value
            else:
                numbers[f"{index}/{key}"] = value
    groups = [{name: value for name, value in group.items() if _is_number(value)} for group in saved["param_groups"]]
    notes = {"format": FORMAT, "position": asdict(position), "optimiser": numbers, "groups": groups, **about}
    copies = {name: apart(tensor) for name, tensor in tensors.items()}
    text = json.dumps(notes)
    with replacing(folder / FILE) as scratch:
        save_file(copies, scratch, metadata={"about": text, "sha256": checksum(text, copies)})


def _is_number(value: Any) -> bool:
    """Whether it is one, or several, such as JSON gives back."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_number, value))
    return isinstance(value, (int, float)) and math.isfinite(value)


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`read_checkpoint` found."""

    path: Path
    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]
    position: Position

    def fill(self, kind: str, state: Mapping[str, Tensor]) -> None:
        """Put one set of tensors back, in place.

        Raises:
            PlanMismatchError: it is of another network.
        """
        saved = {name.partition("/")[2]: tensor for name, tensor in self.tensors.items() if name.startswith(f"{kind}/")}
        if {name: (t.shape, t.dtype) for name, t in saved.items()} != {name: (t.shape, t.dtype) for name, t in state.items()}:
            raise PlanMismatchError(f"{self.path} belongs to another network; give another folder, or remove it to start anew")
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(saved[name])

    def has(self, kind: str) -> bool:
        return any(name.startswith(f"{kind}/") for name in self.tensors)

    def fill_optimiser(self, optimiser: Optimizer) -> None:
        """Give an optimiser made anew the state of the one that was saved.

        Raises:
            PlanMismatchError: it is of other parameters.
        """
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in self.tensors.items():
            if name.startswith("optimiser/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = tensor
        for name, value in self.about["optimiser"].items():
            index, key = name.split("/")
            state.setdefault(int(index), {})[key] = value
        groups = optimiser.state_dict()["param_groups"]
        if len(groups) != len(self.about["groups"]):
            raise PlanMismatchError(
                f"{self.path} was written with an optimiser of {len(self.about['groups'])} groups of parameters, now it has "
                f"{len(groups)}; give another folder, or remove it to start anew"
            )
        for group, saved in zip(groups, self.about["groups"], strict=True):  # some optimisers keep what they learn there
            group.update({name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
        strange = state.keys() - {index for group in groups for index in group["params"]}
        if strange:
            raise PlanMismatchError(
                f"{self.path} was written with another optimiser; give another folder, or remove it to start anew"
            )
        optimiser.load_state_dict({"state": state, "param_groups": groups})


def read_checkpoint(folder: Path, settings: Mapping[str, Any]) -> Checkpoint | None:
    """The run in a folder; None where there is none.

    Args:
        folder: given to :func:`write_checkpoint`.
        settings: of the run that would go on; they must be those saved.

    Raises:
        PlanError: the file is damaged.
        PlanMismatchError: it was made with other settings; says which.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        about = json.loads(notes["about"])
        if about["format"] != FORMAT:
            raise PlanError(
                f"{path} is of format {about['format']!r:.40}, this version reads {FORMAT}: give another folder, or remove it"
            )
        if notes.get("sha256") != checksum(notes["about"], tensors):
            raise ValueError("it has not the checksum that it was written with")
        missing = {"groups", "optimiser", "random", "scaler"} - about.keys()
        if missing:
            raise ValueError(f"it does not say {min(missing)}")
        where = dict(about["position"])
        position = Position(**where | {"history": tuple(Epoch(**epoch) for epoch in where["history"])})
        saved = dict(about["settings"])
    except (AttributeError, OSError, OverflowError, RecursionError, SafetensorError, KeyError, TypeError, ValueError) as fault:
        if isinstance(fault, PlanError):
            raise
        raise PlanError(f"{path} is damaged, or no checkpoint of fxmerge: {fault}. Remove it to start anew") from fault
    for name in sorted(saved.keys() | settings.keys()):
        if saved.get(name) != settings.get(name):
            raise PlanMismatchError(
                f"{path} was written with {name} = {saved.get(name)}, now it is {settings.get(name)}: go on with the same, "
                "give another folder, or remove it to start anew"
            )
    return Checkpoint(path, tensors, about, position)
