"""The student is an ordinary network: a plain loop, Lightning, and somebody's own trainer train it, and what comes out merges.

Each test is an example to start from. In all of them the law holds afterwards: plan applied again, norms folded, merged.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader, TensorDataset

import fxmerge
from fxmerge.testing import assert_equivalent
from fxmerge.tune import calibrate_norms
from tests.small import images
from tests.tune.small import made


@pytest.fixture
def student() -> GraphModule:
    """Merged already, a norm behind each fitted convolution, which is given its statistics first."""
    student = copy.deepcopy(made().with_norms)
    calibrate_norms(student, [(images(64),)])
    return student


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(images(32), torch.arange(32) % 5), batch_size=8)


def assert_trained_and_merges(student: GraphModule) -> None:
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), made().with_norms.parameters(), strict=True))
    student = student.cpu().eval().double()
    merged = fxmerge.fuse(fxmerge.annotate(student, made().plan))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.modules())
    assert_equivalent(student, merged, [images(3, 7).double()])


def test_a_plain_loop(student: GraphModule) -> None:
    optimiser = torch.optim.AdamW(student.parameters(), 1e-3)
    student.train()
    for inputs, labels in loader():
        loss = F.cross_entropy(student(inputs), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert_trained_and_merges(student)


def test_lightning(student: GraphModule) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, at import
        lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed: pip install lightning")

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            inputs, labels = batch
            return F.cross_entropy(self.network(inputs), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few workers, no logger
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(student), loader())
    assert_trained_and_merges(student)


class OwnTrainer:
    """A trainer as people have them: it knows modules, loaders and callables, and nothing of fxmerge."""

    def __init__(self, network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self.network, self.optimiser = torch.nn.DataParallel(network) if torch.cuda.is_available() else network, optimiser
        self.average = torch.optim.swa_utils.AveragedModel(network)

    def fit(self, data: Iterable[tuple[Tensor, ...]]) -> nn.Module:
        self.network.train()
        for inputs, labels in data:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(self.network(inputs), labels)
            self.optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimiser.step()
            self.average.update_parameters(self.network)
        torch.optim.swa_utils.update_bn(data, self.average)
        return self.average.module


def test_a_trainer_of_ones_own_with_mixed_precision_and_averaging(student: GraphModule) -> None:
    trained = OwnTrainer(student, torch.optim.RMSprop(student.parameters(), 1e-4)).fit(loader())
    assert isinstance(trained, GraphModule)
    assert_trained_and_merges(trained)


def test_a_state_dict_goes_into_a_student_made_again(student: GraphModule) -> None:
    """What a trainer leaves on disk is a state dict; the plan makes the student that it belongs to."""
    state = student.state_dict()
    again = fxmerge.linearize(fxmerge.annotate(made().graph, made().plan), norms=True)
    again.load_state_dict(state)
    assert_equivalent(student.eval(), again.eval(), [images(2)])
