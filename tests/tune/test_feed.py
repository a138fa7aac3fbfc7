"""Batches are shared out between processes, each once, and an epoch gone through again gives the same."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from fxmerge.tune.feed import Feed


def process(index: int, count: int) -> SimpleNamespace:
    return SimpleNamespace(process_index=index, num_processes=count, device=torch.device("cpu"))


def drawn(epoch: int) -> list[tuple[Tensor, int]]:
    """Five batches, numbered, of noise from the global generator."""
    return [(torch.rand(2), number) for number in range(5)]


def test_every_process_takes_its_turn_and_what_does_not_go_round_is_left_out_in_training() -> None:
    feeds = [Feed(drawn, process(index, 2), 0) for index in (0, 1)]
    assert [feed.steps() for feed in feeds] == [2, 2]
    assert [[label for _, label in feed.epoch(0)] for feed in feeds] == [[0, 2], [1, 3]]


def test_all_batches_are_judged_on_by_somebody() -> None:
    feeds = [Feed(drawn(0), process(index, 2), 0) for index in (0, 1)]
    assert [[label for _, label in feed.whole()] for feed in feeds] == [[0, 2, 4], [1, 3]]


def test_an_epoch_gone_through_again_from_its_midst_draws_what_it_drew() -> None:
    feed = Feed(lambda epoch: ((torch.rand(2), number) for number in range(5)), process(0, 1), 7)
    before = torch.get_rng_state()
    whole = [inputs[0] for inputs, _ in feed.epoch(1)]
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    rest = [inputs[0] for inputs, _ in feed.epoch(1, skip=2)]
    assert len(rest) == 3
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    assert not torch.equal(whole[0], next(feed.epoch(2))[0][0])


def test_inputs_become_the_arguments_of_a_network() -> None:
    feed = Feed([((torch.zeros(1), torch.ones(1)), None)], process(0, 1), 0)
    (inputs, labels) = next(feed.epoch(0))
    assert isinstance(inputs, tuple)
    assert [float(value) for value in inputs] == [0.0, 1.0]
    assert labels is None
