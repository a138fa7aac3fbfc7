"""A training run for several processes: each process writes what it got into a folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxmerge.tune import Epoch, Recipe, calibrate_norms, fine_tune
from fxmerge.tune.checkpoints import held
from tests.small import images
from tests.tune.small import made


def main(folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if kind == "bf16" else "no")
    student, batch = made().with_norms, 16 // accelerator.num_processes
    calibrate_norms(student, [(images(64),)])
    if accelerator.is_main_process:
        save_file({name: tensor.clone() for name, tensor in held(student).items()}, folder / "given.safetensors")
    labelled = TensorDataset(images(48), torch.arange(48) % 5)
    loader = DataLoader(labelled, batch, shuffle=True)
    listed = [(images(48)[i : i + batch], torch.arange(48)[i : i + batch] % 5) for i in range(0, 48, batch)]
    told: list[Epoch] = []
    ran_in = _Dtypes()
    for module in student.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(ran_in)
    trained = fine_tune(
        student,
        listed if kind == "list" else loader,
        teacher=made().graph,
        recipe=Recipe(epochs=2, checkpoint_steps=1),
        validation={"loader": DataLoader(labelled, 7), "list": listed}.get(kind),
        checkpoints=folder / "checkpoints",
        accelerator=accelerator,
        progress=lambda done, total: os._exit(9) if kind == "killed" and done == 5 else None,
        report=told.append,
    )
    rank = accelerator.process_index
    save_file({name: tensor.clone() for name, tensor in held(trained).items()}, folder / f"{rank}.safetensors")
    about = {"told": [[epoch.step, epoch.metric] for epoch in told], "ran in": sorted(ran_in)}
    (folder / f"{rank}.json").write_text(json.dumps(about), encoding="utf-8")


class _Dtypes(set[str]):
    """Of what convolutions gave; a copied network notes them in the same set."""

    def __deepcopy__(self, memo: object) -> _Dtypes:
        return self

    def __call__(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.add(str(output.dtype))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
