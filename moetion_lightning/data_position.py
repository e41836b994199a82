"""Where a data loader stands, so that the same batches follow after a restart: none lost, none twice.

Any loader is brought back by *re-iterating*: the state of every random number generator at ``iter(loader)`` is
recorded, put back, the iterator is made again, and as many batches as had been drawn are skipped. That is exact for
shuffling, samplers with generators, workers and persistent workers. Loaders and datasets that can save their own
position (``state_dict``) are asked to do so instead, which costs nothing on restart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from moetion_lightning.core.run_state import find_generators, get_rng, set_rng

__all__ = ["LoaderPosition", "loader_parts", "make_resumable", "release"]

_log = logging.getLogger(__name__)
_ATTRIBUTE = "_moetion_position"
_SAY_FROM_BATCHES = 100


def loader_parts(loader: object) -> dict[str, object]:
    """The objects of a loader that may hold generators, by role."""
    parts: dict[str, object] = {"loader": loader}
    for role in ("sampler", "batch_sampler", "dataset"):
        part = getattr(loader, role, None)
        if part is not None:
            parts[role] = part
    role, batches = "batch_sampler", parts.get("batch_sampler")
    while (dealt := getattr(batches, "batch_sampler", None)) is not None:  # it deals out another one's (Accelerate)
        role, batches = f"inner_{role}", dealt
        parts[role] = batches
    inner = getattr(batches, "sampler", None)
    if inner is not None:
        parts["inner_sampler"] = inner
    for role in ("collate_fn", "worker_init_fn"):
        if hasattr(getattr(loader, role, None), "__dict__"):
            parts[role] = getattr(loader, role)
    for role in ("sampler", "inner_sampler"):
        wrapped = _wrapped_sampler(parts.get(role))
        if wrapped is not None:
            parts[f"{role}.wrapped"] = wrapped
    _add_wrapped(parts, "dataset")
    return parts


def _wrapped_sampler(sampler: object) -> object | None:
    """The sampler that Lightning's ``DistributedSamplerWrapper`` deals out to the ranks: of its list, as a dataset."""
    return getattr(getattr(sampler, "dataset", None), "_sampler", None)


def _add_wrapped(parts: dict[str, object], role: str, depth: int = 4) -> None:
    """Datasets wrap datasets (``Subset``, ``ConcatDataset``) and hold transforms."""
    owner = parts.get(role)
    for attribute in ("dataset", "datasets", "transform", "transforms", "target_transform"):
        inner = getattr(owner, attribute, None)
        for index, item in enumerate(inner if isinstance(inner, (list, tuple)) else [inner]):
            name = f"{role}.{attribute}{index}"
            if item is not None and hasattr(item, "__dict__") and depth:
                parts[name] = item
                _add_wrapped(parts, name, depth - 1)


def _is_stateful(obj: object) -> bool:
    return callable(getattr(obj, "state_dict", None)) and callable(getattr(obj, "load_state_dict", None))


@dataclass(kw_only=True)
class _Pass:
    """One pass over the loader.

    Args:
        start: Generators (and sampler epochs) at ``iter(loader)``.
        first: Generators right before its first batch: an in-process sampler draws its order only then.
        drawn: Batches drawn.
    """

    start: Mapping[str, Any]
    first: Mapping[str, Any] | None = None
    drawn: int = 0


