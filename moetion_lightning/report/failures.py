"""The failures of a run: who was lost, where the state came from, and how long it took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moetion_lightning.events import (
    IterationFinished,
    PartialExpertsRestored,
    ReplayFinished,
    ReplayIteration,
    RestoreApplied,
    RestoreStarted,
    StageReplayFinished,
)
from moetion_lightning.report.lanes import Process
from moetion_lightning.report.reading import Record

__all__ = ["Failure", "find_failures"]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Ranks that were lost at one time.

    Args:
        time: Their last sign of life, seconds since 1970.
        ranks: Who.
        iteration: Last iteration that the job had finished.
        sources: Where the state of the new processes came from; nothing if they began anew.
        restored: Iteration of that state.
        replayed: Iterations that were replayed to make it whole, or by a stage alone.
        again: Iterations that were then done again, up to ``iteration``.
        seconds: From ``time`` to the end of the first iteration that is new; None if there was none.
        lost_again: Whether there was none because one of them was lost again.
        verified: Whether all replays were found to be exact; None if nothing was replayed.
        lost_tokens: Tokens whose updates were lost; None where that is not possible.
    """

    time: float
    ranks: tuple[int, ...]
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
    rank: int
    died: float
    restarted: float
    lost_again: float  # infinity if it was not


def find_failures(records: Sequence[Record], processes: Mapping[int, Sequence[Process]]) -> tuple[Failure, ...]:
    """A rank is lost where another process takes its place; ranks lost before one of them is back are one failure."""
    losses = []
    for rank, lives in processes.items():
        for index in range(1, len(lives)):
            again = lives[index].end if index + 1 < len(lives) else float("inf")
            losses.append(_Loss(rank, lives[index - 1].end, lives[index].start, again))
    losses.sort(key=lambda loss: loss.died)
    groups: list[list[_Loss]] = []
    for loss in losses:
        group = groups[-1] if groups else []
        if group and loss.died < max(g.restarted for g in group) and loss.rank not in {g.rank for g in group}:
            group.append(loss)
        else:
            groups.append([loss])
    finished = _iterations(records)
    return tuple(_describe(group, records, finished) for group in groups)


def _describe(group: Sequence[_Loss], records: Sequence[Record], finished: Sequence[tuple[float, int]]) -> Failure:
    died = max(loss.died for loss in group)
    ranks = {loss.rank for loss in group}
    reached = max((iteration for time, iteration in finished if time <= died), default=0)
    lost_again = min(loss.lost_again for loss in group)
    new = [time for time, iteration in finished if died < time <= lost_again and iteration > reached]
    until = new[0] if new else lost_again
    after = [r for r in records if died < r.time <= until]
    mine = [r for r in after if r.rank in ranks]
    # One that was not exact is given up by all ranks: they go back together.
    stages = [r.event for r in after if isinstance(r.event, StageReplayFinished) and r.event.verified]
    applied = [r.event for r in mine if isinstance(r.event, RestoreApplied)]
    replays = [r.event for r in after if isinstance(r.event, ReplayFinished) and r.event.replayed]
    restored = min([s.first_iteration for s in stages] or [a.iteration for a in applied] or [0])
    replayed = len({r.event.iteration for r in mine if isinstance(r.event, ReplayIteration)})
    replayed = max([stage.last_iteration - stage.first_iteration for stage in stages], default=replayed)
    done = {iteration for _, iteration in _iterations(mine)}
    verdicts = [stage.verified for stage in stages] + [replay.verified for replay in replays]
    lossy = [r.event for r in mine if isinstance(r.event, PartialExpertsRestored)]
    return Failure(
        time=died,
        ranks=tuple(sorted(ranks)),
        iteration=reached,
        sources=_sources(mine),
        restored=restored,
        replayed=replayed,
        again=len([iteration for iteration in done if restored + replayed < iteration <= reached]),
        seconds=new[0] - died if new else None,
        lost_again=not new and lost_again < float("inf"),
        verified=all(verdicts) if verdicts else None,
        lost_tokens=lossy[-1].lost_tokens if lossy else None,
    )


def _sources(records: Iterable[Record]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(r.event.tier for r in records if isinstance(r.event, RestoreStarted)))


def _iterations(records: Iterable[Record]) -> list[tuple[float, int]]:
    """When each was finished."""
    return [(r.time, r.event.iteration) for r in records if isinstance(r.event, IterationFinished)]
