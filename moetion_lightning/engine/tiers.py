"""The tiers of one rank, opened and closed together."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from moetion_lightning.config import EngineConfig, default_memory_dir
from moetion_lightning.distributed.restore_choice import Live, Rollback
from moetion_lightning.distributed.stable_store import STORE_ERRORS
from moetion_lightning.engine.group_restore import GroupRestore, LiveReport, Part
from moetion_lightning.engine.journal import Journal, LivePoint
from moetion_lightning.engine.peers import Peers
from moetion_lightning.engine.persist import Persister
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.errors import HostMemoryError
from moetion_lightning.events import EventBus, Notice, RestoreStarted
from moetion_lightning.store.disk import DirectoryTier
from moetion_lightning.store.format import Manifest
from moetion_lightning.store.host_memory import HostMemoryTier, clean_stale
from moetion_lightning.store.tier import Tier, choose_window

__all__ = ["Tiers"]

_log = logging.getLogger(__name__)
_ALONE_SECONDS, _REPLACED_SECONDS = 0.25, 15.0
_Point = TypeVar("_Point", RestorePoint, LivePoint, RestorePoint | None)


class Tiers:
    """Host memory and, if asked for, storage.

    Args:
        config: Settings.
        job: Identity of the job.
        bus: Gets the events.
        ranks: The other ranks.
    """

    def __init__(self, config: EngineConfig, job: str, bus: EventBus, ranks: Ranks) -> None:
        self._ranks = ranks
        rank, world_size = ranks.control.rank, ranks.control.world_size
        self._config = config
        self._bus = bus
        base = Path(config.memory_dir) if config.memory_dir is not None else default_memory_dir()
        self.host = HostMemoryTier(base, job, rank=rank, world_size=world_size)
        self.disk: DirectoryTier | None = None
        if config.persist_dir is not None:
            self.disk = DirectoryTier(
                config.persist_dir,
                job,
                rank=rank,
                world_size=world_size,
                keep=max(config.keep_persisted, 1 if ranks.alone else 2),
            )
        self.point: RestorePoint | LivePoint | None = None
        #: Run states between iterations, where a replaced rank needs them.
        self.journal: Journal | None = None
        #: Where the restore point came from.
        self.origin = ""
        self.peers: Peers | None = None
        self._persister: Persister | None = None
        self._opened = False

    def open(self, report: Callable[[], LiveReport], *, replay_stages: bool) -> RestorePoint | LivePoint | None:
        """Open the tiers; find and verify the newest window of this job.

        Args:
            report: Says what this process holds besides windows.
            replay_stages: Whether stages of a pipeline may be replayed alone.
        """
        # A process whose place this one takes may take a while to die.
        self.host.open(wait_seconds=_ALONE_SECONDS if self._ranks.alone else _REPLACED_SECONDS)
        self._opened = True
        try:
            return self._find(report, replay_stages)
        except BaseException:  # another attempt opens everything again
            self._let_go(completed=False)
            raise

    def _find(self, report: Callable[[], LiveReport], replay_stages: bool) -> RestorePoint | LivePoint | None:
        for stale in clean_stale(
            self.host.base_dir, older_than_seconds=self._config.stale_after_seconds, keep=(self.host.job,)
        ):
            _log.info("reclaimed the host memory of dead job %s (%d bytes)", stale.name, stale.nbytes)
        if self.disk is not None and self._persister is None:
            self.disk.open()
            self._persister = Persister(self.host, self.disk, self._bus, self._config.persist_every_n_windows)
        if not self._ranks.alone:
            if self.peers is None:
                self.peers = Peers(self._config, self._ranks, self.host, self._bus)
            return self.find_together(report, first=True, replay_stages=replay_stages)
        if self._config.resume == "never":
            return None
        return self._announce(self._choose_alone())

    def find_together(
        self, report: Callable[[], LiveReport], *, first: bool, replay_stages: bool
    ) -> RestorePoint | LivePoint | None:
        """All ranks: agree where to continue, at the start and whenever ranks were replaced.

        Args:
            report: Says what this process holds besides windows.
            first: Whether this process starts now.
            replay_stages: Whether stages of a pipeline may be replayed alone.
        """
        assert self.peers is not None
        if self._persister is not None:
            self._persister.forget()
        self.peers.open()
        if self.journal is None and self._ranks.elastic:
            self.journal = Journal(self.peers.service.keep_note, self.peers.service.own_note)
        if first and self._config.resume == "never" and not self._ranks.replaced:
            return None
        restore = GroupRestore(self._ranks, self.peers, self.host, self._usable_disk())
        mine = report()
        found = restore.find(mine, replay_stages=replay_stages)
        if found is None:
            return None
        window, origin = _opened(found.parts)
        if isinstance(found.choice, Rollback):
            assert window is not None  # every rank reads its part
            self.origin = origin
            return self._announce(window)
        return self._announce(self._live_point(found.choice, window, origin, mine))

    def _live_point(self, choice: Live, window: RestorePoint | None, origin: str, mine: LiveReport) -> LivePoint:
        self.origin = "live state" if choice.sources[self.host.rank] is None else "live state of a replica"
        if window is not None:
            self.origin = f"stage replayed from its neighbours' logs, from a window in {origin}"
        for newest in self.host.windows()[:1]:  # the peers may be others now
            self.offer_again(self.host.read_manifest(newest))
        return LivePoint(
            boundary=next(b for b in mine.boundaries if b.serial == choice.iteration),
            sources=choice.sources,
            replays={rank: replay.window for rank, replay in enumerate(choice.replays) if replay is not None},
            window=window,
        )

    def _usable_disk(self) -> DirectoryTier | None:
        if self.disk is not None and self.disk.completed:
            _log.info("%s holds the last window of a run that completed: starting afresh", self.disk.url)
            return None
        return self.disk

    def _choose_alone(self) -> RestorePoint | None:
        disk = self._usable_disk()
        choice = choose_window([self.host, *([disk] if disk else [])], job=self.host.job)
        if choice is None:
            return None
        for problem in choice.problems:
            _log.warning("passed over: %s", problem)
            self._bus.emit(Notice(message=f"passed over: {problem}"))
        self.origin = choice.tier.name
        return RestorePoint(choice.manifest, choice.tier)

    def _announce(self, point: _Point) -> _Point:
        self.point = point
        if isinstance(point, LivePoint):
            _log.info("rank %d continues after iteration %d: %s", self.host.rank, point.boundary.iteration, self.origin)
            window = None if point.window is None else point.window.manifest
            self._bus.emit(
                RestoreStarted(
                    first_iteration=point.boundary.iteration if window is None else window.first_iteration,
                    last_iteration=point.boundary.iteration if window is None else window.last_iteration,
                    tier=self.origin,
                    nbytes=0 if point.window is None else point.window.nbytes,
                )
            )
        if not isinstance(point, RestorePoint):
            return point
        manifest = point.manifest
        age = max(0.0, time.time() - manifest.created_at)
        _log.log(
            logging.INFO if manifest.rank == 0 else logging.DEBUG,
            "found the window of iterations %d..%d of job %s in %s (%.1f MB, %.0f s old, checksums verified): "
            "restoring iteration %d, then replaying %d iterations to rebuild the dense state",
            manifest.first_iteration, manifest.last_iteration, manifest.job, self.origin, point.nbytes / 1e6, age,
            manifest.first_iteration, len(manifest.slots) - 1,
        )  # fmt: skip
        self._bus.emit(
            RestoreStarted(
                first_iteration=manifest.first_iteration,
                last_iteration=manifest.last_iteration,
                tier=self.origin,
                nbytes=point.nbytes,
            )
        )
        return point

    def release_point(self) -> None:
        """The restore point has been used."""
        self.point = None

    def forget_windows(self) -> None:
        """A fresh run begins: windows of an earlier run of the same job must never be restored into it."""
        self.point = None
        tiers: list[Tier] = [self.host, *([self.disk] if self.disk is not None else [])]
        if self.peers is not None:
            self.peers.service.forget_windows()
        if self.journal is not None:
            self.journal.forget()
        for tier in tiers:
            for iteration in tier.windows():
                _log.info("dropping window %d of an earlier run from %s", iteration, tier.name)
                tier.drop(iteration)
        if self.disk is not None:
            self.disk.clear_completed()

    def on_commit(self, manifest: Manifest) -> None:
        """A window was committed in host memory (capture thread)."""
        if self.peers is not None:
            self.peers.offer(manifest)
            if self._persister is not None:
                self._persister.count()
        elif self._persister is not None:
            self._persister.offer(manifest)

    def offer_again(self, manifest: Manifest | None) -> None:
        """This window is the newest one again (a predecessor's, restored): make sure that the peers have it."""
        if self.peers is not None and manifest is not None:
            self.peers.offer(manifest)

    def committed(self, newest: Manifest | None) -> list[int]:
        """Last iterations of the windows that are committed here.

        Args:
            newest: The newest one of this course of training.
        """
        return [] if newest is None else [it for it in self.host.windows() if it <= newest.last_iteration]

    def held(self, newest: Manifest | None) -> list[int]:
        """Those of :meth:`committed` that are copied to the peers as well: older ones are kept until the newest is."""
        committed = self.committed(newest)
        if newest is None or self.peers is None or self.peers.holding(newest.last_iteration):
            return committed
        return [it for it in committed if it < newest.last_iteration]

    def wants_to_persist(self) -> bool | None:
        """Whether the next window that all ranks have is to be persisted; None while one is on its way."""
        if self._persister is None or not self._persister.idle:
            return None
        return self._persister.is_due

    def agreed(self, newest: int, *, persist: bool) -> None:
        """All ranks have a window, and persist it or not: the windows on storage are of the same iterations.

        Args:
            newest: Last iteration of the newest window that all ranks have.
            persist: Whether it is time to persist it.
        """
        if self.peers is not None:
            self.peers.drop_others()
        if newest >= 0:
            self._ranks.note_window(self.host.job, newest)
        if not persist or self._persister is None:
            return
        if len(set(self._ranks.agree("persisted", self._persister.base_iteration))) > 1:
            self._persister.forget()  # one failed, or is new: all write all experts
        if newest in self.host.windows():
            self._persister.persist(self.host.read_manifest(newest))

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
        held = 3 * len(self.peers.holds) if self.peers is not None else 0
        if self.disk is None:
            return 2 + held
        return held + (3 if self._config.persist_every_n_windows == 1 else 4)

    def _room(self) -> int:
        # Free buffers of this process count as free there and as used here.
        free = self.host.free_bytes() // self._ranks.local_size
        return free + self.host.used_bytes() - self.host.pooled_bytes()

    def close(self, *, completed: bool) -> None:
        """Finish persisting, then let go: keep the windows, or remove them if training is complete."""
        self.point = None
        self._let_go(completed=completed)

    def _let_go(self, *, completed: bool) -> None:
        try:
            if self._persister is not None:
                self._persister.close()
                self._persister = None
                if completed and self.disk is not None:
                    self.disk.mark_completed()
        finally:
            if self.journal is not None:
                self.journal.close()
                self.journal = None
            if self.peers is not None:
                self.peers.close(completed=completed)
                self.peers = None
            if completed and self._opened:
                with contextlib.suppress(*STORE_ERRORS):  # a run that is complete needs no store any more
                    self._ranks.note_window(self.host.job, None)
                self.host.destroy()
            self.host.close()
            if self.disk is not None:
                self.disk.close()


def _opened(parts: Sequence[Part]) -> tuple[RestorePoint | None, str]:
    """A restore point of windows that were read, and where this rank's own came from."""
    if not parts:
        return None, ""
    own, *others = parts
    return RestorePoint(own.manifest, own.tier, [(part.manifest, part.tier) for part in others]), own.origin
