"""A pipeline stage dies by SIGKILL and recovers alone, from its neighbours' logs, while all others keep their state."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events, read_logs

pytestmark = pytest.mark.slow

STAGES: dict[str, Any] = {
    "module": "decoder",
    "strategy": "moetion",
    "ranks": 3,
    "num_layers": 4,
    "batch_size": 8,
    "samples": 40,
    "epochs": 2,
    "pipeline": {"pipeline_parallel_size": 3, "num_microbatches": 4},
    "boundary_log": {},
}
FOUR: dict[str, Any] = {**STAGES, "ranks": 4, "pipeline": {"pipeline_parallel_size": 4, "num_microbatches": 4}}
TWO: dict[str, Any] = {**STAGES, "ranks": 2, "pipeline": {"pipeline_parallel_size": 2, "num_microbatches": 4}}
#: Two replicas share the batches of an epoch, or two batches are accumulated: the step of a kill needs one more.
LONGER = {"epochs": 3}
REPLICAS: dict[str, Any] = {
    **STAGES, **LONGER, "ranks": 4, "pipeline": {"pipeline_parallel_size": 2, "num_microbatches": 4},
}  # fmt: skip
BACKWARD = {"hook": "backward", "step": 8}


def check(
    drill: Drill,
    spec: dict[str, Any],
    kills: list[dict[str, Any]],
    *,
    replayed: set[int] | None,
    reference: dict[str, Any] | None = None,
    either: bool = False,
) -> Any:
    """Results are those of a job that never failed, other ranks keep their processes, and these stages replayed alone.

    Args:
        drill: Runs jobs.
        spec: The job.
        kills: Who dies when.
        replayed: Ranks that replayed from logs; None: all went back to a window together.
        reference: The job that never failed, if it is another one.
        either: All may as well go back together: it depends on what was on file when the rank died.
    """
    out, ended, pids = drill.elastic(spec, kills)
    assert ended.good, f"{ended}\n{read_logs(out)}"
    killed = [rank for kill in kills for rank in (kill["rank"], *kill.get("too", ()))]
    assert [len(history) for history in pids] == [1 + killed.count(rank) for rank in range(spec["ranks"])]
    finished = read_events(out, "StageReplayFinished")
    together = [event for event in read_events(out, "RestoreApplied") if event["replay"]]
    if either and together:
        assert not finished
    elif replayed is None:
        assert together, read_logs(out)
    else:
        assert {event["rank"] for event in finished} == replayed, read_logs(out)
        assert all(event["verified"] for event in finished)
        assert not together
    assert differences(drill.reference(reference or spec), out) == []
    return out


def test_one_stage_after_the_other(drill: Drill) -> None:
    """Each one, in each place of a step; from the second one on it is replayed from a log that was made again."""
    kills = [{**BACKWARD, "step": 7, "rank": 0}, {"hook": "before_step", "step": 8, "rank": 1}]
    kills += [{"hook": "backward", "step": 9, "rank": 2}]
    check(drill, STAGES, kills, replayed={0, 1, 2})


def test_in_a_commit(drill: Drill) -> None:
    check(drill, STAGES, [{"event": "ManifestWritten", "count": 2, "rank": 1}], replayed={1})


def test_in_a_capture(drill: Drill) -> None:
    """The note of the boundary is written beside it."""
    kill = {"event": "CaptureFinished", "count": 6, "rank": 1}
    check(drill, STAGES, [kill], replayed={1}, either=True)


def test_between_a_step_and_the_next_batch_all_go_back(drill: Drill) -> None:
    """The step is done, but its boundary is not noted yet: there is no state that all could go on from."""
    kills = [{"hook": "validation", "step": 5, "rank": 1}, {"hook": "batch_end", "step": 9, "rank": 2}]
    out = check(drill, STAGES, kills, replayed=None)
    assert len([event for event in read_events(out, "RestoreApplied", 0) if event["replay"]]) == len(kills)


KINDS: dict[str, dict[str, Any]] = {
    "one micro-batch, frozen front, no clipping, warm-up": {
        "pipeline": {"pipeline_parallel_size": 3, "num_microbatches": 1, "schedule": "gpipe"},
        "frozen_front": True, "clip": 0.0, "scheduler": "warmup",
    },
    "six micro-batches, tied, fused experts, sgd, bf16": {
        "pipeline": {"pipeline_parallel_size": 3, "num_microbatches": 6}, "batch_size": 12, "samples": 60,
        "tied": True, "block": "fused", "optimizer": "sgd", "precision": "bf16-mixed",
    },
    "fp16, skipping gradients": {"precision": "16-mixed", "engine_args": {"skip_frozen_gradients": True}},
    "accumulation, ordinary checkpoints": {
        **LONGER, "accumulate": 2, "callbacks": ["checkpoint"], "ranks": 2,
        "pipeline": {"pipeline_parallel_size": 2, "num_microbatches": 4},
    },
    "interleaved": {
        "pipeline": {
            "pipeline_parallel_size": 2, "num_microbatches": 4, "chunks_per_rank": 2, "schedule": "interleaved_1f1b",
        },
        "ranks": 2,
    },
    "zero bubble, V": {
        "pipeline": {
            "pipeline_parallel_size": 2, "num_microbatches": 4, "chunks_per_rank": 2, "schedule": "zbv_zero_bubble",
        },
        "ranks": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_training(drill: Drill, kind: str) -> None:
    spec = {**STAGES, **KINDS[kind]}
    check(drill, spec, [{**BACKWARD, "rank": 1}], replayed={1})


def test_adjacent_stages_replay_as_one_segment_and_separate_ones_at_once(drill: Drill) -> None:
    kills = [{**BACKWARD, "step": 7, "rank": rank} for rank in (1, 2)] + [{**BACKWARD, "rank": rank} for rank in (0, 3)]
    check(drill, FOUR, kills, replayed={0, 1, 2, 3})


def test_all_replicas_of_a_stage_are_replayed_and_one_with_a_living_replica_is_copied(drill: Drill) -> None:
    kills = [{**BACKWARD, "step": 7, "rank": 2, "too": [3]}, {**BACKWARD, "rank": 0}]
    check(drill, REPLICAS, kills, replayed={2, 3})


def test_shapes_that_were_seen_before_a_recovery_are_known_in_the_next(drill: Drill) -> None:
    """Ten full batches and a short one in an epoch; the second replay repeats both kinds, after a first recovery."""
    kills = [
        {"hook": "backward", "step": 11, "rank": 1},
        {"hook": "before_step", "step": 11, "rank": 1, "generation": 1},
    ]
    check(drill, {**STAGES, "samples": 84, "epochs": 2}, kills, replayed={1})


def test_the_newcomer_dies_in_its_replay(drill: Drill) -> None:
    """Before, and in the middle: in the step of a replayed iteration, while a neighbour sends the next one."""
    moments = [BACKWARD, {"event": "StageReplayStarted"}, {"hook": "before_step", "step": 8}]
    kills = [{**moment, "rank": 1, "generation": generation} for generation, moment in enumerate(moments)]
    check(drill, STAGES, kills, replayed={1})


def test_a_neighbour_dies_while_it_serves(drill: Drill) -> None:
    """Its log is gone: both replay as one segment from the stages that are left."""
    kills = [{**BACKWARD, "rank": 1}, {"event": "RestoreStarted", "rank": 2}]
    check(drill, FOUR, kills, replayed={1, 2})


def test_all_stages(drill: Drill) -> None:
    check(drill, STAGES, [{**BACKWARD, "rank": rank} for rank in range(3)], replayed=None)


def test_without_a_log_all_stages_go_back(drill: Drill) -> None:
    check(drill, {**TWO, "boundary_log": None}, [{**BACKWARD, "rank": 1}], replayed=None)


def test_a_log_that_is_too_small_means_a_rollback_of_all(drill: Drill) -> None:
    out = check(drill, {**STAGES, "boundary_log": {"max_bytes": 6_000}}, [{**BACKWARD, "rank": 1}], replayed=None)
    assert read_logs(out).count("the boundary log reached its bound") == 4  # by each process once


def test_before_the_first_window_all_begin_anew(drill: Drill) -> None:
    out, ended, _ = drill.elastic(TWO, [{"hook": "before_step", "step": 1, "rank": 1}], restarts=4)
    assert ended.good, f"{ended}\n{read_logs(out)}"
    assert differences(drill.reference(TWO), out) == []


def test_whole_jobs_restart_from_windows(drill: Drill) -> None:
    """Without `moetion launch` all processes are started again, and replay together."""
    out = drill.killed(TWO, [{**BACKWARD, "rank": 1}])
    assert differences(drill.reference(TWO), out) == []


@pytest.mark.parametrize("sabotage", ["flipped_record", "unseen_record"])
def test_a_wrong_record_is_noticed(drill: Drill, sabotage: str) -> None:
    """The replay differs from what the stages had recorded of it: all go back, and the result is exact all the same."""
    out = check(drill, {**STAGES, "break": sabotage}, [{**BACKWARD, "rank": 1}], replayed=None)
    assert "could not be replayed exactly" in read_logs(out)


@pytest.mark.parametrize("sabotage", ["flipped_record_unverified", "missing_micro_batch"])
def test_the_comparison_would_notice_a_wrong_replay(drill: Drill, sabotage: str) -> None:
    """Negative control: without its checks a replay from a wrong log ends in another state."""
    spec = {**STAGES, "break": sabotage}
    out, ended, _ = drill.elastic(spec, [{**BACKWARD, "rank": 1}])
    assert ended.good, f"{ended}\n{read_logs(out)}"
    assert {event["rank"] for event in read_events(out, "StageReplayFinished")} == {1}
    assert differences(drill.reference(STAGES), out) != []
