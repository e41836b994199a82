"""The data position inside a Lightning fit loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher, _PrefetchDataFetcher
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from moetion_lightning.callbacks._evaluation_loaders import EvaluationLoaders
from moetion_lightning.callbacks._loader_source import LoaderSource
from moetion_lightning.core.instance_patches import InstancePatches
from moetion_lightning.core.run_state import Rng, set_rng
from moetion_lightning.data import LoaderPosition, Seen, make_resumable, release
from moetion_lightning.engine.replay_record import BatchDigest, describe_batch
from moetion_lightning.errors import ForeignWindowError

__all__ = ["DataSeam"]

_HISTORY = 4  # batches that Lightning may have fetched ahead, and some


class _FollowedCombinedLoader(CombinedLoader):
    """A combined loader that notes where it stands before each fetch. Instances are made by changing their class."""

    _moetion: DataSeam

    def __iter__(self) -> Any:
        return self._moetion.iterate(self, super().__iter__)

    def __next__(self) -> Any:
        return self._moetion.fetch(self, super().__next__)

    def __len__(self) -> int:
        # Lightning asks for it while it ends because iterating failed: its own error would hide the cause.
        return 0 if self._iterator is None and self._moetion.failed else super().__len__()


class DataSeam:
    """Follows the training and validation loaders of one trainer.

    Args:
        trainer: The trainer; its fit loop is hooked where it has just built its loaders and not yet iterated them.
        record_batch: Gets the batches that a training step draws for itself.
    """

    def __init__(self, trainer: Trainer, record_batch: Callable[[BatchDigest], None]) -> None:
        self._trainer = trainer
        self._record_batch = record_batch
        self._digests: deque[BatchDigest] = deque()  # of batches that are drawn, and not begun
        self._positions: list[LoaderPosition] = []
        self._history: deque[dict[str, Any]] = deque(maxlen=_HISTORY)
        self._fetched = 0
        self._followed_before = False
        self._pending: Mapping[str, Any] | None = None
        self._pending_rng: list[Any] = []
        #: Whether iterating the loaders has raised an error.
        self.failed = False
        fit_loop = trainer.fit_loop
        # Before anything is restored: what user hooks do to their loaders then can be told.
        self._seen = Seen()
        roots = {"loaders": fit_loop._data_source.instance, "module": trainer.lightning_module}
        self._seen.add({**roots, "datamodule": getattr(trainer, "datamodule", None)})
        self._source = LoaderSource(trainer, fit_loop, self._seen)
        self._evaluation = EvaluationLoaders(trainer, self._seen)
        original = fit_loop._load_combined_loader_states

        def load_combined_loader_states() -> None:
            original()
            self._follow(fit_loop._combined_loader)

        self._patches = InstancePatches()
        self._patches.put(fit_loop, "_load_combined_loader_states", load_combined_loader_states)

    def remove(self) -> None:
        """Leave the fit loop as it was."""
        self._patches.undo()
        self._source.remove()
        self._evaluation.remove()
        for loader in self.loaders().values():
            release(loader)

    def _follow(self, combined: CombinedLoader | None) -> None:
        if combined is None:
            return
        followed = [make_resumable(loader, seen=self._seen) for loader in combined.flattened]
        combined.flattened = [loader for loader, _ in followed]
        self._positions = [position for _, position in followed]
        if not self._followed_before:
            self._followed_before = True
            for position in self._positions:
                position.forget()
        if not isinstance(combined, _FollowedCombinedLoader):
            combined.__class__ = _FollowedCombinedLoader
        combined._moetion = self  # type: ignore[attr-defined]
        self._expect(False)

    def _expect(self, expected: bool) -> None:
        """Hooks of the user's may iterate a training loader, too: only the loop's passes count."""
        for position in self._positions:
            position.expected = expected

    # --- called by the combined loader ---------------------------------------------------------------------------

    def iterate(self, combined: CombinedLoader, make: Callable[[], Any]) -> Any:
        """``iter(combined)``."""
        pending, self._pending = self._pending, None
        self._history.clear()
        self._digests.clear()
        self._fetched = 0
        self.failed = True
        if pending is not None:
            if len(pending["loaders"]) != len(self._positions):
                raise ForeignWindowError(
                    f"the window was captured in a loop over {len(pending['loaders'])} loaders, this one has "
                    f"{len(self._positions)}. Undo the change, or start afresh with resume='never' or another job_id."
                )
            for position, saved in zip(self._positions, pending["loaders"]):
                position.restore(saved)
        self._expect(True)
        try:
            result = make()
        finally:
            self._expect(False)
        self.failed = False
        if pending is None:
            return result
        iterator = combined._iterator
        assert iterator is not None
        iterator._idx = pending["index"]
        if pending["consumed"] is not None and hasattr(iterator, "_consumed"):
            iterator._consumed = list(pending["consumed"])
        self._fetched = pending["fetched"]
        # What the dataset draws in this process while it fetches belongs to the batch.
        self._pending_rng = list(pending["rng"])
        return result

    def fetch(self, combined: CombinedLoader, draw: Callable[[], Any]) -> Any:
        """``next(combined)``."""
        if self._pending_rng:
            set_rng(self._pending_rng.pop(0))
        self._history.append(self._record(combined))
        self._expect(True)  # a shorter loader begins again
        try:
            batch = draw()
        finally:
            self._expect(False)
        self._fetched += 1
        # On the host still, as the loader gave it: the batch, its number and that of the loader.
        digest = describe_batch(batch[0], self._positions)
        if isinstance(self._trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher):
            self._record_batch(digest)  # by the step, which has begun
        else:
            self._digests.append(digest)
        return batch

    def begun(self, batch: object) -> list[BatchDigest]:
        """A training step begins. Returns what it is to be trained on, unless the step draws for itself.

        Args:
            batch: Where the loaders are not followed.
        """
        if isinstance(self._trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher):
            return []
        return [self._digests.popleft() if self._digests else describe_batch(batch)]

    def _record(self, combined: CombinedLoader) -> dict[str, Any]:
        iterator = combined._iterator
        consumed = getattr(iterator, "_consumed", None)
        rng = Rng()
        return {
            "marks": [position.mark(rng) for position in self._positions],
            "index": getattr(iterator, "_idx", 0),
            "consumed": None if consumed is None else list(consumed),
            "fetched": self._fetched,
            "rng": rng,
        }

    # --- called by the run state ---------------------------------------------------------------------------------

    def _records(self) -> list[dict[str, Any]]:
        """From the batch on that the training loop is about to use."""
        fetcher = self._trainer.fit_loop._data_fetcher
        ahead = len(fetcher.batches) if isinstance(fetcher, _PrefetchDataFetcher) else 0
        return [record for record in self._history if record["fetched"] >= self._fetched - ahead - 1]

    def snapshot(self) -> dict[str, Any] | None:
        """The position before the batch was fetched that the training loop is about to use."""
        combined = self._trainer.fit_loop._combined_loader
        if combined is None or not isinstance(combined, _FollowedCombinedLoader):
            return None
        if isinstance(self._trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher):
            records = [self._record(combined)]  # the step fetches for itself: nothing is fetched yet
            rng: list[dict[str, Any]] = []
        else:
            records = self._records()
            rng = [record["rng"].packed() for record in records]
        if not records:
            return None
        first = records[0]
        return {
            "loaders": [position.describe(mark) for position, mark in zip(self._positions, first["marks"])],
            **{name: first[name] for name in ("index", "consumed", "fetched")},
            "rng": rng,
            "settled": [position.attributes.now() for position in self._positions],
            "made": self._source.snapshot(),
            "evaluation": self._evaluation.snapshot(),
        }

    def lengths(self) -> list[int | None]:
        """Batches of a pass over each training loader; None of a stream."""
        return [position.length() for position in self._positions]

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue there when the fit loop makes and iterates its loaders."""
        self._pending = state
        self._source.restore(None if state is None else state["made"])
        self._evaluation.restore(None if state is None else state["evaluation"])

    def settle(self, state: Mapping[str, Any] | None) -> None:
        """Right before the first batch is used: what hooks have done to samplers since is undone."""
        self._evaluation.settle()
        self._source.restore(None)
        for position, saved in zip(self._positions, [] if state is None else state["settled"]):
            position.attributes.put_now(saved)

    def restart(self) -> None:
        """Training goes back while it runs: workers that live on have drawn too much."""
        for loader in self.loaders().values():
            if getattr(loader, "_iterator", None) is not None:
                loader._iterator = None  # type: ignore[attr-defined]

    def loaders(self) -> dict[str, object]:
        """The training loaders, by name."""
        combined = self._trainer.fit_loop._combined_loader
        return {} if combined is None else {f"train{i}": loader for i, loader in enumerate(combined.flattened)}

    def all_loaders(self) -> dict[str, object]:
        """The training and validation loaders, by name."""
        return {**self.loaders(), **self._evaluation.loaders()}
