"""Hand-written loops: a killed one ends in exactly the state of the ordinary loop that was never killed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events, read_steps

PLAIN: dict[str, Any] = {"runner": "tests.runs.loops"}
FABRIC = {**PLAIN, "framework": "fabric"}
ACCELERATE = {**PLAIN, "framework": "accelerate"}
#: Killed twice: after a window and a half, and again while the next window is captured.
KILLS = [{"hook": "backward", "step": 8}, {"event": "CaptureStarted", "copies": 2, "fields": {"iteration": 12}}]

LOOPS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "plain-accumulate-clip-workers": {**PLAIN, "accumulate": 2, "samples": 56, "loader": "workers", "augment": True},
    "plain-bf16-fused-epoch-sampler": {**PLAIN, "precision": "bf16", "block": "fused", "loader": "epoch_sampler"},
    "plain-fp16-skipped-step": {**PLAIN, "precision": "fp16", "overflow_at": 6},
    "plain-fp16-fused-adam": {**PLAIN, "precision": "fp16", "optimizer": "adamw_fused", "overflow_at": 6, "clip": 0},
    "plain-two-optimizers": {**PLAIN, "second_optimizer": True},
    "plain-wrapped-optimizer-stream": {
        **PLAIN, "optimizer": "lookahead_without_init", "loader": "stream", "augment": True,
    },
    "plain-average": {**PLAIN, "average": True, "precision": "bf16"},
    "plain-persistent-workers-epochs": {**PLAIN, "loader": "persistent", "form": "epochs", "augment": True},
    "plain-zero-grad-before-stateful-loader": {**PLAIN, "zero_grad": "before", "block": "fused", "loader": "stateful"},
    "plain-zero-grad-in-place": {**PLAIN, "zero_grad": "in_place"},
    "plain-gradients-add-up": {**PLAIN, "zero_grad": "never"},
    "plain-dense-policy-no-dataloader": {
        **PLAIN, "policy": "dense", "policy_args": {"every_n_steps": 3}, "loader": "plain",
    },
    "accelerate-counting-module": {**ACCELERATE, "counting": True, "policy_args": {"window": 1}},
    "plain-skipping-gradients-counting-module": {
        **PLAIN, "policy_args": {"window": 4, "skip_frozen_gradients": True}, "counting": True,
    },
    "fabric-epochs-workers": {**FABRIC, "form": "epochs", "loader": "workers", "augment": True},
    "fabric-persistent-workers": {**FABRIC, "loader": "persistent", "augment": True},
    "fabric-bf16-fused-epoch-sampler": {**FABRIC, "precision": "bf16", "block": "fused", "loader": "epoch_sampler"},
    "fabric-fp16": {**FABRIC, "precision": "fp16", "overflow_at": 6},
    "accelerate-accumulate-clip": {**ACCELERATE, "accumulate": 2, "samples": 56},
    "accelerate-ragged": {**ACCELERATE, "accumulate": 3, "samples": 74},
    "accelerate-epochs-augment-seedable": {
        **ACCELERATE, "form": "epochs", "augment": True, "accelerate_args": {"use_seedable_sampler": True},
    },
    "accelerate-bf16-workers": {**ACCELERATE, "precision": "bf16", "loader": "workers", "augment": True},
    "accelerate-persistent-workers": {**ACCELERATE, "loader": "persistent", "augment": True},
    "accelerate-stateful-loader": {**ACCELERATE, "accelerate_args": {"use_stateful_dataloader": True}},
    "accelerate-stream": {**ACCELERATE, "loader": "stream", "augment": True},
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_killed_loop_ends_bitwise_equal(drill: Drill, name: str) -> None:
    spec = {**LOOPS[name], "epochs": 2}
    killed = drill.killed(spec, KILLS)
    assert differences(drill.reference(spec), killed) == []
    restored = read_events(killed, "RestoreApplied")
    assert restored, "nothing was restored: the test shows nothing"
    assert all(event["verified"] for event in read_events(killed, "ReplayFinished"))


LOG: dict[str, Any] = {"policy": "gradient_log", "policy_args": {"window": 4}}
LOGGED = {
    "plain-fp16-fused-adam": LOOPS["plain-fp16-fused-adam"],
    "plain-two-optimizers": LOOPS["plain-two-optimizers"],
    "plain-average": LOOPS["plain-average"],
    "plain-zero-grad-in-place": LOOPS["plain-zero-grad-in-place"],
    "plain-gradients-add-up": LOOPS["plain-gradients-add-up"],
    "fabric-fp16": LOOPS["fabric-fp16"],
    "accelerate-accumulate-clip": LOOPS["accelerate-accumulate-clip"],
    "accelerate-stream": LOOPS["accelerate-stream"],
}


@pytest.mark.parametrize("name", LOGGED)
def test_killed_loop_that_logs_gradients_loses_one_iteration(drill: Drill, name: str) -> None:
    spec = {"epochs": 2, **LOGGED[name], **LOG}
    killed = drill.killed(spec, [{"hook": "backward", "step": 8}, {"hook": "before_step", "step": 12}])
    assert differences(drill.reference(spec), killed) == []
    rebuilt = read_events(killed, "StateRebuilt")
    assert len(rebuilt) == 2
    assert all(event["verified"] for event in read_events(killed, "ReplayFinished"))


#: Each is the end of one process; the next one goes on from what it left. 21 batches in three epochs.
PHASES: dict[str, dict[str, dict[str, Any]]] = {
    "training": {
        "before-first-window": {"hook": "backward", "step": 2},
        "manifest-committed": {"event": "ManifestWritten", "fields": {"committed": True}},
        "sealed-no-manifest": {"event": "SlotSealed", "fields": {"iteration": 6}},
        "before-step": {"hook": "before_step", "step": 9},
        "after-step": {"hook": "batch_end", "step": 9},
        "last-batch-of-epoch": {"hook": "batch_end", "step": 13},
        "epoch-end": {"hook": "epoch_end", "step": 1},
        "first-batch-of-epoch": {"hook": "backward", "step": 14},
        "last-batch": {"hook": "batch_end", "step": 20},
        "after-the-loop": {"hook": "end", "step": 0},
        "before-close": {"hook": "before_close", "step": 0},
    },
    "restore": {
        "first": {"hook": "backward", "step": 11},
        "restore-found": {"event": "RestoreStarted"},
        "mid-restore": {"event": "RestoreStarted", "copies": 3},
        "restored": {"event": "RestoreApplied"},
        "replay": {"event": "ReplayIteration", "count": 2},
        "in-replayed-backward": {"hook": "backward", "step": 6},
        "replay-done": {"event": "ReplayFinished"},
    },
}
#: Those in which no code of an adapter runs, but only the engine's, the same in all; and what only epochs have.
OF_THE_ENGINE = {
    *("sealed-no-manifest", "manifest-committed", "epoch-end", "restore-found", "restored", "replay", "replay-done"),
}


@pytest.mark.parametrize("phases", PHASES)
@pytest.mark.parametrize("framework", ["plain", "accelerate"])
def test_killed_in_each_phase(drill: Drill, framework: str, phases: str) -> None:
    """A plain loop in epochs in all of them, one of Accelerate in those in which its adapter's code runs."""
    spec = {**PLAIN, "form": "epochs"} if framework == "plain" else ACCELERATE
    left_out = set[str]() if framework == "plain" else OF_THE_ENGINE
    kills = [kill for name, kill in PHASES[phases].items() if name not in left_out]
    killed = drill.killed(spec, kills)
    assert differences(drill.reference(spec), killed) == []
    assert len({event["pid"] for event in read_events(killed)}) == len(kills) + 1


