"""What each rank did when: its time line, in pieces that are long enough to be seen."""

from __future__ import annotations

from dataclasses import dataclass, field

from moetion_lightning.badput import NANOSECONDS, Span, Use
from moetion_lightning.events import (
    Event,
    IterationFinished,
    LastIterationFinished,
    ProcessEnded,
    ProcessStarted,
)
from moetion_lightning.report.reading import Record

__all__ = ["Lane", "Piece", "Process"]

_MOST_PIECES = 4000
_MINOR = (Use.STALL, Use.VALIDATION, Use.IDLE)  # parts of any iteration


@dataclass
class Piece:
    """Time of one use; what is too short to be seen is part of what came before it.

    Args:
        use: What most of it went into.
        start: Nanoseconds since 1970.
        end: The same.
        productive: Nanoseconds of it that were productive.
        first: First iteration that it is part of; 0 for none.
        last: Last one.
    """

    use: Use
    start: int
    end: int
    productive: int
    first: int = 0
    last: int = 0

    def extend(self, other: Piece) -> None:
        """Take in what follows."""
        self.end, self.productive = other.end, self.productive + other.productive
        self.first, self.last = self.first or other.first, max(self.last, other.last)


class Lane:
    """The time line of a rank.

    Args:
        rank: The rank.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.pieces: list[Piece] = []
        self._shortest, self._shortest_minor = 0, 0

    def add(self, span: Span) -> None:
        """What the rank did next."""
        productive = span.end - span.start if span.use is Use.PRODUCTIVE else 0
        last = self.pieces[-1] if self.pieces else None
        if last is not None and last.use is span.use:
            last.end, last.last = span.end, max(last.last, span.iteration)
            last.first, last.productive = last.first or span.iteration, last.productive + productive
            return
        self._add(Piece(span.use, span.start, span.end, productive, span.iteration, span.iteration))
        if len(self.pieces) > 2 * _MOST_PIECES:
            self.shorten(_MOST_PIECES)

    def shorten(self, most: int) -> None:
        """Keep at most so many pieces: the longest ones, and of recoveries as much as there is room for."""
        while len(self.pieces) > most:
            least = (self.pieces[-1].end - self.pieces[0].start) // most
            if self._shortest_minor < least:
                self._shortest_minor = max(2 * self._shortest_minor, least // 4, 1)
            else:
                self._shortest = max(2 * self._shortest, least // 4, 1)
            pieces, self.pieces = self.pieces, []
            for piece in pieces:
                self._add(piece)

    def _add(self, piece: Piece) -> None:
        pieces = self.pieces
        if len(pieces) > 1 and pieces[-1].use is not piece.use:
            last = pieces[-1]
            if last.end - last.start < (self._shortest_minor if last.use in _MINOR else self._shortest):
                pieces.pop()
                pieces[-1].extend(last)
        if pieces and pieces[-1].use is piece.use:
            pieces[-1].extend(piece)
        else:
            pieces.append(piece)


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
        self.end = max(self.end, time)
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
