"""Where a job continues after a failure.

Every rank reports what it still has, the reports are gathered, and every rank evaluates :func:`choose` on the same
reports, so that all come to the same choice without another word. In order of preference: the live state, where each
lost rank has a living copy; the newest window that every rank can reach; nothing, with what was lost by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TypeAlias

from moetion_lightning.distributed.rank_report import Excluded, RankReport, Source, Window, check_reports, named_ranks
from moetion_lightning.distributed.stage_choice import Replay, lost_stages, stage_replays
from moetion_lightning.distributed.window_supply import Age, WindowSupply

__all__ = ["Choice", "Excluded", "Live", "Nothing", "RankReport", "Replay", "Rollback", "Source", "Window", "choose"]


@dataclass(frozen=True, kw_only=True)
class Live:
    """Everybody continues with the state that the living ranks hold; only lost stages of a pipeline replay.

    Args:
        iteration: Number of the boundary whose state the living ranks hold.
        sources: For each rank the rank to copy the model state from, or None: it keeps its own, or replays.
        replays: For each rank what it restores and replays up to that boundary, or None. Left out: nobody does.
    """

    iteration: int
    sources: tuple[int | None, ...]
    replays: tuple[Replay | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.replays:
            object.__setattr__(self, "replays", (None,) * len(self.sources))


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Everybody restores the same window and replays it.

    Args:
        window: The window.
        sources: For each rank, parallel to its ``shares``, where to read each owner's window.
        reason: Why the state of surviving processes cannot be used; empty if none survived.
    """

    window: Window
    sources: tuple[tuple[Source, ...], ...]
    reason: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """There is no common state to continue from.

    Args:
        fresh: No rank has any trace of an earlier run: starting from the beginning is right. Otherwise state was lost,
            and only the user may decide to start again.
        reason: What was lost, what is left and what to do, for the user.
        lost: Ranks of which no window can be reached by all ranks that need it; before the first window, those without
            live state.
    """

    fresh: bool
    reason: str
    lost: tuple[int, ...] = ()


Choice: TypeAlias = Live | Rollback | Nothing


def choose(
    reports: Sequence[RankReport],
    excluded: AbstractSet[Excluded] = frozenset(),
    *,
    replay_stages: bool = True,
) -> Choice:
    """Where the job continues.

    Args:
        reports: The report of every rank, by rank; the same on every rank.
        excluded: Sources that failed when they were read. Grows until a choice succeeds; the same on every rank.
        replay_stages: Whether stages of a pipeline may be replayed alone; the same on every rank.

    Returns:
        :class:`Live` where possible, with replays of stages only where a stage has no living rank; else
        :class:`Rollback` to the newest window (largest ``last``, then largest ``first``) that every rank can reach for
        all its shares, else :class:`Nothing`.

    Raises:
        ConfigurationError: The reports are not one for each rank, name ranks that do not exist, or disagree about a
            pipeline.
    """
    check_reports(reports)
    survivors = _survivors(reports)
    reason = survivors if isinstance(survivors, str) else ""
    if isinstance(survivors, _Survivors):
        copied = _copied(reports, survivors)
        if not isinstance(copied, str):
            return Live(iteration=survivors.serial, sources=tuple(copied))
        reason = survivors.but(copied)
    supply = WindowSupply(reports, excluded)
    if isinstance(survivors, _Survivors) and replay_stages and lost_stages(reports):
        live = _live_with_replays(reports, survivors, supply)
        if isinstance(live, Live):
            return live
        reason = survivors.but(live)
    reachable = supply.reachable()
    common = set.intersection(*reachable)
    if common:
        last, first = max(common)
        sources = supply.sources((last, first), range(len(reports)))
        return Rollback(window=Window(first=first, last=last), sources=tuple(sources), reason=reason)
    return _nothing(reports, reachable, reason)


@dataclass(frozen=True, kw_only=True)
class _Survivors:
    """The living ranks, all with the state of one boundary."""

    serial: int
    iteration: int | None
    ranks: tuple[int, ...]

    def but(self, problem: str) -> str:
        """Why their state cannot be used."""
        done = self.serial if self.iteration is None else self.iteration
        return (
            f"The processes of {named_ranks(self.ranks)} survived with the state after iteration {done}, but {problem}."
        )


