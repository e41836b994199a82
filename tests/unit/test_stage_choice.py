"""Stages of a pipeline of which no rank lives go back alone, whenever that can be exact, and never otherwise."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Collection
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetion_lightning.distributed.rank_report import Excluded, RankReport, Source, Window
from moetion_lightning.distributed.restore_choice import Live, Nothing, Replay, Rollback, choose
from moetion_lightning.errors import ConfigurationError

OLD, NEWEST = Window(first=5, last=8), Window(first=9, last=12)
#: The job has done 14 iterations. One step was skipped, so it is at its 16th boundary.
ITERATION, SERIAL = 14, 16


def pipeline(
    stages: int, replicas: int, windows: tuple[Window, ...] = (OLD, NEWEST), **changes: Any
) -> list[RankReport]:
    """A job that runs: rank = stage * replicas + position; the state of a stage is dealt out to its replicas."""
    reports = []
    for rank in range(stages * replicas):
        stage = rank // replicas
        members = tuple(range(stage * replicas, (stage + 1) * replicas))
        report = RankReport(
            rank=rank,
            stage=stage,
            shares=members,
            live=SERIAL,
            live_iteration=ITERATION,
            logged=(NEWEST.first + 1, ITERATION),
            memory={rank: windows},
            copies=tuple(other for other in members if other != rank),
        )
        reports.append(replace(report, **changes))
    return reports


def lose(reports: list[RankReport], ranks: Collection[int], **left: Any) -> list[RankReport]:
    """New processes take these ranks' places; what host memory held is still there."""
    gone: dict[str, Any] = {"live": None, "live_iteration": None, "logged": None, "journal": (SERIAL - 1, SERIAL)}
    return [replace(r, **{**gone, **left}) if r.rank in ranks else r for r in reports]


def members(replicas: int, *stages: int) -> set[int]:
    return {stage * replicas + position for stage in stages for position in range(replicas)}


def test_a_lost_stage_replays_and_the_others_keep_their_state() -> None:
    choice = choose(lose(pipeline(3, 2), {2, 3}))
    own = (Source(owner=2, tier="memory"), Source(owner=3, tier="peer", peer=3))
    other = (Source(owner=2, tier="peer", peer=2), Source(owner=3, tier="memory"))
    assert choice == Live(
        iteration=SERIAL,
        sources=(None,) * 6,
        replays=(
            None, None, Replay(window=NEWEST, sources=own), Replay(window=NEWEST, sources=other), None, None,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (2, 2), (4, 1), (4, 2), (8, 8), (16, 32)])
def test_any_single_stage_may_be_lost(stages: int, replicas: int) -> None:
    for stage in range(stages):
        lost = members(replicas, stage)
        choice = choose(lose(pipeline(stages, replicas), lost))
        assert isinstance(choice, Live)
        assert {rank for rank, replay in enumerate(choice.replays) if replay is not None} == lost
        assert {replay.window for replay in choice.replays if replay is not None} == {NEWEST}
        assert set(choice.sources) == {None}


@pytest.mark.parametrize("stages", [(1, 2), (0, 1), (2, 3), (0, 1, 2), (1, 2, 3)])
def test_adjacent_stages_restore_one_window(stages: tuple[int, ...]) -> None:
    """Only the outer neighbours have logs; the newest window that all ranks of the run can reach counts."""
    lost = members(2, *stages)
    reports = lose(pipeline(4, 2, logged=(OLD.first + 1, ITERATION)), lost)
    choice = choose(reports)
    assert isinstance(choice, Live)
    assert {replay.window for replay in choice.replays if replay is not None} == {NEWEST}
    reports[stages[0] * 2] = replace(reports[stages[0] * 2], memory={stages[0] * 2: (OLD,)})
    choice = choose(reports)
    assert isinstance(choice, Live)
    assert {choice.replays[rank].window for rank in lost} == {OLD}  # type: ignore[union-attr]


def test_separate_stages_may_restore_different_windows() -> None:
    reports = lose(pipeline(5, 1, logged=(OLD.first + 1, ITERATION)), {1, 3})
    reports[3] = replace(reports[3], memory={3: (OLD,)})
    choice = choose(reports)
    assert isinstance(choice, Live)
    assert [replay and replay.window for replay in choice.replays] == [None, NEWEST, None, OLD, None]


