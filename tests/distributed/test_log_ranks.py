"""Ranks that log gradients: whoever dies, all rebuild the newest iteration that everybody reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_node_loss import TWO_HOSTS
from tests.distributed.test_rank_kills import DDP, EXPERTS, FSDP2
from tests.runs.drill import Drill, differences, read_events, read_logs, read_steps

pytestmark = pytest.mark.slow

LOG: dict[str, Any] = {"policy": "gradient_log", "policy_args": {"window": 4}}
STAGES: dict[str, Any] = {
    "module": "decoder",
    "strategy": "moetion",
    "ranks": 2,
    "num_layers": 2,
    "batch_size": 8,
    "samples": 40,
    "pipeline": {"pipeline_parallel_size": 2, "num_microbatches": 2},
}
STRATEGIES = {"ddp": DDP, "fsdp2": FSDP2, "experts": EXPERTS, "stages": STAGES}


def _check(drill: Drill, spec: dict[str, Any], out: Path, kills: int) -> None:
    """The results are those of a job that never failed, and each death cost at most one iteration."""
    assert read_events(out, "ReplayMismatch") == []
    assert differences(drill.reference(spec), out) == []
    again = [sum(len(records) - 1 for records in read_steps(out, rank).values()) for rank in range(spec["ranks"])]
    assert max(again) <= kills, again


#: Each is the end of one group.
DEATHS: dict[str, list[dict[str, Any]]] = {
    "ddp": [
        {"hook": "backward", "step": 5, "rank": 2},
        {"hook": "validation", "step": 6, "rank": 0},
        {"event": "ManifestWritten", "fields": {"iteration": 8}, "rank": 1},
    ],
    "fsdp2": [
        {"event": "SlotSealed", "fields": {"iteration": 6}, "rank": 0},
        {"hook": "before_step", "step": 7, "rank": 1},
    ],
    "experts": [{"hook": "batch_end", "step": 7, "rank": 1}],
    "stages": [{"hook": "batch_end", "step": 8, "rank": 0}],
}


@pytest.mark.parametrize("strategy", DEATHS)
def test_a_group_that_starts_again(drill: Drill, strategy: str) -> None:
    spec, kills = {**STRATEGIES[strategy], **LOG}, DEATHS[strategy]
    out = drill.killed(spec, kills)
    rebuilt = [[e["iteration"] for e in read_events(out, "StateRebuilt", rank)] for rank in range(spec["ranks"])]
    assert len(rebuilt[0]) == len(kills)
    assert all(iterations == rebuilt[0] for iterations in rebuilt), rebuilt
    # Records are committed behind the training: a rank that dies in that has gone on by one more.
    _check(drill, spec, out, sum(2 if "event" in kill else 1 for kill in kills))


@pytest.mark.parametrize(
    ("strategy", "kills"),
    [
        ("ddp", [{"hook": "before_step", "step": 7, "rank": 1}]),
        (
            "fsdp2",
            [
                *({"hook": "backward", "step": 5, "rank": r} for r in (0, 2)),
                {"hook": "before_step", "step": 7, "rank": 1},
            ],
        ),
        ("experts", [{"hook": "batch_end", "step": 7, "rank": 0}]),
        ("stages", [{"hook": "before_step", "step": 8, "rank": 1}]),
    ],
    ids=["ddp", "fsdp2-two-at-once-and-one-after-them", "experts", "stages"],
)
def test_ranks_that_are_replaced(drill: Drill, strategy: str, kills: list[dict[str, Any]]) -> None:
    """The others live on in their processes, and rebuild in memory."""
    spec = {**STRATEGIES[strategy], **LOG}
    out, ended, pids = drill.elastic(spec, kills)
    assert ended.good, f"{ended}\n{read_logs(out)}"
    killed = [kill["rank"] for kill in kills]
    assert [len(history) for history in pids] == [1 + killed.count(rank) for rank in range(spec["ranks"])]
    _check(drill, spec, out, len(kills))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_host_is_lost_with_its_memory(drill: Drill, strategy: str) -> None:
    """Its rank rebuilds from copies in the memory of the other host, which may be one iteration behind."""
    spec = {**TWO_HOSTS, "strategy": strategy, **LOG}
    out, ended, _ = drill.elastic(spec, [{"hook": "before_step", "step": 7, "rank": 1}])
    assert ended.good, f"{ended}\n{read_logs(out)}"
    assert ended.failed == [1]
    assert [e["tier"] for e in read_events(out, "RestoreStarted", 1)] == ["memory of a peer"]
    _check(drill, spec, out, 2)


def test_what_all_ranks_have_stays_while_one_of_them_fails(drill: Drill) -> None:
    """One rank's memory is full: the others go on, and keep the restore point that all have."""
    spec = {**STRATEGIES["experts"], **LOG, "break": "log_full"}
    out = drill.killed(spec, [{"hook": "batch_end", "step": 8, "rank": 0}], **{"break": ""})
    rebuilt = [[e["iteration"] for e in read_events(out, "StateRebuilt", rank)] for rank in range(2)]
    assert rebuilt == [[3], [3]]
    assert differences(drill.reference(spec), out) == []
