"""The data position under the samplers that Lightning injects for several ranks (one rank of two, in one process)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch, _update_dataloader
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from moetion_lightning.data import make_resumable

LENGTH = 26  # 13 samples a rank: 4 batches an epoch, the last one incomplete
BATCHES = 4
EPOCHS = 3


class Augmented(Dataset[torch.Tensor]):
    """Sample ``i``, and a number from the global generator."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, int(torch.randint(1000, ()))])


def plain(rank: int, workers: int) -> Any:
    return injected(DataLoader(Augmented(), 4, shuffle=True, num_workers=workers), rank)


def weighted(rank: int, workers: int) -> Any:
    return injected(DataLoader(Augmented(), 4, sampler=weights(None), num_workers=workers), rank)


def weighted_generator(rank: int, workers: int) -> Any:
    return injected(DataLoader(Augmented(), 4, sampler=weights(4), num_workers=workers), rank)


def stateful(rank: int, workers: int) -> Any:
    return injected(stateful_loader(shuffle=True, num_workers=workers), rank)


def stateful_in_order(rank: int, workers: int) -> Any:
    return injected(stateful_loader(num_workers=workers), rank)


def stateful_weighted(rank: int, workers: int) -> Any:
    return injected(stateful_loader(sampler=weights(4), num_workers=workers), rank)


def weights(seed: int | None) -> WeightedRandomSampler:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return WeightedRandomSampler(torch.arange(1.0, LENGTH + 1), LENGTH, generator=generator)  # type: ignore[arg-type]


def stateful_loader(**settings: Any) -> Any:
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader(Augmented(), 4, **settings)


def injected(loader: Any, rank: int) -> Any:
    """What Lightning makes of the loader on this rank."""
    settings = {"num_replicas": 2, "rank": rank, "seed": 0}
    if isinstance(loader.sampler, (RandomSampler, SequentialSampler)):
        shuffle = isinstance(loader.sampler, RandomSampler)
        return _update_dataloader(loader, DistributedSampler(loader.dataset, shuffle=shuffle, **settings))
    return _update_dataloader(loader, DistributedSamplerWrapper(loader.sampler, shuffle=False, **settings))


def train(loader: Any, epoch: int, drawn: int, before: Callable[[], None]) -> list[Any]:
    """From a batch of an epoch to the end of the last one."""
    seen: list[Any] = []
    for number in range(epoch, EPOCHS):
        _set_sampler_epoch(loader, number)
        iterator = iter(loader)
        for _ in range(drawn if number == epoch else 0, BATCHES):
            before()
            seen.append(next(iterator).tolist())
        assert next(iterator, None) is None
    return seen


def once(function: Callable[[Any], None], argument: Any) -> Callable[[], None]:
    arguments = [argument]
    return lambda: function(arguments.pop()) if arguments else None


def check(
    make: Callable[[int, int], Any], rank: int, workers: int, steps: list[int], *, augmented: bool = True
) -> None:
    def shown(batches: list[Any]) -> list[Any]:
        return batches if augmented else [[sample[0] for sample in batch] for batch in batches]

    torch.manual_seed(1)
    loader, position = make_resumable(make(rank, workers))
    snapshots: list[Any] = []
    reference = train(
        loader, 0, 0, lambda: snapshots.append(copy.deepcopy((position.snapshot(), torch.get_rng_state())))
    )
    assert len(reference) == EPOCHS * BATCHES
    for step in steps:
        torch.manual_seed(2)
        state, generator = snapshots[step]
        loader, position = make_resumable(make(rank, workers))
        position.restore(state)
        resumed = train(loader, step // BATCHES, step % BATCHES, once(torch.set_rng_state, generator))
        assert shown(resumed) == shown(reference[step:]), f"at step {step}"


KINDS = [plain, weighted, weighted_generator, stateful, stateful_in_order, stateful_weighted]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("make", KINDS)
def test_same_batches_follow(make: Callable[[int, int], Any], rank: int) -> None:
    check(make, rank, 0, [0, 2, 4, 5, 7, 10])


@pytest.mark.parametrize("make", [plain, weighted_generator, stateful, stateful_weighted])
def test_same_batches_follow_with_workers(make: Callable[[int, int], Any]) -> None:
    check(make, 1, 2, [2, 5])


@pytest.mark.parametrize("make", [stateful_in_order])
def test_same_samples_follow_with_workers_of_a_loader_that_saves_its_state(make: Callable[[int, int], Any]) -> None:
    """Not what its workers drew at random: they are made anew, and their generators begin anew."""
    check(make, 1, 2, [2, 5], augmented=False)
