"""Where a data loader stands, so that the same batches follow after a restart: none lost, none twice.

Any loader is brought back by *re-iterating*: the state of every random number generator, and of the samplers, at
``iter(loader)`` is recorded, put back, the iterator is made again, and as many batches as had been drawn are skipped.
That is exact for shuffling, samplers with generators, workers and persistent workers. Loaders and datasets that can
save their own position (``state_dict``), and save all of it, are asked to do so instead: that costs nothing on restart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from moetion_lightning.core.generators import Generators
from moetion_lightning.core.run_state import Rng, set_rng
from moetion_lightning.data.attributes import Attributes, Seen
from moetion_lightning.data.indices import Indices, digest_of
from moetion_lightning.data.own_state import Loaded, holder_of_position, keeps_a_buffer
from moetion_lightning.data.parts import batch_size_of, length_of, loader_parts
from moetion_lightning.data.redraw import draw_again, foreign_length
from moetion_lightning.data.workers import WorkerWatch

__all__ = ["LoaderPosition", "Mark"]


@dataclass(kw_only=True)
class _Pass:
    """One pass over the loader.

    Args:
        start: Generators, samplers' state and length at ``iter(loader)``.
        first: Generators right before its first batch: an in-process sampler draws its order only then.
        drawn: Batches drawn.
    """

    start: Mapping[str, Any]
    first: Mapping[str, Any] | tuple[Rng, dict[str, Any]] | None = None
    drawn: int = 0

    def describe(self, drawn: int | None = None) -> dict[str, Any]:
        if isinstance(self.first, tuple):
            self.first = self.first[0].packed(self.first[1])
        # No batch was drawn where the mark was made: what the first one found is not known there yet.
        first = self.first if drawn is None or drawn else None
        return {"start": self.start, "first": first, "drawn": self.drawn if drawn is None else drawn}


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A position, noted cheaply; :meth:`LoaderPosition.describe` makes plain values of it."""

    passes: tuple[_Pass, ...]
    drawn: int
    rng: Rng
    generators: Mapping[str, Any]
    attributes: Mapping[str, Any]
    own: Any
    quiet: bool


