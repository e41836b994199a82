"""Data sets whose samples say who they are, behind every kind of loader."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    WeightedRandomSampler,
    default_collate,
)


class Samples(Dataset[dict[str, Tensor]]):
    """Sample ``i`` is a sequence of tokens; with augmentation it is changed by every generator there is."""

    def __init__(self, count: int, *, augment: bool) -> None:
        generator = torch.Generator().manual_seed(7)
        self.tokens = torch.randint(0, 32, (count, 5), generator=generator)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index].clone()
        if self.augment:
            tokens[random.randrange(5)] = random.randrange(32)
            tokens[int(np.random.randint(5))] = int(np.random.randint(32))
            tokens[int(torch.randint(5, ()))] = int(torch.randint(32, ()))
        return {"tokens": tokens, "target": tokens.sum() % 32, "sample_id": torch.tensor(index)}


class NoisySamples(Samples):
    """Changed by a generator of its own."""

    def __init__(self, count: int) -> None:
        super().__init__(count, augment=False)
        self.noise = np.random.default_rng(5)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        sample["tokens"][int(self.noise.integers(5))] = int(self.noise.integers(32))
        return sample


class NoisyCollate:
    """A batch is changed by a generator of the object that collates it."""

    def __init__(self) -> None:
        self.noise = random.Random(3)

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = default_collate(samples)
        batch["tokens"][:, 0] = self.noise.randrange(32)
        return batch


class Stream(IterableDataset[dict[str, Tensor]]):
    """The same samples as a stream of unknown length."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index in range(len(self.samples)):
            yield self.samples[index]


class StatefulStream(Stream):
    """A stream that knows where it stands."""

    position = 0
    resumed = False

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if not self.resumed:
            self.position = 0
        self.resumed = False
        while self.position < len(self.samples):
            self.position += 1
            yield self.samples[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
        self.resumed = True


class EpochSampler(Sampler[int]):
    """Order is a function of the epoch, as in DistributedSampler."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(100 + self.epoch)
        return iter(torch.randperm(self.count, generator=generator).tolist())


class PlainBatches:
    """An iterable of batches that is no DataLoader."""

    def __init__(self, samples: Samples, batch_size: int) -> None:
        self.loader = DataLoader(samples, batch_size=batch_size)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.loader)


class LeavingOut:
    """A loader without some of its batches; of no length, for its epochs have different ones.

    Args:
        loader: Draws them all.
        numbers: Those to leave out, counted over all passes.
    """

    def __init__(self, loader: Any, numbers: list[int]) -> None:
        self.loader = loader
        self.numbers = set(numbers)
        self.drawn = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.drawn += 1
            if self.drawn - 1 not in self.numbers:
                yield batch


def make_loader(kind: str, samples: Samples, batch_size: int) -> Any:
    count = len(samples)
    if kind == "shuffle":
        return DataLoader(samples, batch_size=batch_size, shuffle=True)
    if kind == "generator":
        sampler = RandomSampler(samples, generator=torch.Generator().manual_seed(3))
        return DataLoader(samples, batch_size=batch_size, sampler=sampler, generator=torch.Generator().manual_seed(4))
    if kind == "weighted":
        weights = torch.arange(1, count + 1).double()
        return DataLoader(samples, batch_size=batch_size, sampler=WeightedRandomSampler(weights, count))
    if kind == "epoch_sampler":
        return DataLoader(samples, batch_size=batch_size, sampler=EpochSampler(count))
    if kind == "workers":
        return DataLoader(samples, batch_size=batch_size, shuffle=True, num_workers=2)
    if kind == "persistent":
        return DataLoader(samples, batch_size=batch_size, shuffle=True, num_workers=2, persistent_workers=True)
    if kind == "stream":
        return DataLoader(Stream(samples), batch_size=batch_size)
    if kind == "stream_workers":
        return DataLoader(Stream(samples), batch_size=batch_size, num_workers=1)
    if kind == "stateful_stream":
        return DataLoader(StatefulStream(samples), batch_size=batch_size)
    if kind == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(samples, batch_size=batch_size, shuffle=True)
    if kind == "combined":  # the shorter one goes round while the longer one goes on
        return [
            DataLoader(samples, batch_size=batch_size, shuffle=True),
            DataLoader(Samples(count // 2 - 2, augment=False), batch_size=batch_size, shuffle=True),
        ]
    if kind == "noisy":
        return DataLoader(NoisySamples(count), batch_size=batch_size, shuffle=True)
    if kind == "noisy_subset":
        return DataLoader(Subset(NoisySamples(2 * count), range(count)), batch_size=batch_size, shuffle=True)
    if kind == "noisy_collate":
        return DataLoader(samples, batch_size=batch_size, shuffle=True, collate_fn=NoisyCollate())
    if kind == "plain":
        return PlainBatches(samples, batch_size)
    from tests.runs.sources import SOURCES

    return SOURCES[kind](samples, batch_size)