EVALUATIONS: dict[str, dict[str, Any]] = {
    "plain-counting-sampler": {"framework": "plain", "evaluate": "bucket"},
    "plain-persistent-workers": {"framework": "plain", "evaluate": "persistent"},
    "plain-drawing-workers": {"framework": "plain", "evaluate": "persistent", "evaluate_augment": True},
    "fabric-persistent-workers": {"framework": "fabric", "evaluate": "persistent"},
    "fabric-epoch-sampler": {"framework": "fabric", "evaluate": "epoch_sampler"},
    "drawing-workers": {"evaluate": "persistent", "evaluate_augment": True},
    "counting-sampler": {"evaluate": "bucket"},
    "stateful": {"accelerate_args": {"use_stateful_dataloader": True}, "evaluate": "shuffle"},
    "seedable": {"accelerate_args": {"use_seedable_sampler": True}, "evaluate": "shuffle"},
    "own-generator": {"evaluate": "generator"},
    "persistent-workers": {"evaluate": "persistent"},
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_is_the_same_after_a_kill(drill: Drill, name: str) -> None:
    """The window begins behind the first evaluation: the restarted process has made none before."""
    spec = {**ACCELERATE, "form": "epochs", **EVALUATIONS[name]}
    killed = drill.killed(spec, [{"hook": "backward", "step": 13, "committed": {"last_iteration": 12}}])
    assert [event["iteration"] for event in read_events(killed, "RestoreApplied")] == [9]
    assert differences(drill.reference(spec), killed) == []
    assert "may differ after this restart" not in (killed / "log").read_text()


def test_partial_policy_says_what_it_lost(drill: Drill) -> None:
    spec = {**PLAIN, "policy": "partial", "policy_args": {"num_experts_per_checkpoint": 1}}
    killed = drill.killed(spec, [{"hook": "backward", "step": 9}])
    (report,) = read_events(killed, "PartialExpertsRestored")
    assert report["lost_tokens"] > 0
    assert differences(drill.reference(spec), killed) != []


def test_seven_kills_in_one_loop(drill: Drill) -> None:
    spec = {**FABRIC, "form": "epochs", "augment": True}
    kills = [{"hook": "backward", "step": step} for step in (3, 6, 7, 11, 12, 16, 19)]
    killed = drill.killed(spec, kills)
    assert differences(drill.reference(spec), killed) == []


def test_complete_loop_leaves_no_window_and_begins_afresh(drill: Drill) -> None:
    killed = drill.killed(PLAIN, [{"hook": "backward", "step": 9}])
    memory = drill.memory_dir / killed.name
    assert not list(memory.rglob("windows/*.json"))
    again = drill.start({**PLAIN, "memory_dir": str(memory)}, killed)
    assert again.good
    assert len(read_steps(killed)[0, 0]) == 2  # all steps were done again, from the first one


def test_finished_loop_that_was_not_closed_has_nothing_left_to_do(drill: Drill) -> None:
    spec = {**PLAIN, "policy": "dense", "policy_args": {"every_n_steps": 1}}
    killed = drill.killed(spec, [{"event": "WindowCommitted", "fields": {"last_iteration": 21}}])
    assert differences(drill.reference(spec), killed) == []
    assert len(read_steps(killed)[2, 6]) == 1  # its last batch was not trained twice


def test_gradients_that_are_dropped_are_not_captured(drill: Drill) -> None:
    """They are, once, in the first window: until then nobody has seen what becomes of them.

    Sizes differ by a few bytes all the same: they include text. The gradients have 20 kB.
    """
    spec = {**PLAIN, "block": "dense", "policy_args": {"window": 2}}
    sizes = {}
    for zero_grad in ("before", "after", "never"):
        killed = drill.killed({**spec, "zero_grad": zero_grad}, [{"hook": "end", "step": 0}])
        sizes[zero_grad] = [event["nbytes"] for event in read_events(killed, "WindowCommitted")]
    first, *_, last = ({name: found[i] for name, found in sizes.items()} for i in (0, 5, -1))
    assert first["after"] + 20_000 < first["before"]
    assert abs(last["after"] - last["before"]) < 100
    assert last["before"] + 20_000 < last["never"]


@pytest.mark.parametrize(
    ("what", "spec"),
    [
        ("activation", PLAIN),
        ("adam_step", PLAIN),
        ("position", PLAIN),
        ("stateful", PLAIN),
        ("buffers", PLAIN),
        ("gradients", {**PLAIN, "zero_grad": "never"}),
        ("position", FABRIC),
        ("draws", {**ACCELERATE, "augment": True}),
        ("others", {**PLAIN, "form": "epochs", "evaluate": "persistent", "samples": 14}),
    ],
)
def test_negative_control_notices_what_is_not_restored(drill: Drill, what: str, spec: dict[str, Any]) -> None:
    killed = drill.killed(spec, [{"hook": "backward", "step": 11}], **{"break": what})
    assert read_events(killed, "RestoreApplied")
    assert differences(drill.reference(spec), killed) != []


RANKS: dict[str, dict[str, Any]] = {
    "plain-ddp": {**PLAIN, "strategy": "ddp", "block": "fused"},
    "plain-fsdp2": {**PLAIN, "strategy": "fsdp2", "block": "fused"},
    "plain-own-state": {**PLAIN, "block": "fused"},  # two trainings beside each other: nothing is shared
    "fabric-ddp": {**FABRIC, "block": "fused", "loader": "shuffle"},
    "accelerate-ddp-accumulate": {**ACCELERATE, "accumulate": 2, "samples": 112},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_two_ranks_killed_and_started_again(drill: Drill, name: str) -> None:
    spec = {"samples": 56, **RANKS[name], "ranks": 2}
    killed = drill.killed(spec, [{"hook": "backward", "step": 9, "rank": 1}, {"hook": "before_step", "step": 14}])
    assert differences(drill.reference(spec), killed) == []
    assert len(read_events(killed, "ReplayFinished")) == 4
    assert all(event["verified"] for event in read_events(killed, "ReplayFinished"))
