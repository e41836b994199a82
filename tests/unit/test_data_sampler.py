"""The sampler for several ranks: torch's order, and an exact place in it, under every loader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from moetion_lightning.data_sampler import ExactDistributedSampler
from moetion_lightning.errors import ConfigurationError, ForeignWindowError

LENGTH = 23


def make(rank: int = 0, **settings: Any) -> ExactDistributedSampler:
    return ExactDistributedSampler(LENGTH, **{"num_replicas": 2, "rank": rank, "seed": 5, **settings})


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("length", [0, 1, 2, 23, 24])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_order_is_that_of_torch(length: int, replicas: int, shuffle: bool, drop_last: bool) -> None:
    for rank in range(replicas):
        theirs = DistributedSampler(range(length), replicas, rank, shuffle, seed=7, drop_last=drop_last)
        mine = ExactDistributedSampler(
            range(length), num_replicas=replicas, rank=rank, shuffle=shuffle, seed=7, drop_last=drop_last
        )
        for epoch in (0, 1, 5):
            theirs.set_epoch(epoch)
            mine.set_epoch(epoch)
            assert list(mine) == list(theirs)
            assert len(mine) == len(theirs)


def test_order_neither_reads_nor_moves_the_global_generator() -> None:
    before = torch.get_rng_state()
    first = list(make())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert list(make()) == first


@pytest.mark.parametrize("epoch", [0, 3])
def test_continues_in_its_epoch_also_when_the_epoch_is_set_again(epoch: int) -> None:
    reference = make()
    reference.set_epoch(epoch)
    whole = list(reference)

    interrupted = make()
    interrupted.set_epoch(epoch)
    passing = iter(interrupted)
    drawn = [next(passing) for _ in range(4)]
    state = json.loads(json.dumps(interrupted.state_dict()))
    assert (state["epoch"], state["position"]) == (epoch, 4)

    resumed = make()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.set_epoch(epoch)
    assert drawn + list(resumed) == whole
    assert list(resumed) == whole  # only one pass continues


def test_another_epoch_begins_at_its_first_sample() -> None:
    sampler, reference = make(), make()
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 1, "position": 6})
    sampler.set_epoch(2)
    reference.set_epoch(2)
    assert sampler.state_dict()["position"] == 0
    assert list(sampler) == list(reference)


def test_setting_the_epoch_within_a_pass_keeps_the_place() -> None:
    sampler = make()
    passing = iter(sampler)
    next(passing)
    sampler.set_epoch(0)
    next(passing)
    assert sampler.state_dict()["position"] == 2


def test_an_abandoned_pass_does_not_move_the_place() -> None:
    sampler = make()
    abandoned, current = iter(sampler), iter(sampler)
    next(current)
    next(abandoned)
    next(abandoned)
    assert sampler.state_dict()["position"] == 1
    sampler.set_epoch(1)
    next(current)
    assert sampler.state_dict()["position"] == 0


def test_state_of_one_rank_fits_another() -> None:
    whole = list(make(rank=1))
    passing = iter(saved := make(rank=0))
    next(passing)
    other = make(rank=1)
    other.load_state_dict(saved.state_dict())
    assert list(other) == whole[1:]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("seed", {"seed": 6}),
        ("num_replicas", {"num_replicas": 3}),
        ("shuffle", {"shuffle": False}),
        ("drop_last", {"drop_last": True}),
    ],
)
def test_place_in_another_order_is_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ForeignWindowError, match=f"saved with {name}="):
        make(**settings).load_state_dict(make().state_dict())


def test_place_in_another_dataset_is_refused() -> None:
    other = ExactDistributedSampler(LENGTH + 1, num_replicas=2, rank=0, seed=5)
    with pytest.raises(ForeignWindowError, match="saved with length=23, now length=24"):
        other.load_state_dict(make().state_dict())


@pytest.mark.parametrize(("rank", "replicas"), [(2, 2), (-1, 2), (0, 0)])
def test_rank_out_of_range_is_refused(rank: int, replicas: int) -> None:
    with pytest.raises(ConfigurationError, match="num_replicas"):
        ExactDistributedSampler(4, num_replicas=replicas, rank=rank)


def epochs(loader: Any, sampler: ExactDistributedSampler, first: int) -> Iterator[list[int]]:
    for epoch in range(first, 3):
        sampler.set_epoch(epoch)
        for batch in loader:
            yield batch.tolist()


def loader_of(kind: str, sampler: ExactDistributedSampler, workers: int, drop_last: bool) -> Any:
    if kind == "stateful":
        factory = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    else:
        factory = DataLoader
    return factory(range(LENGTH), batch_size=4, sampler=sampler, num_workers=workers, drop_last=drop_last)


# 12 samples a rank without drop_last, 11 with: 3 batches of 4 an epoch, or 2 when incomplete ones are dropped.
@pytest.mark.parametrize("drawn", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_stateful_loader_continues_exactly(rank: int, drop_last: bool, drawn: int) -> None:
    check_stateful_loader(rank, drop_last, drawn, workers=0)


@pytest.mark.parametrize("drawn", [1, 5])
@pytest.mark.parametrize("rank", [0, 1])
def test_stateful_loader_with_workers_continues_exactly(rank: int, drawn: int) -> None:
    check_stateful_loader(rank, rank == 1, drawn, workers=2)


def check_stateful_loader(rank: int, drop_last: bool, drawn: int, workers: int) -> None:
    sampler = make(rank, drop_last=drop_last)
    reference = list(epochs(loader_of("plain", sampler, 0, drop_last), sampler, 0))

    sampler = make(rank, drop_last=drop_last)
    loader = loader_of("stateful", sampler, workers, drop_last)
    batches = epochs(loader, sampler, 0)
    before = [next(batches) for _ in range(drawn)]
    epoch, state = sampler.epoch, loader.state_dict()
    batches.close()

    sampler = make(rank, drop_last=drop_last)
    loader = loader_of("stateful", sampler, workers, drop_last)
    loader.load_state_dict(state)
    after = list(epochs(loader, sampler, epoch))
    assert before + after == reference


def test_stateful_loader_saved_between_epochs_begins_the_next_one() -> None:
    sampler = make()
    loader = loader_of("stateful", sampler, 0, False)
    list(loader)
    state = loader.state_dict()
    sampler = make()
    loader = loader_of("stateful", sampler, 0, False)
    loader.load_state_dict(state)
    sampler.set_epoch(1)
    reference = make()
    reference.set_epoch(1)
    assert [i for batch in loader for i in batch.tolist()] == list(reference)


@pytest.mark.parametrize("epoch", [0, 2])
def test_plain_loader_continues_exactly(epoch: int) -> None:
    def batches(sampler: ExactDistributedSampler) -> Iterator[list[int]]:
        sampler.set_epoch(epoch)
        yield from (batch.tolist() for batch in loader_of("plain", sampler, 0, False))

    reference = list(batches(make()))
    interrupted = make()
    passing = batches(interrupted)
    before = [next(passing)]
    resumed = make()
    resumed.load_state_dict(interrupted.state_dict())
    assert before + list(batches(resumed)) == reference