def test_a_living_copy_is_preferred_to_a_replay() -> None:
    choice = choose(lose(pipeline(2, 2), {2}))
    assert choice == Live(iteration=SERIAL, sources=(None, None, 3, None))


def test_one_stage_replays_while_a_rank_of_another_takes_a_copy() -> None:
    """Stage 3 is lost; its neighbour, stage 2, is whole. Of stage 0 one rank is lost, far away."""
    choice = choose(lose(pipeline(4, 2), {0, 6, 7}))
    assert isinstance(choice, Live)
    assert choice.sources == (1, *(None,) * 7)
    assert [rank for rank, replay in enumerate(choice.replays) if replay is not None] == [6, 7]


def test_a_neighbour_that_takes_a_copy_has_no_log() -> None:
    choice = choose(lose(pipeline(3, 2), {2, 4, 5}))
    assert isinstance(choice, Rollback)
    assert choice.window == NEWEST
    assert "boundary records of rank 2 do not reach from iteration 10 to 14" in choice.reason
    assert "ranks of stage 2" in choice.reason


def test_a_lost_rank_without_a_copy_in_a_living_stage_rolls_all_back() -> None:
    reports = lose(pipeline(3, 2), {0, 4, 5})
    reports[0] = replace(reports[0], copies=())
    choice = choose(reports)
    assert isinstance(choice, Rollback)
    assert "none of them has a copy of the state of rank 0" in choice.reason


def test_without_any_living_rank_all_roll_back() -> None:
    choice = choose(lose(pipeline(2, 2), range(4)))
    assert isinstance(choice, Rollback)
    assert choice.window == NEWEST


@pytest.mark.parametrize(
    "logged", [None, (NEWEST.first + 2, ITERATION), (NEWEST.first + 1, ITERATION - 1), (ITERATION, ITERATION)]
)
@pytest.mark.parametrize("neighbour", [0, 1, 4, 5])
def test_every_replica_of_both_neighbours_must_have_the_whole_log(
    neighbour: int, logged: tuple[int, int] | None
) -> None:
    reports = lose(pipeline(3, 2), {2, 3})
    assert isinstance(choose(reports), Live)
    reports[neighbour] = replace(reports[neighbour], logged=logged)
    assert isinstance(choose(reports), Rollback)


def test_the_log_of_a_stage_further_away_does_not_matter() -> None:
    reports = lose(pipeline(4, 1), {0})
    for rank in (2, 3):
        reports[rank] = replace(reports[rank], logged=None)
    assert isinstance(choose(reports), Live)


def test_the_newest_window_that_can_be_read_is_replayed_beyond_its_end() -> None:
    late = Window(first=13, last=14)
    reports = lose(pipeline(2, 1, windows=(NEWEST, late)), {1})
    choice = choose(reports)
    assert isinstance(choice, Live)
    assert choice.replays[1] == Replay(window=late, sources=(Source(owner=1, tier="memory"),))
    bad = frozenset({Excluded(1, "memory", 1, late.last)})
    choice = choose(reports, bad)
    assert isinstance(choice, Live)
    assert choice.replays[1] == Replay(window=NEWEST, sources=(Source(owner=1, tier="memory"),))


def test_corrupt_windows_lead_to_older_ones_and_then_to_a_rollback() -> None:
    reports = lose(pipeline(2, 2, logged=(OLD.first + 1, ITERATION), disk={}), {2, 3})
    ancient = Window(first=1, last=4)
    reports = [replace(r, disk={owner: (ancient,) for owner in r.shares}) for r in reports]
    bad: set[Excluded] = set()
    seen: list[tuple[type, Window]] = []
    for _ in range(3):
        choice = choose(reports, bad)
        assert isinstance(choice, (Live, Rollback))
        mine = choice.replays[2] if isinstance(choice, Live) else choice
        assert mine is not None
        seen.append((type(choice), mine.window))
        bad.add(Source(owner=2, tier="memory").excluded(reports[2], mine.window.last))
    assert seen == [(Live, NEWEST), (Live, OLD), (Rollback, ancient)]


def test_a_window_of_the_living_iteration_itself_needs_no_log() -> None:
    here = Window(first=ITERATION, last=ITERATION)
    reports = lose(pipeline(3, 1, windows=(here,), logged=None), {1})
    choice = choose(reports)
    assert isinstance(choice, Live)
    assert choice.replays[1] == Replay(window=here, sources=(Source(owner=1, tier="memory"),))


