"""The tiers of one rank, opened and closed together."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from moetion_lightning.config import EngineConfig, default_memory_dir
from moetion_lightning.engine.persist import Persister
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.errors import HostMemoryError
from moetion_lightning.events import EventBus, Notice, RestoreStarted
from moetion_lightning.store.disk import DirectoryTier
from moetion_lightning.store.format import Manifest
from moetion_lightning.store.host_memory import HostMemoryTier, clean_stale
from moetion_lightning.store.tier import Tier, choose_window

__all__ = ["Tiers"]

_log = logging.getLogger(__name__)


class Tiers:
    """Host memory and, if asked for, storage.

    Args:
        config: Settings.
        job: Identity of the job.
        bus: Gets the events.
    """

    def __init__(self, config: EngineConfig, job: str, bus: EventBus) -> None:
        self._config = config
        self._bus = bus
        base = Path(config.memory_dir) if config.memory_dir is not None else default_memory_dir()
        self.host = HostMemoryTier(base, job, rank=0, world_size=1)
        self.disk: DirectoryTier | None = None
        if config.persist_dir is not None:
            self.disk = DirectoryTier(config.persist_dir, job, rank=0, world_size=1, keep=config.keep_persisted)
        self.point: RestorePoint | None = None
        self._persister: Persister | None = None
        self._opened = False

    def open(self) -> RestorePoint | None:
        """Open the tiers; find and verify the newest window of this job."""
        self.host.open()
        self._opened = True
        try:
            return self._find()
        except BaseException:
            self.host.close()
            raise

    def _find(self) -> RestorePoint | None:
        for stale in clean_stale(
            self.host.base_dir, older_than_seconds=self._config.stale_after_seconds, keep=(self.host.job,)
        ):
            _log.info("reclaimed the host memory of dead job %s (%d bytes)", stale.name, stale.nbytes)
        tiers: list[Tier] = [self.host]
        if self.disk is not None:
            self.disk.open()
            self._persister = Persister(self.host, self.disk, self._bus, self._config.persist_every_n_windows)
            if self.disk.completed:
                _log.info("%s holds the last window of a run that completed: starting afresh", self.disk.url)
            else:
                tiers.append(self.disk)
        if self._config.resume == "never":
            return None
        choice = choose_window(tiers, job=self.host.job)
        if choice is None:
            return None
        manifest, tier = choice.manifest, choice.tier
        for problem in choice.problems:
            _log.warning("passed over: %s", problem)
            self._bus.emit(Notice(message=f"passed over: {problem}"))
        self.point = RestorePoint(manifest, tier)
        age = max(0.0, time.time() - manifest.created_at)
        _log.info(
            "found the window of iterations %d..%d of job %s in %s (%.1f MB, %.0f s old, checksums verified): "
            "restoring iteration %d, then replaying %d iterations to rebuild the dense state",
            manifest.first_iteration, manifest.last_iteration, manifest.job, tier.name, manifest.nbytes / 1e6, age,
            manifest.first_iteration, len(manifest.slots) - 1,
        )  # fmt: skip
        self._bus.emit(
            RestoreStarted(
                first_iteration=manifest.first_iteration,
                last_iteration=manifest.last_iteration,
                tier=tier.name,
                nbytes=manifest.nbytes,
            )
        )
        return self.point

    def release_point(self) -> None:
        """The restore point has been used."""
        self.point = None

    def forget_windows(self) -> None:
        """A fresh run begins: windows of an earlier run of the same job must never be restored into it."""
        self.point = None
        tiers: list[Tier] = [self.host, *([self.disk] if self.disk is not None else [])]
        for tier in tiers:
            for iteration in tier.windows():
                _log.info("dropping window %d of an earlier run from %s", iteration, tier.name)
                tier.drop(iteration)
        if self.disk is not None:
            self.disk.clear_completed()

    def on_commit(self, manifest: Manifest) -> None:
        """A window was committed in host memory (capture thread)."""
        if self._persister is not None:
            self._persister.offer(manifest)

    def window_capacity(self) -> int:
        """Bytes that one window may take, with as many windows as exist at the same time."""
        return self._room() // self._num_windows

    def check_capacity(self, window_bytes: int) -> None:
        """Whether host memory can hold the windows that exist at the same time.

        Raises:
            HostMemoryError: With the numbers and the remedy.
        """
        needed, room = self._num_windows * window_bytes, self._room()
        if needed > room:
            raise HostMemoryError(
                f"host memory at {self.host.base_dir} has {room / 1e9:.2f} GB for this job; "
                f"{self._num_windows} windows of {window_bytes / 1e9:.2f} GB need {needed / 1e9:.2f} GB. "
                "Use a smaller window, a larger /dev/shm (docker: --shm-size), or another memory_dir=."
            )

    @property
    def _num_windows(self) -> int:
        """The committed one, the one being captured and, with a storage tier, those being or to be persisted."""
        if self.disk is None:
            return 2
        return 3 if self._config.persist_every_n_windows == 1 else 4

    def _room(self) -> int:
        # Free buffers of this process count as free there and as used here.
        return self.host.free_bytes() + self.host.used_bytes() - self.host.pooled_bytes()

    def close(self, *, completed: bool) -> None:
        """Finish persisting, then let go: keep the windows, or remove them if training is complete."""
        self.point = None
        try:
            if self._persister is not None:
                self._persister.close()
                if completed and self.disk is not None:
                    self.disk.mark_completed()
        finally:
            if completed and self._opened:
                self.host.destroy()
            self.host.close()
            if self.disk is not None:
                self.disk.close()
