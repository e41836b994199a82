"""What happened in a run, as numbers: what its time went into, and what survived every failure."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetion_lightning.badput import NANOSECONDS, Ledger, Use
from moetion_lightning.events import (
    CaptureFinished,
    IterationFinished,
    LastIterationFinished,
    LossRecorded,
    PartialExpertsRestored,
    ProcessStarted,
    RestoreApplied,
    ScheduleMade,
    TokensCounted,
)
from moetion_lightning.report.failures import RARE, Failure, find_failures
from moetion_lightning.report.lanes import Lane, Process, nanoseconds
from moetion_lightning.report.reading import Reading, Record

__all__ = ["UNUSED", "Curve", "History", "tell"]

#: Events that no history needs.
UNUSED = ("CaptureStarted", "SlotSealed", "ManifestWritten", "OperatorAudited")
Floats = NDArray[np.float64]
_RATIO_POINTS = 600
_MOST_PIECES = 24_000  # on one page
_HOUR, _NEVER = 3600.0, float("inf")
_KEPT_COUNTS = 64  # windows that a restore can take back


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values of iterations.

    Args:
        iterations: Their numbers, ascending.
        values: A mean over ranks each, or a sum.
        highest: The largest of the ranks.
    """

    iterations: NDArray[np.int64]
    values: Floats
    highest: Floats


@dataclass(frozen=True, kw_only=True)
class History:
    """A run.

    Args:
        start: First sign of life, seconds since 1970.
        end: The last one.
        lanes: Time lines of the ranks.
        failures: What was lost when.
        uses: Nanoseconds of all ranks together, by what they went into; their sum is the ranks' wall time, exactly.
        recent: The same of the last hour.
        ratio: Seconds since the start; the effective training time ratio from there on; that of the hour before.
        loss: Of each iteration that is part of the training, as far as it was recorded.
        lost_loss: Of executions that failures took back.
        rates: Learning rates.
        stalls: Seconds that iterations waited for captures.
        nbytes: Bytes that were captured of iterations, on all ranks together.
        dense_bytes: Bytes of a dense checkpoint of the same state, 0 if not known.
        tokens: Tokens of each expert, by layer.
        plt: Proportion of lost tokens after the last lossy restore; None if there was none.
        processes: All of them, by rank.
        iterations: The last iteration that was finished.
    """

    start: float
    end: float
    lanes: tuple[Lane, ...]
    failures: tuple[Failure, ...]
    uses: dict[Use, int]
    recent: dict[Use, int]
    ratio: tuple[Floats, Floats, Floats]
    loss: Curve
    lost_loss: Curve
    rates: Curve
    stalls: Curve
    nbytes: Curve
    dense_bytes: int
    tokens: dict[str, list[int]]
    plt: float | None
    processes: dict[int, tuple[Process, ...]]
    iterations: int

    @property
    def wall_seconds(self) -> float:
        """From the first to the last sign of life."""
        return self.end - self.start

    @property
    def num_processes(self) -> int:
        """Of all ranks."""
        return sum(len(lives) for lives in self.processes.values())

    @property
    def ettr(self) -> float:
        """Effective training time ratio of the whole run."""
        return self.uses[Use.PRODUCTIVE] / max(1, sum(self.uses.values()))

    def seconds(self, uses: Mapping[Use, int]) -> dict[Use, float]:
        """Means over ranks."""
        return {use: total / NANOSECONDS / len(self.lanes) for use, total in uses.items()}

    def newest(self) -> Process:
        """The process of the lowest rank that was started last."""
        return self.processes[min(self.processes)][-1]