def test_a_window_that_ends_later_than_the_living_state_is_not_used() -> None:
    later = Window(first=13, last=16)
    reports = lose(pipeline(2, 1, windows=(NEWEST, later)), {1})
    choice = choose(reports)
    assert isinstance(choice, Live)
    assert choice.replays[1] == Replay(window=NEWEST, sources=(Source(owner=1, tier="memory"),))


@pytest.mark.parametrize("journal", [(), (SERIAL - 1,), (ITERATION,)])
def test_a_lost_run_state_rolls_all_back(journal: tuple[int, ...]) -> None:
    """Of every rank: boundaries are counted, not iterations."""
    reports = lose(pipeline(2, 2), {2, 3})
    reports[3] = replace(reports[3], journal=journal)
    choice = choose(reports)
    assert isinstance(choice, Rollback)
    assert "run state (RNG, data position) of rank 3 for iteration 14 is gone" in choice.reason


def test_a_node_whose_memory_is_gone_rolls_all_back_to_copies() -> None:
    reports = lose(pipeline(2, 1), {1}, memory={}, journal=())
    reports[0] = replace(reports[0], memory={0: (OLD, NEWEST), 1: (NEWEST,)})
    choice = choose(reports)
    assert isinstance(choice, Rollback)
    assert choice.sources[1] == (Source(owner=1, tier="peer", peer=0),)


def test_a_stage_may_read_its_window_from_other_memories() -> None:
    reports = lose(pipeline(2, 1), {1}, memory={})
    reports[0] = replace(reports[0], memory={0: (OLD, NEWEST), 1: (NEWEST,)})
    choice = choose(reports)
    assert isinstance(choice, Live)
    assert choice.replays[1] == Replay(window=NEWEST, sources=(Source(owner=1, tier="peer", peer=0),))


def test_a_stage_whose_windows_are_gone_names_what_is_lost() -> None:
    choice = choose(lose(pipeline(2, 1), {1}, memory={}))
    assert isinstance(choice, Nothing)
    assert choice.lost == (1,)
    assert "the ranks of stage 1 have no window that all their ranks can reach" in choice.reason


def test_stage_replays_can_be_ruled_out() -> None:
    reports = lose(pipeline(2, 1), {1})
    assert isinstance(choose(reports), Live)
    assert isinstance(choose(reports, replay_stages=False), Rollback)
    copied = lose(pipeline(2, 2), {3})
    assert isinstance(choose(copied, replay_stages=False), Live), "a living copy is no replay"


def test_living_ranks_of_different_boundaries_roll_back() -> None:
    reports = lose(pipeline(3, 1), {1})
    reports[2] = replace(reports[2], live=SERIAL + 1, live_iteration=ITERATION + 1)
    assert isinstance(choose(reports), Rollback)


def test_a_living_process_with_an_overwritten_state_is_replayed_like_a_lost_one() -> None:
    """A second failure in the middle of a replay: the ranks that were replaying live, but their state is in parts."""
    reports = lose(pipeline(4, 1), {1})
    again = lose(reports, {2})
    choice = choose(again)
    assert isinstance(choice, Live)
    assert [rank for rank, replay in enumerate(choice.replays) if replay is not None] == [1, 2]


def test_the_log_that_a_replay_made_again_serves_the_next_failure() -> None:
    """Stage 1 was replayed from iteration 9, so it can serve from 10 on; now stage 2 is lost."""
    reports = lose(pipeline(4, 1, logged=(3, ITERATION)), {2})
    reports[1] = replace(reports[1], logged=(NEWEST.first + 1, ITERATION))
    choice = choose(reports)
    assert isinstance(choice, Live)
    assert choice.replays[2] == Replay(window=NEWEST, sources=(Source(owner=2, tier="memory"),))
    reports[1] = replace(reports[1], logged=(ITERATION, ITERATION))
    assert isinstance(choose(reports), Rollback)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stage": None}, "no stage: 1 ranks.*every rank in one of the stages"),
        ({"stage": 3}, "stage 3: 1 ranks"),
        ({"stage": 0}, "stage 0: 3 ranks, stage 1: 1 ranks"),
        ({"live_iteration": None}, "reports live=16 without live_iteration"),
    ],
)
def test_reports_that_disagree_about_the_pipeline_are_refused(change: dict[str, Any], words: str) -> None:
    reports = pipeline(2, 2)
    reports[2] = replace(reports[2], **change)
    with pytest.raises(ConfigurationError, match=words):
        choose(reports)


