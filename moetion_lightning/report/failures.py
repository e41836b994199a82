"""The failures of a run: who was lost and why, where the state came from, and how long it took."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moetion_lightning.events import (
    PartialExpertsRestored,
    ReplayFinished,
    ReplayIteration,
    RestoreApplied,
    RestoreStarted,
    StageReplayFinished,
    StateRebuilt,
)
from moetion_lightning.report.lanes import Process
from moetion_lightning.report.reading import Record

__all__ = ["RARE", "Failure", "find_failures"]

#: Events that say what a recovery was.
RARE = (
    PartialExpertsRestored,
    ReplayFinished,
    ReplayIteration,
    RestoreApplied,
    RestoreStarted,
    StageReplayFinished,
    StateRebuilt,
)
UNKNOWN = "no word: killed, or lost with its machine"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Ranks that were lost at one time.

    Args:
        time: Their last sign of life, seconds since 1970.
        ranks: Who.
        cause: How they ended, as far as the launcher or they themselves said.
        iteration: Last iteration that the job had finished.
        sources: Where the state of the new processes came from; nothing if they began anew.
        restored: Iteration of that state.
        replayed: Iterations that were replayed or rebuilt to make it whole, or by a stage alone.
        again: Iterations that were then done again, up to ``iteration``.
        seconds: From ``time`` to the end of the first iteration that is new; None if there was none.
        lost_again: Whether there was none because one of them was lost again.
        verified: Whether all replays were found to be exact; None if nothing was replayed.
        lost_tokens: Tokens whose updates were lost; None where that is not possible.
    """

    time: float
    ranks: tuple[int, ...]
    cause: str
    iteration: int
    sources: tuple[str, ...]
    restored: int
    replayed: int
    again: int
    seconds: float | None
    lost_again: bool
    verified: bool | None
    lost_tokens: int | None


@dataclass(frozen=True)
class _Loss:
    old: Process
    new: Process
    lost_again: float  # infinity if it was not


def find_failures(processes: Mapping[int, Sequence[Process]], first: Mapping[int, float]) -> tuple[Failure, ...]:
    """A rank is lost where another process takes its place; ranks lost before one of them is back are one failure.

    Args:
        processes: Of each rank, one after the other.
        first: When each iteration was finished for the first time by any rank, seconds since 1970.
    """
    losses = []
    for lives in processes.values():
        for index in range(1, len(lives)):
            if not lives[index - 1].completed:
                again = lives[index].end if index + 1 < len(lives) else float("inf")
                losses.append(_Loss(lives[index - 1], lives[index], again))
    losses.sort(key=lambda loss: loss.old.end)
    groups: list[list[_Loss]] = []
    for loss in losses:
        group = groups[-1] if groups else []
        is_near = group and loss.old.end < max(g.new.start for g in group)
        if is_near and loss.old.rank not in {g.old.rank for g in group}:
            group.append(loss)
        else:
            groups.append([loss])
    times = sorted((time, iteration) for iteration, time in first.items())
    records = sorted((r for p in _all(processes) for r in p.records), key=lambda record: record.time)
    return tuple(_describe(group, records, times, first) for group in groups)


def _all(processes: Mapping[int, Sequence[Process]]) -> Iterable[Process]:
    return (process for lives in processes.values() for process in lives)


def _describe(
    group: Sequence[_Loss],
    records: Sequence[Record],
    times: Sequence[tuple[float, int]],
    first: Mapping[int, float],
) -> Failure:
    died = max(loss.old.end for loss in group)
    ranks = {loss.old.rank for loss in group}
    before = times[: bisect.bisect_right(times, (died, 1 << 62))]
    reached = max((iteration for _, iteration in before[-1:]), default=0)
    lost_again = min(loss.lost_again for loss in group)
    new = first.get(reached + 1, float("inf"))
    until = new if new <= lost_again else lost_again
    after = [r for r in records if died < r.time <= until]
    mine = [r for r in after if r.rank in ranks]
    # One that was not exact is given up by all ranks: they go back together.
    stages = [r.event for r in after if isinstance(r.event, StageReplayFinished) and r.event.verified]
    applied = [r.event for r in mine if isinstance(r.event, RestoreApplied)]
    rebuilt = [r.event for r in mine if isinstance(r.event, StateRebuilt)]
    replays = [r.event for r in after if isinstance(r.event, ReplayFinished) and (r.event.replayed or rebuilt)]
    restored = min([s.first_iteration for s in stages] or [a.iteration for a in applied] or [0])
    replayed = len({r.event.iteration for r in mine if isinstance(r.event, ReplayIteration)})
    replayed = max([stage.last_iteration - stage.first_iteration for stage in stages], default=replayed)
    done = reached if new <= lost_again else min(reached, max(loss.new.last for loss in group))
    verdicts = [stage.verified for stage in stages] + [replay.verified for replay in replays]
    lossy = [r.event for r in mine if isinstance(r.event, PartialExpertsRestored)]
    return Failure(
        time=died,
        ranks=tuple(sorted(ranks)),
        cause="; ".join(dict.fromkeys(loss.old.reason or loss.new.predecessor or UNKNOWN for loss in group)),
        iteration=reached,
        sources=tuple(dict.fromkeys(r.event.tier for r in mine if isinstance(r.event, RestoreStarted))),
        restored=restored,
        replayed=max([replayed, *(event.rebuilt for event in rebuilt)]),
        again=max(0, done - restored - replayed),
        seconds=new - died if new <= lost_again and new < float("inf") else None,
        lost_again=new > lost_again,
        verified=all(verdicts) if verdicts else None,
        lost_tokens=lossy[-1].lost_tokens if lossy else None,
    )
