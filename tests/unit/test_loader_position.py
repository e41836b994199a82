"""Where a loader stands: what samplers hold, what workers do, states that are not whole, what does not fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from moetion_lightning.data import LoaderPosition, make_resumable, release
from moetion_lightning.errors import ForeignWindowError
from tests.runs.data import Samples, StatefulStream
from tests.runs.sources import Bucket, Resuming, Shuffled


class Permuted(Sampler[int]):
    """Shuffles a long order in place."""

    def __init__(self, count: int) -> None:
        self.order = list(range(count))

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        self.order[:] = [self.order[i] for i in torch.randperm(len(self.order)).tolist()]
        return iter(list(self.order))


def ids(batches: Any) -> list[Any]:
    return [batch["sample_id"].tolist() if isinstance(batch, dict) else batch.tolist() for batch in batches]


def after(loader: Any, passes: int, drawn: int) -> tuple[LoaderPosition, Any, dict[str, Any]]:
    """A loader in the middle of a pass."""
    loader, position = make_resumable(loader)
    for _ in range(passes):
        list(loader)
    iterator = iter(loader)
    for _ in range(drawn):
        next(iterator)
    return position, iterator, position.snapshot()


def test_order_that_is_shuffled_in_place_comes_back() -> None:
    def make() -> Any:
        return DataLoader(torch.arange(3000), 1000, sampler=Permuted(3000))

    torch.manual_seed(1)
    _, iterator, state = after(make(), passes=2, drawn=1)
    expected = ids(iterator)
    torch.manual_seed(2)
    loader, position = make_resumable(make())
    position.restore(state)
    assert ids(iter(loader)) == expected


def test_long_order_that_does_not_change_is_not_stored() -> None:
    class Given(Permuted):
        def __iter__(self) -> Iterator[int]:
            return iter(self.order)

    _, _, state = after(DataLoader(torch.arange(3000), 1000, sampler=Given(3000)), passes=1, drawn=1)
    assert state["passes"][0]["start"]["attributes"]["samplers"] == {"sampler": {}}


def test_setting_of_a_sampler_that_differs_is_said(caplog: pytest.LogCaptureFixture) -> None:
    _, _, state = after(DataLoader(Samples(8, augment=False), batch_sampler=Bucket(8, 2)), passes=1, drawn=1)
    sampler = Bucket(8, 2)
    sampler.batch_size = 4
    loader, position = make_resumable(DataLoader(Samples(8, augment=False), batch_sampler=sampler))
    position.restore(state)
    with caplog.at_level(logging.WARNING):
        assert len(ids(iter(loader))) == 3
    assert "batch_sampler.batch_size is 4 in this script and 2 in the window: the window's is used" in caplog.text
    assert "epoch" not in caplog.text


@pytest.mark.parametrize("size", [1, 4])
def test_loader_of_another_length_names_both(size: int) -> None:
    _, _, state = after(DataLoader(torch.arange(8), 2), passes=0, drawn=3)
    loader, position = make_resumable(DataLoader(torch.arange(8), size))
    position.restore(state)
    with pytest.raises(
        ForeignWindowError, match=rf"over 4 batches of 2 an epoch, this DataLoader has {8 // size} batch"
    ):
        iter(loader)


def test_loader_that_ends_too_early_is_explained() -> None:
    class Short(IterableDataset[int]):
        count = 4

        def __iter__(self) -> Iterator[int]:
            return iter(range(self.count))

    _, _, state = after(DataLoader(Short()), passes=0, drawn=3)
    Short.count = 2
    loader, position = make_resumable(DataLoader(Short()))
    position.restore(state)
    with pytest.raises(ForeignWindowError, match="is behind batch 3 of a pass, and this DataLoader ended after 2"):
        iter(loader)


@pytest.mark.parametrize(("kind", "trusted"), [(StatefulStream, True), (Resuming, True), (Shuffled, False)])
def test_state_of_a_stream_is_trusted_only_if_it_is_whole(kind: Any, trusted: bool) -> None:
    def make() -> Any:
        return DataLoader(kind(Samples(24, augment=False)), 2)

    _, iterator, state = after(make(), passes=0, drawn=5)
    assert ("own" in state) == trusted
    expected = ids(iterator)
    loader, position = make_resumable(make())
    position.restore(state)
    assert ids(iter(loader)) == expected
    assert len(ids(iter(loader))) == 12, "a state was loaded for one pass"


class Endless(StatefulStream):
    """Goes on where the last pass was left."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.position += 1
            yield self.samples[(self.position - 1) % len(self.samples)]


@pytest.mark.parametrize("kind", [StatefulStream, Endless])
@pytest.mark.parametrize("drawn", [0, 1])
def test_pass_of_a_stream_that_has_begun_and_drawn_nothing_comes_back(kind: type[StatefulStream], drawn: int) -> None:
    """What it says of itself then is where the pass before has ended."""

    def make() -> tuple[Any, LoaderPosition]:
        return make_resumable(DataLoader(kind(Samples(8, augment=False)), 2))

    def take(batches: Iterator[Any], count: int) -> list[Any]:
        return ids(batch for _, batch in zip(range(count), batches))

    torch.manual_seed(1)
    loader, position = make()
    assert len(take(iter(loader), 4)) == 4
    iterator = iter(loader)
    take(iterator, drawn)
    state = position.snapshot()
    expected, drawn_number = take(iterator, 3), torch.rand(1)
    torch.manual_seed(2)
    loader, position = make()
    position.restore(state)
    assert take(iter(loader), 3) == expected
    assert torch.equal(torch.rand(1), drawn_number)


def test_stream_whose_parts_are_called_buffers_is_not_trusted() -> None:
    class Buffered(Resuming):
        buffer_size = 8

        def __init__(self, samples: Samples) -> None:
            super().__init__(samples)
            self.buffer_size = 8

    _, _, state = after(DataLoader(Buffered(Samples(8, augment=False)), 2), passes=0, drawn=1)
    assert "own" not in state


def test_passes_of_others_are_not_followed() -> None:
    loader, position = make_resumable(DataLoader(torch.arange(8), 2, shuffle=True))
    iterator = iter(loader)
    next(iterator)
    position.expected = False
    before = position.indices_digest()
    assert len(list(loader)) == 4
    assert position.drawn == 1
    assert position.indices_digest() == before
    next(iterator)
    assert position.drawn == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_indices_of_the_batch_that_was_drawn(workers: int) -> None:
    loader, position = make_resumable(DataLoader(torch.arange(12), 3, shuffle=True, num_workers=workers))
    seen = [(batch.tolist(), position.drawn_indices(), position.indices_digest()) for batch in loader]
    assert all(batch == indices for batch, indices, _ in seen)
    assert len({digest for _, _, digest in seen}) == 4
    release(loader)
    assert type(loader) is DataLoader


def test_a_stream_shows_no_indices() -> None:
    position, _, _ = after(DataLoader(StatefulStream(Samples(8, augment=False)), 2), passes=0, drawn=1)
    assert position.indices_digest() is None


@pytest.mark.parametrize("augment", [False, True])
def test_workers_that_draw_are_told_apart(augment: bool) -> None:
    loader = DataLoader(Samples(8, augment=augment), 2, num_workers=1)
    collate = loader.collate_fn
    _, iterator, state = after(loader, passes=0, drawn=2)
    assert state["quiet"] == (not augment)
    assert loader.collate_fn is collate
    list(iterator)
