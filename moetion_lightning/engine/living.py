"""What this process must keep so that it, or the process that takes its place, can go on when a rank is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moetion_lightning.engine.group_restore import LiveReport
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.engine.tiers import Tiers
from moetion_lightning.storage.tree import FlatTree

__all__ = ["Living"]


@dataclass(frozen=True)
class _Noted:
    """A boundary that this process could go back to.

    Args:
        serial: Its number.
        flat: Its run state.
        stamp: Gives what is another value as soon as the model changes; None where nothing can change it.
        stamped: What it gave.
    """

    serial: int
    flat: FlatTree
    stamp: Callable[[], object] | None
    stamped: object

    def holds(self) -> bool:
        """Whether the model is still that of this boundary."""
        return self.stamp is None or self.stamp() == self.stamped


class Living:
    """Knows whether the live state is that of a boundary between two iterations, and notes each boundary.

    Args:
        ranks: The ranks of the job.
        tiers: Where the notes go.
    """

    def __init__(self, ranks: Ranks, tiers: Tiers) -> None:
        self._ranks = ranks
        self._tiers = tiers
        #: Whose model state is the live one. Two only where hooks alone come between them: behind a batch, and before
        #: the next one. Ranks may be on different sides of what lies between, a validation for example.
        self._held: list[_Noted] = []
        #: Counts boundaries; the same on all ranks.
        self.serial = 0
        #: An adapter whose run state cannot be taken apart from the weights (averaged weights) clears this.
        self.allowed = True

    def note(
        self,
        describe: Callable[[], FlatTree],
        *,
        advance: bool = True,
        stamp: Callable[[], object] | None = None,
    ) -> None:
        """The state is dense and between two iterations.

        Args:
            describe: Copies the run state, as fields of a :class:`~.journal.Boundary`; called if needed.
            advance: Whether this is another boundary than the last one.
            stamp: Given where hooks that may change the model come before the next boundary: what shows that they did.
        """
        self.serial += advance
        if self._tiers.journal is None or not self.allowed:
            return
        flat = describe()
        self._tiers.journal.record(self.serial, flat)
        noted = _Noted(self.serial, flat, stamp, None if stamp is None else stamp())
        self._held = [*(before for before in self._held if before.serial < self.serial), noted][-2:]

    def about_to_update(self) -> None:
        """All gradients are complete on all ranks, or nobody steps: survivors of a loss are at one iteration."""
        if self._ranks.elastic:
            self._ranks.control.vote("optimizer step")
            self._held.clear()

    def replaced(self) -> None:
        """Another state is put in place: nothing that was noted belongs to it."""
        self._held.clear()
        if self._tiers.journal is not None:
            self._tiers.journal.forget()

    def report(self) -> LiveReport:
        """What this process holds besides windows. All ranks ask together, and name the same boundary if they can."""
        journal = self._tiers.journal
        if journal is None:
            return LiveReport()
        held = {noted.serial: noted for noted in self._held if noted.holds()}
        left = () if held else tuple(journal.left_behind())
        answers = self._ranks.agree("living", [bool(held), sorted(held) or [boundary.serial for boundary in left]])
        alive = [set(serials) for lives, serials in answers if lives]
        common = set.intersection(*alive) if alive else set()
        with_all = common.intersection(*(serials for lives, serials in answers if not lives))
        if held:
            last = journal.boundary(held[max(with_all or common or held)].flat)
            if last is not None:
                return LiveReport(live=last.serial, boundaries=(last,), copies=last.copies)
            left = tuple(journal.left_behind())
        newest = max(left, key=lambda boundary: boundary.serial, default=None)
        return LiveReport(boundaries=left, copies=newest.copies if newest is not None else ())
