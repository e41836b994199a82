"""A restore that leaves something out is seen by the replay check itself, which names the cause; exact ones agree."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events, read_steps

LIST: dict[str, Any] = {"block": "list", "samples": 40, "epochs": 2}
LOOP: dict[str, Any] = {"runner": "tests.runs.loops"}
FABRIC = {**LOOP, "framework": "fabric"}
ACCELERATE = {**LOOP, "framework": "accelerate"}
HF: dict[str, Any] = {"runner": "tests.runs.hf_trainer"}
ONE: dict[str, Any] = {"policy_args": {"window": 1}}
DENSE: dict[str, Any] = {"policy": "dense", "policy_args": {}}
PARTIAL: dict[str, Any] = {"policy": "partial", "policy_args": {"num_experts_per_checkpoint": 2}}
MANUAL = {**LIST, "clip": 0, "module": "silent_manual"}
KILL = [{"hook": "before_step", "step": 11}]
HF_KILL = [{"hook": "step_end", "step": 10}]
CAUSE = re.compile(r"THE RECOVERED STATE IS APPROXIMATE from here on\. Likely cause: (.*)")


def kills(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return HF_KILL if spec.get("runner") == HF["runner"] else KILL


DATA, RNG, RATES = "the data differ", "the global random generators stand elsewhere", "a learning-rate scheduler"
DECLARED = "elementwise_optimizers= declares tests.runs.variants.NormedMomentum"
WRONGLY_DECLARED = {"engine_args": {"elementwise_optimizers": ["tests.runs.variants.NormedMomentum"]}}
FORWARD, OPTIMIZER = "the forward differs although the batches are the same", "the optimizer keeps state outside"

#: What is left out, in which run, what must differ first, and which cause comes first.
LEFT_OUT: dict[str, tuple[str, dict[str, Any], set[str], str]] = {
    "data": ("data_position", LIST, {"batches", "losses"}, DATA),
    "data-window-1": ("data_position", {**LIST, **ONE}, {"batches"}, DATA),
    "data-dense": ("data_position", {**LIST, **DENSE}, {"batches"}, DATA),
    "data-partial": ("data_position", {**LIST, **PARTIAL}, {"batches"}, DATA),
    "data-manual": ("data_position", MANUAL, {"batches", "gradients"}, DATA),
    "data-loop": ("position", LOOP, {"batches", "losses"}, DATA),
    "data-loop-window-1": ("position", {**LOOP, **ONE}, {"batches"}, DATA),
    "data-fabric-window-1": ("position", {**FABRIC, **ONE}, {"batches"}, DATA),
    "data-accelerate-window-1": ("position", {**ACCELERATE, **ONE}, {"batches"}, DATA),
    "data-hf": ("data", HF, {"batches", "losses"}, DATA),
    "data-hf-window-1": ("data", {**HF, **ONE}, {"batches"}, DATA),
    "rng": ("rng", LIST, {"rng", "losses"}, RNG),
    "rng-window-1": ("rng", {**LIST, **ONE, "loader": "plain"}, {"rng"}, RNG),
    "scheduler": ("scheduler", {**LIST, "scheduler": "warmup"}, {"lrs"}, RATES),
    "buffers-manual": ("buffers", MANUAL, {"gradients"}, FORWARD),
    "buffers-manual-backward": ("buffers", {**MANUAL, "module": "silent_manual_backward"}, {"losses"}, FORWARD),
    "optimizer-state": ("adam_step", LIST, {"weights"}, OPTIMIZER),
    "hidden-optimizer-state": ("", {**LIST, "module": "hidden_optimizer"}, {"weights"}, OPTIMIZER),
    "declared-elementwise": (
        "", {**LIST, "block": "fused", "module": "coupled_optimizer", **WRONGLY_DECLARED}, {"weights"}, DECLARED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_seen_and_named(drill: Drill, name: str) -> None:
    what, spec, first, cause = LEFT_OUT[name]
    killed = drill.killed(spec, kills(spec), **{"break": what})
    assert differences(drill.reference(spec), killed) != [], "nothing was left out: the test shows nothing"
    (finished,) = read_events(killed, "ReplayFinished")
    assert not finished["verified"]
    found = read_events(killed, "ReplayMismatch")
    assert first <= {event["quantity"] for event in found if event["iteration"] == found[0]["iteration"]}
    assert all(event["recorded"] != event["replayed"] for event in found)
    (causes,) = CAUSE.findall((killed / "log").read_text())  # said once
    assert causes.startswith(cause)
    if cause in (DATA, RNG, RATES):
        assert "kernels" not in causes


#: Runs, and what is compared in each replayed iteration besides learning rates, random generators and batches.
EXACT: dict[str, tuple[dict[str, Any], set[str]]] = {
    "lightning": (LIST, {"losses", "gradient norms"}),
    "accumulating": ({**LIST, "accumulate": 2, "samples": 80}, {"losses", "gradient norms"}),
    "manual": (MANUAL, {"gradients"}),
    "manual-backward": ({**MANUAL, "module": "silent_manual_backward"}, {"losses"}),
    "fused-bf16-skipping": (
        {"block": "fused", "precision": "bf16-mixed", "policy_args": {"window": 4, "skip_frozen_gradients": True}},
        {"losses", "gradient norms"},
    ),
    "draws-for-itself": ({**LIST, "loader": "stream", "augment": True}, {"losses", "gradient norms"}),
    "loop": (LOOP, {"losses", "gradients", "gradient norms"}),
    "fabric": (FABRIC, {"losses", "gradient norms"}),
    "accelerate": ({**ACCELERATE, "augment": True}, {"losses", "gradient norms"}),
    "hf": (HF, {"losses", "gradient norms"}),
}
ALWAYS = {"learning rates", "RNG", "batches", "next batch", "RNG at the next batch"}
INDICES = EXACT.keys() - {"draws-for-itself"}  # a stream has none


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_recovery_agrees_in_all_that_it_names(drill: Drill, name: str) -> None:
    spec, compared = EXACT[name]
    killed = drill.killed(spec, kills(spec))
    assert differences(drill.reference(spec), killed) == []
    (finished,) = read_events(killed, "ReplayFinished")
    assert finished["verified"]
    *replayed, _, _ = finished["compared"]
    assert replayed[-1].startswith("weights of ")
    indices = {"sampler indices"} if name in INDICES else set()
    assert {*finished["compared"]} - {replayed[-1]} == compared | ALWAYS | indices
    assert f"compared and equal in each: {', '.join(replayed)}; the next batch agrees" in (killed / "log").read_text()


@pytest.mark.parametrize(
    "spec", [LIST, LOOP, FABRIC, ACCELERATE, HF], ids=["lightning", "loop", "fabric", "accel", "hf"]
)
def test_without_a_replay_the_next_batch_is_compared(drill: Drill, spec: dict[str, Any]) -> None:
    killed = drill.killed({**spec, **ONE}, kills(spec))
    (finished,) = read_events(killed, "ReplayFinished")
    assert (finished["replayed"], finished["verified"]) == (0, True)
    assert finished["compared"] == ["next batch", "RNG at the next batch"]
    assert "nothing was replayed; the next batch agrees, and the RNG there" in (killed / "log").read_text()


@pytest.mark.parametrize("spec", [{**LIST, **ONE}, {**LOOP, **ONE}], ids=["lightning", "loop"])
def test_another_batch_can_end_the_run_before_it_trains(drill: Drill, spec: dict[str, Any]) -> None:
    strict = {"engine_args": {"on_mismatch": "raise"}} if "runner" not in spec else {}
    strict = strict or {"policy_args": {"window": 1, "on_mismatch": "raise"}}
    with pytest.raises(
        AssertionError, match=r"NonDeterminismError: what follows the restored iteration \d+ is not what"
    ):
        drill.killed(spec, KILL, **{"break": "position" if "runner" in spec else "data_position"}, **strict)
    killed = max(drill.base.glob("*-killed"))
    done = sum(len(records) for records in read_steps(killed).values())
    assert done == 11, "a step was made after the kill"
    assert not read_events(killed, "IterationFinished")[-1]["iteration"] > 11
