"""The numbers of a job that is killed again and again, against what its processes left in their events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moetion_lightning import report
from moetion_lightning.badput import CAUSES, NANOSECONDS, Ledger, Use
from moetion_lightning.events import IterationFinished, ProcessStarted
from tests.runs import monitored
from tests.runs.drill import Drill, differences, read_events, read_logs

# 30 iterations, W = 4; captures that begin late, so that training waits for some of them.
SPEC: dict[str, Any] = {"block": "fused", "samples": 40, "callbacks": ["monitor"], "slow_sink": "CaptureStarted"}
KILLS = [
    {"hook": "backward", "step": 11},
    {"event": "ReplayIteration", "count": 2},  # in the replay of the first kill
    {"hook": "batch_end", "step": 21},
]
PARTIAL = {"num_experts_per_checkpoint": 1, "every_n_steps": 2, "plt_limit": None}


def surviving(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The execution of each iteration that the final state contains: the last one."""
    last = {event["iteration"]: event for event in events if event["event"] == "IterationFinished"}
    return [last[iteration] for iteration in sorted(last)]


def told(out: Path, rank: int | None = None) -> Ledger:
    """The account of a rank as its events tell it, up to the last iteration that a next one ends."""
    records = [record for record in report.read_events(out) if record.rank == (rank or 0)]
    first = records[0].event
    assert isinstance(first, ProcessStarted)
    last = max(index for index, record in enumerate(records) if isinstance(record.event, IterationFinished))
    ledger = Ledger(round(first.created_at * NANOSECONDS))
    for record in records[: last + 1]:
        ledger.add(record.event, round(record.time * NANOSECONDS))
    return ledger


def check_times(out: Path, rank: int | None = None) -> dict[str, Any]:
    """What the monitor of one rank counted is what the events say.

    Sums of the same numbers in the same order are equal. Times of day of two clocks that are read one after the other
    are not: 50 ms for all of them together.
    """
    last = monitored.read(out, rank)[-1]
    iterations = surviving(read_events(out, rank=rank))
    assert [event["iteration"] for event in iterations] == list(range(1, last["num_iterations"] + 1))
    assert last["iteration_seconds"] == sum(event["seconds"] for event in iterations)
    assert last["stall_seconds"] == sum(event["stall_seconds"] for event in iterations) > 0
    counted, expected = Ledger.load(last["ledger"]), told(out, rank)
    assert counted.wall == sum(counted.totals.values())
    for use in Use:
        mine, theirs = counted.totals[use] / NANOSECONDS, expected.totals[use] / NANOSECONDS
        assert mine == pytest.approx(theirs, abs=0.05), use
    return last


def test_three_kills_are_in_the_numbers(drill: Drill) -> None:
    out = drill.killed(SPEC, KILLS)
    assert differences(drill.reference({**SPEC, "callbacks": []}), out) == []
    assert len({event["pid"] for event in read_events(out)}) == 4
    last = check_times(out)
    assert last["num_iterations"] == 29  # the last one has no next one that would end it
    values = last["values"]
    badput = {use: values[f"moetion/badput/{use.value}_seconds"] for use in CAUSES}
    wall = values["moetion/wall_seconds"]
    assert wall == pytest.approx(values["moetion/productive_seconds"] + sum(badput.values()))
    assert values["moetion/ettr"] == pytest.approx(values["moetion/productive_seconds"] / wall)
    lost = sum(seconds for use, seconds in badput.items() if use not in (Use.STALL, Use.VALIDATION))
    assert values["moetion/lost_seconds"] == pytest.approx(lost)
    assert values["moetion/stall_seconds_per_iteration"] == last["stall_seconds"] / 29
    assert values["moetion/stall_share"] == last["stall_seconds"] / last["iteration_seconds"]
    assert values["moetion/plt"] == 0
    # Three times a process was started anew, replayed, and did again what had come after its window.
    assert min(badput[use] for use in (Use.START, Use.RESTORE, Use.REPLAY, Use.REDO)) > 0
    events = read_events(out, "IterationFinished")
    executions = sum(event["seconds"] for event in events)
    again = executions - sum(first["seconds"] for first in {e["iteration"]: e for e in reversed(events)}.values())
    # Iterations that were never finished are in no event.
    assert badput[Use.REPLAY] + badput[Use.REDO] > again - 0.05
    assert [event["iteration"] for event in read_events(out, "LastIterationFinished")] == [30]
    losses = {event["iteration"]: event["loss"] for event in read_events(out, "LossRecorded")}
    assert sorted(losses) == list(range(1, 31))
    assert [event["completed"] for event in read_events(out, "ProcessEnded")] == [True]


