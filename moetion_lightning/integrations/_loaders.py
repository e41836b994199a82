"""Loaders that a loop iterates through :meth:`~.loop.GuidedLoop.steps`, with their position.

Plain loaders are followed where the loop draws from them. Those that Fabric and Accelerate have prepared are followed
inside the wrapper, at the ``DataLoader`` that it draws from: there batches can be skipped without loading them.
Accelerate's wrapper draws ahead, so every draw is noted with the generators that it found: a dataset may use them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch.utils.data import IterableDataset

from moetion_lightning.core.run_state import set_rng
from moetion_lightning.data_position import LoaderPosition, loader_parts, make_resumable, release
from moetion_lightning.errors import ConfigurationError

__all__ = ["Followed", "follow"]

_ACCELERATE = {"DataLoaderShard", "DataLoaderDispatcher", "SkipDataLoader"}


class Followed(Protocol):
    """A loader that is followed.

    Attributes:
        source: What the loop was given.
    """

    source: Any

    def iterate(self) -> Iterator[Any]:
        """Begin a pass, or the rest of the one that was restored."""
        ...

    def finish(self) -> None:
        """The pass is over."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """The position before the batch that comes next."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue there at the next :meth:`iterate`."""
        ...

    def begin_epoch(self, epoch: int) -> None:
        """Tell a sampler whose order depends on the epoch."""
        ...

    def jump(self, epoch: int) -> None:
        """The next pass is that of an epoch, though this process has made none before."""
        ...

    def parts(self) -> dict[str, object]:
        """Objects that may hold generators."""
        ...

    def release(self) -> None:
        """Leave the loader as it was."""
        ...


def follow(loader: Any) -> Followed:
    """Follow a loader: torch's, Fabric's, Accelerate's, or any iterable of batches."""
    kinds = {kind.__name__ for kind in type(loader).__mro__ if kind.__module__.startswith("accelerate.")}
    if kinds & _ACCELERATE:
        ahead = "SkipDataLoader" not in kinds
        return _Wrapped(loader, loader.base_dataloader, "iteration", _draws_per_batch(loader, kinds), ahead=ahead)
    if kinds:
        raise ConfigurationError(
            f"steps({type(loader).__name__}): expected a loader of Accelerate that draws in this process. "
            "Loaders of XLA devices draw in threads of their own."
        )
    if hasattr(loader, "_dataloader") and hasattr(loader, "_num_iter_calls"):
        return _Wrapped(loader, loader._dataloader, "_num_iter_calls", 1, ahead=False)
    return _Direct(loader)


def _draws_per_batch(loader: Any, kinds: set[str]) -> int:
    """How many batches the wrapper draws in this process for one that it gives."""
    if "DataLoaderDispatcher" not in kinds:
        return 1
    if loader.state.process_index:
        return 0
    return 1 if loader.split_batches else int(loader.state.num_processes)


class _Direct:
    """A loader that the loop itself draws from."""

    def __init__(self, loader: Any) -> None:
        self.source = self._loader = loader
        self._position = LoaderPosition(loader)
        self._iterating = False

    def iterate(self) -> Iterator[Any]:
        self._iterating = True
        return self._position.iterate(lambda: iter(self._loader))

    def finish(self) -> None:
        self._iterating = False

    def snapshot(self) -> dict[str, Any]:
        return {"iterating": self._iterating, "position": self._position.snapshot()}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["iterating"]:
            self._position.restore(state["position"])
        elif self._position.keeps_workers:
            self._position.restore(state["position"])
            _exhaust(self._position.iterate(lambda: iter(self._loader)))

    def begin_epoch(self, epoch: int) -> None:
        for part in loader_parts(self._loader).values():
            if part is not self._loader and callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)  # type: ignore[attr-defined]

    def jump(self, epoch: int) -> None:
        """The loop tells the sampler, or the user does."""

    def parts(self) -> dict[str, object]:
        return loader_parts(self._loader)

    def release(self) -> None:
        """Nothing was changed."""