def tell(records: Iterable[Record], processes: int = 1) -> History:
    """Make the history of a run from its events; there must be one.

    Args:
        records: Those of each rank in the order in which they came.
        processes: How many may read them, where they are long and in several files. With more than one, the module
            ``__main__`` must be fit for :mod:`multiprocessing`.
    """
    parts = records.parts(processes) if isinstance(records, Reading) else []
    read = _read_at_once(parts) if len(parts) > 1 else None
    if read is None:
        read = _Read(records)
    elif isinstance(records, Reading):
        records.count(read.num_events, read.num_skipped)
    ranks, counts, first = dict(sorted(read.ranks.items())), read.counts, read.first
    of_ranks = {number: tuple(rank.processes) for number, rank in ranks.items()}
    start, end = min(r.ledger.start for r in ranks.values()), max(r.ledger.seen for r in ranks.values())
    for rank in ranks.values():
        rank.end(start, end)
        rank.lane.shorten(max(100, _MOST_PIECES // len(ranks)))
    loss, lost_loss = _mean([r.loss for r in ranks.values()]), _mean([r.lost_loss for r in ranks.values()])
    every = [r.ledger for r in ranks.values()]
    return History(
        start=start / NANOSECONDS,
        end=end / NANOSECONDS,
        lanes=tuple(rank.lane for rank in ranks.values()),
        failures=find_failures(of_ranks, first),
        uses={use: sum(ledger.totals[use] for ledger in every) for use in Use},
        recent=_summed([ledger.last_hour() for ledger in every]),
        ratio=_ratio([rank.lane for rank in ranks.values()], start, end),
        loss=loss,
        lost_loss=lost_loss,
        rates=_mean([rank.rates for rank in ranks.values()]),
        stalls=_mean([rank.stalls for rank in ranks.values()]),
        nbytes=_mean([rank.nbytes for rank in ranks.values()], summed=True),
        dense_bytes=sum(rank.dense_bytes for rank in ranks.values()),
        tokens=counts.total(),
        plt=next((rank.plt for rank in ranks.values() if rank.plt is not None), None),
        processes=of_ranks,
        iterations=max((process.last for lives in of_ranks.values() for process in lives), default=0),
    )


class _Read:
    """What is kept of events.

    Args:
        records: They.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.ranks: dict[int, _Rank] = {}
        self.counts = _Counts()
        self.first: dict[int, float] = {}
        counting = None
        for record in records:
            rank = self.ranks.get(record.rank)
            if rank is None:
                rank = self.ranks[record.rank] = _Rank(record)
            rank.add(record)
            event = record.event
            if isinstance(event, (IterationFinished, LastIterationFinished)):
                if record.time < self.first.get(event.iteration, _NEVER):
                    self.first[event.iteration] = record.time
            elif isinstance(event, (TokensCounted, RestoreApplied)):
                counting = record.rank if counting is None else counting  # all ranks are told the same
                if record.rank == counting:
                    self.counts.add(event)
        self.num_events = self.num_skipped = 0
        if isinstance(records, Reading):
            self.num_events, self.num_skipped = records.num_events, records.num_skipped

    def take(self, other: _Read) -> None:
        """Add other ranks."""
        self.ranks.update(other.ranks)
        for iteration, time in other.first.items():
            self.first[iteration] = min(time, self.first.get(iteration, time))
        self.num_events += other.num_events
        self.num_skipped += other.num_skipped


def _read_at_once(parts: Sequence[Reading]) -> _Read | None:
    """Read parts of a run in processes of their own; None if the events of a rank are in several parts."""
    with ProcessPoolExecutor(len(parts), multiprocessing.get_context("spawn")) as pool:
        first, *others = pool.map(_Read, parts)
    if len({rank for read in (first, *others) for rank in read.ranks}) < sum(len(r.ranks) for r in (first, *others)):
        return None
    for other in others:
        first.take(other)
    return first


@dataclass
class _Rank:
    """What is known of one rank."""

    begin: Record
    loss: dict[int, float] = field(default_factory=dict)
    lost_loss: dict[int, float] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)
    stalls: dict[int, float] = field(default_factory=dict)
    nbytes: dict[int, float] = field(default_factory=dict)
    dense_bytes: int = 0
    plt: float | None = None
    processes: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        record, event = self.begin, self.begin.event
        self.lane = Lane(record.rank)
        begun = event.created_at if isinstance(event, ProcessStarted) else record.time
        self.ledger = Ledger(nanoseconds(min(begun, record.time)), self.lane.add)

    def add(self, record: Record) -> None:
        event, at = record.event, nanoseconds(record.time)
        if not self.processes or self.processes[-1].pid != record.pid:
            # A number may come up again after a long time, so a process ends where another one of its rank begins.
            if not isinstance(event, ProcessStarted):
                self.ledger.begin_process(at, at)
            process = Process(rank=record.rank, pid=record.pid, start=record.time, end=record.time)
            self.processes.append(process)
        self.processes[-1].add(event, record.time)
        self.ledger.add(event, at)
        if isinstance(event, IterationFinished):
            self.stalls[event.iteration] = event.stall_seconds
        elif isinstance(event, LossRecorded):
            if event.iteration in self.loss:
                self.lost_loss[event.iteration] = self.loss[event.iteration]
            self.loss[event.iteration], self.rates[event.iteration] = event.loss, event.learning_rate
        elif isinstance(event, CaptureFinished):
            self.nbytes[event.iteration] = event.nbytes
        elif isinstance(event, ScheduleMade):
            self.dense_bytes = event.dense_bytes
        elif isinstance(event, RARE):
            self.processes[-1].records.append(record)
            if isinstance(event, PartialExpertsRestored):
                self.plt = event.plt

    def end(self, start: int, end: int) -> None:
        """All ranks are accounted for over the same time."""
        self.ledger.spend(end, Use.IDLE)
        if start < self.ledger.start:
            before = Ledger(start)
            before.spend(self.ledger.start, Use.IDLE)
            self.ledger.precede(before)


def _summed(uses: Iterable[Mapping[Use, int]]) -> dict[Use, int]:
    total = dict.fromkeys(Use, 0)
    for each in uses:
        for use, nanoseconds_ in each.items():
            total[use] += nanoseconds_
    return total


def _mean(of_ranks: Iterable[Mapping[int, float]], *, summed: bool = False) -> Curve:
    """One curve over iterations of what ranks have."""
    filled = [each for each in of_ranks if each]
    numbers = np.unique(np.concatenate([np.fromiter(each, np.int64) for each in filled] or [np.empty(0, np.int64)]))
    total, count = np.zeros(len(numbers)), np.zeros(len(numbers))
    highest = np.full(len(numbers), -np.inf)
    for each in filled:
        places = np.searchsorted(numbers, np.fromiter(each, np.int64))
        values = np.fromiter(each.values(), np.float64)
        total[places] += values
        count[places] += 1
        highest[places] = np.maximum(highest[places], values)
    if summed:
        return Curve(iterations=numbers, values=total, highest=total)
    return Curve(iterations=numbers, values=total / np.maximum(count, 1), highest=highest)


def _ratio(lanes: Iterable[Lane], start: int, end: int) -> tuple[Floats, Floats, Floats]:
    """At the same times on all ranks, between which their productive time grows evenly: nobody has counted ahead."""
    wall = (end - start) / NANOSECONDS
    times = np.linspace(0.0, wall, _RATIO_POINTS + 1)
    productive, hour_before, number = np.zeros_like(times), np.zeros_like(times), 0
    for lane in lanes:
        ends = np.array([(piece.end - start) / NANOSECONDS for piece in lane.pieces] or [0.0])
        begin = (lane.pieces[0].start - start) / NANOSECONDS if lane.pieces else 0.0
        sums = np.cumsum([piece.productive / NANOSECONDS for piece in lane.pieces] or [0.0])
        ends, sums = np.concatenate([[begin], ends]), np.concatenate([[0.0], sums])
        productive += np.interp(times, ends, sums)
        hour_before += np.interp(times - _HOUR, ends, sums)
        number += 1
    passed = np.maximum(times, 1e-9)
    recent = np.minimum(passed, _HOUR)
    return times, productive / number / passed, (productive - hour_before) / number / recent


class _Counts:
    """Tokens of each expert, as far as they are part of the training."""

    def __init__(self) -> None:
        self._base: dict[str, Any] = {}
        self._newest: deque[tuple[int, dict[str, list[int]]]] = deque()

    def add(self, event: TokensCounted | RestoreApplied) -> None:
        if isinstance(event, RestoreApplied):
            while self._newest and self._newest[-1][0] > event.iteration:
                self._newest.pop()
            return
        while self._newest and self._newest[-1][0] >= event.iteration:  # a process that began anew says nothing of it
            self._newest.pop()
        self._newest.append((event.iteration, event.tokens))
        if len(self._newest) > _KEPT_COUNTS:
            self._base = _add_counts(self._base, self._newest.popleft()[1])

    def total(self) -> dict[str, list[int]]:
        """Of the layers that were counted last."""
        total = self._base
        for _, tokens in self._newest:
            total = _add_counts(total, tokens)
        return {name: [int(count) for count in row] for name, row in total.items()}


def _add_counts(total: dict[str, Any], tokens: Mapping[str, list[int]]) -> dict[str, Any]:
    if list(tokens) != list(total) or any(len(tokens[name]) != len(total[name]) for name in tokens):
        return {name: np.array(row) for name, row in tokens.items()}
    return {name: total[name] + np.array(row) for name, row in tokens.items()}
