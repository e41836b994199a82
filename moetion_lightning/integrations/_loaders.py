"""Loaders that a loop iterates through :meth:`~.loop.GuidedLoop.steps`, with their position.

Plain loaders are followed where the loop draws from them. Those that Fabric and Accelerate have prepared are followed
inside the wrapper, at the ``DataLoader`` that it draws from: there batches can be skipped without loading them.
Accelerate's wrapper draws ahead, so every draw is noted with the generators that it found: a dataset may use them.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from moetion_lightning.core.run_state import set_rng
from moetion_lightning.data import (
    LoaderPosition,
    Mark,
    Seen,
    length_of,
    loader_parts,
    make_resumable,
    release,
    unfollowed,
)
from moetion_lightning.data.indices import digest_of
from moetion_lightning.errors import ConfigurationError

__all__ = ["Followed", "follow"]

_ACCELERATE = {"DataLoaderShard", "DataLoaderDispatcher", "SkipDataLoader"}


class Followed:
    """A loader that is followed.

    Args:
        loader: What the loop iterates.
        inner: The ``DataLoader`` whose position is followed.

    Attributes:
        source: What the loop was given.
    """

    def __init__(self, loader: Any, inner: Any) -> None:
        self.source = self._loader = loader
        self._inner = inner
        self._make = functools.partial(unfollowed, inner)
        self._iterating = False
        #: What was restored, as long as nothing has been drawn since: until then it alone says where the loader stands.
        self._restored: Mapping[str, Any] | None = None

    def iterate(self) -> Iterator[Any]:
        """Begin a pass, or the rest of the one that was restored."""
        raise NotImplementedError

    def finish(self) -> None:
        """The pass is over."""
        self._iterating = False
        self._restored = None

    def snapshot(self) -> Mapping[str, Any]:
        """The position before the batch that comes next."""
        return self._snapshot() if self._restored is None else self._restored

    def _snapshot(self) -> dict[str, Any]:
        raise NotImplementedError

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue there at the next :meth:`iterate`."""
        self._restored = state
        self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def begin_epoch(self, epoch: int) -> None:
        """Tell a sampler whose order depends on the epoch, unless a wrapper does that."""

    def jump(self, epoch: int) -> None:
        """The next pass is that of an epoch, though this process has made none before; unless the user says so."""

    def parts(self) -> dict[str, object]:
        """Objects that may hold generators."""
        return {"loader": self._inner}

    def length(self) -> int | None:
        """Batches of a pass; None of a stream."""
        return length_of(self._loader)

    def indices_digest(self) -> str | None:
        """Digest of the indices that the sampler gave for the batch that the loop has; None if they are not seen."""
        raise NotImplementedError

    def release(self) -> None:
        """Leave the loader as it was."""
        release(self._inner)


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