class _Draws(LoaderPosition):
    """Position of a loader that a wrapper draws from: as of each of the last draws.

    Args:
        loader: The loader.
    """

    def __init__(self, loader: object) -> None:
        super().__init__(loader)
        self._loader = loader
        # A wrapper makes a StatefulDataLoader of samplers that save nothing: when it loads its state, it asks them for
        # their order several times, and each time they draw another one.
        self._draws_again = self._stateful is loader and not isinstance(
            getattr(loader, "dataset", None), IterableDataset
        )
        if self._draws_again:
            self._stateful = None
        #: Whether the next pass is the loop's; it begins when the wrapper draws for the first time.
        self.expected = False
        self._generators_to_come: list[Mapping[str, Any]] = []
        self.records: deque[dict[str, Any]] = deque(maxlen=2)

    def expect(self, generators: list[Mapping[str, Any]]) -> None:
        """The next pass is the loop's (others, of whoever else iterates the loader, are not followed).

        Args:
            generators: States to put back before its first draws.
        """
        self.expected = True
        self._generators_to_come = generators
        self.records.clear()

    def iterate(self, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """See :class:`LoaderPosition`."""
        if not self.expected:
            return make()
        self.expected = False
        return super().iterate(make)

    def _skip(self, iterator: Iterator[Any], count: int) -> None:
        if not self._draws_again:
            super()._skip(iterator, count)
            return
        for _ in range(count):  # it counts what it gives, for its own state
            next(iterator)

    def drawing(self) -> None:
        """A batch is about to be drawn."""
        if self._generators_to_come:
            set_rng(self._generators_to_come.pop(0), self.generators())
        self.records.append(self.snapshot())
        super().drawing()


class _Wrapped:
    """A loader that draws from another one.

    Args:
        loader: What the loop iterates.
        inner: What that draws from.
        epoch: Its attribute that counts passes.
        per_batch: Draws from the inner loader for each batch.
        ahead: Whether it draws one batch ahead.
    """

    def __init__(self, loader: Any, inner: Any, epoch: str, per_batch: int, *, ahead: bool) -> None:
        followed, position = make_resumable(inner, _Draws)
        if followed is not inner or not isinstance(position, _Draws):
            raise ConfigurationError(
                f"steps({type(loader).__name__} of a {type(inner).__name__}): expected a DataLoader inside, which no "
                "running Trainer and no other steps() follows."
            )
        self.source = self._loader = loader
        self._inner, self._position = inner, position
        position.records = deque(maxlen=2 * per_batch + 2)
        self._epoch, self._per_batch, self._ahead = epoch, per_batch, ahead
        self._taken = 0
        self._epoch_number = getattr(loader, epoch)
        self._iterating = False
        self._pending: Mapping[str, Any] | None = None

    def iterate(self) -> Iterator[Any]:
        pending, self._pending = self._pending, None
        if pending is not None and not pending["begun"]:
            set_rng(pending["now"], self._position.generators())
            pending = None
        self._taken = 0 if pending is None else pending["taken"]
        self._epoch_number = getattr(self._loader, self._epoch)
        self._iterating = True
        self._position.expect([] if pending is None else list(pending["draws"]))
        if pending is not None and pending["at_end"]:  # the wrapper would not know that the pass had batches
            if self._position.keeps_workers:
                _exhaust(iter(self._inner))
            else:
                self._position.restore({"passes": []})
            set_rng(pending["now"], self._position.generators())
            setattr(self._loader, self._epoch, self._epoch_number + 1)
            return iter(())
        return self._take(iter(self._loader))

    def _take(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for batch in iterator:
            self._taken += 1
            yield batch

    def finish(self) -> None:
        self._iterating = False

    def snapshot(self) -> dict[str, Any]:
        position = self._position.snapshot()
        records: list[dict[str, Any]] = []
        if self._iterating and self._ahead:
            records = [r for r in self._position.records if _drawn(r) >= self._taken * self._per_batch]
        return {
            "iterating": self._iterating,
            "begun": not self._position.expected,
            "epoch": self._epoch_number if self._iterating else getattr(self._loader, self._epoch),
            "taken": self._taken,
            "at_end": self._iterating and self._ahead and bool(self._taken and self._loader.end_of_dataloader),
            "position": records[0] if records else position,
            "now": position["now"],
            # What the wrapper draws again, and then draws next.
            "draws": [*(r["now"] for r in records), position["now"]] if records else [],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        setattr(self._loader, self._epoch, state["epoch"])
        self._position.restore(state["position"])
        if state["iterating"]:
            self._pending = state
        if state["iterating"] and state["begun"]:
            return  # else the last pass is over
        if self._position.keeps_workers:
            self._position.expect([])
            _exhaust(iter(self._inner))
        else:
            self._position.restore({"passes": []})

    def begin_epoch(self, epoch: int) -> None:
        """The wrapper does that."""

    def jump(self, epoch: int) -> None:
        setattr(self._loader, self._epoch, epoch)

    def parts(self) -> dict[str, object]:
        return loader_parts(self._inner)

    def release(self) -> None:
        release(self._inner)


def _drawn(record: Mapping[str, Any]) -> int:
    passes = record["passes"]
    return int(passes[-1]["drawn"]) if passes else 0


def _exhaust(iterator: Iterator[Any]) -> None:
    for _ in iterator:
        pass
