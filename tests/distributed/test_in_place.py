"""A rank dies by SIGKILL and is replaced; the other processes live on inside the same ``fit``, and nothing is lost."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events, read_logs, read_steps

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


def in_turn(*kills: dict[str, Any]) -> list[dict[str, Any]]:
    """One death after the other; a rank that has died before dies in the process that took its place."""
    died: dict[int, int] = {}
    found = []
    for generation, kill in enumerate(kills, start=1):
        found.append({**kill, "generation": died.get(kill["rank"], 0)})
        died[kill["rank"]] = generation
    return found


def test_ddp_live(drill: Drill) -> None:
    kills = [{"hook": "before_step", "step": 10 + rank, "rank": rank} for rank in (0, 1)]
    check(drill, DDP, kills, "live")


def phases(hook: str) -> list[dict[str, Any]]:
    """Each is the end of one process of the same rank: in a commit, in a validation, in a step. Of 16 iterations."""
    moments = [
        {"event": "ManifestWritten", "count": 3}, {"hook": "validation", "step": 12}, {"hook": hook, "step": 14},
    ]  # fmt: skip
    return in_turn(*({**moment, "rank": 1} for moment in moments))


def test_ddp_phases(drill: Drill) -> None:
    check(drill, {**DDP, "epochs": 4}, phases("batch_end"))


def test_ddp_in_a_capture(drill: Drill) -> None:
    check(drill, DDP, [{"event": "CaptureFinished", "count": 6, "rank": 1}])


def test_ddp_in_the_first_iteration(drill: Drill) -> None:
    """Whether the run state before it is on file already decides whether the other process lives on."""
    out, ended, _ = drill.elastic(DDP, [{"hook": "backward", "step": 0, "rank": 1}], restarts=4)
    assert ended.good, f"{ended}\n{read_logs(out)}"
    assert differences(drill.reference(DDP), out) == []


@pytest.mark.parametrize(
    "kills",
    [
        [{"hook": "validation", "step": 9, "rank": 0}],
        [{"hook": "validation", "step": 6, "rank": 1}, {"hook": "epoch_end", "step": 12, "rank": 0}],
    ],
    ids=["validation in the middle of an epoch", "validation and the end of an epoch"],
)
def test_what_follows_a_batch_is_done_again_from_living_state(drill: Drill, kills: list[dict[str, Any]]) -> None:
    """Nobody goes back behind the batch before it."""
    validates = 0.5 if len(kills) == 1 else 1.0
    spec = {**DDP, "samples": 48, "val_check_interval": validates, "callbacks": ["checkpoint"], "scheduler": "plateau"}
    out, ended, pids = drill.elastic(spec, kills)
    assert ended.good, f"{ended}\n{read_logs(out)}"
    assert sorted(len(history) for history in pids) == ([1, 2] if len(kills) == 1 else [2, 2])
    assert {event["replay"] for event in read_events(out, "RestoreApplied")} == {0}
    assert differences(drill.reference(spec), out) == []
    steps = [records for rank in (0, 1) for records in read_steps(out, rank).values()]
    assert all(len(records) == 1 for records in steps), "no batch is trained on again"


def test_newcomer_that_loses_another_rank_in_what_follows_a_batch_does_it_again_too(drill: Drill) -> None:
    """All ranks of one validation are there again: one that left it out would go on with the next batch."""
    once = [{"hook": "validation", "step": 4, "rank": rank} for rank in (0, 1, 1)]
    spec = {**DDP, "ranks": 3, "samples": 36, "callbacks": ["checkpoint"], "scheduler": "plateau", "once": once}
    out, ended, _ = drill.elastic(spec, [], restarts=3)
    assert ended.good, f"{ended}\n{read_logs(out)}"
    assert len(list(out.glob("killed-*"))) == len(once)
    assert differences(drill.reference(spec), out) == []


def test_four_ranks(drill: Drill) -> None:
    check(drill, {**DDP, "ranks": 4, "samples": 48}, [{"hook": "before_step", "step": 5, "rank": 2}], "live")


def test_live_state_after_a_window_and_again(drill: Drill) -> None:
    """One after the other: what was put in place for one recovery must not be read in the next."""
    spec = {**DDP, "ranks": 3, "samples": 60, "epochs": 5}
    hooks = ("batch_end", "before_step", "batch_end", "before_step")
    kills = [{"hook": hook, "step": 7 + 4 * n, "rank": n % 3} for n, hook in enumerate(hooks)]
    kills[3]["generation"] = 1  # the process that replaced the first one
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


def test_expert_parallel(drill: Drill) -> None:
    """Experts of the lost rank have no living copy: all go back to a window and replay it together, in each phase."""
    check(drill, {**MOETION, "epochs": 4}, phases("batch_end"), "memory")


def test_data_and_expert_parallel(drill: Drill) -> None:
    """Each expert lives on two ranks."""
    check(drill, {**MOETION, "ranks": 4, "samples": 48}, [{"hook": "before_step", "step": 5, "rank": 2}], "live")


FSDP2: dict[str, Any] = {"ranks": 2, "strategy": "fsdp2", "block": "fused"}


def test_fsdp2(drill: Drill) -> None:
    """Shards of the lost rank have no living copy: all go back to a window and replay it together, in each phase."""
    check(drill, {**FSDP2, "epochs": 4}, phases("before_step"), "memory")


def test_fsdp2_backward(drill: Drill) -> None:
    """Of the first rank."""
    check(drill, FSDP2, [{"hook": "backward", "step": 7, "rank": 0}], "memory")


def test_before_the_first_window_a_lost_shard_means_the_beginning(drill: Drill) -> None:
    """Nothing that all ranks could go back to exists yet: all processes are started again, and begin anew."""
    out, ended, pids = drill.elastic(FSDP2, [{"hook": "before_step", "step": 2, "rank": 1}], restarts=3)
    assert ended.good, f"{ended}\n{read_logs(out)}"
    assert len(pids[0]) >= 2, pids
    assert "no window was committed by all ranks" in read_logs(out)
    assert differences(drill.reference(FSDP2), out) == []


AGREEING: dict[str, Any] = {**DDP, "module": "agreeing", "callbacks": ["best"], "default_logger": True}


def test_newcomer_has_what_the_others_agreed_on_at_start(drill: Drill) -> None:
    """Each of the ranks, also before the first window, where nothing else tells it."""
    moments = [(rank, step) for step in (2, 10) for rank in (0, 1)]
    kills = in_turn(*({"hook": "backward", "step": step + rank, "rank": rank} for rank, step in moments))
    out, ended, pids = drill.elastic(AGREEING, kills)
    assert ended.good, f"{ended}\n{read_logs(out)}"
    assert [len(history) for history in pids] == [3, 3]
    reference = drill.reference(AGREEING)
    names = ("gathered", "folder", "last", "mine", "seed", "total", "parts")
    for other in (0, 1):
        here, there = (json.loads((path / f"agreed-{other}.json").read_text()) for path in (out, reference))
        assert {name: here[name] for name in names} == {name: there[name] for name in names}
        assert here["log_dir"] == str(out / "lightning_logs" / "version_0")
        assert here["dirpath"] == f"{here['log_dir']}/checkpoints"
        assert len(here["best"]) == 2
    assert [path.name for path in (out / "lightning_logs").iterdir()] == ["version_0"]
    assert differences(reference, out) == []


def test_an_expert_without_tokens_under_plain_ddp_is_named_and_nobody_waits(drill: Drill) -> None:
    spec = {**DDP, "module": "one-without-tokens", "strategy_args": {"find_unused_parameters": False}}
    out, ended, _ = drill.elastic(spec, [], restarts=0)
    assert not ended.good
    assert not ended.timed_out
    said = read_logs(out)
    assert "body.blocks.0 has experts that are modules of their own, under DDP without find_unused_parameters" in said
    assert "rank 1: no token went to expert 1 of body.blocks.0, expert 1 of body.blocks.1 in this step" in said
    assert 'use strategy="ddp_find_unused_parameters_true"' in said


@pytest.mark.parametrize(("hook", "step"), [("backward", 0), ("batch_end", 1)])
def test_a_newcomer_that_waits_for_its_first_batch_begins_there_as_the_others_do(
    drill: Drill, hook: str, step: int
) -> None:
    """No state is kept of averaged weights before the first window: the survivor ends, the newcomer lives on."""
    spec = {**DDP, "callbacks": ["ema"]}
    out, ended, pids = drill.elastic(spec, [{"hook": hook, "step": step, "rank": 1}], restarts=4)
    assert ended.good, f"{ended}\n{read_logs(out)}"
    assert [len(history) for history in pids] == [2, 2], "else it is no newcomer that others are lost to"
    assert differences(drill.reference(spec), out) == []
