"""SIGKILL at every iteration and in every phase of a gradient log: at most one iteration is done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moetion_lightning.testing.compare import compare_states
from tests.faults.test_changing_models import EXACT as CHANGING
from tests.faults.test_exactness import TRAININGS
from tests.faults.test_optimizers import KILL, TWO_EPOCHS
from tests.faults.test_optimizers import SPARSE as OPTIMIZERS
from tests.runs.drill import Drill, differences, read_events, read_logs, read_steps

LOG: dict[str, Any] = {"policy": "gradient_log", "policy_args": {"window": 4}}
SPEC: dict[str, Any] = {"block": "fused", "precision": "bf16-mixed", "samples": 40, **LOG}  # 30 iterations
LIST: dict[str, Any] = {"block": "list", "samples": 40, **LOG}
#: What cannot be logged: dense windows take its place.
NOT_LOGGED = {
    "sharpness_aware", "lookahead", "lookahead_lists", "lookahead_without_init", "two_in_one", "two-step", "rounding",
}  # fmt: skip


def _done_again(out: Path) -> int:
    """How often an iteration was trained on once more."""
    return sum(len(records) - 1 for records in read_steps(out).values())


def _check(drill: Drill, spec: dict[str, Any], kills: list[dict[str, Any]], **last: Any) -> Path:
    killed = drill.killed(spec, kills, **last)
    assert differences(drill.reference(spec), killed) == []
    return killed


@pytest.mark.parametrize(
    ("hook", "spec"), [("backward", SPEC), ("before_step", LIST), ("batch_end", SPEC)], ids=lambda g: str(g)[:11]
)
def test_killed_at_each_iteration(drill: Drill, hook: str, spec: dict[str, Any]) -> None:
    steps = list(range(1 if hook == "batch_end" else 0, 9))  # a batch ends after its step
    killed = _check(drill, spec, [{"hook": hook, "step": step} for step in steps])
    assert max(len(records) - 1 for records in read_steps(killed).values()) <= 2
    rebuilt = [event["iteration"] for event in read_events(killed, "StateRebuilt")]
    assert len(rebuilt) >= len(steps) - 1  # nothing is there before the first step
    behind = [step - iteration for step, iteration in zip(steps[-len(rebuilt) :], rebuilt)]
    assert set(behind) <= {0, 1}, behind


def test_a_state_that_is_restored_keeps_its_time_and_its_next_batch(drill: Drill) -> None:
    """Files that are newer belong to what is done again, however often that fails; the batch is compared each time."""
    found = []

    def look(memory: Path) -> None:
        newest = max(memory.rglob("windows/*.json"))
        manifest = json.loads(newest.read_text())
        found.append((manifest["last_iteration"], *(manifest["extra"][name] for name in ("first_captured_at", "next"))))

    _check(drill, LIST, [{"hook": "batch_end", "step": 4}] * 2, between=look)
    assert found[0][0] == 3
    assert found[0][2]["batches"]
    assert found[0] == found[1]


#: Those in which the loops, callbacks or evaluations differ, and nothing that an optimizer consumes.
LIKE_OTHERS = {
    "module-list", "adam-no-schedule", "clip-hard-schedule-epoch", "early-stopping", "model-checkpoint-dense",
    "validation-mid-epoch-no-clipping", "validation-in-accumulation",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in TRAININGS if name not in LIKE_OTHERS])
def test_every_kind_of_training(drill: Drill, name: str) -> None:
    spec = {**TWO_EPOCHS, **TRAININGS[name], **LOG}
    killed = _check(drill, spec, [{"hook": "backward", "step": 8}, {"hook": "before_step", "step": 12}])
    finished = read_events(killed, "ReplayFinished")
    assert finished
    assert all(event["verified"] for event in finished)
    assert len(read_events(killed, "StateRebuilt")) == 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(drill: Drill, name: str) -> None:
    spec = {**OPTIMIZERS[name], **TWO_EPOCHS, **LOG}
    killed = drill.killed(spec, [KILL])
    assert differences(drill.reference(spec), killed) == []
    assert bool(read_events(killed, "StateRebuilt")) == (name not in NOT_LOGGED)


@pytest.mark.parametrize("name", CHANGING)
def test_every_changing_model(drill: Drill, name: str) -> None:
    _check(drill, {**CHANGING[name], **LOG}, [{"hook": "backward", "step": 17}])


UNUSUAL = {
    "clamped", "coupled_optimizer", "freezing", "keyed_optimizer", "lbfgs", "only_trainable", "own_accumulation",
    "shrink_at_start", "shrink_in_step", "silent_manual_backward", "teacher", "tensor_rate", "toggling", "unfreezing",
    "weight_norm", "zeroed_gradients", "zeroed_in_place",
    "clamped_through_data", "moments_reset", "old_style",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(UNUSUAL))
def test_every_unusual_training(drill: Drill, name: str) -> None:
    """Weights, gradients, generators or metrics that a script treats in its own way."""
    clip = {"clip": 0} if name in ("lbfgs", "silent_manual_backward") else {}
    killed = _check(drill, {"module": name, **clip, **LOG}, [{"hook": "batch_end", "step": 12}])
    if name == "clamped":  # weights that change outside of steps are captured whole, which is said once in each process
        said = [e["message"] for e in read_events(killed, "Notice") if "whole at every iteration" in e["message"]]
        assert len(said) == 2
        assert "body.embed.weight" in said[0]


def _findings(out: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(out, "OperatorAudited") if event["difference"]]


def test_audits_find_nothing_where_nothing_is_wrong(drill: Drill) -> None:
    out = drill.killed(SPEC, [])
    assert len(read_events(out, "OperatorAudited")) > 20
    assert _findings(out) == []


def test_an_audit_finds_an_element_that_has_changed_and_names_it(drill: Drill) -> None:
    out = drill._directory("corrupted")
    memory = drill.memory_dir / out.name
    memory.mkdir(mode=0o700)
    args = {"window": 4, "audit": "raise"}
    ended = drill.start({**LIST, "module": "corrupted", "policy_args": args, "memory_dir": str(memory)}, out)
    assert ended.codes == [1]
    (finding,) = _findings(out)
    assert "optimizer state '0.exp_avg' of 'body." in finding["difference"]
    assert ", element 3: " in finding["difference"]
    assert finding["iteration"] == 9
    assert read_events(out, "WindowCommitted")[-1]["last_iteration"] == 8
    assert "AuditError: an audit failed" in (out / "log").read_text()


def test_audits_show_state_that_an_optimizer_hides_and_dense_windows_take_over(drill: Drill) -> None:
    args = {"window": 4, "elementwise_optimizers": ["tests.runs.variants.HiddenMomentum"]}
    out = drill.killed({**LIST, "module": "hidden_optimizer", "policy_args": args}, [])
    assert len(_findings(out)) >= 3
    assert any("windows are dense now" in event["message"] for event in read_events(out, "Notice"))


def test_state_that_an_optimizer_hides_is_noticed(drill: Drill) -> None:
    spec = {**LIST, "module": "hidden_optimizer", "policy_args": {"window": 4, "audit": "off"}}
    killed = drill.killed(spec, [{"hook": "backward", "step": 11}])
    assert {event["quantity"] for event in read_events(killed, "ReplayMismatch")} == {"weights"}
    assert "THE RECOVERED STATE IS APPROXIMATE" in (killed / "log").read_text()


#: Each is the end of one process; the next one goes on from what it left. 30 iterations.
PHASES: dict[str, dict[str, dict[str, Any]]] = {
    "capture": {
        "base-begins": {"event": "CaptureStarted", "copies": 1, "fields": {"iteration": 0}},
        "base-sealed": {"event": "SlotSealed", "count": 2},
        "validation": {"hook": "validation", "step": 10},
        "slot-is-copied": {"event": "CaptureStarted", "copies": 2, "fields": {"iteration": 12}},
        "record-is-copied": {"event": "IterationFinished", "copies": 9, "fields": {"iteration": 14}},
        "not-sealed": {"event": "CaptureFinished", "fields": {"iteration": 16}},
    },
    "commit": {
        "slot-sealed": {"event": "SlotSealed", "fields": {"iteration": 12}},
        "manifest-temporary": {"event": "ManifestWritten", "fields": {"iteration": 14, "committed": False}},
        "manifest-committed": {"event": "ManifestWritten", "fields": {"iteration": 16, "committed": True}},
        "older-dropped": {"event": "WindowCommitted", "fields": {"last_iteration": 18}},
    },
    "rebuild": {
        "first": {"hook": "backward", "step": 11},
        "restore-found": {"event": "RestoreStarted"},
        "rebuild-begins": {"event": "RestoreStarted", "copies": 3},
        "in-rebuild": {"event": "RestoreApplied", "copies": 2},
        "rebuilt": {"event": "StateRebuilt"},
        "base-after-rebuild": {"event": "StateRebuilt", "copies": 12},
    },
}


@pytest.mark.parametrize("phases", PHASES)
def test_killed_in_each_phase(drill: Drill, phases: str) -> None:
    kills = list(PHASES[phases].values())
    killed = _check(drill, SPEC, kills)
    assert len({event["pid"] for event in read_events(killed)}) == len(kills) + 1
    assert _done_again(killed) <= len(kills)


def test_killed_between_two_optimizers(drill: Drill) -> None:
    """Behind the first one's step, and before it."""
    kills = [{"hook": "before_step", "step": step} for step in (13, 14)]
    assert _done_again(_check(drill, {"manual": True, **LOG}, kills)) <= len(kills)