class _Direct(Followed):
    """A loader that the loop itself draws from."""

    def __init__(self, loader: Any) -> None:
        release(loader)  # of an earlier loop that was not closed
        self._position = make_resumable(loader)[1] if isinstance(loader, DataLoader) else LoaderPosition(loader)
        super().__init__(loader, loader)
        self._position.expected = False  # the script may iterate it elsewhere, too

    def iterate(self) -> Iterator[Any]:
        self._restored = None
        self._iterating = True
        self._position.expected = True
        try:
            return self._position.iterate(self._make)
        finally:
            self._position.expected = False

    def _snapshot(self) -> dict[str, Any]:
        position = self._position
        return {
            "iterating": self._iterating,
            "position": position.snapshot() if self._iterating else position.snapshot_between(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state["iterating"]:
            self._position.restore(state["position"])
        else:
            self._position.restore_between(state["position"], self._make)

    def begin_epoch(self, epoch: int) -> None:
        for part in loader_parts(self._loader).values():
            if part is not self._loader and callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)  # type: ignore[attr-defined]

    def indices_digest(self) -> str | None:
        return self._position.indices_digest()


class _Draws(LoaderPosition):
    """Position of a loader that a wrapper draws from: as of each of the last draws.

    Args:
        loader: The loader.
    """

    def __init__(self, loader: object, seen: Seen | None = None) -> None:
        super().__init__(loader, seen)
        self._loader = loader
        # A wrapper makes a StatefulDataLoader of samplers that save nothing: when it loads its state, it asks them for
        # their order several times, and each time they draw another one.
        self._draws_again = self._stateful is loader and not isinstance(
            getattr(loader, "dataset", None), IterableDataset
        )
        if self._draws_again:
            self._stateful = None
        self.expected = False  # the next pass is the loop's; it begins when the wrapper draws for the first time
        self._generators_to_come: list[Mapping[str, Any]] = []
        self.records: deque[Mark] = deque(maxlen=2)
        self.indices_of_batches: deque[Any] = deque(maxlen=2)

    def expect(self, generators: list[Mapping[str, Any]]) -> None:
        """The next pass is the loop's (others, of whoever else iterates the loader, are not followed).

        Args:
            generators: States to put back before its first draws.
        """
        self.expected = True
        self._generators_to_come = generators
        self.records.clear()
        self.indices_of_batches.clear()

    def iterate(self, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """See :class:`LoaderPosition`."""
        try:
            return super().iterate(make)
        finally:
            self.expected = False

    def _asks_sampler(self) -> bool:
        return not self._draws_again  # it counts what it gives, for its own state

    def drawing(self) -> None:
        """A batch is about to be drawn."""
        if self._generators_to_come:
            set_rng(self._generators_to_come.pop(0), self.generators())
        self.records.append(self.mark())
        super().drawing()

    def drew(self) -> None:
        """A batch was drawn."""
        super().drew()
        self.indices_of_batches.append(self.drawn_indices())


class _Wrapped(Followed):
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
        super().__init__(loader, inner)
        self._position = position
        position.records = deque(maxlen=2 * per_batch + 2)
        position.indices_of_batches = deque(maxlen=2 * per_batch)
        self._epoch, self._per_batch, self._ahead = epoch, per_batch, ahead
        self._taken = 0
        self._epoch_number = getattr(loader, epoch)
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
            self._position.expected = False
            self._position.restore_between(pending["between"], self._make)
            set_rng(pending["now"], self._position.generators())
            setattr(self._loader, self._epoch, self._epoch_number + 1)
            return iter(())
        return self._take(iter(self._loader))

    def _take(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for batch in iterator:
            self._restored = None
            self._taken += 1
            yield batch

    def _snapshot(self) -> dict[str, Any]:
        at_end = self._iterating and self._ahead and bool(self._taken and self._loader.end_of_dataloader)
        between = at_end or not self._iterating or self._position.expected
        position = self._position.snapshot()
        records: list[Mark] = []
        if self._iterating and self._ahead:
            records = [r for r in self._position.records if r.drawn >= self._taken * self._per_batch]
        return {
            "iterating": self._iterating,
            "begun": not self._position.expected,
            "epoch": self._epoch_number if self._iterating else getattr(self._loader, self._epoch),
            "taken": self._taken,
            "at_end": at_end,
            "position": self._position.describe(records[0]) if records else position,
            "between": self._position.snapshot_between() if between else None,
            "now": position["now"],
            # What the wrapper draws again, and then draws next.
            "draws": [*(r.rng.packed(r.generators) for r in records), position["now"]] if records else [],
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        setattr(self._loader, self._epoch, state["epoch"])
        self._position.restore(state["position"])
        if state["iterating"]:
            self._pending = state
        if state["iterating"] and state["begun"]:
            return  # else the last pass is over
        self._position.restore_between(state["between"], self._make)

    def jump(self, epoch: int) -> None:
        setattr(self._loader, self._epoch, epoch)

    def indices_digest(self) -> str | None:
        drawn = list(self._position.indices_of_batches)
        ahead = max(self._position.drawn - self._taken * self._per_batch, 0)
        given = drawn[len(drawn) - ahead - self._per_batch : len(drawn) - ahead]
        if not given or any(indices is None for indices in given):
            return None
        return digest_of(given[0] if len(given) == 1 else given)
