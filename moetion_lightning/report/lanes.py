"""What each rank did when: its time line as spans that follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from moetion_lightning.events import (
    CaptureFinished,
    IterationFinished,
    RestoreApplied,
    StageReplayFinished,
    WindowCommitted,
)
from moetion_lightning.report.reading import Record

__all__ = ["Kind", "Lane", "Process", "Span", "find_processes", "make_lane"]


class Kind(Enum):
    """What a rank does; the value names it in the page."""

    FIRST = "first"
    REPLAYED = "replayed"
    AGAIN = "again"
    STAGE_REPLAY = "stage"
    STARTING = "starting"
    WAITING = "waiting"
    LOST = "lost"
    DOWN = "down"


@dataclass(frozen=True, kw_only=True)
class Span:
    """A piece of a time line.

    Args:
        kind: What was done.
        start: Seconds since 1970.
        end: Seconds since 1970.
        first: First iteration that was done; None if it was none.
        last: The last one.
    """

    kind: Kind
    start: float
    end: float
    first: int | None = None
    last: int | None = None


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of one rank, with all its events."""

    rank: int
    pid: int
    records: tuple[Record, ...]

    @property
    def start(self) -> float:
        """Its first sign of life."""
        return self.records[0].time

    @property
    def end(self) -> float:
        """Its last sign of life."""
        return self.records[-1].time


@dataclass(frozen=True, kw_only=True)
class Lane:
    """The time line of a rank.

    Args:
        rank: The rank.
        spans: What it did.
        captures: When slots were copied, on the capture thread.
        commits: When windows were committed, and the last iteration of each.
    """

    rank: int
    spans: tuple[Span, ...]
    captures: tuple[Span, ...]
    commits: tuple[tuple[float, int], ...]


def find_processes(records: Sequence[Record]) -> dict[int, tuple[Process, ...]]:
    """The processes of each rank, one after the other.

    A number may come up again after a long time, so a process ends where another one of its rank begins.
    """
    runs: dict[int, list[list[Record]]] = {}
    for record in records:
        of_rank = runs.setdefault(record.rank, [])
        if not of_rank or of_rank[-1][0].pid != record.pid:
            of_rank.append([])
        of_rank[-1].append(record)
    return {
        rank: tuple(Process(rank=rank, pid=run[0].pid, records=tuple(run)) for run in runs[rank])
        for rank in sorted(runs)
    }


def make_lane(rank: int, processes: Sequence[Process]) -> Lane:
    """The time line of a rank."""
    spans: list[Span] = []
    reached = 0
    for index, process in enumerate(processes):
        if index:
            spans.append(Span(kind=Kind.DOWN, start=processes[index - 1].end, end=process.start))
        life = _Life(process, reached, dies=index + 1 < len(processes))
        spans += life.spans
        reached = life.reached
    records = [record for process in processes for record in process.records]
    return Lane(
        rank=rank,
        spans=tuple(span for span in spans if span.end > span.start),
        captures=tuple(
            Span(
                kind=Kind.FIRST,
                start=r.time - r.event.seconds,
                end=r.time,
                first=r.event.iteration,
                last=r.event.iteration,
            )
            for r in records
            if isinstance(r.event, CaptureFinished)
        ),
        commits=tuple((r.time, r.event.last_iteration) for r in records if isinstance(r.event, WindowCommitted)),
    )


class _Life:
    """Walks through the events of one process."""

    def __init__(self, process: Process, reached: int, *, dies: bool) -> None:
        self.spans: list[Span] = []
        self.reached = reached
        self._cursor = process.start
        self._begun = self._went_back = False
        self._replay_until = -1
        self._stages: list[Span] = []
        for record in process.records:
            event = record.event
            if isinstance(event, RestoreApplied):
                self._went_back = True
                self._replay_until = event.iteration + event.replay
            elif isinstance(event, StageReplayFinished):
                start, last = max(self._cursor, record.time - event.seconds), event.last_iteration
                first = event.first_iteration + 1
                self._stages.append(Span(kind=Kind.STAGE_REPLAY, start=start, end=record.time, first=first, last=last))
            elif isinstance(event, IterationFinished):
                self._iteration(event, record.time)
        if dies or self._went_back or not self._begun:
            self._gap(process.end, Kind.LOST)

    def _iteration(self, event: IterationFinished, end: float) -> None:
        start = max(self._cursor, end - event.seconds)
        self._gap(start, Kind.LOST)
        if event.iteration <= self._replay_until:
            kind = Kind.REPLAYED
        else:
            kind = Kind.AGAIN if event.iteration <= self.reached else Kind.FIRST
        self.spans.append(Span(kind=kind, start=start, end=end, first=event.iteration, last=event.iteration))
        self.reached = max(self.reached, event.iteration)
        self._cursor, self._begun, self._went_back = end, True, False

    def _gap(self, until: float, otherwise: Kind) -> None:
        """What is no finished iteration: a start, a wait for other ranks, or an iteration that was never finished."""
        kind = otherwise if self._begun and not self._went_back else Kind.STARTING
        if self._begun and self._went_back:
            kind = Kind.WAITING
        for stage in self._stages:
            self.spans += [Span(kind=kind, start=self._cursor, end=stage.start), stage]
            self._cursor = stage.end
        self._stages = []
        self.spans.append(Span(kind=kind, start=self._cursor, end=until))
        self._cursor = until
