"""The networks that the other tests stand on: alive, the same every time, and with the keys that were promised."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.zoo import NETWORKS, ZOO, cifar_resnet, images, network, specimen

WEIGHTS = Path(__file__).resolve().parents[2] / "shared" / "weights"


@pytest.mark.parametrize("name", [*ZOO, *NETWORKS])
def test_outputs_neither_vanish_nor_explode_and_depend_on_the_input(name: str) -> None:
    big = name in NETWORKS
    model = network(name) if big else specimen(name)
    inputs = [images(name, size=(40, 40) if big else (12, 12), seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        one, other = (model(x) for x in inputs)
    assert 0.1 < float(one.abs().max()) < 1000
    assert float((one - other).abs().max()) > 0.01 * float(one.abs().max())


@pytest.mark.parametrize("name", ["residual_plus", "repvgg_block"])
def test_a_seed_gives_the_same_network_every_time_and_another_another(name: str) -> None:
    def state(seed: int) -> dict[str, Tensor]:
        return specimen(name, seed=seed).state_dict()

    assert all(torch.equal(value, state(0)[key]) for key, value in state(0).items())
    assert not any(torch.equal(value, state(1)[key]) for key, value in state(0).items() if key.endswith("weight"))


@pytest.mark.parametrize(("depth", "blocks"), [(20, 3), (56, 9)])
def test_a_cifar_resnet_has_the_keys_of_the_shared_weights(depth: int, blocks: int) -> None:
    layers = {re.sub(r"\.\w+$", "", key) for key in cifar_resnet(depth).state_dict()}
    inner = {f"layer{s}.{b}.{part}" for s in (1, 2, 3) for b in range(blocks) for part in ("conv1", "bn1", "conv2", "bn2")}
    assert layers == {"conv1", "bn1", "linear"} | inner


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="the shared weights are not on this machine")
@pytest.mark.parametrize("depth", [20, 56])
def test_the_shared_weights_load(depth: int) -> None:
    state = torch.load(WEIGHTS / f"resnet{depth}_cifar10_jpeg.pt", weights_only=True)
    assert not any(cifar_resnet(depth).load_state_dict(state))
