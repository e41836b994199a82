"""SIGKILL at every iteration of a window and in every phase of capture, commit, restore and replay."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events

# 20 iterations in two epochs, W = 4.
SPEC: dict[str, Any] = {"block": "fused", "precision": "bf16-mixed", "samples": 40, "epochs": 2}
LIST: dict[str, Any] = {"block": "list", "samples": 40, "epochs": 2}
#: 30 iterations.
LONG: dict[str, Any] = {**SPEC, "epochs": 3}

HOOKS = ("backward", "before_step", "batch_end")
STEPS = (0, 1, 4, 5, 6, 7, 8, 9, 10, 13, 18)
#: One whole window in each place of the training step; before and after it the places take turns.
TURNS = [(HOOKS[turn % 3], step) for turn, step in enumerate(STEPS)]
WINDOW = [(hook, step) for step in (5, 6, 7, 8) for hook in HOOKS]
MOMENTS = [
    *(pytest.param(SPEC, *moment, id=f"fused-bf16-{moment[0]}-{moment[1]}") for moment in sorted({*TURNS, *WINDOW})),
    *(pytest.param(LIST, *moment, id=f"list-fp32-{moment[0]}-{moment[1]}") for moment in TURNS),
]


@pytest.mark.parametrize(("spec", "hook", "step"), MOMENTS)
def test_killed_at_each_iteration(drill: Drill, spec: dict[str, Any], hook: str, step: int) -> None:
    killed = drill.killed(spec, [{"hook": hook, "step": step}])
    assert differences(drill.reference(spec), killed) == []


PHASES: dict[str, list[dict[str, Any]]] = {
    "before-first-window": [{"event": "CaptureStarted", "copies": 1, "fields": {"iteration": 1}}],
    "first-window-unsealed": [{"event": "SlotSealed", "fields": {"iteration": 3}}],
    "capture-begins": [{"event": "CaptureStarted", "fields": {"iteration": 10}}],
    "mid-capture": [{"event": "CaptureStarted", "copies": 3, "fields": {"iteration": 10}}],
    "captured-not-sealed": [{"event": "CaptureFinished", "fields": {"iteration": 11}}],
    "sealed-no-manifest": [{"event": "SlotSealed", "fields": {"iteration": 12}}],
    "manifest-temporary": [{"event": "ManifestWritten", "fields": {"iteration": 12, "committed": False}}],
    "manifest-committed": [{"event": "ManifestWritten", "fields": {"iteration": 12, "committed": True}}],
    "old-window-dropped": [{"event": "WindowCommitted", "fields": {"last_iteration": 12}}],
    "restore-found": [{"hook": "backward", "step": 11}, {"event": "RestoreStarted"}],
    "mid-restore": [{"hook": "backward", "step": 11}, {"event": "RestoreStarted", "copies": 3}],
    "restored": [{"hook": "backward", "step": 11}, {"event": "RestoreApplied"}],
    "replay-1": [{"hook": "backward", "step": 11}, {"event": "ReplayIteration", "count": 1}],
    "replay-2": [{"hook": "backward", "step": 11}, {"event": "ReplayIteration", "count": 2}],
    "replay-3": [{"hook": "backward", "step": 11}, {"event": "ReplayIteration", "count": 3}],
    "replay-done": [{"hook": "backward", "step": 11}, {"event": "ReplayFinished"}],
    "in-replayed-backward": [{"hook": "backward", "step": 11}, {"hook": "backward", "step": 6}],
    "first-capture-after-replay": [
        {"hook": "backward", "step": 11},
        {"event": "CaptureStarted", "copies": 2, "fields": {"iteration": 8}},
    ],
    "validation": [{"hook": "validation", "step": 10}],
}


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_each_phase(drill: Drill, phase: str) -> None:
    killed = drill.killed(SPEC, PHASES[phase])
    assert differences(drill.reference(SPEC), killed) == []


def test_ten_kills_in_one_run(drill: Drill) -> None:
    kills: list[dict[str, Any]] = [
        {"hook": "backward", "step": 2},
        {"event": "SlotSealed", "fields": {"iteration": 4}},
        {"hook": "backward", "step": 7},
        {"event": "ReplayIteration", "count": 1},
        {"hook": "before_step", "step": 10},
        {"event": "CaptureStarted", "copies": 1, "fields": {"iteration": 13}},
        {"event": "RestoreStarted", "copies": 2},
        {"hook": "batch_end", "step": 19},
        {"event": "ManifestWritten", "fields": {"iteration": 24, "committed": False}},
        {"hook": "backward", "step": 28},
    ]
    killed = drill.killed(LONG, kills)
    assert differences(drill.reference(LONG), killed) == []
    assert len({event["pid"] for event in read_events(killed)}) == 11


@pytest.mark.parametrize("window", [1, 2, 7, "auto"])
def test_window_sizes(drill: Drill, window: Any) -> None:
    spec = {**LONG, "policy_args": {"window": window}}
    killed = drill.killed(spec, [{"hook": "backward", "step": 17}, {"hook": "backward", "step": 23}])
    assert differences(drill.reference(spec), killed) == []


@pytest.mark.parametrize("step", range(10, 14))
def test_at_most_two_windows_are_done_again(drill: Drill, step: int) -> None:
    """Of windows that are committed within two iterations after their last one."""
    kill = {"hook": "before_step", "step": step, "committed": {"last_iteration": (step - 2) // 4 * 4}}
    killed = drill.killed(SPEC, [kill])
    restored = read_events(killed, "RestoreApplied")
    assert step - restored[0]["iteration"] <= 2 * 4


@pytest.mark.parametrize(("block", "clip"), [("list", 0.5), ("fused", 0.5), ("fused", 0), ("dense", 0)])
def test_skipping_frozen_gradients_is_exact(drill: Drill, block: str, clip: float) -> None:
    spec = {**LIST, "block": block, "clip": clip, "policy_args": {"window": 4, "skip_frozen_gradients": True}}
    killed = drill.killed(spec, [{"hook": "backward", "step": 11}, {"event": "ReplayIteration", "count": 2}])
    assert differences(drill.reference(spec), killed) == []
    assert all(event["verified"] for event in read_events(killed, "ReplayFinished"))


def test_skipping_frozen_gradients_with_a_gradient_scaler_is_exact(drill: Drill) -> None:
    spec = {
        "block": "fused",
        "precision": "16-mixed",
        "overflow_at": 6,
        "policy_args": {"window": 4, "skip_frozen_gradients": True},
    }
    killed = drill.killed(spec, [{"hook": "backward", "step": 12}])
    assert differences(drill.reference(spec), killed) == []


@pytest.mark.parametrize("what", ["activation", "adam_step", "rng", "data_position", "buffers", "scheduler"])
def test_negative_control_notices_what_is_not_restored(drill: Drill, what: str) -> None:
    spec = {**LIST, "scheduler": "warmup"}
    killed = drill.killed(spec, [{"hook": "backward", "step": 11}], **{"break": what})
    assert read_events(killed, "RestoreApplied")
    assert differences(drill.reference(spec), killed) != []


def test_mismatch_is_reported_with_step_and_values(drill: Drill) -> None:
    killed = drill.killed(LIST, [{"hook": "backward", "step": 11}], **{"break": "rng"})
    mismatches = read_events(killed, "ReplayMismatch")
    assert mismatches
    assert {"losses", "rng"} <= {event["quantity"] for event in mismatches}
    assert all(event["recorded"] != event["replayed"] for event in mismatches)
    assert "was replayed differently" in (killed / "log").read_text()