class LoaderPosition:
    """Follows one loader.

    Args:
        loader: Any iterable of batches.
        seen: What attributes were when training had not begun; None: as they are now.
    """

    def __init__(self, loader: object, seen: Seen | None = None) -> None:
        self._loader = loader
        self._passes: list[_Pass] = []
        self._origin: Mapping[str, Any] | None = None  # how the first pass began, of workers that live on
        self._pending: Mapping[str, Any] | None = None
        dataset = getattr(loader, "dataset", None)
        self._in_process = getattr(loader, "num_workers", 0) == 0
        self._map_style = isinstance(loader, DataLoader) and not isinstance(dataset, IterableDataset)
        self._stateful = holder_of_position(loader)  # whose own state is the position
        self._loaded: Loaded | None = None
        # Workers that live on carry their generators from pass to pass.
        self._keeps_workers = bool(getattr(loader, "persistent_workers", False)) and not self._in_process
        self._watch: WorkerWatch | None = None if self._in_process else WorkerWatch()
        self._generators = Generators(lambda: {"loader": self._loader})
        #: Plain attributes of what it draws by.
        self.attributes = Attributes(loader, seen or Seen())
        self._iterator: Any = None
        #: The loader's index sampler, where its class lets us stand in for it.
        self.indices: Indices | None = None
        #: Whether a pass that begins now is one of those that are followed; others may iterate the loader, too.
        self.expected = True
        #: Whether its workers, if it has some, run torch's own loop.
        self.is_watched = False

    @property
    def keeps_workers(self) -> bool:
        """Whether workers live on from pass to pass, with generators that earlier passes may have moved."""
        return self._keeps_workers

    @property
    def drawn(self) -> int:
        """Batches drawn in the present pass."""
        return self._passes[-1].drawn if self._passes else 0

    @property
    def present_pass(self) -> object:
        """Something that is another object in each pass; None before the first one."""
        return self._passes[-1] if self._passes else None

    def length(self) -> int | None:
        """Batches of a pass; None of a stream."""
        return length_of(self._loader)

    def generators(self) -> Generators:
        """The generators that the loader leads to."""
        return self._generators

    def drawn_indices(self) -> Any:
        """What the sampler gave for the batch that was drawn last; None if that is not seen.

        It is seen of map-style datasets behind torch's own ``DataLoader``.
        """
        return None if self.indices is None else self.indices.drawn

    def indices_digest(self) -> str | None:
        """Digest of :meth:`drawn_indices`: equal in all processes. Takes a few microseconds."""
        return digest_of(self.drawn_indices())

    # --- noting --------------------------------------------------------------------------------------------------

    def mark(self, rng: Rng | None = None) -> Mark:
        """The position before the next batch is drawn.

        Args:
            rng: The global generators, if they were noted already.
        """
        drawn = self.drawn
        own = None
        if self._stateful is not None and self._passes:
            if self._iterator is not None and drawn & (drawn - 1) == 0 and self._hides_samples():
                self._stateful = None
            else:
                own = copy.deepcopy(self._stateful.state_dict())
        return Mark(
            passes=tuple(self._passes),
            drawn=drawn,
            rng=rng or Rng(),
            generators=self._generators.states(),
            attributes=self.attributes.now(),
            own=own,
            quiet=self._watch is not None and self._watch.quiet,
        )

    def describe(self, mark: Mark) -> dict[str, Any]:
        """Plain values and tensors of a mark."""
        *earlier, last = mark.passes or (None,)
        passes = [one.describe() for one in earlier if one is not None]
        state: dict[str, Any] = {
            "passes": [*passes, last.describe(mark.drawn)] if last is not None else [],
            "origin": self._origin,
            "quiet": mark.quiet,
            "now": mark.rng.packed(mark.generators),
            "attributes": mark.attributes,
        }
        # Deciding later that it is not whole counts for what was noted before.
        if mark.own is not None and self._stateful is not None:
            state["own"] = mark.own
        return state

    def snapshot(self) -> dict[str, Any]:
        """The position before the next batch is drawn (plain values and tensors)."""
        return self.describe(self.mark())

    def snapshot_between(self) -> dict[str, Any]:
        """The position while no pass is under way."""
        return {**self.snapshot(), "start": self.attributes.at_start()}

    # --- putting back --------------------------------------------------------------------------------------------

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue there at the next ``iter(loader)``."""
        self._pending = state

    def restore_between(self, state: Mapping[str, Any], make: Callable[[], Iterator[Any]]) -> None:
        """The next pass is a new one, as it would be after those that are done. Global generators are left alone.

        Args:
            state: From :meth:`snapshot_between`.
            make: The loader's own ``__iter__``.
        """
        self._pending = None
        self._passes, self._origin = [], state["origin"]
        if self._keeps_workers and (state["passes"] or self._origin is not None):
            rng = Rng()
            passes = [] if state["quiet"] else state["passes"]
            if state["quiet"] or self._origin is not None:
                self._origin = self._origin or state["passes"][0]["start"]
                self._start_workers(make)
            for number, saved in enumerate(passes):
                self._again(saved, make, number, len(passes))
            set_rng(rng.packed())
        self.attributes.put_start(state["start"])
        self._generators.take(state["now"].get("generators", {}))

    def forget(self) -> None:
        """A training run begins: passes of earlier ones are not its own."""
        self._passes = []
        self._origin = None

    # --- iterating -----------------------------------------------------------------------------------------------

    def iterate(self, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """An iterator over the loader that is followed.

        Args:
            make: The loader's own ``__iter__``.

        Raises:
            ForeignWindowError: The loader is another one than that whose position was recorded.
        """
        if not self.expected:
            return self._aside(make)
        if self._loaded is not None:
            self._loaded.undo()
            self._loaded = None
        pending, self._pending = self._pending, None
        if pending is not None and pending["passes"]:
            self._resume(pending, make)
        else:
            self._begin_pass(self._start())
            self._iterator = self._make(make)
        return _Followed(self._iterator, self)

    def drawing(self) -> None:
        """A batch is about to be drawn."""
        current = self._passes[-1]
        if current.first is None:
            current.first = Rng(), self._generators.states()

    def drew(self) -> None:
        """A batch was drawn."""
        self._passes[-1].drawn += 1
        if self.indices is not None:
            self.indices.next()

    def _hides_samples(self) -> bool:
        return keeps_a_buffer(self._iterator, getattr(self._loader, "dataset", None))

    def _begin_pass(self, start: Mapping[str, Any]) -> None:
        if not self._keeps_workers:
            self._passes = []
        elif self._passes and self._watch is not None and self._watch.quiet:
            self._origin = self._origin or self._passes[0].start  # the workers' seeds
            self._passes = []
        self._passes.append(_Pass(start=start))

    def _start(self) -> dict[str, Any]:
        start: dict[str, Any] = {
            "rng": Rng().packed(self._generators.states()),
            "attributes": self.attributes.at_start(),
            "length": self.length(),
            "batch_size": batch_size_of(self._loader),
        }
        epochs = {
            role: part.epoch  # type: ignore[attr-defined]
            for role, part in loader_parts(self._loader).items()
            if isinstance(getattr(part, "epoch", None), int) and callable(getattr(part, "set_epoch", None))
        }
        return {**start, "epochs": epochs} if epochs else start

    def _aside(self, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Somebody else's pass."""
        if self.indices is None:
            return make()
        self.indices.aside = True
        try:
            return make()
        finally:
            self.indices.aside = False

    def _make(self, make: Callable[[], Iterator[Any]]) -> Any:
        """A new pass of the loader; its workers are watched from their start."""
        if self.indices is not None:
            self.indices.begin()
        loader: Any = self._loader
        if self._watch is None or not self.is_watched or (self._keeps_workers and loader._iterator is not None):
            return make()
        return self._watch.making(loader, make)

    # --- again ---------------------------------------------------------------------------------------------------

    def _resume(self, state: Mapping[str, Any], make: Callable[[], Iterator[Any]]) -> None:
        own = state.get("own") if self._stateful is not None else None
        passes = state["passes"] if own is None else state["passes"][-1:]
        self._passes, self._origin = [], state["origin"]
        if own is not None:
            self._put_start(passes[0]["start"])
            self._loaded = Loaded(self._stateful, own)
            self._iterator = self._make(make)
            self._passes = [_Pass(**passes[0])]
        else:
            if self._origin is not None:
                self._start_workers(make)
            for number, saved in enumerate(passes):
                self._again(saved, make, number, len(passes), quiet=state["quiet"])
        left_over = set_rng(
            state["now"], self._generators
        )  # a dataset's, too: skipping by the sampler leaves it behind
        if left_over and self._map_style and self._in_process and own is None:
            self._warm_up(make)
            self._again(passes[-1], make)
            set_rng(state["now"], self._generators)
        if own is None:
            self.attributes.put_now(state["attributes"], others=self._in_process)

    def _warm_up(self, make: Callable[[], Iterator[Any]]) -> None:
        """Read a batch, so that what is made when it is first needed is there."""
        next(make(), None)
        self._passes.pop()

    def _again(
        self, saved: Mapping[str, Any], make: Callable[[], Iterator[Any]], number: int = 0, of: int = 1, *,
        quiet: bool = False,
    ) -> None:  # fmt: skip
        """Make a pass again, up to where it was."""
        start, first, drawn = saved["start"], saved["first"], saved["drawn"]
        self._put_start(start)
        known = quiet and self._map_style and self.indices is not None and not self._in_process
        # Workers take turns: the next batch falls to the one to which it fell.
        skipped = drawn - drawn % int(getattr(self._loader, "num_workers", 1)) if known else 0
        if self.indices is not None:
            self.indices.skip = skipped
        self._iterator = self._make(make)
        if self.indices is not None:
            self.indices.skip = 0
        if drawn:
            if first is not None and not skipped:
                set_rng(first, self._generators)
            self._skip(self._iterator, drawn - skipped, number, of)
        self._passes.append(_Pass(**saved))

    def _put_start(self, start: Mapping[str, Any]) -> None:
        parts = loader_parts(self._loader)
        for role, epoch in start.get("epochs", {}).items():
            if role in parts:
                parts[role].set_epoch(epoch)  # type: ignore[attr-defined]
        self.attributes.put_start(start["attributes"])
        self._check_length(start)
        set_rng(start["rng"], self._generators)

    def _check_length(self, start: Mapping[str, Any]) -> None:
        here = self.length(), batch_size_of(self._loader)
        there = start["length"], start["batch_size"]
        if here != there:
            raise foreign_length(self._loader, there, here)

    def _start_workers(self, make: Callable[[], Iterator[Any]]) -> None:
        """Workers with the seeds that they had, which have read nothing."""
        assert self._origin is not None
        self._put_start(self._origin)
        if self.indices is not None:
            self.indices.none = True
        self._make(make)
        if self.indices is not None:
            self.indices.none = False

    def _asks_sampler(self) -> bool:
        """Whether the sampler alone may be moved on."""
        return True

    def _skip(self, iterator: Any, count: int, number: int = 0, of: int = 1) -> None:
        alone = self._asks_sampler() and isinstance(iterator, _BaseDataLoaderIter)
        if alone and self._map_style and self._in_process:
            # The sampler alone moves on: a map-style dataset has no position of its own, and the generators that it may
            # use are put back before the next batch is drawn.
            skip: Callable[[], Any] = iterator._next_index
            iterator._num_yielded += count
            draw_again(skip, count, self._loader, quick=True)
        else:
            draw_again(lambda: next(iterator), count, self._loader, number=number, of=of)
        if self.indices is not None:
            self.indices.next(count)


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
