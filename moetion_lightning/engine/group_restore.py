"""What the ranks of a job restore together: each says what it has, all evaluate one function, each reads its part."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from moetion_lightning.distributed.restore_choice import (
    Excluded,
    Live,
    Nothing,
    RankReport,
    Replay,
    Rollback,
    Window,
    choose,
)
from moetion_lightning.engine.journal import Boundary
from moetion_lightning.engine.peers import Peers
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.engine.window_reading import Part, WindowReader
from moetion_lightning.errors import (
    ConfigurationError,
    ForeignWindowError,
    MoEtionError,
    RankLostError,
    StateLostError,
)
from moetion_lightning.storage.choice import Accept
from moetion_lightning.storage.disk import DirectoryTier
from moetion_lightning.storage.format import Manifest
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.tier import Tier
from moetion_lightning.units import span_text

__all__ = ["PROTECTED", "Found", "GroupRestore", "LiveReport"]

_log = logging.getLogger(__name__)

#: Note of a rank that knows that all ranks had a window.
PROTECTED = "protected"


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where all ranks continue.

    Args:
        choice: What they chose.
        parts: The windows that this rank restores, its own first; empty if it has its state, or gets it from another.
    """

    choice: Live | Rollback
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LiveReport:
    """What a process still holds, or can get, besides windows.

    Args:
        live: Serial number of the boundary whose state the process holds, or None.
        boundaries: Run states that this rank has, its own or its predecessor's.
        copies: Other ranks that hold a copy of all model state of this rank.
    """

    live: int | None = None
    boundaries: tuple[Boundary, ...] = ()
    copies: tuple[int, ...] = ()

    @property
    def iteration(self) -> int | None:
        """Iterations that are complete in the state that the process holds."""
        return next((b.iteration for b in self.boundaries if b.serial == self.live), None)


