"""Optimizers of every kind are restored exactly: inside each other, several over one parameter, with any state."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events
from tests.runs.optimizers import MADE

KILL = {"hook": "backward", "step": 10}
#: Of a run that is killed and compared.
TWO_EPOCHS = {"epochs": 2}

SPARSE: dict[str, dict[str, Any]] = {
    **{name: {"module": "with_optimizer", "optimizer": name, "clip": 0} for name in MADE},
    "two-step": {"module": "two_step", "clip": 0},
    "in-turn": {"module": "in_turn", "clip": 0},
    "one-after-the-other": {"module": "one_after_the_other", "clip": 0},
    "quantised-frozen": {"module": "quantised_frozen"},
    "sparse-gradients": {"module": "sparse_gradients", "clip": 0},
}
#: W = 1 and dense: nothing is replayed, so that nothing would notice.
UNNOTICED: dict[str, dict[str, Any]] = {
    name: {**SPARSE[name], **TWO_EPOCHS, "policy_args": {"window": 1}}
    for name in ("sharpness_aware", "in-turn", "projecting")
}
DENSE = {**SPARSE["in-turn"], **TWO_EPOCHS, "policy": "dense", "policy_args": {}}


@pytest.mark.parametrize("name", SPARSE)
def test_killed_run_ends_bitwise_equal(drill: Drill, name: str) -> None:
    spec = {**SPARSE[name], **TWO_EPOCHS}
    killed = drill.killed(spec, [KILL])
    assert differences(drill.reference(spec), killed) == []
    (finished,) = read_events(killed, "ReplayFinished")
    assert finished["verified"]


@pytest.mark.parametrize("spec", [*UNNOTICED.values(), DENSE], ids=[*UNNOTICED, "dense"])
def test_killed_run_without_a_replay_ends_bitwise_equal(drill: Drill, spec: dict[str, Any]) -> None:
    killed = drill.killed(spec, [KILL])
    assert read_events(killed, "RestoreApplied")
    assert differences(drill.reference(spec), killed) == []


@pytest.mark.parametrize("name", ["sharpness_aware", "in-turn"])
def test_negative_control_without_the_second_optimizer(drill: Drill, name: str) -> None:
    killed = drill.killed(UNNOTICED[name], [KILL], **{"break": "one_optimizer"})
    assert read_events(killed, "RestoreApplied")
    assert differences(drill.reference(UNNOTICED[name]), killed) != []


@pytest.mark.parametrize("name", ["counting", "in-turn", "sharpness_aware", "preconditioned"])
def test_windows_stay_sparse(drill: Drill, name: str) -> None:
    out = drill.killed(SPARSE[name], [])
    assert [e["last_iteration"] - e["first_iteration"] for e in read_events(out, "WindowCommitted")] == [3] * 5


@pytest.mark.parametrize("name", ["lookahead_lists", "schedule_free", "one-after-the-other"])
def test_what_no_sparse_window_can_hold_is_captured_whole(drill: Drill, name: str) -> None:
    out = drill.killed(SPARSE[name], [])
    assert any("dense now" in event["message"] for event in read_events(out, "Notice"))
    committed = read_events(out, "WindowCommitted")
    assert len(committed) > 10
    assert all(event["first_iteration"] == event["last_iteration"] for event in committed)
