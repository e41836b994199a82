"""Samplers, datasets, collate functions and DataModules with state of their own, as users write them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, default_collate

from tests.runs.data import Samples

NOISE = np.random.default_rng(0)  # a generator of the file


# --- samplers --------------------------------------------------------------------------------------------------------


class Bucket(Sampler[list[int]]):
    """A batch sampler that counts its epochs itself."""

    def __init__(self, count: int, batch_size: int) -> None:
        self.count, self.batch_size = count, batch_size
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(5 + self.epoch)).tolist()
        self.epoch += 1
        for start in range(0, self.count, self.batch_size):
            yield order[start : start + self.batch_size]


class StatefulBucket(Bucket):
    """Says its state; a state that is loaded means the pass that comes next."""

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]


class Consumed(Bucket):
    """Counts the samples that it has given, over all epochs."""

    consumed_samples = 0

    def __iter__(self) -> Iterator[list[int]]:
        epoch, done = divmod(self.consumed_samples, self.count)
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(epoch)).tolist()
        for start in range(done, self.count, self.batch_size):
            self.consumed_samples += len(order[start : start + self.batch_size])
            yield order[start : start + self.batch_size]


class Order(Sampler[int]):
    """Shuffles its order in place, again and again: the class has the seed, the object what it has come to."""

    seed = 7

    def __init__(self, count: int) -> None:
        self.order = list(range(count))

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        self.seed += 1
        random.Random(self.seed).shuffle(self.order)
        return iter(list(self.order))


class Resumable(Order):
    """A hook of the user's may tell it where to begin."""

    consumed = 0

    def __iter__(self) -> Iterator[int]:
        begin, self.consumed = self.consumed, 0
        return iter(list(super().__iter__())[begin:])


# --- generators ------------------------------------------------------------------------------------------------------


class LazyCollate:
    """Makes its generator when it is first called, as collators of libraries do."""

    generator: Any = None

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.generator is None:
            self.generator = np.random.default_rng(42)
        batch: dict[str, Tensor] = default_collate(samples)
        batch["tokens"][:, 0] = int(self.generator.integers(32))
        return batch


class Jitter:
    """Holds a generator; the system's, which has no state, is not drawn from."""

    def __init__(self) -> None:
        self.rng, self.system = np.random.default_rng(1), random.SystemRandom()

    def __call__(self, tokens: Tensor) -> Tensor:
        tokens[0] = int(self.rng.integers(32))
        return tokens


class Steps:
    """Objects in a list in an object."""

    def __init__(self) -> None:
        self.steps = [Jitter()]

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.steps[0](tokens)


class Augmented(Samples):
    """Changed by whatever is called ``how``."""

    def __init__(self, count: int, how: str) -> None:
        super().__init__(count, augment=False)
        self.how = how
        self.pipeline: Any = Steps() if how == "deep" else None
        self.given = 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        tokens = sample["tokens"]
        if self.how == "rarely":
            if index == 20:
                tokens[0] = int(torch.randint(32, ()))
        elif self.how == "file":
            tokens[0] = int(NOISE.integers(32))
        elif self.how == "count":  # no generator at all
            self.given += 1
            tokens[0] = self.given % 32
        else:
            if self.pipeline is None:  # "lazy": what holds the generator is made here
                self.pipeline = Steps()
            self.pipeline(tokens)
        return sample


def _closure() -> Callable[[list[Any]], Any]:
    rng = random.Random(5)

    def collate(samples: list[Any]) -> Any:
        batch = default_collate(samples)
        batch["tokens"][:, 0] = rng.randrange(32)
        return batch

    return collate


# --- streams ---------------------------------------------------------------------------------------------------------


class Resuming(IterableDataset[dict[str, Tensor]]):
    """A stream that begins where it is told; a state that was loaded counts in every pass, as in ``datasets``."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self._starting: dict[str, Any] | None = None
        self._state: dict[str, Any] = {"position": 0}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._starting = state

    def _source(self) -> Iterator[dict[str, Tensor]]:
        self._state = {"position": 0 if self._starting is None else self._starting["position"]}
        while self._state["position"] < len(self.samples):
            self._state["position"] += 1
            yield self.samples[self._state["position"] - 1]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from self._source()


class Shuffled(Resuming):
    """Keeps samples back, which are in no state."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng, waiting = random.Random(3), []
        for sample in self._source():
            if len(waiting) == 8:
                place = rng.randrange(8)
                yield waiting[place]
                waiting[place] = sample
            else:
                waiting.append(sample)
        rng.shuffle(waiting)
        yield from waiting


class Skipping(IterableDataset[dict[str, Tensor]]):
    """A stream that a hook of the user's tells where to begin."""

    start = 0

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        start, self.start = self.start, 0
        for index in range(start, len(self.samples)):
            yield self.samples[index]


# --- loaders ---------------------------------------------------------------------------------------------------------


def _batches(kind: type[Bucket]) -> Callable[..., Any]:
    return lambda samples, size: DataLoader(samples, batch_sampler=kind(len(samples), size))