class LoaderPosition:
    """Follows one loader.

    Args:
        loader: Any iterable of batches.
    """

    def __init__(self, loader: object) -> None:
        self._loader = loader
        self._passes: list[_Pass] = []
        self._pending: Mapping[str, Any] | None = None
        self._said = False
        dataset = getattr(loader, "dataset", None)
        self._in_process = getattr(loader, "num_workers", 0) == 0
        self._stateful: Any = None  # whose own state is the position: the loader, or an iterable dataset
        if _is_stateful(loader):
            # A loader that loads its state asks the sampler for its order several times. Each time a wrapped sampler
            # draws a new one at once, and its generator is in nobody's state: then only re-iterating is exact. So it is
            # with workers, which begin with new generators, unless an iterable dataset keeps its own position there.
            wrapped = any(role.endswith(".wrapped") for role in loader_parts(loader))
            if not wrapped and (self._in_process or isinstance(dataset, IterableDataset)):
                self._stateful = loader
        elif isinstance(dataset, IterableDataset) and _is_stateful(dataset) and self._in_process:
            self._stateful = dataset
        # Workers that live on carry their generators from pass to pass: only all passes bring them back.
        self._keeps_workers = bool(getattr(loader, "persistent_workers", False)) and not self._in_process

    @property
    def keeps_workers(self) -> bool:
        """Whether workers live on from pass to pass, with generators that only all passes bring back."""
        return self._keeps_workers

    @property
    def drawn(self) -> int:
        """Batches drawn in the present pass."""
        return self._passes[-1].drawn if self._passes else 0

    def generators(self) -> dict[str, object]:
        """The generators of the loader's parts, by name."""
        return find_generators(loader_parts(self._loader))

    def snapshot(self) -> dict[str, Any]:
        """The position before the next batch is drawn (plain values and tensors)."""
        passes = [{"start": p.start, "first": p.first, "drawn": p.drawn} for p in self._passes]
        state: dict[str, Any] = {"passes": passes, "now": self._generators()}
        if self._stateful is not None and self._passes:
            state["own"] = self._stateful.state_dict()
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue there at the next ``iter(loader)``."""
        self._pending = state

    def forget(self) -> None:
        """A training run begins: passes of earlier ones are not its own."""
        self._passes = []

    def iterate(self, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """An iterator over the loader that is followed.

        Args:
            make: The loader's own ``__iter__``.
        """
        if self._pending is not None and self._pending["passes"]:
            pending, self._pending = self._pending, None
            iterator = self._resume(pending, make)
        else:
            self._pending = None
            self._begin_pass(self._start())
            iterator = make()
        return _Followed(iterator, self)

    def drawing(self) -> None:
        """A batch is about to be drawn."""
        current = self._passes[-1]
        if current.first is None:
            current.first = self._generators()

    def drew(self) -> None:
        """A batch was drawn."""
        self._passes[-1].drawn += 1

    def _begin_pass(self, start: Mapping[str, Any], first: Mapping[str, Any] | None = None, drawn: int = 0) -> None:
        if not self._keeps_workers:
            self._passes = []
        self._passes.append(_Pass(start=start, first=first, drawn=drawn))

    def _generators(self) -> dict[str, Any]:
        return get_rng(find_generators(loader_parts(self._loader)))

    def _start(self) -> dict[str, Any]:
        parts = loader_parts(self._loader)
        start: dict[str, Any] = {"rng": self._generators()}
        epochs = {
            role: part.epoch  # type: ignore[attr-defined]
            for role, part in parts.items()
            if isinstance(getattr(part, "epoch", None), int) and callable(getattr(part, "set_epoch", None))
        }
        if epochs:
            start["epochs"] = epochs
        return start

    def _resume(self, state: Mapping[str, Any], make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        own = state.get("own")
        passes = state["passes"] if own is None else state["passes"][-1:]
        parts = loader_parts(self._loader)
        iterator: Iterator[Any] | None = None
        for saved in passes:
            start, first, drawn = saved["start"], saved["first"], saved["drawn"]
            for role, epoch in start.get("epochs", {}).items():
                if role in parts:
                    parts[role].set_epoch(epoch)  # type: ignore[attr-defined]
            set_rng(start["rng"], find_generators(parts))
            if own is not None:
                self._stateful.load_state_dict(own)
            iterator = make()
            if own is None and drawn:
                if first is not None:
                    set_rng(first, find_generators(parts))
                self._skip(iterator, drawn)
            self._begin_pass(start, first, drawn)
        set_rng(state["now"], find_generators(parts))  # of the dataset, too: skipping by the sampler leaves them behind
        assert iterator is not None
        return iterator

    def _skip(self, iterator: Iterator[Any], count: int) -> None:
        dataset = getattr(self._loader, "dataset", None)
        map_style = isinstance(iterator, _BaseDataLoaderIter) and not isinstance(dataset, IterableDataset)
        if map_style and self._in_process:
            # The sampler alone moves on: a map-style dataset has no position of its own, and the generators that it may
            # use are put back before the next batch is drawn.
            for _ in range(count):
                iterator._next_index()  # type: ignore[attr-defined]
            iterator._num_yielded += count  # type: ignore[attr-defined]
            return
        if count >= _SAY_FROM_BATCHES and not self._said:
            self._said = True
            _log.info(
                "drawing %d batches again to reach the data position; a loader or dataset with state_dict() and "
                "load_state_dict() (torchdata's StatefulDataLoader) restarts at once", count,
            )  # fmt: skip
        for _ in range(count):
            next(iterator)


class _Followed(Iterator[Any]):
    """Counts what is drawn from the loader's own iterator."""

    def __init__(self, iterator: Iterator[Any], position: LoaderPosition) -> None:
        self._iterator = iterator
        self._position = position

    def __next__(self) -> Any:
        self._position.drawing()
        batch = next(self._iterator)
        self._position.drew()
        return batch

    def __len__(self) -> int:
        return len(self._iterator)  # type: ignore[arg-type]


class _FollowedIterable:
    """Stands for an iterable whose class cannot be extended (a list, a generator function's object)."""

    def __init__(self, iterable: Any) -> None:
        self._moetion_iterable = iterable
        self._moetion_position = LoaderPosition(iterable)

    def __iter__(self) -> Iterator[Any]:
        return self._moetion_position.iterate(lambda: iter(self._moetion_iterable))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_moetion_iterable"], name)


class _FollowedSized(_FollowedIterable):
    def __len__(self) -> int:
        return len(self._moetion_iterable)


_classes: dict[type, type] = {}


def release(loader: Any) -> None:
    """Undo :meth:`make_resumable` on a loader that it changed."""
    if isinstance(loader, DataLoader) and _ATTRIBUTE in loader.__dict__:
        object.__setattr__(loader, "__class__", type(loader).__mro__[1])
        del loader.__dict__[_ATTRIBUTE]


def make_resumable(loader: Any, kind: type[LoaderPosition] = LoaderPosition) -> tuple[Any, LoaderPosition]:
    """Follow a loader from now on.

    A ``DataLoader`` stays the same object; its class becomes a subclass of its own that differs in ``__iter__`` alone.
    Other iterables are wrapped.

    Args:
        loader: The loader.
        kind: What follows a ``DataLoader``.

    Returns:
        The loader to use from now on, and its position.
    """
    known = getattr(loader, _ATTRIBUTE, None)
    if isinstance(known, LoaderPosition):
        return loader, known
    if not isinstance(loader, DataLoader):
        wrapped = _FollowedSized(loader) if hasattr(loader, "__len__") else _FollowedIterable(loader)
        return wrapped, wrapped._moetion_position
    base = type(loader)
    if base not in _classes:

        def __iter__(self: Any) -> Iterator[Any]:
            position: LoaderPosition = self.__dict__[_ATTRIBUTE]
            return position.iterate(lambda: base.__iter__(self))

        namespace = {"__iter__": __iter__, "__doc__": base.__doc__, "__module__": base.__module__}
        _classes[base] = type(base.__name__, (base,), namespace)
    position = kind(loader)
    object.__setattr__(loader, _ATTRIBUTE, position)
    object.__setattr__(loader, "__class__", _classes[base])
    return loader, position
