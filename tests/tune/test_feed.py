"""Batches are shared out between processes, each once, and an epoch gone through again gives the same."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from fxmerge.errors import InputError
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


@pytest.mark.parametrize("shuffled", [True, False])
def test_a_loader_is_left_as_it_was(shuffled: bool) -> None:
    """accelerate writes into the samplers of the loader that it is given."""
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(torch.arange(32.0)[:, None], torch.arange(32)), 8, shuffle=shuffled, generator=generator)
    sampler, state = loader.batch_sampler.sampler, generator.get_state()  # type: ignore[union-attr]
    feed = Feed(loader, Accelerator(), seed=1)
    orders = [torch.cat([labels for _, labels in feed.epoch(number)]).tolist() for number in (0, 1, 0)]
    assert loader.batch_sampler.sampler is loader.sampler is sampler  # type: ignore[union-attr]
    assert torch.equal(generator.get_state(), state)
    assert orders[0] == orders[2]
    assert (orders[0] != orders[1]) == shuffled
    assert sorted(orders[0]) == list(range(32))


def test_a_loader_without_a_length_is_counted() -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(20):
                yield torch.full((1,), float(number)), torch.tensor(number)

    feed = Feed(DataLoader(Stream(), batch_size=5), Accelerator(), seed=1)
    assert feed.steps() == 4
    assert torch.cat([labels for _, labels in feed.epoch(0)]).tolist() == list(range(20))


def test_what_made_the_inputs_is_not_trained_along() -> None:
    images = torch.ones(4, 1, requires_grad=True) * 2
    feed = Feed([(images, torch.zeros(4))], Accelerator(), seed=1)
    [((inputs,), _)] = list(feed.epoch(0))
    assert not inputs.requires_grad


def test_a_function_that_gives_no_batches_is_told() -> None:
    with pytest.raises(InputError, match="must give batches; gave NoneType"):
        Feed(lambda epoch: None, Accelerator(), seed=1).steps()  # type: ignore[arg-type, return-value]


def test_a_loader_with_a_batch_sampler_is_left_as_it_was_too() -> None:
    """Its inner sampler is not the loader's own."""
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.arange(32.0)[:, None], torch.arange(32))
    inner = RandomSampler(data, generator=generator)
    loader = DataLoader(data, batch_sampler=BatchSampler(inner, 8, drop_last=False))
    state = generator.get_state()
    order = torch.cat([labels for _, labels in Feed(loader, Accelerator(), seed=1).epoch(0)]).tolist()
    assert sorted(order) == list(range(32))
    assert loader.batch_sampler.sampler is inner  # type: ignore[union-attr]
    assert torch.equal(generator.get_state(), state)