# ---- Any failures, against rules that are written down a second time.


def expected_window(reports: list[RankReport], bad: AbstractSet[Excluded], stage: int) -> Window | None:
    """The window that this lost stage restores, rank by rank and neighbour by neighbour; None if none will do."""
    ranks_of: dict[int, list[RankReport]] = {}
    for report in reports:
        assert report.stage is not None
        ranks_of.setdefault(report.stage, []).append(report)
    dead = {s for s, ranks in ranks_of.items() if all(r.live is None for r in ranks)}
    low = high = stage
    while low - 1 in dead:
        low -= 1
    while high + 1 in dead:
        high += 1
    run = [report for s in range(low, high + 1) for report in ranks_of[s]]
    if any(SERIAL not in report.journal for report in run):
        return None
    for window in (NEWEST, OLD):
        reached = all(
            window in reports[owner].memory[owner] and Excluded(owner, "memory", owner, window.last) not in bad
            for report in run
            for owner in report.shares
        )
        served = all(
            n.live is not None and n.logged is not None and n.logged[0] <= window.first + 1 and n.logged[1] >= ITERATION
            for s in (low - 1, high + 1)
            for n in ranks_of.get(s, ())
        )
        if reached and served:
            return window
    return None


def check_any_failure(seed: int, stages: int, replicas: int) -> str:
    rng = random.Random(seed)
    reports = pipeline(stages, replicas)
    reports = [
        replace(r, logged=rng.choice([(OLD.first + 1, ITERATION), (NEWEST.first + 1, ITERATION), r.logged]))
        for r in reports
    ]
    dead_stages = {rng.randrange(stages) for _ in range(rng.choice([0, 1, 1, 2, 3]))}
    lost = members(replicas, *dead_stages) | {rng.randrange(len(reports)) for _ in range(rng.choice([0, 0, 0, 1, 2]))}
    reports = lose(reports, lost)
    for _ in range(rng.choice([0, 0, 0, 1])):
        rank = rng.randrange(len(reports))
        reports[rank] = replace(
            reports[rank],
            **rng.choice(
                [
                    {"journal": ()},
                    {"logged": None},
                    {"memory": {rank: (OLD,)}},
                    {"memory": {rank: (NEWEST,)}},
                    {"copies": ()},
                ]
            ),
        )
    bad = frozenset(
        Excluded(owner, "memory", owner, rng.choice([OLD, NEWEST]).last)
        for owner in [rng.randrange(len(reports)) for _ in range(rng.choice([0, 0, 1, 2]))]
    )
    choice = choose([RankReport.from_json(json.loads(json.dumps(r.to_json()))) for r in reports], bad)
    living = [r for r in reports if r.live is not None]
    dead = {r.stage for r in reports} - {r.stage for r in living}
    windows = {stage: expected_window(reports, bad, stage) for stage in dead if stage is not None}
    copies = [r for r in reports if r.live is None and r.stage not in dead]
    copied = all(SERIAL in r.journal and any(reports[c].live is not None for c in r.copies) for r in copies)
    if living and copied and None not in windows.values():
        assert isinstance(choice, Live)
        for report, replay, source in zip(reports, choice.replays, choice.sources):
            assert (replay and replay.window) == (windows.get(report.stage) if report.stage is not None else None)
            assert (source is not None) == (report in copies)
            if replay is not None:
                assert [s.owner for s in replay.sources] == list(report.shares)
    else:
        assert not isinstance(choice, Live)
    return type(choice).__name__ + (" with replays" if isinstance(choice, Live) and any(choice.replays) else "")


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), stages=st.integers(2, 8), replicas=st.integers(1, 4))
def test_any_failure_of_a_small_job(seed: int, stages: int, replicas: int) -> None:
    check_any_failure(seed, stages, replicas)


@pytest.mark.parametrize(("stages", "replicas", "rounds"), [(4, 1, 300), (4, 4, 200), (16, 8, 60), (32, 16, 20)])
def test_random_failures_up_to_512_ranks(stages: int, replicas: int, rounds: int) -> None:
    seen = Counter(check_any_failure(seed, stages, replicas) for seed in range(rounds))
    assert seen["Live with replays"], seen
    assert seen["Rollback"], seen
