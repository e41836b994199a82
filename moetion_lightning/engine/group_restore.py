"""What the ranks of a job restore together: each says what it has, all evaluate one function, each reads its part."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moetion_lightning.distributed.restore_choice import (
    Excluded,
    Live,
    Nothing,
    RankReport,
    Rollback,
    Source,
    Window,
    choose,
)
from moetion_lightning.engine.journal import Boundary
from moetion_lightning.engine.peers import Peers
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.errors import ForeignWindowError, MoEtionError, RankLostError, StateLostError
from moetion_lightning.store.disk import DirectoryTier
from moetion_lightning.store.format import Manifest
from moetion_lightning.store.host_memory import HostMemoryTier
from moetion_lightning.store.tier import Tier

__all__ = ["GroupRestore", "LiveReport", "Part"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One rank's window, where this rank reads it."""

    manifest: Manifest
    tier: Tier
    origin: str


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


class GroupRestore:
    """Finds the newest state that every rank can reach. All ranks call each method together.

    Args:
        ranks: The ranks of the job.
        peers: Their memory.
        host: This rank's windows in memory, open.
        disk: This rank's windows on storage, open, or None.
    """

    def __init__(self, ranks: Ranks, peers: Peers, host: HostMemoryTier, disk: DirectoryTier | None) -> None:
        self._ranks = ranks
        self._peers = peers
        self._host = host
        self._disk = disk
        self._problems: list[str] = []

    def find(self, live: LiveReport) -> Live | list[Part] | None:
        """Choose, and read this rank's part.

        Args:
            live: What this process holds besides windows.

        Returns:
            The choice to go on from live state; or the windows to restore, this rank's own first; or None if there is
            no trace of an earlier run.

        Raises:
            StateLostError: There were windows, but none that all ranks can reach; says what is lost.
            RankLostError: There was state, but no window yet.
            ForeignWindowError: A window is of a run with another number of ranks.
        """
        reports = self._reports(live)
        excluded: set[Excluded] = set()
        while True:
            choice = choose(reports, frozenset(excluded))
            if isinstance(choice, Nothing):
                if not choice.fresh and any(r.memory or r.held or r.disk for r in reports):
                    raise StateLostError(choice.reason)
                if not choice.fresh:  # no window was committed yet: processes that are all new begin anew
                    raise RankLostError(choice.reason)
                self._refuse_if_all_is_lost()
                self._refuse_if_unreadable()
                return None
            if isinstance(choice, Live):
                return choice
            parts, problems = self._read(choice)
            bad = [item for answer in self._ranks.agree("read", problems) for item in answer]
            if not bad:
                self._drop_later(choice.window)
                return parts
            excluded.update(Excluded(owner, tier, rank, last) for owner, tier, rank, last in bad)

    # --- inside --------------------------------------------------------------------------------------------------

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

    def _windows(self, tier: Tier) -> dict[int, Manifest]:
        """Windows whose manifests can be read, by last iteration."""
        found = {}
        for iteration in tier.windows():
            try:
                found[iteration] = tier.read_manifest(iteration)
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

    def _reports(self, live: LiveReport) -> list[RankReport]:
        rank = self._ranks.control.rank
        memory, disk = self._windows(self._host), {} if self._disk is None else self._windows(self._disk)
        held = {owner: self._windows(tier) for owner, tier in self._peers.held().items()}
        seen = [(rank, m) for m in (*memory.values(), *disk.values())]
        seen += [(owner, m) for owner, found in held.items() for m in found.values()]
        answers = self._ranks.agree("shares", [[owner, m.extra.get("shares", [])] for owner, m in seen])
        shares: dict[int, set[int]] = {}
        for answer in answers:
            for owner, ranks in answer:
                shares.setdefault(owner, {owner}).update(ranks)
        mine = tuple(sorted(shares.get(rank, {rank})))
        on_disk = {owner: _ages(self._windows(self._disk_of(owner))) for owner in mine if self._disk is not None}
        report = RankReport(
            rank=rank,
            shares=mine,
            live=live.live,
            journal=() if live.live is not None else tuple(b.serial for b in live.boundaries),
            memory=_ages(memory),
            held={owner: _ages(found) for owner, found in held.items()},
            disk=on_disk,
            copies=live.copies,
        )
        world = self._ranks.control.world_size
        foreign = sorted({m.world_size for _, m in seen if m.world_size != world})
        answers = self._ranks.agree("reports", [report.to_json(), foreign])
        sizes = sorted({size for _, sizes in answers for size in sizes})
        if sizes:
            raise ForeignWindowError(
                f"job {self._host.job!r} has windows of a run with {sizes[0]} ranks, this one has {world}. Start as "
                "many ranks as before, or start afresh with resume='never' or another job_id."
            )
        reports = [RankReport.from_json(answer) for answer, _ in answers]
        if all(report.live is None for report in reports):  # run states alone continue nothing
            reports = [dataclasses.replace(report, journal=()) for report in reports]
        return reports

    def _disk_of(self, owner: int) -> DirectoryTier:
        assert self._disk is not None
        if owner == self._host.rank:
            return self._disk
        return self._disk.of_rank(owner)

    def _read(self, choice: Rollback) -> tuple[list[Part], list[list[Any]]]:
        rank, last = self._host.rank, choice.window.last
        parts, problems = [], []
        sources = sorted(choice.sources[rank], key=lambda source: source.owner != rank)
        for source in sources:
            try:
                tier = self._tier_of(source, last)
                manifest = tier.read_manifest(last)
                if source.tier != "peer":  # what comes over the wire was verified on its way
                    tier.verify(manifest)
            except (MoEtionError, OSError) as error:
                bad = source.excluded(rank, last)
                _log.warning("rank %d passes over the window %d of rank %d: %s", rank, last, source.owner, error)
                problems.append([bad.owner, bad.tier, bad.rank, bad.last])
                continue
            origin = "memory of a peer" if source.tier == "peer" and source.owner == rank else tier.name
            parts.append(Part(manifest=manifest, tier=tier, origin=origin))
        return parts, problems

    def _tier_of(self, source: Source, last: int) -> Tier:
        if source.tier == "peer":
            assert source.peer is not None
            return self._peers.fetch(source.peer, source.owner, last)
        if source.tier == "disk":
            return self._disk_of(source.owner)
        return self._host if source.owner == self._host.rank else self._peers.held()[source.owner]

    def _drop_later(self, window: Window) -> None:
        """Later windows belong to a course that is given up: with another rank's, they could later look common."""
        tiers: list[Tier] = [self._host, *self._peers.held().values(), *([self._disk] if self._disk else [])]
        for tier in tiers:
            for iteration in tier.windows():
                if iteration > window.last:
                    tier.drop(iteration)


def _ages(manifests: Mapping[int, Manifest]) -> tuple[Window, ...]:
    return tuple(Window(first=m.first_iteration, last=m.last_iteration) for m in manifests.values())
