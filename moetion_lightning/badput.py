"""What the wall time of a rank went into: training, or one of the causes for which it did not go forward.

A :class:`Ledger` reads the events of one rank over all its processes. It has a cursor, and each event moves it on: what
lies between goes to one use. So every second is counted once, and all uses together are the wall time, exactly: they
are whole nanoseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum

from moetion_lightning.events import (
    Event,
    GroupsFormed,
    IterationFinished,
    LastIterationFinished,
    LossNoticed,
    ProcessEnded,
    ProcessStarted,
    RestoreApplied,
    RestoreStarted,
    StageReplayFinished,
    StartedAfresh,
    StateRebuilt,
    ValidationFinished,
)

__all__ = ["CAUSES", "NANOSECONDS", "Ledger", "Use"]

NANOSECONDS = 1_000_000_000
_HOUR = 3600 * NANOSECONDS
_CLOCKS = NANOSECONDS // 1000  # iterations follow each other: a smaller gap is that of two clocks
_ON_PURPOSE = ("SIGTERM", "KeyboardInterrupt")
_MARK = 60 * NANOSECONDS  # the last hour is known to the minute


class Use(str, Enum):  # its members are hashed often: as text, that is fast
    """What a piece of wall time was used for. All but the first are causes of badput."""

    PRODUCTIVE = "productive"
    START = "start"
    DETECTION = "detection"
    GROUPS = "groups"
    RESTORE = "restore"
    REPLAY = "replay"
    REDO = "redo"
    STALL = "stall"
    VALIDATION = "validation"
    IDLE = "idle"


#: All uses that are badput, in the order in which they are shown.
CAUSES = tuple(use for use in Use if use is not Use.PRODUCTIVE)
_USES = tuple(Use)


class Ledger:
    """The account of one rank.

    Args:
        start: Where it begins, nanoseconds since 1970.
        on_span: Is told each piece of time, one after the other: its use, start and end (nanoseconds since 1970), and
            the iteration that it is part of, 0 for none. None for nobody.
    """

    def __init__(self, start: int, on_span: Callable[[Use, int, int, int], None] | None = None) -> None:
        self.start = self.cursor = self.seen = start
        self.totals = dict.fromkeys(Use, 0)
        #: The last iteration that was ever finished.
        self.reached = 0
        self._on_span = on_span
        self._marks: deque[tuple[int, tuple[int, ...]]] = deque([(start, (0,) * len(Use))])
        self._next_mark = start + _MARK
        self._num_processes = 0
        self._ended = self._begun = self._went_back = False
        self._searches = True
        self._replay_until = 0
        self._validation = 0

    # --- reading -------------------------------------------------------------------------------------------------

    @property
    def wall(self) -> int:
        """Nanoseconds from the beginning to the cursor: the sum of all uses."""
        return self.cursor - self.start

    def last_hour(self) -> dict[Use, int]:
        """Nanoseconds of each use since an hour before the cursor, or since up to a minute before that."""
        before = self._marks[0][1]
        for at, totals in self._marks:
            if at > self.cursor - _HOUR:
                break
            before = totals
        return {use: self.totals[use] - then for use, then in zip(_USES, before)}

    # --- writing -------------------------------------------------------------------------------------------------

    def add(self, event: Event, at: int) -> None:
        """Take note of an event.

        Args:
            event: The next one of this rank.
            at: When it came, nanoseconds since 1970. What lies before the cursor takes no time.
        """
        if isinstance(event, (IterationFinished, LastIterationFinished)):
            self._iteration(event, at)
        elif isinstance(event, ValidationFinished):
            self._validation += _ns(event.seconds)
        elif isinstance(event, ProcessStarted):
            self.begin_process(_ns(event.created_at), at)
            self._both(at, _ns(event.groups_seconds), Use.START, Use.GROUPS)
        elif isinstance(event, LossNoticed):
            self.spend(at, Use.DETECTION)
            self._went_back, self._searches = True, False
        elif isinstance(event, GroupsFormed):
            self._both(at, _ns(event.seconds), Use.START, Use.GROUPS)
        elif isinstance(event, RestoreStarted):
            self.spend(at, Use.RESTORE if self._searches else Use.START)
        elif isinstance(event, RestoreApplied):
            self._both(at, _ns(event.seconds), Use.START, Use.RESTORE)
            self._replay_until, self._went_back = event.iteration + event.replay, True
        elif isinstance(event, StateRebuilt):
            self.spend(at, Use.REPLAY)
        elif isinstance(event, StageReplayFinished):
            self._both(at, _ns(event.seconds), Use.START, Use.REPLAY)
        elif isinstance(event, StartedAfresh):
            self.reached = 0
        elif isinstance(event, ProcessEnded):
            self._end(event, at)
        if at > self.seen:
            self.seen = at

    def begin_process(self, created: int, now: int) -> None:
        """Another process goes on with this rank.

        Args:
            created: When it was made, nanoseconds since 1970.
            now: The same of its first event.
        """
        created = min(created, now)
        if self._num_processes:
            if not self._ended:
                self.spend(min(self.seen, created), Use.REDO if self._begun else Use.START)
            self.spend(created, Use.IDLE if self._ended else Use.DETECTION)
        else:
            self.spend(created, Use.IDLE)
        self._num_processes += 1
        self._ended = self._begun = self._went_back = False
        self._searches = True
        self._replay_until = self._validation = 0
        self.seen = max(self.seen, now)

    def spend(self, until: int, use: Use, iteration: int = 0) -> None:
        """Move the cursor, if that is forward.

        Args:
            until: Where to, nanoseconds since 1970.
            use: What the time went into.
            iteration: Of which iteration it is part; 0 for none.
        """
        start = self.cursor
        if until <= start:
            return
        self.cursor = until
        self.totals[use] += until - start
        if until >= self._next_mark:
            self._next_mark = until + _MARK
            self._marks.append((until, tuple(self.totals.values())))
            while len(self._marks) > 1 and self._marks[1][0] <= until - _HOUR:
                self._marks.popleft()
        if self._on_span is not None:
            self._on_span(use, start, until, iteration)

    def _both(self, until: int, part: int, before: Use, use: Use) -> None:
        """The last ``part`` nanoseconds are one use, what lies before them another one."""
        self.spend(until - part, before)
        self.spend(until, use)

    def _iteration(self, event: IterationFinished | LastIterationFinished, at: int) -> None:
        number, validation, self._validation = event.iteration, self._validation, 0
        first_here = not self._begun or self._went_back
        begun = at - _ns(event.seconds)
        if first_here or begun - self.cursor > _CLOCKS:
            self.spend(begun, Use.START if first_here else Use.IDLE)
        self._begun, self._went_back = True, False
        if number <= self._replay_until:
            self.spend(at, Use.REPLAY, number)
        elif number <= self.reached:
            self.spend(at, Use.REDO, number)
        else:
            stall = _ns(event.stall_seconds)
            self.spend(at - stall - validation, Use.PRODUCTIVE, number)
            if validation:
                self.spend(at - stall, Use.VALIDATION, number)
            if stall:
                self.spend(at, Use.STALL, number)
            self.reached = number

    def _end(self, event: ProcessEnded, at: int) -> None:
        lost = Use.REDO if self._begun else Use.START
        self.spend(at, Use.IDLE if event.completed else lost)
        self._ended = event.completed or event.reason.startswith(_ON_PURPOSE)
        if event.completed:
            self.reached = 0  # what begins now is another course, or goes on behind this one

    # --- over processes ------------------------------------------------------------------------------------------

    def dump(self) -> list[int]:
        """Everything as numbers, as many each time; the marks are not among them, see :meth:`marks`."""
        flags = self._ended | self._begun << 1 | bool(self._num_processes) << 2
        return [self.start, self.cursor, self.seen, self.reached, flags, *self.totals.values()]

    def marks(self) -> Sequence[tuple[int, tuple[int, ...]]]:
        """Where the account stood at the minutes of the last hour: instants, and the sums of all uses."""
        return self._marks

    @classmethod
    def load(cls, values: Sequence[int], marks: Sequence[tuple[int, Sequence[int]]] = ()) -> Ledger:
        """What :meth:`dump` and :meth:`marks` gave. The cursor is where the uses end, whatever was written last."""
        start, _, seen, reached, flags, *totals = values
        ledger = cls(start)
        ledger.totals = dict(zip(_USES, totals))
        ledger.cursor = start + sum(totals)
        ledger.seen, ledger.reached = max(seen, ledger.cursor), reached
        ledger._ended, ledger._begun = bool(flags & 1), bool(flags & 2)
        ledger._num_processes = flags >> 2
        kept = [(at, tuple(sums)) for at, sums in sorted(marks) if start <= at <= ledger.cursor]
        ledger._marks = deque(kept or ledger._marks)
        return ledger

    def precede(self, earlier: Ledger) -> None:
        """Put an account before this one: that of a predecessor, as it was when the restored state was captured.

        What lies between the two is not known: it was lost with the predecessor's machine, and counts as detection.
        """
        gap = self.start - earlier.cursor
        if gap < 0:
            return
        self.start = earlier.start
        for use, nanoseconds in earlier.totals.items():
            self.totals[use] += nanoseconds
        self.totals[Use.DETECTION] += gap
        self.reached = max(self.reached, earlier.reached)
        before = dict(earlier.totals)
        before[Use.DETECTION] += gap
        self._marks = deque(
            [*earlier._marks, *((at, tuple(a + b for a, b in zip(sums, before.values()))) for at, sums in self._marks)]
        )


def _ns(seconds: float) -> int:
    return round(seconds * NANOSECONDS) if seconds > 0 else 0
