"""A rank dies by SIGKILL and is replaced; the other processes live on inside the same ``fit``, and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events, read_logs

pytestmark = pytest.mark.slow

DDP: dict[str, Any] = {"ranks": 2, "strategy": "ddp"}


def check(drill: Drill, spec: dict[str, Any], kills: list[dict[str, Any]], origin: str | None = None) -> None:
    """Only the killed ranks have new processes, and all results are those of a job that never failed."""
    out, ended, pids = drill.elastic(spec, kills)
    assert ended.good, f"{ended}\n{read_logs(out)}"
    killed = [kill["rank"] for kill in kills]
    assert [len(history) for history in pids] == [1 + killed.count(rank) for rank in range(spec["ranks"])]
    tiers = {event["tier"] for event in read_events(out, "RestoreStarted")}
    if origin is not None:
        assert any(origin in tier for tier in tiers), tiers
    assert differences(drill.reference(spec), out) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_ddp_live(drill: Drill, rank: int) -> None:
    check(drill, DDP, [{"hook": "before_step", "step": 11, "rank": rank}], "live")


PHASES: dict[str, dict[str, Any]] = {
    "first iteration": {"hook": "backward", "step": 0},
    "before the step": {"hook": "before_step", "step": 7},
    "after the step": {"hook": "batch_end", "step": 9},
    "validation": {"hook": "validation", "step": 8},
    "capture": {"event": "CaptureFinished", "count": 6},
    "commit": {"event": "ManifestWritten", "count": 3},
}


@pytest.mark.parametrize("phase", PHASES)
def test_ddp_phases(drill: Drill, phase: str) -> None:
    check(drill, DDP, [{**PHASES[phase], "rank": 1}])


def test_four_ranks(drill: Drill) -> None:
    check(drill, {**DDP, "ranks": 4, "samples": 48}, [{"hook": "before_step", "step": 5, "rank": 2}], "live")


def test_one_after_the_other(drill: Drill) -> None:
    spec = {**DDP, "ranks": 3, "samples": 36}
    kills = [{"hook": "before_step", "step": 3, "rank": 2}, {"hook": "before_step", "step": 7, "rank": 0}]
    check(drill, spec, kills, "live")


def test_two_at_once(drill: Drill) -> None:
    spec = {**DDP, "ranks": 3, "samples": 36}
    kills = [{"hook": "backward", "step": 5, "rank": 2}, {"hook": "backward", "step": 5, "rank": 1}]
    check(drill, spec, kills)


def test_the_newcomer_dies_too(drill: Drill) -> None:
    spec = {**DDP, "ranks": 3, "samples": 36}
    kills = [
        {"hook": "backward", "step": 5, "rank": 1},
        {"event": "RestoreApplied", "rank": 1, "generation": 1},
        {"event": "RestoreStarted", "rank": 1, "generation": 2},
    ]
    check(drill, spec, kills)


def test_a_survivor_dies_while_it_goes_back(drill: Drill) -> None:
    spec = {**DDP, "ranks": 3, "samples": 36}
    kills = [{"hook": "backward", "step": 5, "rank": 1}, {"event": "RestoreStarted", "rank": 0}]
    check(drill, spec, kills)


def test_all_die(drill: Drill) -> None:
    kills = [{"hook": "backward", "step": 11, "rank": rank} for rank in (0, 1)]
    check(drill, DDP, kills)


MOETION: dict[str, Any] = {"ranks": 2, "strategy": "moetion", "expert_parallel_size": 2}


@pytest.mark.parametrize("phase", ["before the step", "after the step", "validation"])
def test_expert_parallel(drill: Drill, phase: str) -> None:
    """Experts of the lost rank have no living copy: all go back to a window and replay it together."""
    check(drill, MOETION, [{**PHASES[phase], "rank": 1}], "memory")


def test_data_and_expert_parallel(drill: Drill) -> None:
    """Each expert lives on two ranks."""
    check(drill, {**MOETION, "ranks": 4, "samples": 48}, [{"hook": "before_step", "step": 5, "rank": 2}], "live")


FSDP2: dict[str, Any] = {"ranks": 2, "strategy": "fsdp2"}


@pytest.mark.parametrize("phase", ["before the step", "after the step", "validation", "commit"])
def test_fsdp2(drill: Drill, phase: str) -> None:
    """Shards of the lost rank have no living copy: all go back to a window and replay it together."""
    check(drill, FSDP2, [{**PHASES[phase], "rank": 1}], "memory")


def test_fsdp2_backward(drill: Drill) -> None:
    check(drill, {**FSDP2, "ranks": 3, "samples": 36}, [{"hook": "backward", "step": 7, "rank": 0}], "memory")


def test_before_the_first_window_a_lost_shard_means_the_beginning(drill: Drill) -> None:
    """Nothing that all ranks could go back to exists yet: all processes are started again, and begin anew."""
    out, ended, pids = drill.elastic(FSDP2, [{"hook": "before_step", "step": 2, "rank": 1}], restarts=3)
    assert ended.good, f"{ended}\n{read_logs(out)}"
    assert len(pids[0]) >= 2, pids
    assert "no rank has a committed window" in read_logs(out)
    assert differences(drill.reference(FSDP2), out) == []
