"""How a node reads the windows that were chosen: what is elsewhere is copied here once, and all of it is verified."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from moetion_lightning.distributed.restore_choice import Excluded, Live, RankReport, Replay, Rollback, Source
from moetion_lightning.distributed.window_supply import copied_by
from moetion_lightning.engine.peers import Peers
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.errors import HostMemoryError, MoEtionError
from moetion_lightning.storage.disk import DirectoryTier
from moetion_lightning.storage.format import Manifest
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.tier import Tier

__all__ = ["Part", "WindowReader"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One rank's window, where this rank reads it."""

    manifest: Manifest
    tier: Tier
    origin: str


class WindowReader:
    """Reads this rank's part of a choice. All ranks call :meth:`copy` and :meth:`told` together.

    Args:
        ranks: The ranks of the job.
        peers: The memory of this node and of others.
        host: This rank's windows in memory, open.
        disk: This rank's windows on storage, open, or None.
    """

    def __init__(self, ranks: Ranks, peers: Peers, host: HostMemoryTier, disk: DirectoryTier | None) -> None:
        self._ranks = ranks
        self._peers = peers
        self._host = host
        self._disk = disk

    def copy(self, mine: Replay | None, choice: Live | Rollback, reports: Sequence[RankReport]) -> set[Excluded]:
        """Copy from other nodes what this rank copies for its own.

        Args:
            mine: What this rank restores, if anything.
            choice: What all do.
            reports: Of all ranks.

        Returns:
            What any rank cannot copy.

        Raises:
            HostMemoryError: On all ranks: the copies of one of them do not fit.
        """
        readers = _by_reader(choice)
        if all(source.peer is None for some in readers.values() for source in some):
            return set()  # on all ranks alike
        rank, problems, too_large = self._host.rank, [], ""
        sources = [] if mine is None else copied_by(rank, reports, readers)
        first = sum(source.owner <= rank for source in sources)
        for source in [*sources[first:], *sources[:first]]:  # every node begins with another one
            assert mine is not None
            assert source.peer is not None
            try:
                self._peers.fetch(source.peer, source.owner, mine.window.last)
            except HostMemoryError as error:
                too_large = f"rank {rank} cannot copy the window {mine.window.last} of rank {source.owner}: {error}"
                break
            except (MoEtionError, OSError) as error:
                bad = source.excluded(reports[rank], mine.window.last)
                problems.append(bad)
                _log.warning("rank %d cannot copy the window %d of rank %d: %s", rank, bad.last, source.owner, error)
        errors = set(filter(None, self._ranks.agree("room", too_large)))
        if errors:
            raise HostMemoryError(min(errors))
        return self.told("copied", problems)

    def read(self, mine: Replay, reports: Sequence[RankReport]) -> tuple[list[Part], list[Excluded]]:
        """Verify every window of this rank's part, its own first. Returns them, and what it cannot read."""
        rank, last = self._host.rank, mine.window.last
        parts, problems = [], []
        for source in sorted(mine.sources, key=lambda source: source.owner != rank):
            try:
                tier, manifest = self._whole(source, last)
            except (MoEtionError, OSError) as error:
                _log.warning("rank %d passes over the window %d of rank %d: %s", rank, last, source.owner, error)
                problems.append(source.excluded(reports[rank], last))
                continue
            origin = "memory of a peer" if source.tier == "peer" and source.owner == rank else tier.name
            parts.append(Part(manifest=manifest, tier=tier, origin=origin))
        return parts, problems

    def told(self, topic: str, problems: Sequence[Excluded]) -> set[Excluded]:
        """What any rank cannot read."""
        return {Excluded(*item) for answer in self._ranks.agree(topic, [list(p) for p in problems]) for item in answer}

    def disk_of(self, owner: int) -> DirectoryTier:
        """A rank's windows on storage."""
        assert self._disk is not None
        return self._disk if owner == self._host.rank else self._disk.of_rank(owner)

    def _whole(self, source: Source, last: int) -> tuple[Tier, Manifest]:
        """Where a window is on this node, verified; this rank's own is in its own directory then."""
        if source.tier == "disk":
            disk = self.disk_of(source.owner)
            manifest = disk.read_manifest(last)
            disk.verify(manifest)
            return disk, manifest
        tier, manifest = self._peers.windows.whole(source.owner, last)
        if source.owner == self._host.rank:
            return self._host.take_over(manifest, tier), manifest
        return tier, manifest


def _by_reader(choice: Live | Rollback) -> dict[int, tuple[Source, ...]]:
    """Where each rank reads that reads anything."""
    if isinstance(choice, Rollback):
        return dict(enumerate(choice.sources))
    return {rank: replay.sources for rank, replay in enumerate(choice.replays) if replay is not None}
