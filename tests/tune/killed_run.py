"""A training run with everything that draws random numbers, for a process that is killed: folder [pause]."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fxmerge
from fxmerge.tune import Recipe, calibrate_norms, fine_tune
from fxmerge.tune.checkpoints import held
from tests.small import images, network


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images that are changed by three generators whenever they are read."""

    def __init__(self) -> None:
        self.images = images(32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        changed = self.images[index] + torch.randn(1) * 0.1 + random.random() * 0.1 + float(numpy.random.rand()) * 0.1
        return changed, torch.tensor(index % 5)


def main(folder: Path, pause: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(time.time_ns() % 2**31)  # nothing must come from outside
    original = network(blocks=2)
    original.insert(len(original) - 1, nn.Dropout(0.3))
    original.eval()
    graph = fxmerge.trace(original, images(4))
    findings = fxmerge.find_segments(graph)
    fitted = next(c for p in fxmerge.propose(findings) for c in p.candidates if c.kind == "fitted")
    plan = fxmerge.Plan(findings.fingerprint, (fitted,))
    weights = fxmerge.fit(findings, plan, images(64))
    student = fxmerge.linearize(fxmerge.annotate(graph, plan), weights=weights, norms=True)
    calibrate_norms(student, [(images(64),)])
    data = DataLoader(Augmented(), batch_size=8, shuffle=True)
    trained = fine_tune(
        student,
        data,
        teacher=graph,
        recipe=Recipe(epochs=3, checkpoint_steps=1),
        validation=[(images(32, 3), torch.arange(32) % 5)],
        checkpoints=folder,
        progress=lambda done, total: time.sleep(0.2 if pause and done > 6 else 0.0),
    )
    save_file({name: tensor.clone() for name, tensor in held(trained).items()}, folder / "final.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), len(sys.argv) > 2)