def _augmented(how: str, **settings: Any) -> Callable[..., Any]:
    return lambda samples, size: DataLoader(Augmented(len(samples), how), size, shuffle=True, **settings)


def _of(dataset: Callable[[Samples], Any]) -> Callable[..., Any]:
    return lambda samples, size: DataLoader(dataset(samples), size)


SOURCES: dict[str, Callable[[Samples, int], Any]] = {
    "bucket": _batches(Bucket),
    "stateful_bucket": _batches(StatefulBucket),
    "consumed": _batches(Consumed),
    "order": lambda samples, size: DataLoader(samples, size, sampler=Order(len(samples))),
    "resumable": lambda samples, size: DataLoader(samples, size, sampler=Resumable(len(samples))),
    "order_workers": lambda samples, size: DataLoader(samples, size, sampler=Order(len(samples)), num_workers=2),
    "lazy_collate": lambda samples, size: DataLoader(samples, size, shuffle=True, collate_fn=LazyCollate()),
    "lazy_collate_workers": lambda samples, size: DataLoader(
        samples, size, shuffle=True, collate_fn=LazyCollate(), num_workers=2, persistent_workers=True
    ),
    "closure": lambda samples, size: DataLoader(samples, size, shuffle=True, collate_fn=_closure()),
    "deep": _augmented("deep"),
    "lazy_owner": _augmented("lazy"),
    "file": _augmented("file"),
    "count": _augmented("count"),
    "deep_workers": _augmented("deep", num_workers=2, persistent_workers=True),
    "rarely_workers": _augmented("rarely", num_workers=3),
    "rarely_persistent": _augmented("rarely", num_workers=3, persistent_workers=True),
    "resuming": _of(Resuming),
    "shuffled": _of(Shuffled),
    "skipping": _of(Skipping),
}


# --- what a trainer's loaders come from ------------------------------------------------------------------------------


class ConsumedModule(pl.LightningDataModule):
    """Makes a shorter loader for what is left of an epoch, and saves what is done."""

    def __init__(self, samples: Dataset[Any], batch_size: int) -> None:
        super().__init__()
        self.samples, self.batch_size = samples, batch_size

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.trainer.global_step * self.batch_size}  # type: ignore[union-attr]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = state["consumed"]

    def train_dataloader(self) -> Any:
        count = len(self.samples)  # type: ignore[arg-type]
        begin, self.consumed = getattr(self, "consumed", 0) % count, 0
        return DataLoader(Subset(self.samples, range(begin, count)), self.batch_size)


class CutModule(ConsumedModule):
    """Its hook cuts the dataset itself."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        count = len(self.samples)  # type: ignore[arg-type]
        self.samples = Subset(self.samples, range(state["consumed"] % count, count))


class EpochModule(ConsumedModule):
    """Its loader depends on the epoch, on the step, and on random numbers when it is made."""

    def train_dataloader(self) -> Any:
        trainer: Any = self.trainer
        seed = 100 * trainer.current_epoch + trainer.global_step + int(torch.randint(1000, ()))
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.samples), generator=generator).tolist()  # type: ignore[arg-type]
        return DataLoader(Subset(self.samples, order), self.batch_size)


class GrowingModule(ConsumedModule):
    """Begins with few samples, and adds some in every epoch; their order is drawn when the loader is made."""

    def train_dataloader(self) -> Any:
        count = 20 + 4 * self.trainer.current_epoch  # type: ignore[union-attr]
        return DataLoader(Subset(self.samples, torch.randperm(count).tolist()), self.batch_size, shuffle=True)


DATAMODULES: dict[str, type[ConsumedModule]] = {
    "consumed": ConsumedModule,
    "cut": CutModule,
    "epoch": EpochModule,
    "growing": GrowingModule,
}


def hook(module: Any, loader: Any, batch_size: int) -> None:
    """Let a module's checkpoint hooks move its loader to its place."""

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = module.trainer.global_step

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        done = checkpoint["mine"] % len(loader) * batch_size if isinstance(loader.sampler, Order) else 8
        if isinstance(loader.dataset, Skipping):
            loader.dataset.start = done
        else:
            loader.sampler.consumed = done
            loader.sampler.seed = 7

    module.on_save_checkpoint, module.on_load_checkpoint = on_save_checkpoint, on_load_checkpoint


def fit_arguments(spec: dict[str, Any], module: Any, loader: Any) -> dict[str, Any]:
    """What ``Trainer.fit`` is given beside the module."""
    settings: dict[str, Any] = {}
    if spec["validation"]:
        settings = {"num_workers": 1, "persistent_workers": True, "shuffle": True}
    augment = spec["validation"] == "augmented"
    val = DataLoader(Samples(8, augment=augment), batch_size=4, **settings)
    if spec["source"] == "hooks":
        hook(module, loader, spec["batch_size"])
    elif spec["source"]:
        datamodule = DATAMODULES[spec["source"]](Samples(spec["samples"], augment=False), spec["batch_size"])
        datamodule.val_dataloader = lambda: val  # type: ignore[method-assign]
        return {"datamodule": datamodule}
    return {"train_dataloaders": loader, "val_dataloaders": val}
