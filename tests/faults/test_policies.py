"""The three policies on the same run: sparse and dense are exact, partial experts says what it lost."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events

SPEC: dict[str, Any] = {"block": "fused", "samples": 40}
KILLS = [{"hook": "backward", "step": 10}, {"event": "RestoreProgress", "count": 2}, {"hook": "backward", "step": 21}]


@pytest.mark.parametrize("every", [1, 3])
def test_dense_in_memory_is_exact(drill: Drill, every: int) -> None:
    spec = {**SPEC, "policy": "dense", "policy_args": {"every_n_steps": every}}
    killed = drill.killed(spec, KILLS)
    assert differences(drill.reference(spec), killed) == []
    assert {event["replay"] for event in read_events(killed, "RestoreApplied")} == {0}


@pytest.mark.parametrize("selection", ["sequential", "load_aware"])
def test_partial_experts_reports_what_is_stale(drill: Drill, selection: str) -> None:
    args = {"num_experts_per_checkpoint": 1, "selection": selection, "every_n_steps": 2, "plt_limit": None}
    spec = {**SPEC, "policy": "partial", "policy_args": args}
    killed = drill.killed(spec, [{"hook": "backward", "step": 13}, {"hook": "backward", "step": 21}])
    reports = read_events(killed, "PartialExpertsRestored")
    assert len(reports) == 2
    for report in reports:
        # Two layers of four experts; one of each is in the newest checkpoint, the others are older by its interval.
        assert len(report["stale"]) == 6
        assert all(behind % 2 == 0 and behind > 0 for behind in report["stale"].values())
        assert report["lost_tokens"] > 0
        assert 0 < report["plt"] < 1
    assert reports[1]["plt"] > 0
    if selection == "sequential":
        assert max(reports[0]["stale"].values()) <= 2 * 3
    # Lossy: it must not be equal, and it must not claim to be.
    assert differences(drill.reference(spec), killed) != []


def test_all_experts_per_checkpoint_is_exact(drill: Drill) -> None:
    spec = {**SPEC, "policy": "partial", "policy_args": {"num_experts_per_checkpoint": 4, "every_n_steps": 2}}
    killed = drill.killed(spec, [{"hook": "backward", "step": 13}, {"hook": "backward", "step": 21}])
    assert differences(drill.reference(spec), killed) == []
    assert {event["lost_tokens"] for event in read_events(killed, "PartialExpertsRestored")} == {0}


def test_dynamic_k_doubles_after_a_costly_restore(drill: Drill) -> None:
    args = {"num_experts_per_checkpoint": 1, "every_n_steps": 4, "plt_limit": 0.001}
    spec = {**SPEC, "policy": "partial", "policy_args": args}
    killed = drill.killed(spec, [{"hook": "backward", "step": 17}])
    assert "2 experts per checkpoint from now on" in (killed / "log").read_text()


def test_sparse_captures_fewer_bytes_than_dense_and_partial_fewer_still(drill: Drill) -> None:
    policies: dict[str, dict[str, Any]] = {
        "sparse": {"window": 4},
        "dense": {"every_n_steps": 1},
        "partial": {"num_experts_per_checkpoint": 1},
    }
    mean: dict[str, float] = {}
    for policy, args in policies.items():
        spec = {**SPEC, "policy": policy, "policy_args": args, "precision": "bf16-mixed"}
        events = read_events(drill.killed(spec, []), "CaptureFinished")[8:]
        mean[policy] = sum(event["nbytes"] for event in events) / len(events)
    assert mean["sparse"] < 0.6 * mean["dense"]
    assert mean["partial"] < mean["dense"]
