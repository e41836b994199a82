"""A rank dies by SIGKILL, the whole group starts again (as under torchrun), and nothing of it shows in any result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events

pytestmark = pytest.mark.slow

#: Three ranks: the order of summation depends on the layout of the gradient buckets, which fused blocks rebuild.
DDP: dict[str, Any] = {"ranks": 3, "strategy": "ddp", "samples": 36, "block": "fused"}
#: The third rank's shard of each fused parameter is empty.
FSDP2: dict[str, Any] = {"ranks": 3, "strategy": "fsdp2", "samples": 36, "block": "fused"}
#: Two ranks that share the experts; the rest is replicated.
EXPERTS: dict[str, Any] = {
    "ranks": 2,
    "strategy": "moetion",
    "expert_parallel_size": 2,
    "samples": 24,
    "block": "fused",
}
STRATEGIES = {"ddp": DDP, "fsdp2": FSDP2, "experts": EXPERTS}

LATE = {"hook": "before_step", "step": 7}
COMMITTED = {"event": "ManifestWritten", "count": 4}


def check(drill: Drill, spec: dict[str, Any], kills: list[dict[str, Any]]) -> Path:
    """Every start after the first one restored the same window on every rank; all results are the reference's."""
    killed = drill.killed(spec, kills)
    restored = [
        [event["iteration"] for event in read_events(killed, "RestoreApplied", rank)] for rank in range(spec["ranks"])
    ]
    assert len(restored[0]) == len(kills)
    assert all(iterations == restored[0] for iterations in restored), restored
    assert {event["tier"] for event in read_events(killed, "RestoreStarted")} == {"host memory"}
    assert read_events(killed, "ReplayMismatch") == []
    assert differences(drill.reference(spec), killed) == []
    return killed


#: Each is the end of one group. The first window ends at 4; whoever restores it begins the next one there, to end at 7.
PHASES: dict[str, list[dict[str, Any]]] = {
    "ddp": [
        {"hook": "backward", "step": 5, "rank": 2},
        {"hook": "validation", "step": 6, "rank": 1},
        {"event": "CaptureFinished", "count": 2, "rank": 0},
        {"event": "ManifestWritten", "count": 1, "rank": 1},
        {"event": "ManifestWritten", "count": 2, "rank": 2},
        {**LATE, "rank": 0},
    ],
    "fsdp2": [
        {**LATE, "rank": 1},
        {"event": "CaptureStarted", "count": 3, "rank": 0},
        {"event": "ManifestWritten", "count": 2, "rank": 2},
    ],
    "experts": [
        {"hook": "batch_end", "step": 7, "rank": 1},
        {"event": "SlotSealed", "count": 4, "rank": 1},
        {"event": "ManifestWritten", "count": 2, "rank": 0},
    ],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_death_in_any_phase_changes_nothing(drill: Drill, strategy: str) -> None:
    check(drill, STRATEGIES[strategy], PHASES[strategy])


@pytest.mark.parametrize(
    ("strategy", "second"),
    [
        ("ddp", {"event": "RestoreApplied", "rank": 1}),
        ("fsdp2", {"event": "ReplayIteration", "count": 2, "rank": 2}),
        ("experts", {"event": "ReplayIteration", "count": 2, "rank": 0}),
    ],
    ids=["ddp-RestoreApplied", "fsdp2-ReplayIteration", "experts-ReplayIteration"],
)
def test_a_second_death_while_restoring_changes_nothing(drill: Drill, strategy: str, second: dict[str, Any]) -> None:
    spec = STRATEGIES[strategy]
    killed = drill.killed(spec, [{**LATE, "rank": 0}, second])
    # The rank that died in the middle may have been faster than the others.
    for rank in range(spec["ranks"]):
        assert len(read_events(killed, "RestoreStarted", rank)) == 2
        assert {event["iteration"] for event in read_events(killed, "RestoreApplied", rank)} == {1}
    assert differences(drill.reference(spec), killed) == []


def test_four_ranks(drill: Drill) -> None:
    """Data parallel times expert parallel: names of parameters stand for two shards, each on two ranks."""
    check(drill, {**EXPERTS, "ranks": 4, "samples": 48}, [{**LATE, "rank": 3}])


VARIANTS: dict[str, dict[str, Any]] = {
    "ddp-accumulate-ragged-bf16": {**DDP, "accumulate": 3, "samples": 84, "precision": "bf16-mixed"},
    "ddp-list-manual": {**DDP, "block": "list", "manual": True, "kill_after_window": True},
    "ddp-dense-after-validation": {**DDP, "policy": "dense", "policy_args": {"every_n_steps": 3}},
    "ddp-every-rank-captures-all": {**DDP, "engine_args": {"sharding": "none"}},
    "fsdp2-list-no-clipping": {**FSDP2, "block": "list", "clip": None},
    "experts-sgd-workers": {**EXPERTS, "optimizer": "sgd", "loader": "workers"},
    "experts-dense": {**EXPERTS, "policy": "dense", "policy_args": {}},
}


@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS)
def test_variants(drill: Drill, spec: dict[str, Any]) -> None:
    spec = dict(spec)
    kill = COMMITTED if spec.pop("kill_after_window", False) else LATE
    check(drill, spec, [{**kill, "rank": 1}])


@pytest.mark.parametrize("what", ["buckets", "rng_of_another_rank"])
def test_a_part_left_out_is_noticed(drill: Drill, what: str) -> None:
    """Negative controls: the comparison is as sharp as it claims."""
    killed = drill.killed(DDP, [{**LATE, "rank": 1}], **{"break": what})
    assert len(read_events(killed, "RestoreApplied")) == DDP["ranks"]
    assert differences(drill.reference(DDP), killed) != []
    assert read_events(killed, "ReplayMismatch") != []


def test_a_rank_that_reads_its_own_share_alone_is_refused(drill: Drill) -> None:
    with pytest.raises(AssertionError, match=r"StateLostError: .*the windows of the ranks 0, 2, which hold the rest"):
        drill.killed(DDP, [{**LATE, "rank": 1}], **{"break": "share"})


def test_ranks_that_restore_different_windows_stop(drill: Drill) -> None:
    """Training never goes on from a mixed state."""
    # When the third window of four slots begins, all ranks have the two before it.
    kill = {"event": "CaptureStarted", "count": 9, "rank": 0}
    # Seen first in whatever the ranks do together first: the plan of a window, or a sum of tensors of different sizes.
    with pytest.raises(AssertionError, match=r"Ended\(codes=\[[^\]]*-?[1-9]"):
        drill.killed({**DDP, "epochs": 6, "break": "keep_older"}, [kill], **{"break": "window"})
