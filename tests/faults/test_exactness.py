"""A killed run ends in exactly the state of the run that was never killed: one test per kind of training."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events

#: Killed twice: after a window and a half, and again while the next window is captured, in the last of two epochs.
KILLS = [{"hook": "backward", "step": 8}, {"event": "CaptureStarted", "copies": 2, "fields": {"iteration": 12}}]

TRAININGS: dict[str, dict[str, Any]] = {
    "module-list": {},
    "adamw-fused": {"optimizer": "adamw_fused", "block": "fused"},
    "adamw-loop-amsgrad": {"optimizer": "adamw_loop"},
    "adam-no-schedule": {"optimizer": "adam", "block": "fused", "scheduler": ""},
    "sgd-nesterov": {"optimizer": "sgd", "block": "fused"},
    "lion": {"optimizer": "lion", "block": "fused"},
    "rmsprop": {"optimizer": "rmsprop"},
    "adafactor-not-elementwise": {"optimizer": "adafactor", "block": "fused"},
    "bf16-mixed-fused": {"precision": "bf16-mixed", "block": "fused", "optimizer": "adamw_fused", "clip": 0},
    "bf16-true": {"precision": "bf16-true", "block": "fused"},
    "16-mixed": {"precision": "16-mixed", "block": "fused", "overflow_at": 6},
    "16-mixed-fused-adam": {"precision": "16-mixed", "optimizer": "adamw_fused", "overflow_at": 6, "clip": 0},
    "accumulate-ragged": {"accumulate": 3, "samples": 74},
    "clip-by-value": {"clip": 0.05, "clip_algorithm": "value"},
    "clip-hard-schedule-epoch": {"clip": 0.01, "scheduler": "epoch"},
    "schedule-warmup": {"scheduler": "warmup", "estimate_steps": True},
    "schedule-plateau": {"scheduler": "plateau"},
    "validation-mid-epoch-no-clipping": {"val_check_interval": 3, "clip": 0},
    "validation-in-accumulation": {"val_check_interval": 3, "accumulate": 2, "samples": 56},
    "early-stopping": {"callbacks": ["early_stopping"], "epochs": 6},
    "model-checkpoint-dense": {"callbacks": ["checkpoint"], "block": "dense"},
    "weight-averaging": {"callbacks": ["ema"], "val_check_interval": 3},
    "manual-two-optimizers": {"manual": True},
    "manual-inner-steps": {"manual": True, "inner_steps": 2},
    "augmentation-in-process": {"augment": True},
}


@pytest.mark.parametrize("name", TRAININGS)
def test_killed_run_ends_bitwise_equal(drill: Drill, name: str) -> None:
    spec = {"epochs": 2, **TRAININGS[name]}
    killed = drill.killed(spec, KILLS)
    assert differences(drill.reference(spec), killed) == []
    finished = read_events(killed, "ReplayFinished")
    assert finished, "nothing was restored: the test shows nothing"
    assert all(event["verified"] for event in finished)
    if spec.get("overflow_at"):
        assert read_events(killed, "StepSkipped"), "the loss scale never overflowed"