def test_ten_kills_in_one_run(drill: Drill) -> None:
    kills: list[dict[str, Any]] = [
        {"hook": "backward", "step": 2},
        {"event": "SlotSealed", "fields": {"iteration": 4}},
        {"hook": "backward", "step": 7},
        {"event": "RestoreApplied", "copies": 1},
        {"hook": "before_step", "step": 10},
        {"event": "CaptureStarted", "copies": 1, "fields": {"iteration": 13}},
        {"event": "RestoreStarted", "copies": 2},
        {"hook": "batch_end", "step": 19},
        {"event": "ManifestWritten", "fields": {"iteration": 24, "committed": False}},
        {"hook": "backward", "step": 28},
    ]
    killed = _check(drill, SPEC, kills)
    assert _done_again(killed) <= len(kills)


@pytest.mark.parametrize("window", [1, 2, 7, 16, "auto"])
def test_window_sizes(drill: Drill, window: Any) -> None:
    spec = {**SPEC, "policy_args": {"window": window}}
    killed = _check(drill, spec, [{"hook": "backward", "step": 17}, {"hook": "backward", "step": 23}])
    assert _done_again(killed) <= 2


@pytest.mark.parametrize(
    "what", ["log_dropped", "log_swapped", "log_settings", "buffers", "scheduler", "data_position"]
)
def test_negative_control_notices_what_is_not_restored(drill: Drill, what: str) -> None:
    spec = {**LIST, "scheduler": "warmup"}
    killed = drill.killed(spec, [{"hook": "backward", "step": 6}], **{"break": what})
    assert read_events(killed, "StateRebuilt")
    assert differences(drill.reference(spec), killed) != []
    if what in ("log_dropped", "log_swapped", "log_settings"):
        assert "was rebuilt differently" in (killed / "log").read_text()