class GroupRestore:
    """Finds the newest state that every rank can reach. All ranks call each method together.

    Args:
        ranks: The ranks of the job.
        peers: Their memory.
        host: This rank's windows in memory, open.
        disk: This rank's windows on storage, open, or None.
        accept: Says why a window is not wanted; None takes all.
        iteration: Only windows that contain this iteration are wanted.
    """

    def __init__(
        self,
        ranks: Ranks,
        peers: Peers,
        host: HostMemoryTier,
        disk: DirectoryTier | None,
        *,
        accept: Accept | None = None,
        iteration: int | None = None,
    ) -> None:
        self._accept = accept
        self._iteration = iteration
        self._ranks = ranks
        self._peers = peers
        self._host = host
        self._disk = disk
        self._reader = WindowReader(ranks, peers, host, disk)
        self._problems: list[str] = []
        self._spans: set[str] = set()
        self._is_any_readable = False
        self._not_finite: set[Excluded] = set()

    def find(self, live: LiveReport, *, replay_stages: bool) -> Found | None:
        """Choose, and read this rank's part.

        Args:
            live: What this process holds besides windows.
            replay_stages: Whether stages of a pipeline may be replayed alone; they are if all ranks say so.

        Returns:
            The choice, and this rank's part of the windows in it; None if there is no trace of an earlier run.

        Raises:
            StateLostError: There were windows, but none that all ranks can reach; says what is lost.
            RankLostError: There was state, but no window yet.
            ForeignWindowError: A window is of a run with another number of ranks.
        """
        reports, replay_stages = self._reports(live, replay_stages)
        excluded: set[Excluded] = set()
        while True:
            choice = choose(reports, frozenset(excluded | self._not_finite), replay_stages=replay_stages)
            if isinstance(choice, Nothing) and self._not_finite:
                self._not_finite = set()  # better than nothing
                continue
            if isinstance(choice, Nothing):
                self._refuse_if_asked_for()
                if not choice.fresh and any(r.protected or any(r.disk.values()) for r in reports):
                    raise StateLostError(choice.reason)
                if not choice.fresh:  # all ranks had no window yet: processes that are all new begin anew
                    raise RankLostError(choice.reason)
                if any(any(r.memory.values()) for r in reports):
                    _log.warning("rank %d: %s", self._host.rank, choice.reason)
                self._refuse_if_all_is_lost()
                self._look_for_strangers()
                self._refuse_if_unreadable()
                return None
            mine = self._mine(choice)
            if isinstance(choice, Live) and not any(choice.replays):
                return Found(choice=choice)
            bad = self._reader.copy(mine, choice, reports)
            if bad:
                excluded.update(bad)
                continue
            parts, problems = ([], []) if mine is None else self._reader.read(mine, reports)
            bad = self._reader.told("read", problems)
            if not bad:
                self._settle(choice)
                return Found(choice=choice, parts=tuple(parts))
            excluded.update(bad)

    def check_fresh(self) -> None:
        """Training is to begin anew. Where there are windows and none can be read, only the user may decide that.

        Raises:
            StateLostError: There are; lists what is wrong with them.
        """
        for tier in (*self._memory(), *self._disks()):
            self._windows(tier)
        if self._is_any_readable:
            self._problems = []
        self._refuse_if_unreadable()

    # --- inside --------------------------------------------------------------------------------------------------

    def _mine(self, choice: Live | Rollback) -> Replay | None:
        """What this rank restores."""
        rank = self._host.rank
        if isinstance(choice, Live):
            return choice.replays[rank]
        return Replay(window=choice.window, sources=choice.sources[rank])

    def _settle(self, choice: Live | Rollback) -> None:
        """The choice stands."""
        if isinstance(choice, Rollback):
            if any(place.last > choice.window.last for place in self._not_finite):
                _log.warning(
                    "rank %d goes back to the window of iterations %d..%d: newer ones hold a loss, a gradient norm or "
                    "a weight that is not finite",
                    self._host.rank, choice.window.first, choice.window.last,
                )  # fmt: skip
            _log.log(
                logging.INFO if choice.reason and self._host.rank == 0 else logging.DEBUG,
                "all ranks go back to the window of iterations %d..%d. %s",
                choice.window.first, choice.window.last, choice.reason,
            )  # fmt: skip
            for tier in (self._host, *self._disks()):
                # Not dropped: resume=<iteration> or a poisoned window may have led here.
                tier.set_aside(i for i in tier.windows() if i > choice.window.last)
                if self._iteration is not None:
                    tier.mark_resumed(self._iteration)
            self._peers.drop_later(choice.window.last)
            return
        mine = choice.replays[self._host.rank]
        if mine is not None:
            # Those of this rank only, which proved unusable: other ranks go on, and keep theirs.
            for iteration in self._host.windows():
                if iteration > mine.window.last:
                    self._host.drop(iteration)

    def _refuse_if_all_is_lost(self) -> None:
        """Processes that are all new find nothing, as at the start of a job. Only the store knows better."""
        last = self._ranks.noted_window(self._host.job)
        if last is not None:
            raise StateLostError(
                f"The job cannot continue: the state of all {self._ranks.control.world_size} ranks is lost, in all "
                f"memories and without a window on storage. The newest window that all ranks had committed ended with "
                f"iteration {last}. Start the job again to train from the beginning. To survive such a failure next "
                "time, persist to storage that every rank can read (persist_dir=)."
            )

    def _refuse_if_asked_for(self) -> None:
        """``resume=<iteration>`` never begins anew."""
        if self._iteration is not None:
            there = sorted({span for spans in self._ranks.agree("spans", sorted(self._spans)) for span in spans})
            raise ConfigurationError(
                f"resume={self._iteration}: no window that all ranks have contains iteration {self._iteration}. "
                f"Windows of this job: {', '.join(there) or 'none'}. Give the last iteration of one of them, or "
                "resume='auto'."
            )

    def _look_for_strangers(self) -> None:
        """On a disk of this node there may be windows of ranks that are elsewhere now, where nobody can read them."""
        if self._disk is None or self._disk.place.is_remote or not self._peers.stands_for_node:
            return
        for rank in range(self._ranks.control.world_size):
            tier = self._disk.of_rank(rank)
            if not self._peers.is_here(rank) and self._windows(tier):
                self._problems.append(
                    f"{tier.location} has windows of rank {rank}, which is on another node now. Let persist_dir= be "
                    "storage that all nodes share, or give the nodes the ranks that they had"
                )

    def _windows(self, tier: Tier) -> dict[int, Manifest]:
        """Windows that are wanted and whose manifests can be read, by last iteration."""
        found = {}
        for iteration in tier.windows():
            try:
                manifest = tier.read_manifest(iteration)
                self._is_any_readable = True
                if self._accept is not None and self._accept(manifest):
                    continue
                self._spans.add(span_text(manifest.first_iteration, manifest.last_iteration))
                if self._iteration is None or manifest.first_iteration <= self._iteration <= manifest.last_iteration:
                    found[iteration] = manifest
            except MoEtionError as error:
                _log.warning("passed over: window %d in %s: %s", iteration, tier.name, error)
                self._problems.append(f"window {iteration} in {tier.name}: {error}")
        return found

    def _refuse_if_unreadable(self) -> None:
        """Where there are windows that no rank can read, only the user may decide to start again."""
        problems = [item for found in self._ranks.agree("unreadable", self._problems[:4]) for item in found]
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems[:8])
            raise StateLostError(
                f"No whole window of job {self._host.job!r} was found; nothing was restored.\n{listed}\nRepair the "
                "cause, or start anew: give the run another job_id, or delete these windows."
            )

    def _reports(self, live: LiveReport, replay_stages: bool) -> tuple[list[RankReport], bool]:
        """What every rank has, and whether all of them let stages be replayed alone."""
        rank, world = self._ranks.control.rank, self._ranks.control.world_size
        memory: dict[int, dict[int, Manifest]] = {}  # by owner
        for tier in self._memory():
            memory.setdefault(tier.rank, {}).update(self._windows(tier))
        disk = {} if self._disk is None else self._windows(self._disk)
        seen = [(rank, m) for m in disk.values()]
        seen += [(owner, m) for owner, found in memory.items() for m in found.values()]
        together: dict[tuple[int, ...], set[int]] = {}
        for owner, manifest in seen:
            together.setdefault(tuple(manifest.extra.get("shares", [])), set()).add(owner)
        shares: dict[int, set[int]] = {}
        for answer in self._ranks.agree("shares", [[ranks, sorted(owners)] for ranks, owners in together.items()]):
            for ranks, owners in answer:
                for owner in owners:
                    shares.setdefault(owner, {owner}).update(ranks)
        mine = tuple(sorted(shares.get(rank, {rank})))
        on_disk = {owner: _ages(self._windows(self._reader.disk_of(owner))) for owner in mine if self._disk is not None}
        link = self._ranks.link()
        report = RankReport(
            rank=rank,
            shares=mine,
            live=live.live,
            live_iteration=live.iteration,
            journal=() if live.live is not None else tuple(b.serial for b in live.boundaries),
            node=self._peers.node,
            memory={owner: _ages(found) for owner, found in memory.items() if found and owner < world},
            disk=on_disk,
            copies=live.copies,
            stage=None if link is None else link.stage,
            logged=None if link is None or live.live is None else link.logged(),
            protected=any(tier.note(PROTECTED) for tier in (self._host, *self._memory())),
        )
        foreign = sorted({m.world_size for _, m in seen if m.world_size != world})
        poisoned = sorted({m.iteration for _, m in seen if not m.finite})
        answers = self._ranks.agree("reports", [report.to_json(), foreign, replay_stages, poisoned])
        sizes = sorted({size for _, sizes, _, _ in answers for size in sizes})
        if sizes:
            raise ForeignWindowError(
                f"job {self._host.job!r} has windows of a run with {sizes[0]} ranks, this one has {world}. Start as "
                "many ranks as before, or start afresh with resume='never' or another job_id."
            )
        reports = [RankReport.from_json(answer) for answer, _, _, _ in answers]
        self._not_finite = _places(reports, {last for *_, lasts in answers for last in lasts})
        if all(report.live is None for report in reports):  # run states alone continue nothing
            reports = [dataclasses.replace(report, journal=()) for report in reports]
        return reports, all(allowed for _, _, allowed, _ in answers)

    def _memory(self) -> list[HostMemoryTier]:
        """What this rank tells of: all that is in the memory of its node, if it stands for it."""
        return self._peers.windows.tiers() if self._peers.stands_for_node else []

    def _disks(self) -> list[Tier]:
        return [] if self._disk is None else [self._disk]


def _ages(manifests: Mapping[int, Manifest]) -> tuple[Window, ...]:
    return tuple(Window(first=m.first_iteration, last=m.last_iteration) for m in manifests.values())


def _places(reports: Sequence[RankReport], lasts: AbstractSet[int]) -> set[Excluded]:
    """Everywhere that windows of these last iterations are: a value that is not finite spoils them on all ranks."""
    found: set[Excluded] = set()
    for report in reports:
        for owner, windows in report.memory.items():
            found.update(Excluded(owner, "memory", report.place, w.last) for w in windows if w.last in lasts)
        for owner, windows in report.disk.items():
            found.update(Excluded(owner, "disk", report.rank, w.last) for w in windows if w.last in lasts)
    return found
