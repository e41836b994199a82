"""What each rank did when: its time line, in pieces that are long enough to be seen."""

from __future__ import annotations

from dataclasses import dataclass, field

from moetion_lightning.badput import NANOSECONDS, Use
from moetion_lightning.events import (
    Event,
    IterationFinished,
    LastIterationFinished,
    ProcessEnded,
    ProcessStarted,
)
from moetion_lightning.report.reading import Record

__all__ = ["MINOR", "Lane", "Piece", "Process"]

_MOST_PIECES = 4000
#: Parts of any iteration.
MINOR = (Use.STALL, Use.VALIDATION, Use.IDLE)


@dataclass
class Piece:
    """Time of one use, or of several that are too short to be seen.

    Args:
        start: Nanoseconds since 1970.
        end: The same.
        parts: Nanoseconds of it by use.
        first: First iteration that it is part of; 0 for none.
        last: Last one.
    """

    start: int
    end: int
    parts: dict[Use, int]
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        #: What most of it went into.
        self.use = max(self.parts, key=self.parts.__getitem__)

    @property
    def productive(self) -> int:
        """Nanoseconds of it that were productive."""
        return self.parts.get(Use.PRODUCTIVE, 0)

    def take(self, use: Use, end: int, nanoseconds: int, first: int, last: int) -> None:
        """Take in what follows, or a part of it."""
        total = self.parts[use] = self.parts.get(use, 0) + nanoseconds
        if use is not self.use and total > self.parts[self.use]:
            self.use = use
        self.end = end
        if last:
            self.first = self.first or first
            if last > self.last:
                self.last = last

    def extend(self, other: Piece) -> None:
        """Take in what follows."""
        for use, nanoseconds in other.parts.items():
            self.take(use, other.end, nanoseconds, other.first, other.last)


class Lane:
    """The time line of a rank.

    Args:
        rank: The rank.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.pieces: list[Piece] = []
        self._shortest, self._shortest_minor = 0, 0

    def add(self, use: Use, start: int, end: int, number: int) -> None:
        """What the rank did next, as a :class:`~moetion_lightning.badput.Ledger` tells it."""
        last = self.pieces[-1] if self.pieces else None
        if last is not None and (use is last.use or (end - start < self._shortest_minor and use in MINOR)):
            last.take(use, end, end - start, number, number)
            return
        self._add(Piece(start, end, {use: end - start}, number, number))
        if len(self.pieces) > 2 * _MOST_PIECES:
            self.shorten(_MOST_PIECES)

    def shorten(self, most: int) -> None:
        """Keep at most so many pieces: the longest ones, and of recoveries as much as there is room for."""
        while len(self.pieces) > most:
            least = 2 * (self.pieces[-1].end - self.pieces[0].start) // most
            if self._shortest_minor < least:
                self._shortest_minor = max(2 * self._shortest_minor, least // 8, 1)
            else:
                self._shortest = max(2 * self._shortest, least // 8, 1)
            pieces, self.pieces = self.pieces, []
            for piece in pieces:
                self._add(piece)

    def _is_short(self, piece: Piece) -> bool:
        return piece.end - piece.start < (self._shortest_minor if piece.use in MINOR else self._shortest)

    def _add(self, piece: Piece) -> None:
        pieces = self.pieces
        if not pieces:
            pieces.append(piece)
        elif pieces[-1].use is piece.use or (self._is_short(pieces[-1]) and self._is_short(piece)):
            pieces[-1].extend(piece)
        elif len(pieces) > 1 and self._is_short(pieces[-1]):
            short = pieces.pop()
            pieces[-1].extend(short)
            self._add(piece)
        else:
            pieces.append(piece)
        if len(pieces) > 1 and pieces[-1].use is pieces[-2].use:
            last = pieces.pop()
            pieces[-1].extend(last)


@dataclass
class Process:
    """One process of one rank.

    Args:
        rank: The rank.
        pid: Its process id.
        start: When it was made, or its first sign of life, seconds since 1970.
        end: Its last sign of life.
        last: Last iteration that it finished.
        predecessor: How the one before it ended, where the launcher says so.
        reason: Why it ended, where it says so.
        completed: Whether it ended with the training.
        environment: What it runs on.
        settings: Of its callback.
        records: Its events that are rare.
    """

    rank: int
    pid: int
    start: float
    end: float
    last: int = 0
    predecessor: str = ""
    reason: str = ""
    completed: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def add(self, event: Event, time: float) -> None:
        """Its next event."""
        if time > self.end:
            self.end = time
        if isinstance(event, (IterationFinished, LastIterationFinished)):
            self.last = event.iteration
        elif isinstance(event, ProcessStarted):
            self.start = min(self.start, event.created_at)
            self.predecessor = self.predecessor or event.predecessor
            self.environment, self.settings = event.environment, event.settings
            self.completed = False
        elif isinstance(event, ProcessEnded):
            self.completed, self.reason = event.completed, event.reason


def nanoseconds(seconds: float) -> int:
    """The same in whole nanoseconds."""
    return round(seconds * NANOSECONDS)
