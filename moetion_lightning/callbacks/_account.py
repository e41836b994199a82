"""The ledger of a rank, kept where the process that takes this one's place finds it."""

from __future__ import annotations

import mmap
import struct
import threading
import time

from moetion_lightning.badput import NANOSECONDS, Ledger, Use
from moetion_lightning.events import Event, ProcessStarted, StartedAfresh

__all__ = ["NOTE_BYTES", "Account"]

_HEAD = struct.Struct("<q")
_STATE = struct.Struct(f"<{5 + len(Use)}q")
_MARK = struct.Struct(f"<{1 + len(Use)}q")
_NUM_MARKS = 64  # one a minute, for an hour
_MINUTE = 60 * NANOSECONDS
_VERSION = 1 << 32 | len(Use)
#: Size of the file.
NOTE_BYTES = _HEAD.size + _STATE.size + _NUM_MARKS * _MARK.size


class Account:
    """A ledger that outlives its process, once :meth:`keep_in` has said where.

    An event costs a write of some hundred bytes into mapped memory, which is there when the process is killed.
    """

    def __init__(self) -> None:
        self._created = time.time_ns()
        self.ledger = Ledger(self._created)
        self._early: list[tuple[Event, int]] = []
        self._note: mmap.mmap | None = None
        self._marked = 0
        self._writing = threading.Lock()  # events come from several threads

    def add(self, event: Event) -> None:
        """An event has just come."""
        now = time.time_ns()
        with self._writing:
            if isinstance(event, ProcessStarted):  # another fit
                self._note, self._early = None, []
                self._created = min(now, round(event.created_at * NANOSECONDS))
                self.ledger = Ledger(self._created)
            elif isinstance(event, StartedAfresh):
                self.ledger = Ledger(self._created)
                self.ledger.begin_process(self._created, now)
                self.ledger.spend(now, Use.START)
            self.ledger.add(event, now)
            if self._note is None:
                self._early.append((event, now))
            else:
                self._write(self._note)

    def keep_in(self, note: mmap.mmap) -> None:
        """Go on with the account of a predecessor, if it left one, and keep it from now on.

        Args:
            note: Of ``NOTE_BYTES`` bytes; zeros if it is new.
        """
        with self._writing:
            earlier = _read(note)
            if earlier is not None and earlier.start <= self.ledger.start:
                for event, at in self._early:
                    earlier.add(event, at)
                self.ledger = earlier
            self._note, self._early, self._marked = note, [], 0
            self._write(note)

    def follow(self, earlier: Ledger) -> None:
        """Go on with an account that came with the restored state, if this one has no predecessor's."""
        with self._writing:
            self.ledger.precede(earlier)

    def _write(self, note: mmap.mmap) -> None:
        _HEAD.pack_into(note, 0, _VERSION)
        _STATE.pack_into(note, _HEAD.size, *self.ledger.dump())
        marks = self.ledger.marks()
        if marks[-1][0] != self._marked:
            for at, totals in marks if not self._marked else [marks[-1]]:
                place = _HEAD.size + _STATE.size + at // _MINUTE % _NUM_MARKS * _MARK.size
                _MARK.pack_into(note, place, at, *totals)
            self._marked = marks[-1][0]


def _read(note: mmap.mmap) -> Ledger | None:
    if _HEAD.unpack_from(note, 0) != (_VERSION,):
        return None
    begin = _HEAD.size + _STATE.size
    marks = [_MARK.unpack_from(note, begin + index * _MARK.size) for index in range(_NUM_MARKS)]
    return Ledger.load(_STATE.unpack_from(note, _HEAD.size), [(at, totals) for at, *totals in marks if at])
