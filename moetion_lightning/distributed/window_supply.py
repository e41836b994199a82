"""Which windows every rank that needs them can reach, and where it reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import TypeAlias

from moetion_lightning.distributed.rank_report import Excluded, RankReport, Source, Window

__all__ = ["Age", "WindowSupply"]

#: ``(last, first)`` of a window: compares like "newer".
Age: TypeAlias = tuple[int, int]


class WindowSupply:
    """Where each owner's windows can be read, without the excluded places.

    Args:
        reports: What every rank has, by rank.
        excluded: Places that failed when they were read.
    """

    def __init__(self, reports: Sequence[RankReport], excluded: AbstractSet[Excluded]) -> None:
        self._reports = reports
        # By owner: the windows in any rank's memory, with the ranks from which others can fetch them, ascending.
        self._remote: list[dict[Age, list[int]]] = [{} for _ in reports]
        # By reader: what it reaches without another rank, by owner.
        self._memory: list[dict[int, set[Age]]] = []
        self._disk: list[dict[int, set[Age]]] = []
        for report in reports:
            rank = report.rank
            memory: dict[int, set[Age]] = {}
            for owner, windows in [(rank, report.memory), *report.held.items()]:
                kept = {_age(w) for w in windows if Excluded(owner, "memory", rank, w.last) not in excluded}
                memory.setdefault(owner, set()).update(kept)
            for owner, ages in memory.items():
                for age in ages:
                    if Excluded(owner, "peer", rank, age[0]) not in excluded:
                        self._remote[owner].setdefault(age, []).append(rank)
            self._memory.append(memory)
            self._disk.append(
                {
                    owner: {_age(w) for w in windows if Excluded(owner, "disk", rank, w.last) not in excluded}
                    for owner, windows in report.disk.items()
                }
            )

    def reachable(self) -> list[set[Age]]:
        """For each owner, the windows that every rank that needs them can read."""
        # What others can fetch from some memory everybody can read: the rank with that memory reads it directly.
        # Beyond that, a window must be in every reader's own reach.
        local: list[set[Age] | None] = [None] * len(self._reports)
        nowhere: set[Age] = set()
        for report, memory, disk in zip(self._reports, self._memory, self._disk):
            for owner in report.shares:
                before = local[owner]
                if before is not None and not before:
                    continue
                own = memory.get(owner, nowhere) | disk.get(owner, nowhere)
                local[owner] = own if before is None else before & own
        return [set(remote) | (own or nowhere) for remote, own in zip(self._remote, local)]

    def sources(self, age: Age, readers: Iterable[int]) -> list[tuple[Source, ...]]:
        """Where each reader reads each of its shares: own memory, the owner's, the least used replica's, storage."""
        used = [0] * len(self._reports)
        made: dict[tuple[int, int], Source] = {}
        on_disk = [Source(owner=owner, tier="disk") for owner in range(len(self._reports))]
        fetchable = [remote.get(age, []) for remote in self._remote]

        def source(reader: int, owner: int) -> Source:
            if age in self._memory[reader].get(owner, ()):
                return Source(owner=owner, tier="memory")
            peers = fetchable[owner]
            if not peers:
                return on_disk[owner]
            peer = owner if owner in peers else min(peers, key=used.__getitem__)
            used[peer] += 1
            if (owner, peer) not in made:
                made[owner, peer] = Source(owner=owner, tier="peer", peer=peer)
            return made[owner, peer]

        return [tuple(source(reader, owner) for owner in self._reports[reader].shares) for reader in readers]


def _age(window: Window) -> Age:
    return window.last, window.first