def test_training_that_is_not_deterministic_is_restored_exactly(drill: Drill) -> None:
    """What the dying process had after its last step is what the next one finds before its first."""
    spec = {"module": "noisy_backward", "callbacks": ["history"], **LOG}
    killed = drill.killed(spec, [{"hook": "backward", "step": 11}])
    (rebuilt,) = read_events(killed, "StateRebuilt")
    before = killed / "history" / f"{rebuilt['iteration']:04d}.safetensors"
    assert compare_states(before, killed / "history" / "found.safetensors").equal
    assert read_events(killed, "ReplayMismatch") == []


def test_negative_control_a_sparse_window_notices_that_training_is_not_deterministic(drill: Drill) -> None:
    killed = drill.killed({"module": "noisy_backward"}, [{"hook": "backward", "step": 11}])
    assert {event["quantity"] for event in read_events(killed, "ReplayMismatch")} >= {"losses", "weights"}


@pytest.mark.parametrize("kind", ["grad", "steps", "slot", "rest", "manifest"])
def test_a_flipped_byte_is_a_clear_error(drill: Drill, kind: str) -> None:
    flipped: list[Path] = []

    def flip(memory: Path) -> None:
        *older, path = sorted(memory.glob("*/rank-*/windows/*.json"))
        for manifest in older:  # the kill came before it went: it would be restored in place of the flipped one
            manifest.unlink()
        if kind != "manifest":
            names = [name for name, *_ in json.loads(path.read_bytes())["files"]]
            path = path.parent.parent / "files" / next(name for name in names if f"-{kind}" in name)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        flipped.append(path)

    out = drill._directory("flipped")
    memory = drill.memory_dir / out.name
    memory.mkdir(mode=0o700)
    common = {**SPEC, "memory_dir": str(memory)}
    drill.start({**common, "kill": {"hook": "backward", "step": 9}}, out)
    flip(memory)
    ended = drill.start(common, out)
    assert ended.codes == [1]
    assert flipped[0].name in read_logs(out)
    assert "nothing was restored" in read_logs(out)


@pytest.mark.parametrize("iteration", [12, 15, 18])
def test_going_back_on_purpose(drill: Drill, iteration: int) -> None:
    """Any iteration of the kept rounds; training is deterministic, so that it ends as ever."""
    args = {"window": 4, "keep_rounds": 2}
    spec = {**SPEC, "policy_args": args}
    kill = {"hook": "backward", "step": 20, "committed": {"last_iteration": 19}}
    last = {"policy_args": {**args, "resume": iteration}}
    killed = _check(drill, spec, [kill], **last)
    assert [event["iteration"] for event in read_events(killed, "StateRebuilt")] == [iteration]
