"""Which stages of a pipeline go back to a window alone, and replay it from what their neighbours sent them.

All ranks of a stage are lost, and ranks of other stages live on: then the stage restores its newest window and repeats
the iterations that the others have made since, with the activations and gradients that its neighbours kept. The others
keep their state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moetion_lightning.distributed.rank_report import RankReport, Source, Window, named_ranks
from moetion_lightning.distributed.window_supply import Age, WindowSupply

__all__ = ["Replay", "lost_stages", "stage_replays"]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A rank restores a window, and replays from there.

    Args:
        window: The window; the same for all ranks of adjacent lost stages, which replay together.
        sources: Where the rank reads the window of each of its ``shares``, parallel to them.
    """

    window: Window
    sources: tuple[Source, ...]


def lost_stages(reports: Sequence[RankReport]) -> list[int]:
    """The stages of which no rank lives, ascending; none without a pipeline."""
    living = {report.stage for report in reports if report.live is not None}
    return sorted({report.stage for report in reports if report.stage is not None} - living)


def stage_replays(reports: Sequence[RankReport], supply: WindowSupply) -> dict[int, Replay] | str:
    """What each rank of the lost stages restores, or why they cannot be replayed alone.

    A window qualifies for adjacent lost stages if all their ranks can reach it for all their shares, and if the ranks
    of the stages before and after them have logged all iterations that follow its first one, up to that of the living
    state. The newest such window is taken. It never ends after the living state: no rank can capture an iteration
    before all ranks have agreed to make it, and what a course that was given up had left is dropped. A window that did
    could not be used, because operators that it holds in full only later would stay incomplete.

    Args:
        reports: Of every rank, by rank; the living ones agree in ``live``.
        supply: The windows.
    """
    living = [report for report in reports if report.live is not None]
    iterations = {report.live_iteration for report in living}
    if len(iterations) != 1:
        return "the living ranks are not at one iteration"
    (target,) = iterations
    assert target is not None  # checked with the reports
    serial = living[0].live
    stages: dict[int, list[RankReport]] = {}
    for report in reports:
        if report.stage is not None:
            stages.setdefault(report.stage, []).append(report)
    reachable = supply.reachable()
    replays: dict[int, Replay] = {}
    for run in _runs(lost_stages(reports)):
        members = [report for stage in run for report in stages[stage]]
        without = [report.rank for report in members if serial not in report.journal]
        if without:
            return f"the run state (RNG, data position) of {named_ranks(without)} for iteration {target} is gone"
        common = set.intersection(*(reachable[owner] for report in members for owner in report.shares))
        common = {age for age in common if age[0] <= target}
        if not common:
            return f"{_named_stages(run)} have no window that all their ranks can reach"
        neighbours = [report for stage in (run[0] - 1, run[-1] + 1) for report in stages.get(stage, ())]
        covered = [age for age in common if not _missing(neighbours, age, target)]
        if not covered:
            newest = max(common)
            missing = named_ranks(report.rank for report in _missing(neighbours, newest, target))
            return (
                f"the boundary records of {missing} do not reach from iteration {newest[1] + 1} to {target}, which "
                f"{_named_stages(run)} would need"
            )
        last, first = max(covered)
        ranks = [report.rank for report in members]
        for rank, sources in zip(ranks, supply.sources((last, first), ranks)):
            replays[rank] = Replay(window=Window(first=first, last=last), sources=sources)
    return replays


def _missing(neighbours: Sequence[RankReport], age: Age, target: int) -> list[RankReport]:
    """The neighbours that cannot serve every iteration from the window's first one to the target."""
    first = age[1]
    if first == target:  # nothing is to be replayed
        return []
    return [
        report
        for report in neighbours
        if report.live is None
        or report.logged is None
        or report.logged[0] > first + 1
        or report.logged[1] < target
    ]  # fmt: skip


def _runs(stages: Sequence[int]) -> list[list[int]]:
    """Stages, ascending, in groups of adjacent ones."""
    runs: list[list[int]] = []
    for stage in stages:
        if runs and stage == runs[-1][-1] + 1:
            runs[-1].append(stage)
        else:
            runs.append([stage])
    return runs


def _named_stages(run: Sequence[int]) -> str:
    return f"the ranks of stage {run[0]}" if len(run) == 1 else f"the ranks of stages {run[0]}-{run[-1]}"
