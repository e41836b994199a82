"""The windows of a job in this node's memory, whoever captured them and whoever keeps them now.

A directory belongs to the process that has its lock, and to nobody when that is dead: ranks may come back in another
order. Everybody on the node may read every directory. One rank of the node removes those of dead processes, when the
job has newer windows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from moetion_lightning.errors import CorruptSnapshotError, JobBusyError, MoEtionError
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.manifest import Manifest

__all__ = ["NodeWindows"]

_DIRECTORY = re.compile(r"rank-(\d{5,})|replica-(\d{5,})-at-(\d{5,})")


class NodeWindows:
    """Reads and adopts the directories of one job in one place.

    Args:
        own: Tier of a rank of the job on this node; says where to look.
        ranks: Ranks that live on this node: their directories, and those of their copies, are theirs.
    """

    def __init__(self, own: HostMemoryTier, ranks: Collection[int]) -> None:
        self._own = own
        self._ranks = frozenset(ranks)

    def tiers(self, owner: int | None = None) -> list[HostMemoryTier]:
        """Every directory, to be read only; ranks' own ones first.

        Args:
            owner: Only those with this rank's windows.
        """
        return [tier for tier, _ in self._directories() if owner in (None, tier.rank)]

    def of_rank(self, owner: int) -> HostMemoryTier:
        """Where a rank of this node captures its windows, to be read only."""
        return HostMemoryTier(self._own.base_dir, self._own.job, owner, self._own.world_size)

    def find(self, owner: int, last: int) -> list[tuple[HostMemoryTier, Manifest]]:
        """Where this node has the window of a rank that ends with an iteration, its bytes not verified yet."""
        found = []
        for tier in self.tiers(owner):
            if last in tier.windows():
                try:
                    found.append((tier, tier.read_manifest(last)))
                except MoEtionError:
                    continue  # said when the reports were made
        return found

    def whole(self, owner: int, last: int) -> tuple[HostMemoryTier, Manifest]:
        """The first of them whose bytes are those that were committed.

        Raises:
            CorruptSnapshotError: There is none; says why.
        """
        problems = [f"{self._own.path.parent} has no window {last} of rank {owner}"]
        for tier, manifest in self.find(owner, last):
            try:
                tier.verify(manifest)
                return tier, manifest
            except MoEtionError as error:
                problems.append(str(error))
        raise CorruptSnapshotError(problems[-1])

    def adopt(self) -> Iterator[HostMemoryTier]:
        """Directories of processes that are dead and that no rank of this node takes over, opened one by one."""
        for tier, keeper in self._directories():
            if keeper not in self._ranks:
                try:
                    with tier.open(wait_seconds=0.0):
                        yield tier
                except JobBusyError:  # it lives, perhaps on another machine
                    continue

    def remove_others(self) -> None:
        """The ranks have newer windows, or are done: what dead processes left here goes."""
        for tier in self.adopt():
            tier.destroy()

    def set_others_aside(self) -> None:
        """A fresh course of training begins: nothing here belongs to it. Copies go, ranks' own windows lie aside."""
        for tier in self.adopt():
            if tier.path.name.startswith("replica"):
                tier.destroy()
            else:
                tier.set_aside()

    def drop_later(self, last: int) -> None:
        """Windows after this iteration belong to a course that is given up: with others they could look common."""
        for tier in self.adopt():
            for iteration in tier.windows():
                if iteration > last:
                    tier.drop(iteration)

    def _directories(self) -> list[tuple[HostMemoryTier, int]]:
        """Tiers, not opened, and the rank that keeps or kept each."""
        own, found = self._own, []
        for path in sorted(own.path.parent.glob("r*-*")):
            match = _DIRECTORY.fullmatch(path.name)
            if match is None or path.is_symlink():
                continue
            owner, holder = int(match[1] or match[2]), None if match[1] else int(match[3])
            if owner != holder:
                tier = HostMemoryTier(own.base_dir, own.job, owner, own.world_size, holder=holder)
                found.append((tier, owner if holder is None else holder))
        return found
