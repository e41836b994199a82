"""What this process must keep so that it, or the process that takes its place, can go on when a rank is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moetion_lightning.engine.group_restore import LiveReport
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.engine.tiers import Tiers
from moetion_lightning.storage.tree import FlatTree

__all__ = ["Living"]


class Living:
    """Knows whether the live state is that of a boundary between two iterations, and notes each boundary.

    Args:
        ranks: The ranks of the job.
        tiers: Where the notes go.
    """

    def __init__(self, ranks: Ranks, tiers: Tiers) -> None:
        self._ranks = ranks
        self._tiers = tiers
        self._clean = False  # whether the live state is that of the last boundary
        #: Counts boundaries; the same on all ranks.
        self.serial = 0
        #: An adapter whose run state cannot be taken apart from the weights (averaged weights) clears this.
        self.allowed = True

    def note(self, iteration: int, describe: Callable[[Mapping[str, Any]], FlatTree], *, advance: bool = True) -> None:
        """The state is dense and between two iterations.

        Args:
            iteration: Completed iterations.
            describe: Copies the run state, with the given fields of a :class:`~.journal.Boundary`; called if needed.
            advance: Whether this is another boundary than the last one.
        """
        self.serial += advance
        if self._tiers.journal is None or not self.allowed:
            return
        self._tiers.journal.record(self.serial, describe({"serial": self.serial, "iteration": iteration}))
        self._clean = True

    def about_to_update(self) -> None:
        """All gradients are complete on all ranks, or nobody steps: survivors of a loss are at one iteration."""
        if self._ranks.elastic:
            self._ranks.control.vote("optimizer step")
            self._clean = False

    def replaced(self) -> None:
        """Another state is put in place: nothing that was noted belongs to it."""
        self._clean = False
        if self._tiers.journal is not None:
            self._tiers.journal.forget()

    def report(self) -> LiveReport:
        """What this process holds besides windows."""
        journal = self._tiers.journal
        if journal is None:
            return LiveReport()
        last = journal.last() if self._clean else None
        if last is not None:
            return LiveReport(live=last.serial, boundaries=(last,), copies=last.copies)
        left = tuple(journal.left_behind())
        newest = max(left, key=lambda boundary: boundary.serial, default=None)
        return LiveReport(boundaries=left, copies=newest.copies if newest is not None else ())
