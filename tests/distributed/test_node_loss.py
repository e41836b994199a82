"""Whole hosts are lost, with all their processes and their memory; ranks on a spare host take over, and all results are
those of a job that never failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events, read_logs

pytestmark = pytest.mark.slow

TWO_HOSTS: dict[str, Any] = {
    "ranks": 2, "samples": 48, "strategy": "ddp", "hosts": ["a", "b"], "policy_args": {"window": 3},
}  # fmt: skip
THREE_HOSTS: dict[str, Any] = {**TWO_HOSTS, "ranks": 3, "samples": 72, "hosts": ["a", "b", "c"]}
PAIRS: dict[str, Any] = {**TWO_HOSTS, "ranks": 4, "samples": 96, "hosts": ["a", "a", "b", "b"]}
#: A window begins only when all ranks' last one is safe: with the second one, each rank's first one is.
REPLICATED: dict[str, Any] = {"event": "WindowReplicated", "count": 2}


def run(drill: Drill, spec: dict[str, Any], *kills: dict[str, Any]) -> tuple[Path, list[int]]:
    """A job whose hosts die as asked and that ends as one that never failed. Returns the replaced ranks, too."""
    out, ended, _ = drill.elastic(spec, list(kills))
    assert ended.good, f"{ended}\n{read_logs(out)}"
    assert "Timed out waiting" not in read_logs(out), "a rank that had left still held its connections open"
    assert differences(drill.reference(spec), out) == []
    return out, ended.failed


def origins(out: Path, rank: int) -> list[str]:
    """Where each process of a rank that restored anything had it from, in order."""
    return [event["tier"] for event in read_events(out, "RestoreStarted", rank)]


def check_loss(drill: Drill, spec: dict[str, Any], rank: int, lost: list[int]) -> None:
    out, replaced = run(drill, spec, {**REPLICATED, "rank": rank})
    assert replaced == lost
    for each in range(spec["ranks"]):
        assert origins(out, each) == ["memory of a peer" if each in lost else "host memory"], each


def test_ddp(drill: Drill) -> None:
    """The host of the last ranks; below, that of the first ones is lost."""
    check_loss(drill, PAIRS, 3, [2, 3])


def test_fsdp2(drill: Drill) -> None:
    check_loss(drill, {**TWO_HOSTS, "strategy": "fsdp2"}, 0, [0])


@pytest.mark.parametrize(("hosts", "lost"), [("aabb", [0, 1]), ("abab", [0, 2])])
def test_expert_parallel(drill: Drill, hosts: str, lost: list[int]) -> None:
    """Ranks 0, 1 and 2, 3 share the experts: within a host, and across hosts."""
    check_loss(drill, {**PAIRS, "strategy": "moetion", "expert_parallel_size": 2, "hosts": [*hosts]}, 0, lost)


def test_last_window_was_not_copied_yet(drill: Drill) -> None:
    out, replaced = run(drill, TWO_HOSTS, {"event": "WindowCommitted", "count": 3, "rank": 0})
    assert replaced == [0]
    committed = [e["last_iteration"] for e in read_events(out, "WindowCommitted", 0)][:2]
    restored = [e["last_iteration"] for rank in (0, 1) for e in read_events(out, "RestoreStarted", rank)]
    assert restored == [committed[1]] * 2


@pytest.mark.parametrize("kill", [{"transfer": "sending", "count": 3}, {"transfer": "receiving", "count": 11}])
def test_in_the_middle_of_a_copy(drill: Drill, kill: dict[str, Any]) -> None:
    """Of the third windows, on the host of an owner or of a holder: all first ones are safe (of 5 and of 4 files)."""
    _, replaced = run(drill, TWO_HOSTS, {**kill, "rank": 1})
    assert replaced == [1]


def test_loss_of_a_holder_and_then_of_what_it_held(drill: Drill) -> None:
    """Rank 0 has its copies on b; when b is lost they go to the spare host, and when a is lost they come from there."""
    again = {**REPLICATED, "fields": {"owner": 2}, "after": "RestoreApplied", "rank": 0}
    out, replaced = run(drill, THREE_HOSTS, {**REPLICATED, "rank": 1}, again)
    assert replaced == [1, 0]
    assert origins(out, 0) == ["host memory", "memory of a peer"]
    assert [origins(out, rank)[0] for rank in (1, 2)] == ["memory of a peer", "host memory"]


# --- a second loss while the first one is recovered -----------------------------------------------------------------


def test_newcomers_are_lost_too(drill: Drill) -> None:
    deaths = [REPLICATED, {"event": "RestoreStarted"}, {"event": "RestoreApplied"}]
    kills = [{**death, "rank": 1, "generation": generation} for generation, death in enumerate(deaths)]
    _, replaced = run(drill, THREE_HOSTS, *kills)
    assert replaced == [1, 1, 1]


@pytest.mark.parametrize(("event", "rank"), [("RestoreStarted", 2), ("RestoreApplied", 0)])
def test_survivor_is_lost_too(drill: Drill, event: str, rank: int) -> None:
    """Rank 2 holds the copies of the lost rank 1, rank 1 held those of rank 0."""
    _, replaced = run(drill, THREE_HOSTS, {**REPLICATED, "rank": 1}, {"event": event, "rank": rank})
    assert replaced == [1, rank]


def failed(drill: Drill, spec: dict[str, Any], *kills: dict[str, Any]) -> list[str]:
    """A job that cannot go on: every rank ends by an error of its own. Returns the last lines of their logs."""
    out, ended, _ = drill.elastic(spec, list(kills))
    assert not ended.timed_out, read_logs(out)
    assert ended.codes == [1] * spec["ranks"], f"{ended}\n{read_logs(out)}"
    return [(out / f"log-{rank}").read_text().strip().splitlines()[-1] for rank in range(spec["ranks"])]


def test_only_holder_is_lost_while_it_serves_the_copy(drill: Drill) -> None:
    """Rank 2 held the windows of rank 1: both are gone."""
    lines = failed(drill, THREE_HOSTS, {**REPLICATED, "rank": 1}, {"transfer": "serving", "rank": 2, "owner": 1})
    for line in lines:
        assert "StateLostError: The job cannot continue: the state of rank 1 is lost" in line
        assert "Newest whole window of the others: ranks 0, 2: iterations " in line


def test_one_of_two_holders_is_lost_while_it_serves_the_copy(drill: Drill) -> None:
    spec = {**THREE_HOSTS, "engine_args": {"replicas": 2}}
    twice = {**REPLICATED, "count": 4}  # each window is copied to two
    out, ended, _ = drill.elastic(spec, [{**twice, "rank": 1}, {"transfer": "serving", "rank": 0}])
    assert ended.good, read_logs(out)
    assert differences(drill.reference(spec), out) == []


# --- a slow network ---------------------------------------------------------------------------------------------------


def test_slow_holder_delays_windows_but_no_iteration_and_fills_no_memory(drill: Drill) -> None:
    spec = {**TWO_HOSTS, "epochs": 6, "slow_sink": "IterationFinished", "slow_holders": {"1": 0.1}}
    out, replaced = run(drill, {**spec, "count_windows": True}, {**REPLICATED, "rank": 0})
    assert replaced == [0]
    counts = [json.loads(line) for rank in (0, 1) for line in (out / f"windows-{rank}.jsonl").read_text().splitlines()]
    assert max(count["own"] for count in counts) == 2
    assert 1 <= max(max(count["held"], default=0) for count in counts) <= 3
    events = [event["event"] for event in read_events(out, None, 0)]
    events = events[events.index("WindowCommitted") :]
    waited = events[: events.index("CaptureStarted")]
    assert waited.count("IterationFinished") >= 2, "no window began before the last one was safe"


# --- everything is lost -----------------------------------------------------------------------------------------------


def test_all_hosts_at_once_with_storage(drill: Drill) -> None:
    spec = {**TWO_HOSTS, "persist": True}
    out, replaced = run(drill, spec, {"event": "WindowPersisted", "count": 2, "rank": 0, "with_hosts": ["b"]})
    assert replaced == [0, 1]
    assert [origins(out, rank) for rank in (0, 1)] == [["disk"], ["disk"]]


def test_all_hosts_at_once_without_storage(drill: Drill) -> None:
    lines = failed(drill, TWO_HOSTS, {**REPLICATED, "rank": 0, "with_hosts": ["b"]})
    for line in lines:
        assert "StateLostError: The job cannot continue: the state of all 2 ranks is lost" in line
        assert "The newest window that all ranks had committed ended with iteration " in line


def test_without_copies(drill: Drill) -> None:
    spec = {**TWO_HOSTS, "engine_args": {"replicas": 0}}
    lines = failed(drill, spec, {"event": "WindowCommitted", "count": 2, "rank": 0})
    for line in lines:
        assert "StateLostError: The job cannot continue: the state of rank 0 is lost" in line
        assert "Newest whole window of the others: rank 1: iterations " in line
        assert "keep copies on other nodes (replicas=1 or more)" in line
