"""The data position inside a Lightning fit loop. Private names of Lightning: only here and in ``_loop_seam``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher, _PrefetchDataFetcher
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from moetion_lightning.core.run_state import get_rng, set_rng
from moetion_lightning.data_position import LoaderPosition, make_resumable, release
from moetion_lightning.engine.replay_record import BatchDigest, describe_batch

__all__ = ["DataSeam"]

_HISTORY = 4  # batches that Lightning may have fetched ahead, and some


class _FollowedCombinedLoader(CombinedLoader):
    """A combined loader that notes where it stands before each fetch. Instances are made by changing their class."""

    _moetion: DataSeam

    def __iter__(self) -> Any:
        return self._moetion.iterate(self, super().__iter__)

    def __next__(self) -> Any:
        return self._moetion.fetch(self, super().__next__)


class DataSeam:
    """Follows the training loaders of one trainer.

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
        fit_loop = trainer.fit_loop
        original = fit_loop._load_combined_loader_states

        def load_combined_loader_states() -> None:
            original()
            self._follow(fit_loop._combined_loader)

        fit_loop._load_combined_loader_states = load_combined_loader_states  # type: ignore[method-assign]

    def remove(self) -> None:
        """Leave the fit loop as it was."""
        self._trainer.fit_loop.__dict__.pop("_load_combined_loader_states", None)
        for loader in self.loaders().values():
            release(loader)

    def _follow(self, combined: CombinedLoader | None) -> None:
        if combined is None:
            return
        followed = [make_resumable(loader) for loader in combined.flattened]
        combined.flattened = [loader for loader, _ in followed]
        self._positions = [position for _, position in followed]
        if not self._followed_before:
            self._followed_before = True
            for position in self._positions:
                position.forget()
        if not isinstance(combined, _FollowedCombinedLoader):
            combined.__class__ = _FollowedCombinedLoader
        combined._moetion = self  # type: ignore[attr-defined]

    # --- called by the combined loader ---------------------------------------------------------------------------

    def iterate(self, combined: CombinedLoader, make: Any) -> Any:
        """``iter(combined)``."""
        pending, self._pending = self._pending, None
        self._history.clear()
        self._digests.clear()
        self._fetched = 0
        if pending is None:
            return make()
        for position, saved in zip(self._positions, pending["loaders"]):
            position.restore(saved)
        result = make()
        iterator = combined._iterator
        assert iterator is not None
        iterator._idx = pending["index"]
        if pending["consumed"] is not None and hasattr(iterator, "_consumed"):
            iterator._consumed = list(pending["consumed"])
        self._fetched = pending["fetched"]
        # What the dataset draws in this process while it fetches belongs to the batch.
        self._pending_rng = list(pending["rng"])
        return result

    def fetch(self, combined: CombinedLoader, draw: Any) -> Any:
        """``next(combined)``."""
        if self._pending_rng:
            set_rng(self._pending_rng.pop(0))
        self._history.append(self._record(combined))
        batch = draw()
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
        return {
            "loaders": [position.snapshot() for position in self._positions],
            "index": getattr(iterator, "_idx", 0),
            "consumed": None if consumed is None else list(consumed),
            "fetched": self._fetched,
            "rng": get_rng(),
        }

    # --- called by the run state ---------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any] | None:
        """The position before the batch was fetched that the training loop is about to use."""
        combined = self._trainer.fit_loop._combined_loader
        fetcher = self._trainer.fit_loop._data_fetcher
        if combined is None or not isinstance(combined, _FollowedCombinedLoader):
            return None
        if isinstance(fetcher, _DataLoaderIterDataFetcher):  # the step fetches for itself: nothing is fetched yet
            record = self._record(combined)
            return {**record, "rng": []}
        ahead = len(fetcher.batches) if isinstance(fetcher, _PrefetchDataFetcher) else 0
        current = self._fetched - ahead - 1
        records = [record for record in self._history if record["fetched"] >= current]
        if not records:
            return None
        return {**records[0], "rng": [record["rng"] for record in records]}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue there when the fit loop iterates its loaders."""
        self._pending = state

    def restart(self) -> None:
        """Training goes back while it runs: workers that live on have drawn too much."""
        for loader in self.loaders().values():
            if getattr(loader, "_iterator", None) is not None:
                loader._iterator = None  # type: ignore[attr-defined]

    def loaders(self) -> dict[str, object]:
        """The training loaders, by name."""
        combined = self._trainer.fit_loop._combined_loader
        return {} if combined is None else {f"train{i}": loader for i, loader in enumerate(combined.flattened)}
