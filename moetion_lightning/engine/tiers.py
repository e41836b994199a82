"""The tiers of one rank, opened and closed together."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from moetion_lightning.config import EngineConfig, default_memory_dir, launched_run
from moetion_lightning.distributed.node_windows import NodeWindows
from moetion_lightning.distributed.restore_choice import Live, Rollback
from moetion_lightning.distributed.stable_store import STORE_ERRORS
from moetion_lightning.engine.capacity import Capacity
from moetion_lightning.engine.group_restore import PROTECTED, GroupRestore, LiveReport
from moetion_lightning.engine.journal import Journal, LivePoint
from moetion_lightning.engine.peers import Peers
from moetion_lightning.engine.persist import Persister
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.engine.termination import TerminationWatch
from moetion_lightning.engine.window_reading import Part
from moetion_lightning.errors import JobBusyError, MoEtionError, OwnerLostError
from moetion_lightning.events import CopiesChanged, EventBus, Notice, RestoreStarted, StartedAfresh
from moetion_lightning.storage.choice import Accept, Refusal, choose_window
from moetion_lightning.storage.disk import DirectoryTier
from moetion_lightning.storage.format import Manifest
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.jobs import clean_stale, remove_if_ours
from moetion_lightning.storage.tier import Tier
from moetion_lightning.units import age_text, bytes_text, span_text

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
                run=launched_run(),
            )
        self.point: RestorePoint | LivePoint | None = None
        #: Run states between iterations, where a replaced rank needs them.
        self.journal: Journal | None = None
        #: Where the restore point came from.
        self.origin = ""
        #: Windows that are whole and were not wanted when the newest one was looked for, and why.
        self.refused: list[Refusal] = []
        #: Whether the course of training that was restored had come to its end.
        self.trained = False
        self.peers: Peers | None = None
        #: Whether host memory can hold what training needs.
        self.capacity = Capacity(
            self.host, local_size=ranks.local_size, peers=lambda: self.peers,
            persist_every=config.persist_every_n_windows if self.disk is not None else None,
        )  # fmt: skip
        self._others: NodeWindows | None = None  # what dead processes left on this node, to end with the run
        self._uncopied: Sequence[tuple[int, int]] = ()
        self._persister: Persister | None = None
        self._is_noted = False  # that all ranks had a window
        self._termination: TerminationWatch | None = None
        self._drained_by: float | None = None  # on the monotonic clock
        self._opened = False
        self._accept: Accept | None = None
        self._fresh = False
        self._asked_for = False
        #: Whether the script has gone on from this run to another one, each time: it does not end where it was left.
        self.left = False

    def open(
        self,
        report: Callable[[], LiveReport],
        *,
        replay_stages: bool,
        accept: Accept | None = None,
        fresh: bool = False,
    ) -> RestorePoint | LivePoint | None:
        """Open the tiers; find and verify the newest window of this job.

        Args:
            report: Says what this process holds besides windows.
            replay_stages: Whether stages of a pipeline may be replayed alone.
            accept: Says why a window is not wanted. Those that are not are set aside, if another one is restored or
                training begins anew; :attr:`refused` has them.
            fresh: Restore none; only make sure that there are not some that nobody can read. Else the run is known not
                to be complete, whatever single processes of it have noted.
        """
        # A process whose place this one takes may take a while to die.
        self.host.open(wait_seconds=_ALONE_SECONDS if self._ranks.alone else _REPLACED_SECONDS)
        self._opened = True
        self._accept, self._fresh = (_refuse if fresh else accept), fresh
        self.refused = []
        try:
            return self._find(report, replay_stages)
        except BaseException:  # another attempt opens everything again
            self._let_go(trained=False)
            raise

    def _find(self, report: Callable[[], LiveReport], replay_stages: bool) -> RestorePoint | LivePoint | None:
        for stale in clean_stale(
            self.host.base_dir, older_than_seconds=self._config.stale_after_seconds, keep=(self.host.job,)
        ):
            _log.info("reclaimed the host memory of dead job %s (%s)", stale.name, bytes_text(stale.nbytes))
        if self.disk is not None and self._persister is None:
            self.disk.open()
            self._persister = Persister(self.host, self.disk, self._bus, self._config.persist_every_n_windows)
        if not self._fresh:
            for tier in self._tiers():
                tier.mark_uncompleted()
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
        is_fresh = first and self._fresh and not self._ranks.replaced
        if first and not is_fresh:
            self._prepare_together()  # before any rank looks
        self.peers.open()
        if self.journal is None and self._ranks.elastic:
            self.journal = Journal(self.host.keep_note, self.host.note)
        if is_fresh and self._config.resume == "never":
            return None
        restore = GroupRestore(
            self._ranks, self.peers, self.host, self._usable_disk(),
            accept=self._accept if first else None,  # what this process has captured since is its own
            iteration=self._wanted_iteration() if first and not is_fresh else None,
        )  # fmt: skip
        if is_fresh:
            restore.check_fresh()
            return None
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
        return LivePoint(
            boundary=next(b for b in mine.boundaries if b.serial == choice.iteration),
            sources=choice.sources,
            replays={rank: replay.window for rank, replay in enumerate(choice.replays) if replay is not None},
            window=window,
        )

    def _tiers(self) -> list[Tier]:
        return [self.host, *([self.disk] if self.disk is not None else [])]

    def _usable_disk(self) -> DirectoryTier | None:
        if self.disk is not None and self.disk.completed:
            _log.info("%s holds the last window of a run that completed: starting afresh", self.disk.url)
            return None
        return self.disk

    def _wanted_iteration(self) -> int | None:
        """The iteration of ``resume=<iteration>``, unless the course that is there began from it."""
        wanted = self._config.resume
        if isinstance(wanted, str):
            return None
        self._asked_for = not any(tier.resumed == wanted for tier in self._tiers())
        if not self._asked_for:
            _log.info(
                "resume=%d has been done, and training went on from there: the newest window of that course is taken. "
                "To go back again, choose an iteration of another window.",
                wanted,
            )
            return None
        return wanted

    def _prepare_together(self) -> None:
        """Leave only wanted windows where all ranks look for one; what is not wanted lies aside."""
        if self._accept is None:
            return
        for tier in self._tiers():
            wanted, refused = self._sorted(tier)
            if not wanted:
                for course in tier.courses_aside():
                    if self._sorted(tier, course)[0]:
                        tier.take_back(course)
                        break
                _, refused = self._sorted(tier)
            tier.set_aside(m.iteration for m in refused)

    def _sorted(self, tier: Tier, aside: str = "") -> tuple[list[Manifest], list[Manifest]]:
        """Readable windows that are wanted, and that are not."""
        assert self._accept is not None
        wanted, refused = [], []
        for iteration in tier.windows(aside):
            with contextlib.suppress(MoEtionError):  # said by whoever chooses
                manifest = tier.read_manifest(iteration, aside)
                reason = self._accept(manifest)
                if reason:
                    refused.append(manifest)
                    self.refused.append(Refusal(tier=tier.name, manifest=manifest, reason=reason, aside=aside))
                else:
                    wanted.append(manifest)
        return wanted, refused

    def _choose_alone(self) -> RestorePoint | None:
        self._usable_disk()
        tiers, iteration = self._tiers(), self._wanted_iteration()
        choice = choose_window(
            tiers, job=self.host.job, accept=self._accept, iteration=iteration, on_refused=self.refused.append
        )
        if choice is None:
            return None
        for problem in choice.problems:
            _log.warning("passed over: %s", problem)
            self._bus.emit(Notice(message=f"passed over: {problem}"))
        chosen = choice.manifest
        if choice.aside:
            choice.tier.take_back(choice.aside)
        for tier in tiers:
            others = {r.manifest.iteration for r in choice.refused if r.tier == tier.name and not r.aside}
            if iteration is not None:
                others.update(i for i in tier.windows() if i > chosen.iteration)
            if tier is self.host:
                # Older ones, left by a kill between a commit and their removal, and damaged ones: where two windows
                # just fit, they would keep the next one out for ever. Aside, they give way to it.
                others.update(tier.windows())
                if tier is choice.tier:
                    others.discard(chosen.iteration)
            tier.set_aside(others)
            if iteration is not None:
                tier.mark_resumed(iteration)
        for refusal in choice.refused:
            if not refusal.manifest.finite and chosen.finite:
                _log.warning("not restored: %s", refusal)
                self._bus.emit(Notice(message=f"not restored: {refusal}"))
        self.origin = choice.tier.name
        return RestorePoint(chosen, choice.tier)

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
        for tier in self._tiers():
            self.trained = self.trained or tier.is_trained()
            tier.mark_continued()
        manifest = point.manifest
        if not (self.trained or self.left):  # else it did not end the process
            self._count_restore(manifest)
        age = max(0.0, time.time() - manifest.created_at)
        what = f"the window of iterations {manifest.first_iteration}..{manifest.last_iteration}"
        then = f"restoring iteration {manifest.first_iteration}, then replaying {point.replays} iterations"
        if point.is_log:
            what = f"the restore point of iteration {manifest.iteration}"
            count = len(manifest.extra["log"])
            then = f"rebuilding its state from captures and the gradients of {count} iteration{'s'[: count != 1]}"
        _log.log(
            logging.INFO if manifest.rank == 0 else logging.DEBUG,
            "found %s of job %s in %s (%s, %s old, checksums verified): %s",
            what, manifest.job, self.origin, bytes_text(point.nbytes), age_text(age), then,
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

    def _count_restore(self, manifest: Manifest) -> None:
        """Say when runs end again and again soon after the same window."""
        asked_for = self._asked_for
        count = max(tier.count_restore(manifest.iteration, asked_for=asked_for) for tier in self._tiers())
        if count < 2 or manifest.rank != 0:
            return
        steps = self.host.reached - manifest.last_iteration
        ended = f"about {steps} steps after this window" if steps > 0 else "soon after this window"
        older = []
        if self.disk is not None:
            for iteration in self.disk.windows():
                if iteration < manifest.iteration:
                    with contextlib.suppress(MoEtionError):
                        found = self.disk.read_manifest(iteration)
                        older.append(span_text(found.first_iteration, found.last_iteration))
        message = (
            f"the run ended {ended} ({span_text(manifest.first_iteration, manifest.last_iteration)}) {count} times, "
            "and left no later one to continue from. If it ends there again: resume=<an older iteration> takes an "
            f"older window (on storage: {', '.join(older) or 'none; keep_persisted= keeps more'})."
        )
        _log.warning(message)
        self._bus.emit(Notice(message=message))

    def release_point(self) -> None:
        """The restore point has been used: give its memory back now, whenever garbage is collected."""
        self._close_point()

    def _close_point(self) -> None:
        point, self.point = self.point, None
        window = point.window if isinstance(point, LivePoint) else point
        if window is not None:
            window.close()

    def set_aside(self) -> None:
        """A fresh course of training begins: windows of an earlier one must not be restored into it, but stay.

        They are removed when this course has a window of its own on that tier. Copies at peers go now.
        """
        self._close_point()
        if self.peers is not None:
            self.peers.begin_anew()
        if self.journal is not None:
            self.journal.forget()
        if not self._ranks.alone:
            self._is_noted = False
            self.host.keep_note(PROTECTED, b"")
        found = [(tier, tier.windows()) for tier in self._tiers()]
        if any(windows for _, windows in found):
            self._bus.emit(StartedAfresh(num_windows=max(len(windows) for _, windows in found)))
        for tier, windows in found:
            if tier.set_aside():
                _log.info(
                    "%d windows of an earlier course of training in %s are set aside (the newest is %d); they are "
                    "removed when this one has committed a window there",
                    len(windows), tier.name, windows[0],
                )  # fmt: skip

    def training_begins(self) -> None:
        """The training thread is about to take its first step, or its first one after a loss."""
        if self.peers is not None:
            self.peers.follow()
        if self._persister is not None and self._termination is None:
            self._termination = TerminationWatch(self._persist_before_the_end)
            if not self._termination.install():
                _log.info("SIGTERM cannot be watched here: the last windows may not be on storage after it")

    def drain(self) -> None:
        """Note a SIGTERM: closing copies committed windows to storage within ``grace_seconds``."""
        if self._drained_by is None:
            self._drained_by = time.monotonic() + self._config.grace_seconds

    def _grace(self) -> float | None:
        """Seconds that are left to bring state away; None: as long as it takes."""
        return None if self._drained_by is None else max(0.0, self._drained_by - time.monotonic())

    def _persist_before_the_end(self) -> None:
        """SIGTERM (a thread of its own)."""
        assert self._persister is not None
        assert self.disk is not None
        started, persister = time.perf_counter(), self._persister
        self.drain()
        persister.persist_all()
        if not persister.wait(self._grace()):
            _log.error("SIGTERM: storage was not ready within %.0f s (grace_seconds)", self._config.grace_seconds)
            return
        with contextlib.suppress(MoEtionError):
            newest = self.disk.windows()[:1]
            _log.warning(
                "SIGTERM: what is committed was persisted in %.1f s; the newest window in %s ends with iteration %s",
                time.perf_counter() - started, self.disk.location, newest[0] if newest else "none",
            )  # fmt: skip

    def on_commit(self, manifest: Manifest) -> None:
        """A window was committed in host memory (capture thread)."""
        if manifest.finite:
            self.host.forget_aside()
        is_due = manifest.extra.get("round_begins", True)  # of a gradient log every iteration is committed
        if self._persister is not None and is_due:
            if self.peers is not None:
                self._persister.count()
            else:
                self._persister.offer(manifest)

    def committed(self, newest: Manifest | None) -> list[int]:
        """Last iterations of the windows that are committed here.

        Args:
            newest: The newest one of this course of training.
        """
        return [] if newest is None else [it for it in self.host.windows() if it <= newest.last_iteration]

    def held(self, newest: Manifest | None) -> list[int]:
        """Those of :meth:`committed` of which all copies are here that this rank keeps of others, if they can be made.

        Older ones stay until all ranks have a newer one of these.
        """
        copies = [] if self.peers is None else self.peers.copies.held().values()
        return [it for it in self.committed(newest) if all(kept is None or it in kept for kept in copies)]

    def uncopied(self) -> list[tuple[int, int]]:
        """Ranks whose windows cannot be copied here now, each with this rank."""
        copies = {} if self.peers is None else self.peers.copies.held()
        return [(owner, self.host.rank) for owner, kept in copies.items() if kept is None]

    def wants_to_persist(self) -> bool | None:
        """Whether the next window that all ranks have is to be persisted; None while one is on its way."""
        if self._persister is None or not self._persister.idle:
            return None
        return self._persister.is_due

    def agreed(self, newest: int, *, persist: bool, uncopied: Sequence[tuple[int, int]] = ()) -> None:
        """All ranks have a window, and persist it or not: the windows on storage are of the same iterations.

        Args:
            newest: Last iteration of the newest window that all ranks have.
            persist: Whether it is time to persist it.
            uncopied: Ranks whose windows cannot be copied now, and the ranks that were to keep the copies.
        """
        self._tell_of_copies(uncopied)
        if newest >= 0:
            if self.peers is not None:
                self.peers.settle()
            self._ranks.note_window(self.host.job, newest)
            if not self._is_noted and not self._ranks.alone:
                self._is_noted = True
                self.host.keep_note(PROTECTED, b"1")
        if not persist or self._persister is None:
            return
        if len(set(self._ranks.agree("persisted", self._persister.base_iteration))) > 1:
            self._persister.forget()  # one failed, or is new: all write all experts
        if newest in self.host.windows():
            self._persister.persist(self.host.read_manifest(newest))

    def _tell_of_copies(self, uncopied: Sequence[tuple[int, int]]) -> None:
        """Say once that windows are not safe from the loss of a node, and once that they are again."""
        if uncopied == self._uncopied:
            return
        self._uncopied = uncopied
        self._bus.emit(CopiesChanged(missing=len(uncopied)))
        if self.host.rank != 0:
            return
        message = "the windows of all ranks are copied to other nodes again"
        if uncopied:
            pairs = ", ".join(f"of rank {owner} to rank {holder}" for owner, holder in uncopied[:4])
            more = f" and {len(uncopied) - 4} more" if len(uncopied) > 4 else ""
            message = (
                f"no copies of windows can be made {pairs}{more}. Training goes on, and windows too, but the loss of a "
                "node whose windows are not copied would end the job. See the log of the ranks that keep the copies"
            )
        _log.warning(message)
        self._bus.emit(Notice(message=message))

    def close(self, *, trained: bool) -> None:
        """Finish persisting, then let go of everything; the windows stay.

        Args:
            trained: Note that training came to its end: :meth:`complete` follows when the process has ended well, too.
        """
        self._close_point()
        self._let_go(trained=trained)

    def complete(self, *, all_ranks: bool = True) -> None:
        """After ``close(trained=True)``: the process ends well now. Windows that are of another process by now stay.

        Args:
            all_ranks: Whether every rank of the job has come to its good end. While one may still fail, and all be
                started again, windows are kept.
        """
        if all_ranks:
            with contextlib.suppress(*STORE_ERRORS):  # a run that is complete needs no store any more
                self._ranks.note_window(self.host.job, None)  # first: nobody shall miss what is removed
        with contextlib.suppress(JobBusyError):  # the job was started again: it is that process's
            if self.host.is_of_this_process():
                with self.host:
                    if all_ranks:
                        self.host.destroy()
                    else:
                        self.host.mark_completed()
            if all_ranks:
                self._remove_copies()
        if self.disk is not None and self.disk.is_of_this_process():
            self._note_end(completed=True)
            self.disk.close()

    def _remove_copies(self) -> None:
        for path in self.host.path.parent.glob(f"replica-*-at-{self.host.rank:05d}"):
            remove_if_ours(path)
        if self._others is not None:
            self._others.remove_others()

    def _note_end(self, *, completed: bool) -> None:
        """Note on storage that training, or the process, came to its end; not if the place is another process's now."""
        if self.disk is not None:
            try:
                if completed:
                    self.disk.mark_completed()
                else:
                    self.disk.mark_trained()
            except OwnerLostError as error:
                _log.error("%s", error)

    def _let_go(self, *, trained: bool) -> None:
        try:
            if self._persister is not None:
                if self._drained_by is not None:
                    self._persister.persist_all()  # what was committed since the signal, too
                self._persister.close(self._grace())
                if self._termination is not None:
                    self._termination.remove()
                    self._termination = None
                is_lost, self._persister = self._persister.is_lost, None
                if not is_lost and trained:
                    self._note_end(completed=False)
        finally:
            if self.journal is not None:
                self.journal.close()
                self.journal = None
            if self.peers is not None:
                self._others = self.peers.windows if self.peers.stands_for_node else None
                self.peers.close()
                self.peers = None
            if trained and self._opened:
                self.host.mark_trained()
            self.host.close()
            if self.disk is not None:
                self.disk.close()


def _refuse(manifest: Manifest) -> str:
    return "training begins anew"


def _opened(parts: Sequence[Part]) -> tuple[RestorePoint | None, str]:
    """A restore point of windows that were read, and where this rank's own came from."""
    if not parts:
        return None, ""
    own, *others = parts
    return RestorePoint(own.manifest, own.tier, [(part.manifest, part.tier) for part in others]), own.origin