def _survivors(reports: Sequence[RankReport]) -> _Survivors | str:
    """The living ranks, or why there are none that could go on together."""
    found: dict[int, list[RankReport]] = {}
    for report in reports:
        if report.live is not None:
            found.setdefault(report.live, []).append(report)
    if len(found) != 1:
        held = "; ".join(
            f"{named_ranks(r.rank for r in some)} after iteration {i}" for i, some in sorted(found.items())
        )
        return f"The surviving processes do not hold the same iteration: {held}." if held else ""
    ((serial, living),) = found.items()
    return _Survivors(serial=serial, iteration=living[0].live_iteration, ranks=tuple(r.rank for r in living))


def _live_with_replays(reports: Sequence[RankReport], survivors: _Survivors, supply: WindowSupply) -> Live | str:
    """Stages without a living rank replay; lost ranks of other stages take a copy, as usual. Or what is missing."""
    copied = _copied(reports, survivors, without=frozenset(lost_stages(reports)))
    if isinstance(copied, str):
        return copied
    replays = stage_replays(reports, supply)
    if isinstance(replays, str):
        return replays
    return Live(
        iteration=survivors.serial,
        sources=tuple(copied),
        replays=tuple(replays.get(report.rank) for report in reports),
    )


def _copied(
    reports: Sequence[RankReport], survivors: _Survivors, without: AbstractSet[int] = frozenset()
) -> list[int | None] | str:
    """For each rank the living one to copy the model state from, or None; or what is missing.

    Args:
        reports: The reports.
        survivors: The living ranks.
        without: Stages whose ranks need no copy.
    """
    alive = set(survivors.ranks)
    used = dict.fromkeys(survivors.ranks, 0)
    sources: list[int | None] = [None] * len(reports)
    for report in reports:
        if report.live is not None or report.stage in without:
            continue
        candidates = [rank for rank in report.copies if rank in alive]
        if not candidates:
            return f"none of them has a copy of the state of rank {report.rank}"
        if survivors.serial not in report.journal:
            return f"the run state (RNG, data position) of rank {report.rank} for it is gone"
        sources[report.rank] = source = min(sorted(candidates), key=used.__getitem__)
        used[source] += 1
    return sources


def _nothing(reports: Sequence[RankReport], reachable: Sequence[AbstractSet[Age]], live: str) -> Nothing:
    windows = any(any(report.memory.values()) or any(report.disk.values()) for report in reports)
    # Without a window that all ranks had, some may have committed their part of the first one.
    if not windows or not any(report.protected or any(report.disk.values()) for report in reports):
        if not live and not any(report.journal for report in reports):
            reason = "No rank has any state of an earlier run."
            if windows:
                reason = "The failure came before all ranks had committed their first window: all begin anew."
            return Nothing(fresh=True, reason=reason)
        trace = live or f"Iteration {max(max(r.journal, default=0) for r in reports)} was reached."
        return Nothing(
            fresh=False,
            lost=tuple(report.rank for report in reports if report.live is None),
            reason=f"The job cannot continue: no window was committed by all ranks. {trace} If the failure came before "
            "the first window was committed, nothing else can be restored: start from the beginning with "
            "resume='never'.",
        )
    lost = tuple(rank for rank, ages in enumerate(reachable) if not ages)
    newest: dict[Age, list[int]] = {}
    for rank, ages in enumerate(reachable):
        if ages:
            newest.setdefault(max(ages), []).append(rank)
    left = "; ".join(
        f"{named_ranks(newest[age])}: iterations {age[1]}..{age[0]}" for age in sorted(newest, reverse=True)
    )
    if lost:
        what = f"the state of {named_ranks(lost)} is lost (no usable window that all ranks that need it can reach)."
        left = f"Newest whole window of the others: {left}." if left else "No other rank has a usable window either."
    else:
        what = "each rank's state exists, but no window is common to all ranks."
        left = f"Newest whole window: {left}."
    return Nothing(
        fresh=False,
        lost=lost,
        reason=" ".join(
            filter(
                None,
                [
                    f"The job cannot continue: {what}",
                    left,
                    live,
                    "If a node that holds what is missing can come back, start the job again with it. Otherwise start "
                    "from the beginning with resume='never'. To survive such a failure next time, keep copies on other "
                    "nodes (replicas=1 or more) or persist to storage that every rank can read (persist_dir=).",
                ],
            )
        ),
    )
