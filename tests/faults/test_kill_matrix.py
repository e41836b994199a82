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
TURNS = [(step, HOOKS[turn % 3]) for turn, step in enumerate(STEPS)]
WINDOW = [(step, hook) for step in (5, 6, 7, 8) for hook in HOOKS]
MATRIX = {
    **{f"fused-bf16-{hook}": (SPEC, [m for m in sorted({*TURNS, *WINDOW}) if m[1] == hook]) for hook in HOOKS},
    "list-fp32": (LIST, TURNS),
}


def _check(drill: Drill, spec: dict[str, Any], kills: list[dict[str, Any]]) -> None:
    """Each process dies where it should, the last one does not, and nothing of it shows in any result."""
    killed = drill.killed(spec, kills)
    assert differences(drill.reference(spec), killed) == []
    assert len({event["pid"] for event in read_events(killed)}) == len(kills) + 1


@pytest.mark.parametrize("moments", MATRIX)
def test_killed_at_each_iteration(drill: Drill, moments: str) -> None:
    """Each process is killed at the next one of the moments."""
    spec, found = MATRIX[moments]
    _check(drill, spec, [{"hook": hook, "step": step} for step, hook in found])


#: Each is the end of one process; the next one goes on from what it left. 20 iterations. Windows end at 4, 8, 12, and
#: in a process that went back to a window three iterations after its end.
PHASES: dict[str, dict[str, dict[str, Any]]] = {
    "capture": {
        "before-first-window": {"event": "CaptureStarted", "copies": 1, "fields": {"iteration": 1}},
        "first-window-unsealed": {"event": "SlotSealed", "fields": {"iteration": 3}},
        "validation": {"hook": "validation", "step": 10},
        "capture-begins": {"event": "CaptureStarted", "fields": {"iteration": 10}},
        "mid-capture": {"event": "CaptureStarted", "copies": 3, "fields": {"iteration": 10}},
        "captured-not-sealed": {"event": "CaptureFinished", "fields": {"iteration": 11}},
    },
    "commit": {
        "manifest-temporary": {"event": "ManifestWritten", "fields": {"iteration": 12, "committed": False}},
        "manifest-committed": {"event": "ManifestWritten", "fields": {"iteration": 11, "committed": True}},
        "old-window-dropped": {"event": "WindowCommitted", "fields": {"last_iteration": 14}},
        "sealed-no-manifest": {"event": "SlotSealed", "fields": {"iteration": 16}},
    },
    "restore": {
        "first": {"hook": "backward", "step": 11},
        "restore-found": {"event": "RestoreStarted"},
        "mid-restore": {"event": "RestoreStarted", "copies": 3},
        "restored": {"event": "RestoreApplied"},
    },
    "replay": {
        "first": {"hook": "backward", "step": 11},
        "replay-1": {"event": "ReplayIteration", "count": 1},
        "replay-2": {"event": "ReplayIteration", "count": 2},
        "replay-3": {"event": "ReplayIteration", "count": 3},
        "replay-done": {"event": "ReplayFinished"},
        "in-replayed-backward": {"hook": "backward", "step": 6},
        "first-capture-after-replay": {"event": "CaptureStarted", "copies": 2, "fields": {"iteration": 8}},
    },
}


@pytest.mark.parametrize("phases", PHASES)
def test_killed_in_each_phase(drill: Drill, phases: str) -> None:
    _check(drill, SPEC, list(PHASES[phases].values()))


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
    _check(drill, LONG, kills)


@pytest.mark.parametrize("window", [1, 2, 7, "auto"])
def test_window_sizes(drill: Drill, window: Any) -> None:
    spec = {**LONG, "policy_args": {"window": window}}
    killed = drill.killed(spec, [{"hook": "backward", "step": 17}, {"hook": "backward", "step": 23}])
    assert differences(drill.reference(spec), killed) == []


def test_at_most_two_windows_are_done_again(drill: Drill) -> None:
    """Of windows that are committed within two iterations after their last one: here of the second one."""
    steps = range(10, 14)
    kills: list[dict[str, Any]] = [{"hook": "before_step", "step": step} for step in steps]
    kills[0]["committed"] = {"last_iteration": 8}
    killed = drill.killed(SPEC, kills)
    restored = [event["iteration"] for event in read_events(killed, "RestoreApplied")]
    assert len(restored) == len(kills)
    assert all(step - iteration <= 2 * 4 for step, iteration in zip(steps, restored)), restored


@pytest.mark.parametrize(("block", "clip"), [("list", 0.5), ("fused", 0), ("dense", 0)])
def test_skipping_frozen_gradients_is_exact(drill: Drill, block: str, clip: float) -> None:
    spec = {**LIST, "block": block, "clip": clip, "policy_args": {"window": 4, "skip_frozen_gradients": True}}
    killed = drill.killed(spec, [{"hook": "backward", "step": 11}, {"event": "ReplayIteration", "count": 2}])
    assert differences(drill.reference(spec), killed) == []
    assert all(event["verified"] for event in read_events(killed, "ReplayFinished"))


def test_skipping_frozen_gradients_with_a_gradient_scaler_is_exact(drill: Drill) -> None:
    """Fused experts, with clipping."""
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
    if what == "rng":  # it is reported with step and values
        mismatches = read_events(killed, "ReplayMismatch")
        assert {"losses", "rng"} <= {event["quantity"] for event in mismatches}
        assert all(event["recorded"] != event["replayed"] for event in mismatches)
        assert "was replayed differently" in (killed / "log").read_text()
