"""Whatever draws comes back as it was: samplers that count, generators, streams, loaders that hooks make or move."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events, read_logs

ONE = {"policy_args": {"window": 1}}
LOOP = {"runner": "tests.runs.loops"}
KILLS = [{"hook": "backward", "step": step} for step in (9, 16)]  # 7 iterations an epoch

EXACT: dict[str, dict[str, Any]] = {
    "sampler-counts-epochs": {"loader": "bucket"},
    "sampler-counts-epochs-window-1": {"loader": "bucket", **ONE},
    "sampler-counts-epochs-loop": {**LOOP, "loader": "bucket", **ONE},
    "sampler-counts-samples-window-1": {"loader": "consumed", **ONE},
    "sampler-says-its-state": {"loader": "stateful_bucket"},
    "sampler-shuffles-in-place": {"loader": "order"},
    "sampler-shuffles-in-place-loop": {**LOOP, "loader": "order", **ONE},
    "sampler-shuffles-in-place-accelerate": {**LOOP, "framework": "accelerate", "loader": "order"},
    "sampler-shuffles-in-place-fabric": {**LOOP, "framework": "fabric", "loader": "order"},
    "sampler-before-workers": {"loader": "order_workers", **ONE},
    "collate-makes-its-generator": {"loader": "lazy_collate"},
    "collate-makes-its-generator-loop": {**LOOP, "loader": "lazy_collate", **ONE},
    "collate-in-workers": {"loader": "lazy_collate_workers", **ONE},
    "collate-is-a-closure": {"loader": "closure", **ONE},
    "generator-deep-in-the-dataset": {"loader": "deep"},
    "generator-in-workers-that-live-on": {"loader": "deep_workers", **ONE},
    "workers-draw-nothing": {"loader": "workers", **ONE},
    "workers-live-on-and-draw-nothing": {"loader": "persistent", **ONE},
    "workers-live-on-and-draw-nothing-loop": {**LOOP, "loader": "persistent", **ONE},
    "workers-live-on-and-draw-nothing-accelerate": {**LOOP, "framework": "accelerate", "loader": "persistent", **ONE},
    "workers-draw-rarely": {"loader": "rarely_workers", **ONE},
    "workers-live-on-and-draw-rarely": {"loader": "rarely_persistent", **ONE},
    "generator-of-what-is-made-late": {"loader": "lazy_owner", **ONE},
    "generator-of-the-file-loop": {**LOOP, "loader": "file", **ONE},
    "dataset-counts": {"loader": "count", **ONE},
    "stream-that-resumes": {"loader": "resuming"},
    "stream-that-resumes-loop": {**LOOP, "loader": "resuming", **ONE},
    "stream-with-a-buffer": {"loader": "shuffled"},
    "stream-with-a-buffer-window-1": {"loader": "shuffled", **ONE},
    "hooks-move-the-sampler": {"loader": "resumable", "source": "hooks"},
    "hooks-move-the-sampler-window-1": {"loader": "resumable", "source": "hooks", **ONE},
    "hooks-move-the-stream-window-1": {"loader": "skipping", "source": "hooks", **ONE},
    "datamodule-moves-the-loader": {"source": "consumed", "reload": 1},
    "datamodule-cuts-the-dataset": {"source": "cut", **ONE},
    "loader-of-its-epoch": {"source": "epoch", "reload": 1, **ONE},
    "loader-of-an-earlier-epoch": {"source": "epoch", "reload": 2, **ONE},
    "loader-of-the-first-epoch": {"source": "epoch", **ONE},
    "loader-that-grows": {"source": "growing", "reload": 1},
    "loader-that-grows-window-1": {"source": "growing", "reload": 1, **ONE},
    "validation-workers-live-on": {"validation": "persistent"},
    "validation-workers-draw": {"validation": "augmented", **ONE},
}


@pytest.mark.parametrize("name", EXACT)
def test_same_samples_follow(drill: Drill, name: str) -> None:
    spec = {"block": "dense", **EXACT[name]}
    kills = KILLS[1:] if spec.get("policy_args") == ONE["policy_args"] else KILLS  # with windows of four once more
    killed = drill.killed(spec, kills)
    assert differences(drill.reference(spec), killed) == []
    assert len(read_events(killed, "RestoreApplied")) == len(kills), "nothing was restored: the test shows nothing"
    assert all(event["verified"] for event in read_events(killed, "ReplayFinished"))


@pytest.mark.parametrize("name", ["sampler-counts-epochs", "collate-makes-its-generator", "validation-workers-live-on"])
def test_what_is_not_put_back_is_noticed(drill: Drill, name: str) -> None:
    spec = {"block": "dense", **EXACT[name]}
    killed = drill.killed(spec, KILLS[1:], **{"break": "draws"})
    assert differences(drill.reference(spec), killed)


@pytest.mark.parametrize("batch_size", [2, 7])
def test_loader_of_another_length_is_refused(drill: Drill, batch_size: int) -> None:
    spec = {"block": "dense", **ONE}
    with pytest.raises(AssertionError, match=r"ForeignWindowError: .*over \[?7.* this .* \[?(14|4)"):
        drill.killed(spec, KILLS[:1], batch_size=batch_size)


def test_workers_that_draw_nothing_restart_at_once(drill: Drill) -> None:
    spec = {"block": "dense", "loader": "persistent", "samples": 220, "batch_size": 2, "epochs": 2, **ONE}
    killed = drill.killed(spec, [{"hook": "backward", "step": 107}, {"hook": "backward", "step": 218}])
    assert differences(drill.reference(spec), killed) == []
    assert "again to reach the data position" not in read_logs(killed)


def test_workers_that_draw_are_read_again_and_that_is_said(drill: Drill) -> None:
    spec = {
        "block": "dense",
        "loader": "persistent",
        "augment": True,
        "samples": 280,
        "batch_size": 2,
        "epochs": 1,
        **ONE,
    }
    killed = drill.killed(spec, [{"hook": "backward", "step": 120}])
    assert differences(drill.reference(spec), killed) == []
    assert "batches again to reach the data position" in read_logs(killed)
