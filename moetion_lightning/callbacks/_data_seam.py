"""The data position inside a Lightning fit loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher, _PrefetchDataFetcher
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from moetion_lightning.callbacks._evaluation_loaders import EvaluationLoaders
from moetion_lightning.callbacks._loader_source import LoaderSource
from moetion_lightning.callbacks._skip_seam import SkipSeam
from moetion_lightning.core.instance_patches import InstancePatches
from moetion_lightning.core.run_state import Rng, set_rng
from moetion_lightning.data import LoaderPosition, Seen, make_resumable, release
from moetion_lightning.engine.replay_record import BatchDigest, describe_batch
from moetion_lightning.errors import ForeignWindowError
from moetion_lightning.session.skipped_batches import SkippedBatches

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
        skipped: Says which batches are left out, and is told where training is.
    """

    def __init__(self, trainer: Trainer, record_batch: Callable[[BatchDigest], None], skipped: SkippedBatches) -> None:
        self._trainer = trainer
        self._record_batch = record_batch
        self._digests: deque[BatchDigest] = deque()  # of batches that are drawn, and not begun
        self._positions: list[LoaderPosition] = []
        self._history: deque[dict[str, Any]] = deque(maxlen=_HISTORY)
        self._fetched = 0  # batches of the pass that were drawn
        self._given = 0  # of them, those that Lightning got
        self._followed_before = False
        self._waited = 0.0
        self._pending: Mapping[str, Any] | None = None
        self._pending_rng: dict[int, Any] = {}
        #: Whether iterating the loaders has raised an error.
        self.failed = False
        fit_loop = trainer.fit_loop
        # Before anything is restored: what user hooks do to their loaders then can be told.
        self._seen = Seen()
        roots = {"loaders": fit_loop._data_source.instance, "module": trainer.lightning_module}
        self._seen.add({**roots, "datamodule": getattr(trainer, "datamodule", None)})
        self._source = LoaderSource(trainer, fit_loop, self._seen)
        self._evaluation = EvaluationLoaders(trainer, self._seen)
        self._skips = SkipSeam(trainer, skipped)
        skipped.where = self._next_number
        original = fit_loop._load_combined_loader_states

        def load_combined_loader_states() -> None:
            original()
            self._follow(fit_loop._combined_loader)

        self._patches = InstancePatches()
        self._patches.put(fit_loop, "_load_combined_loader_states", load_combined_loader_states)

    def remove(self) -> None:
        """Leave the fit loop as it was."""
        self._patches.undo()
        self._skips.remove()
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
        self.failed = True
        self._skips.begin_pass(self._used())
        self._history.clear()
        self._digests.clear()
        self._fetched = self._given = 0
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
        self._skips.restore(pending["skips"])
        # What the dataset draws in this process while it fetches belongs to the batch.
        self._pending_rng = dict(zip(pending["draws"], pending["rng"]))
        if pending["used"]:
            self._history.append(self._record(combined))
            self._draw(lambda: CombinedLoader.__next__(combined))
            self._given += 1
        return result

    def fetch(self, combined: CombinedLoader, draw: Callable[[], Any]) -> Any:
        """``next(combined)``, behind batches that are left out; of the last one also before such."""
        started = time.perf_counter() - time.thread_time()
        try:
            return self._fetch(combined, draw)
        finally:
            self._waited += time.perf_counter() - time.thread_time() - started

    def take_waited(self) -> float:
        """Seconds of waiting for batches since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _fetch(self, combined: CombinedLoader, draw: Callable[[], Any]) -> Any:
        self._skips.check_rest(self._fetched)
        try:
            while self._skips.leaves_out(self._fetched):
                self._throw_away(draw)
        except StopIteration:
            self._skips.check_given(self._given, self._fetched)
            raise
        self._history.append(self._record(combined))
        batch = self._draw(draw)
        self._given += 1
        # On the host still, as the loader gave it: the batch, its number and that of the loader.
        digest = describe_batch(batch[0], self._positions)
        if isinstance(self._trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher):
            self._record_batch(digest)  # by the step, which has begun
        else:
            self._digests.append(digest)
        while self._skips.ends_without(self._fetched):
            self._throw_away(draw)
        self._skips.tell_fetcher()
        return batch

    def _throw_away(self, draw: Callable[[], Any]) -> None:
        self._draw(draw)
        self._skips.note(self._fetched - 1)

    def _draw(self, draw: Callable[[], Any]) -> Any:
        rng = self._pending_rng.pop(self._fetched, None)
        if rng is not None:
            set_rng(rng)
        self._expect(True)  # a shorter loader begins again
        try:
            batch = draw()
        finally:
            self._expect(False)
        self._fetched += 1
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
            "given": self._given,
            "skips": self._skips.record(),
            "rng": rng,
        }

    # --- called by the run state ---------------------------------------------------------------------------------

    def _records(self, *, after_batch: bool = False) -> list[dict[str, Any]]:
        """From the batch on that the training loop is about to use, or will fetch after the one that has ended."""
        first = self._given - self._ahead() - (not after_batch)
        return [record for record in self._history if record["given"] >= first]

    def _ahead(self) -> int:
        """Batches that Lightning has fetched, and not used."""
        fetcher = self._trainer.fit_loop._data_fetcher
        return len(fetcher.batches) if isinstance(fetcher, _PrefetchDataFetcher) else 0

    def _used(self) -> int:
        """Batches of the pass but for those that Lightning has fetched, and not used."""
        ahead = self._ahead()
        return next((r["fetched"] for r in self._history if r["given"] == self._given - ahead), self._fetched)

    def _next_number(self) -> int:
        """Of the batch that the training loop is about to use."""
        records = self._records()
        return self._skips.number(records[0]["fetched"] if records else self._fetched)

    def snapshot(self, *, after_batch: bool = False) -> dict[str, Any] | None:
        """The position before the batch was fetched that the training loop is about to use.

        Args:
            after_batch: A batch has just ended: before the next one is fetched. At the end of a pass there is none; the
                last one is drawn again then, and not used.
        """
        combined = self._trainer.fit_loop._combined_loader
        if combined is None or not isinstance(combined, _FollowedCombinedLoader):
            return None
        if isinstance(self._trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher):
            records = [self._record(combined)]  # the step fetches for itself: nothing is fetched yet
            fetched: list[dict[str, Any]] = []
        else:
            fetched = records = self._records(after_batch=after_batch)
        used = after_batch and not records and bool(self._history)
        if used:
            fetched = records = [self._history[-1]]
        if not records:
            return None
        first = records[0]
        return {
            "loaders": [position.describe(mark) for position, mark in zip(self._positions, first["marks"])],
            **{name: first[name] for name in ("index", "consumed", "fetched", "skips")},
            "used": used,
            "draws": [record["fetched"] for record in fetched],
            "rng": [record["rng"].packed() for record in fetched],
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
