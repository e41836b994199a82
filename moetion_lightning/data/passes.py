"""Passes over one loader: how each began, and how it is made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from moetion_lightning.core.generators import Generators
from moetion_lightning.core.run_state import Rng, set_rng
from moetion_lightning.data.attributes import Attributes, Seen
from moetion_lightning.data.indices import Indices
from moetion_lightning.data.parts import batch_size_of, length_of, loader_parts
from moetion_lightning.data.redraw import draw_again, foreign_length
from moetion_lightning.data.workers import WorkerWatch

__all__ = ["Pass", "Passes"]


@dataclass(kw_only=True)
class Pass:
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
        """Plain values and tensors.

        Args:
            drawn: How many batches had been drawn where a mark was made; None: now.
        """
        if isinstance(self.first, tuple):
            self.first = self.first[0].packed(self.first[1])
        # No batch was drawn where the mark was made: what the first one found is not known there yet.
        first = self.first if drawn is None or drawn else None
        return {"start": self.start, "first": first, "drawn": self.drawn if drawn is None else drawn}


class Passes:
    """Those over one loader.

    Args:
        loader: Any iterable of batches.
        seen: What attributes were when training had not begun; None: as they are now.
    """

    def __init__(self, loader: object, seen: Seen | None = None) -> None:
        self._loader = loader
        self._passes: list[Pass] = []
        self._origin: Mapping[str, Any] | None = None  # how the first pass began, of workers that live on
        dataset = getattr(loader, "dataset", None)
        self._in_process = getattr(loader, "num_workers", 0) == 0
        self._map_style = isinstance(loader, DataLoader) and not isinstance(dataset, IterableDataset)
        # Workers that live on carry their generators from pass to pass.
        self._keeps_workers = bool(getattr(loader, "persistent_workers", False)) and not self._in_process
        self._watch: WorkerWatch | None = None if self._in_process else WorkerWatch()
        self._generators = Generators(lambda: {"loader": self._loader})
        #: Plain attributes of what it draws by.
        self.attributes = Attributes(loader, seen or Seen())
        self._iterator: Any = None
        #: The loader's index sampler, where its class lets us stand in for it.
        self.indices: Indices | None = None
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

    @property
    def _quiet(self) -> bool:
        """Whether workers were watched, and have drawn no random numbers and changed nothing."""
        return self._watch is not None and self._watch.quiet

    def forget(self) -> None:
        """A training run begins: passes of earlier ones are not its own."""
        self._passes = []
        self._origin = None

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

    def _begin_pass(self, start: Mapping[str, Any]) -> None:
        if not self._keeps_workers:
            self._passes = []
        elif self._passes and self._quiet:
            self._origin = self._origin or self._passes[0].start  # the workers' seeds
            self._passes = []
        self._passes.append(Pass(start=start))

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
        self._passes.append(Pass(**saved))

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
