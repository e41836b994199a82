"""Which windows every rank that needs them can reach, and where it reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TypeAlias

from moetion_lightning.distributed.rank_report import Excluded, RankReport, Source, Window

__all__ = ["Age", "WindowSupply", "copied_by"]

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
        self._barred = {item for item in excluded if item.reader >= 0}
        # By owner: the windows in any node's memory, with the nodes that others can copy them from, ascending.
        self._remote: list[dict[Age, list[int]]] = [{} for _ in reports]
        # By node: what its memory has, by owner; by reader: what it reads from storage.
        self._memory: dict[int, dict[int, set[Age]]] = {report.place: {} for report in reports}
        self._disk: list[dict[int, set[Age]]] = []
        for report in reports:
            node = report.place
            for owner, windows in report.memory.items():
                kept = {_age(w) for w in windows if Excluded(owner, "memory", node, w.last) not in excluded}
                self._memory[node].setdefault(owner, set()).update(kept)
            self._disk.append(
                {
                    owner: {_age(w) for w in windows if Excluded(owner, "disk", report.rank, w.last) not in excluded}
                    for owner, windows in report.disk.items()
                }
            )
        for node in sorted(self._memory):
            for owner, ages in self._memory[node].items():
                for age in ages:
                    if Excluded(owner, "peer", node, age[0]) not in excluded:
                        self._remote[owner].setdefault(age, []).append(node)

    def reachable(self) -> list[set[Age]]:
        """For each owner, the windows that every rank that needs them can read."""
        # What can be copied from some node's memory everybody can read: the ranks of that node read it directly.
        # Beyond that, a window must be in every reader's own reach.
        local: list[set[Age] | None] = [None] * len(self._reports)
        nowhere: set[Age] = set()
        for report, disk in zip(self._reports, self._disk):
            memory = self._memory[report.place]
            for owner in report.shares:
                before = local[owner]
                if before is not None and not before:
                    continue
                own = memory.get(owner, nowhere) | disk.get(owner, nowhere)
                local[owner] = own if before is None else before & own
        found = [set(remote) | (own or nowhere) for remote, own in zip(self._remote, local)]
        for owner, node in {(item.owner, item.reader) for item in self._barred}:
            for report in self._reports:  # this node cannot copy from all of the others
                if report.place == node and owner in report.shares and owner < len(found):
                    own = self._memory[node].get(owner, nowhere) | self._disk[report.rank].get(owner, nowhere)
                    found[owner] = {age for age in found[owner] if age in own or self._nodes(node, owner, age)}
        return found

    def sources(self, age: Age, readers: Iterable[int]) -> list[tuple[Source, ...]]:
        """Where each reader reads each of its shares: its node's memory, another node's, storage.

        Of other nodes a node takes the owner's, else the one that is asked least.

        Args:
            age: The window.
            readers: Ranks.
        """
        asked = dict.fromkeys(self._memory, 0)
        in_memory = [Source(owner=owner, tier="memory") for owner in range(len(self._reports))]
        on_disk = [Source(owner=owner, tier="disk") for owner in range(len(self._reports))]
        at_home = [Source(owner=r.rank, tier="peer", peer=r.place) for r in self._reports]
        known: dict[int, dict[int, Source]] = {}  # by node, by owner

        def copied(node: int, owner: int) -> Source:
            nodes, home = self._nodes(node, owner, age), self._reports[owner].place
            if not nodes:
                return on_disk[owner]
            if home in nodes:
                asked[home] += 1
                known[node][owner] = at_home[owner]
            else:
                peer = min(nodes, key=asked.__getitem__)
                asked[peer] += 1
                known[node][owner] = Source(owner=owner, tier="peer", peer=peer)
            return known[node][owner]

        found = []
        for reader in readers:
            node, shares = self._reports[reader].place, self._reports[reader].shares
            if node not in known:
                known[node] = {o: in_memory[o] for o, ages in self._memory[node].items() if age in ages}
            here = known[node]
            found.append(tuple([here.get(owner) or copied(node, owner) for owner in shares]))
        return found

    def _nodes(self, reader: int, owner: int, age: Age) -> list[int]:
        """The nodes from which a node that lacks a window can copy it."""
        nodes = self._remote[owner].get(age, [])
        if not self._barred:
            return nodes
        return [node for node in nodes if Excluded(owner, "peer", node, age[0], reader) not in self._barred]


def copied_by(rank: int, reports: Sequence[RankReport], sources: Mapping[int, Sequence[Source]]) -> list[Source]:
    """What a rank copies from other nodes for all ranks of its own, so that the node has each byte once.

    An owner copies its own window; the others are dealt out evenly.

    Args:
        rank: The rank.
        reports: Of all ranks.
        sources: From :meth:`WindowSupply.sources`, by reader.
    """
    copies = {reader: 0 for reader in sources if reports[reader].place == reports[rank].place}
    wanted = {source.owner: source for reader in copies for source in sources[reader] if source.peer is not None}
    mine = []
    for owner, source in sorted(wanted.items()):
        copier = owner if owner in copies else min(copies, key=copies.__getitem__)
        copies[copier] += 1
        if copier == rank:
            mine.append(source)
    return mine


def _age(window: Window) -> Age:
    return window.last, window.first