def test_tokens_are_those_of_a_run_that_never_failed(drill: Drill) -> None:
    """Tokens are summed where a window may begin: in windows of one iteration, after each."""
    whole, killed = drill.killed({**SPEC, "policy_args": {"window": 1}}, []), drill.killed(SPEC, KILLS)
    counted = read_events(killed, "TokensCounted")[-1]["iteration"]
    assert counted > 21
    mine, theirs = monitored.read(killed)[-1], monitored.read(whole)[counted + 1]
    assert theirs["num_iterations"] == counted
    assert mine["tokens"] == theirs["tokens"]
    assert len(mine["tokens"]) == 2
    for row in mine["tokens"].values():
        assert sum(row) == 2 * 4 * counted  # top-2 of four samples
    assert mine["values"]["moetion/expert_imbalance"] == theirs["values"]["moetion/expert_imbalance"]
    assert mine["values"]["moetion/expert_imbalance"] == max(
        max(row) * len(row) / sum(row) for row in mine["tokens"].values()
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_lost_tokens_are_those_of_the_engine(drill: Drill, ranks: int) -> None:
    spec = {**SPEC, "policy": "partial", "policy_args": PARTIAL, "ranks": ranks, "samples": 40 * ranks}
    kills = [{"hook": "backward", "step": step} for step in (8, 13, 21)]
    out = drill.killed(spec, kills)
    for rank in [None] if ranks == 1 else range(ranks):
        records = [record for record in monitored.read(out, rank) if record.get("tokens")]
        last = records[-1]
        assert last["engine"]["plt"] == last["values"]["moetion/plt"] > 0
        for record in records:  # after each batch, in each process
            assert record["lost_tokens"] == record["engine"]["lost"]
            assert [sum(row) for row in record["tokens"].values()] == record["engine"]["total"]
        reports = read_events(out, "PartialExpertsRestored", rank)
        assert len(reports) == 3
        assert all(sum(report["lost_by_layer"].values()) == report["lost_tokens"] for report in reports)
        assert last["lost_tokens"] == [sum(r["lost_by_layer"][name] for r in reports) for name in last["tokens"]]


@pytest.mark.slow
def test_ranks_log_the_mean_over_ranks(drill: Drill) -> None:
    spec = {**SPEC, "ranks": 2, "samples": 80}
    out = drill.killed({**spec, "busy": {"1": 0.05}}, KILLS)
    assert differences(drill.reference({**spec, "callbacks": []}), out) == []
    first, second = (check_times(out, rank) for rank in range(2))
    ledgers = [Ledger.load(record["ledger"]) for record in (first, second)]
    productive = sum(ledger.totals[Use.PRODUCTIVE] for ledger in ledgers)
    for record in (first, second):
        assert record["values"]["moetion/ettr"] == pytest.approx(productive / sum(ledger.wall for ledger in ledgers))
        stalled = first["stall_seconds"] + second["stall_seconds"]
        assert record["values"]["moetion/stall_seconds_per_iteration"] == stalled / 58
        assert record["values"]["moetion/slowest_rank"] == 1
        assert record["values"]["moetion/slowest_over_median"] > 1.5
    assert "rank 1 is slow: " in read_logs(out)
    assert "rank 0 is slow" not in read_logs(out)
    assert first["tokens"] == second["tokens"]
    counted = read_events(out, "TokensCounted", rank=0)[-1]["iteration"]
    assert all(sum(row) == 2 * 2 * 4 * counted for row in first["tokens"].values())


@pytest.mark.slow
def test_a_replaced_rank_counts_on_with_the_others(drill: Drill) -> None:
    """The others live on; the new process takes their count."""
    spec = {**SPEC, "ranks": 2, "samples": 80}
    out, ended, pids = drill.elastic(spec, [{"hook": "backward", "step": 11, "rank": 1}])
    assert ended.good, f"{ended}\n{read_logs(out)}"
    assert [len(history) for history in pids] == [1, 2]
    first, second = (monitored.read(out, rank)[-1] for rank in range(2))
    assert first["num_iterations"] == second["num_iterations"] == 29
    assert first["values"]["moetion/ettr"] == second["values"]["moetion/ettr"]
    assert first["tokens"] == second["tokens"]
    dead, living = (pids[1][0], pids[0][0])
    died = max(event["time"] for event in read_events(out, rank=1) if event["pid"] == dead)
    resumed = [e for e in read_events(out, "IterationFinished", rank=0) if e["pid"] == living and e["time"] > died]
    without_training = resumed[0]["time"] - resumed[0]["seconds"] - died
    assert first["values"]["moetion/lost_seconds"] > without_training
    survivor, replaced = (Ledger.load(record["ledger"]).totals for record in (first, second))
    assert min(survivor[Use.DETECTION], survivor[Use.GROUPS], replaced[Use.GROUPS], replaced[Use.START]) > 0
    assert survivor[Use.START] > 0  # it waited for the other one
