"""Processes that train on a device and are killed: the end is that of the run that was never killed, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs.alone import Interpreters
from tests.runs.devices import accelerator_of
from tests.runs.drill import Drill, Zygote, differences, read_events
from tests.runs.references import References

# Each process imports everything, and the first one of a GPU waits for its driver.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

KILL = {"hook": "backward", "step": 8}
TRAININGS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed", "block": "fused"},
    "16-mixed": {"precision": "16-mixed", "block": "fused", "overflow_at": 6},
}


@pytest.fixture
def runs(kind: str, zygote: Zygote, tmp_path: Path, memory_dir: Path, references: References) -> Drill:
    return Drill(Interpreters() if kind == "cuda" else zygote, tmp_path, memory_dir, references)


@pytest.mark.parametrize("precision", TRAININGS)
def test_killed_run_ends_bitwise_equal(runs: Drill, kind: str, precision: str) -> None:
    spec = {**TRAININGS[precision], "accelerator": accelerator_of(kind)}
    killed = runs.killed(spec, [KILL])
    assert differences(runs.reference(spec), killed) == []
    finished = read_events(killed, "ReplayFinished")
    assert [event["verified"] for event in finished] == [True]
    if spec.get("overflow_at"):
        assert read_events(killed, "StepSkipped"), "the loss scale never overflowed"


@pytest.mark.parametrize("left_out", ["rng", "activation"])
def test_comparison_notices_what_is_left_out(runs: Drill, kind: str, left_out: str) -> None:
    """The negative control: one part of the restore is missing."""
    spec = {**TRAININGS["bf16-mixed"], "accelerator": accelerator_of(kind)}
    killed = runs.killed(spec, [KILL], **{"break": left_out})
    assert differences(runs.reference(spec), killed)
