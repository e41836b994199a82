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

from moetion_lightning.core.generators import Generators
from moetion_lightning.core.run_state import Rng, set_rng
from moetion_lightning.data.attributes import Seen
from moetion_lightning.data.indices import digest_of
from moetion_lightning.data.own_state import Loaded, holder_of_position, keeps_a_buffer
from moetion_lightning.data.passes import Pass, Passes

__all__ = ["LoaderPosition", "Mark"]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A position, noted cheaply; :meth:`LoaderPosition.describe` makes plain values of it."""

    passes: tuple[Pass, ...]
    drawn: int
    rng: Rng
    generators: Mapping[str, Any]
    attributes: Mapping[str, Any]
    own: Any
    quiet: bool


class LoaderPosition(Passes):
    """Follows one loader.

    Args:
        loader: Any iterable of batches.
        seen: What attributes were when training had not begun; None: as they are now.
    """

    def __init__(self, loader: object, seen: Seen | None = None) -> None:
        super().__init__(loader, seen)
        self._pending: Mapping[str, Any] | None = None
        self._stateful = holder_of_position(loader)  # whose own state is the position
        self._loaded: Loaded | None = None
        #: Makes the iterator of a pass that was restored before its first batch, and in which nothing was drawn yet.
        self._make_again: Callable[[], Iterator[Any]] | None = None
        self._look_from = 1  # batches of a pass, from which on to look whether that state is whole
        #: Whether a pass that begins now is one of those that are followed; others may iterate the loader, too.
        self.expected = True

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
            if drawn >= self._look_from and self._hides_samples():
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
            quiet=self._quiet,
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
        return {
            "passes": [one.describe() for one in self._passes] if self._keeps_workers else [],
            "origin": self._origin,
            "quiet": self._quiet,
            "start": self.attributes.at_start(look=False),
            "generators": self._generators.states(),
        }

    def _hides_samples(self) -> bool:
        self._look_from *= 2
        return keeps_a_buffer(self._iterator, getattr(self._loader, "dataset", None))

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
        self._generators.take(state["generators"])

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
        pending, self._pending, self._make_again = self._pending, None, None
        if pending is not None and pending["passes"]:
            self._resume(pending, make)
        else:
            self._begin_pass(self._start())
            self._iterator = self._make(make)
        return _Followed(self._iterator, self)

    def _resume(self, state: Mapping[str, Any], make: Callable[[], Iterator[Any]]) -> None:
        own = state.get("own") if self._stateful is not None else None
        passes = state["passes"] if own is None else state["passes"][-1:]
        self._passes, self._origin = [], state["origin"]
        if own is not None:
            self._put_start(passes[0]["start"])
            self._loaded = Loaded(self._stateful, own)
            self._iterator = self._make(make)
            self._passes = [Pass(**passes[0])]
            self._make_again = None if passes[0]["drawn"] else make
        else:
            if self._origin is not None:
                self._start_workers(make)
            for number, saved in enumerate(passes):
                self._again(saved, make, number, len(passes), quiet=state["quiet"])
        # A dataset's, too: skipping by the sampler leaves it behind.
        left_over = set_rng(state["now"], self._generators)
        if left_over and self._map_style and self._in_process and own is None:
            self._warm_up(make)
            self._again(passes[-1], make)
            set_rng(state["now"], self._generators)
        if own is None:
            self.attributes.put_now(state["attributes"], others=self._in_process)

    def drew(self) -> None:
        """A batch was drawn."""
        self._make_again = None
        super().drew()

    def begin_again(self) -> Iterator[Any] | None:
        """The pass is over before its first batch, though there was one: what was loaded is where the last pass ended.

        Many datasets go back to their beginning only when the first sample is drawn.

        Returns:
            The pass as it is without a loaded state; None if nothing was loaded.
        """
        make, self._make_again = self._make_again, None
        if make is None or self._loaded is None:
            return None
        self._loaded.undo()
        self._loaded = None
        rng, generators = Rng(), self._generators.states()
        self._iterator = self._make(make)
        set_rng(rng.packed(generators), self._generators)
        return self._iterator  # type: ignore[no-any-return]

    def _warm_up(self, make: Callable[[], Iterator[Any]]) -> None:
        """Read a batch, so that what is made when it is first needed is there."""
        next(make(), None)
        self._passes.pop()


class _Followed(Iterator[Any]):
    """Counts what is drawn from the loader's own iterator."""

    def __init__(self, iterator: Iterator[Any], position: LoaderPosition) -> None:
        self._iterator = iterator
        self._position = position

    def __next__(self) -> Any:
        self._position.drawing()
        try:
            batch = next(self._iterator)
        except StopIteration:
            again = self._position.begin_again()
            if again is None:
                raise
            self._iterator = again
            batch = next(again)
        self._position.drew()
        return batch

    def __len__(self) -> int:
        return len(self._iterator)  # type: ignore[arg-type]
