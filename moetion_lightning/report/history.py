"""What happened in a run, as numbers: the state that survived every failure, and what it took to get there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moetion_lightning.events import (
    CaptureFinished,
    IterationFinished,
    PartialExpertsRestored,
    RestoreApplied,
    ScheduleMade,
    TokensCounted,
)
from moetion_lightning.report.failures import Failure, find_failures
from moetion_lightning.report.lanes import Lane, find_processes, make_lane
from moetion_lightning.report.reading import Record

__all__ = ["History", "tell"]


@dataclass(frozen=True, kw_only=True)
class History:
    """A run.

    Args:
        start: First sign of life, seconds since 1970.
        end: The last one.
        lanes: Time lines of the ranks.
        failures: What was lost when.
        ratio: Seconds since the start, and the effective training time ratio then.
        stalls: Seconds that each iteration waited for captures, on the rank where it was longest.
        nbytes: Bytes that were captured of each iteration, on all ranks together.
        dense_bytes: Bytes of a dense checkpoint of the same state, 0 if not known.
        tokens: Tokens of each expert, by layer.
        plt: Proportion of lost tokens after the last lossy restore; None if there was none.
        num_processes: Processes of all ranks.
    """

    start: float
    end: float
    lanes: tuple[Lane, ...]
    failures: tuple[Failure, ...]
    ratio: tuple[tuple[float, float], ...]
    stalls: dict[int, float]
    nbytes: dict[int, int]
    dense_bytes: int
    tokens: dict[str, list[int]]
    plt: float | None
    num_processes: int

    @property
    def wall_seconds(self) -> float:
        """From the first to the last sign of life."""
        return self.end - self.start

    @property
    def iterations(self) -> int:
        """The last iteration that is part of the training."""
        return max(self.stalls, default=0)


def tell(records: Sequence[Record]) -> History:
    """Make the history of a run from its events, by time; there must be one."""
    processes = find_processes(records)
    account = _Account(records[0].time, len(processes))
    for record in records:
        account.add(record)
    return History(
        start=records[0].time,
        end=records[-1].time,
        lanes=tuple(make_lane(rank, lives) for rank, lives in processes.items()),
        failures=find_failures(records, processes),
        ratio=tuple(account.ratio),
        stalls=account.stalls(),
        nbytes=account.nbytes(),
        dense_bytes=sum(account.dense.values()),
        tokens=account.tokens(),
        plt=account.plt,
        num_processes=sum(len(lives) for lives in processes.values()),
    )


@dataclass(frozen=True)
class _Step:
    useful: float
    stall: float


class _Account:
    """What is part of the training, as of the last event: a rank that goes back gives up what came after."""

    def __init__(self, start: float, num_ranks: int) -> None:
        self._start = start
        self._num_ranks = num_ranks
        self._steps: dict[int, dict[int, _Step]] = {}
        self._useful: dict[int, float] = {}
        self._nbytes: dict[int, dict[int, int]] = {}
        self._tokens: dict[int, dict[str, list[int]]] = {}
        self.dense: dict[int, int] = {}
        self.ratio: list[tuple[float, float]] = [(0.0, 0.0)]
        self.plt: float | None = None

    def add(self, record: Record) -> None:
        event, rank = record.event, record.rank
        if isinstance(event, RestoreApplied):
            self._go_back(rank, event.iteration)
        elif isinstance(event, IterationFinished):
            self._go_back(rank, event.iteration - 1)  # a process that began anew says nothing of it
            step = _Step(max(0.0, event.seconds - event.stall_seconds), event.stall_seconds)
            self._steps.setdefault(rank, {})[event.iteration] = step
            self._useful[rank] = self._useful.get(rank, 0.0) + step.useful
            self._note(record.time)
        elif isinstance(event, CaptureFinished):
            self._nbytes.setdefault(event.iteration, {})[rank] = event.nbytes
        elif isinstance(event, TokensCounted):  # the same on all ranks
            self._tokens[event.iteration] = event.tokens
        elif isinstance(event, ScheduleMade):
            self.dense[rank] = event.dense_bytes
        elif isinstance(event, PartialExpertsRestored):
            self.plt = event.plt

    def _go_back(self, rank: int, iteration: int) -> None:
        steps = self._steps.get(rank, {})
        while steps and next(reversed(steps)) > iteration:  # they are in ascending order
            self._useful[rank] -= steps.popitem()[1].useful
        while self._tokens and next(reversed(self._tokens)) > iteration:
            self._tokens.popitem()

    def _note(self, time: float) -> None:
        wall = time - self._start
        if wall > 0:
            mean = sum(self._useful.values()) / self._num_ranks
            self.ratio.append((wall, min(1.0, max(0.0, mean / wall))))

    def stalls(self) -> dict[int, float]:
        """Of each iteration, on the rank where it was longest."""
        longest: dict[int, float] = {}
        for steps in self._steps.values():
            for number, step in steps.items():
                longest[number] = max(step.stall, longest.get(number, 0.0))
        return dict(sorted(longest.items()))

    def nbytes(self) -> dict[int, int]:
        """Of each iteration, on all ranks."""
        return {number: sum(of_ranks.values()) for number, of_ranks in sorted(self._nbytes.items())}

    def tokens(self) -> dict[str, list[int]]:
        """Of the layers that were counted last."""
        total: dict[str, list[int]] = {}
        for tokens in self._tokens.values():
            if list(tokens) != list(total) or any(len(tokens[n]) != len(total[n]) for n in tokens):
                total = {name: [0] * len(row) for name, row in tokens.items()}
            total = {name: [a + b for a, b in zip(total[name], row)] for name, row in tokens.items()}
        return total
