"""The demonstrations' own decisions; the demonstrations themselves are run in tests/integrations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moetion_lightning.cli import main
from moetion_lightning.demo import pipeline, ranks, single
from moetion_lightning.demo.job import Job, compare
from moetion_lightning.demo.pipeline import PipelineOptions
from moetion_lightning.demo.ranks import RanksOptions
from moetion_lightning.demo.recovery import Recovery
from moetion_lightning.demo.single import DemoOptions
from moetion_lightning.demo.stage import KillMidWindow, finish
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.testing.compare import write_state
from moetion_lightning.testing.processes import RunError, Tail


def _capture(slot: int, num_slots: int = 4, **who: int) -> dict[str, object]:
    return {"event": "CaptureFinished", "slot": slot, "num_slots": num_slots, **who}


def test_kill_falls_into_the_middle_of_the_window_after_the_nth_commit() -> None:
    kill = KillMidWindow(2)
    committed = {"event": "WindowCommitted"}
    assert not kill.watch([_capture(s) for s in range(4)] + [committed])
    assert not kill.watch([_capture(s) for s in range(4)])
    assert not kill.watch([committed, _capture(0)])
    assert kill.watch([{"event": "IterationFinished", "iteration": 10}, _capture(1)])
    assert kill.last_step == 10
    assert kill.due


def test_only_the_events_of_the_chosen_rank_count() -> None:
    kill = KillMidWindow(1, rank=2)
    assert not kill.watch([{"event": "WindowCommitted", "rank": 1}, _capture(1, rank=2)])
    assert not kill.watch([{"event": "WindowCommitted", "rank": 2}, _capture(1, rank=1)])
    assert kill.watch([_capture(1, rank=2)])


def test_tail_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = Tail(path)
    assert tail.new() == []
    path.write_text('{"a": 1}\n{"a": 2')
    assert tail.new() == [{"a": 1}]
    with path.open("a") as file:
        file.write("}\n")
    assert tail.new() == [{"a": 2}]
    assert tail.new() == []


def test_twin_has_no_callback_of_ours_and_else_the_same_configuration(tmp_path: Path) -> None:
    options = DemoOptions(folder=tmp_path, memory_dir=tmp_path / "memory")
    configs = []
    for name in ("failing", "twin"):
        run = single._Run(options, name)
        configs.append(yaml.safe_load((run.folder / "config.yaml").read_text()))
    ours = [[c["class_path"].rpartition(".")[2] for c in config["trainer"]["callbacks"]] for config in configs]
    assert ours == [["SparseExpertCheckpoint", "LossRecorder", "FinalState"], ["LossRecorder", "FinalState"]]
    for config in configs:
        del config["trainer"]["callbacks"], config["trainer"]["default_root_dir"]
    assert json.dumps(configs[0]) == json.dumps(configs[1])


@pytest.mark.parametrize("change", [{"window": 1}, {"kill_after_windows": 0}, {"steps": 20}])
def test_impossible_demo_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError):
        DemoOptions(folder=tmp_path, memory_dir=tmp_path, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"window": 1},
        {"steps": 20},
        {"ranks": 1},
        {"kill_rank": 4},
        {"kill_rank": -1},
        {"standby": -1},
        {"strategy": "expert", "ranks": 3},
        {"strategy": "zero"},
    ],
)
def test_impossible_demo_of_ranks_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        RanksOptions(folder=tmp_path, memory_dir=tmp_path, **change)


def _jobs(folder: Path, strategy: str) -> list[Job]:
    common = {"folder": folder, "memory_dir": folder / "memory"}
    if strategy == "pipeline":
        return [pipeline.make_job(PipelineOptions(**common), name) for name in ("failing", "twin")]
    return [ranks.make_job(RanksOptions(**common, strategy=strategy), name) for name in ("failing", "twin")]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "expert", "pipeline"])
def test_both_jobs_run_the_same_configuration(tmp_path: Path, strategy: str) -> None:
    texts = [
        (job.folder / "config.yaml").read_text().replace(str(job.folder), "FOLDER") for job in _jobs(tmp_path, strategy)
    ]
    assert texts[0] == texts[1]
    assert "FOLDER/events.jsonl" in texts[0]
    assert "total_steps: 40" in texts[0]


def test_job_of_a_pipeline_logs_its_boundaries_and_says_how_much(tmp_path: Path) -> None:
    config = yaml.safe_load((_jobs(tmp_path, "pipeline")[0].folder / "config.yaml").read_text())
    names = [c["class_path"].rpartition(".")[2] for c in config["trainer"]["callbacks"]]
    assert names == ["SparseExpertCheckpoint", "StageBoundaryLogging", "LossRecorder", "FinalState", "BoundaryLogSize"]


@pytest.mark.parametrize("change", [{"steps": 20}, {"kill_rank": 3}, {"standby": -1}])
def test_impossible_demo_of_a_pipeline_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        PipelineOptions(folder=tmp_path, memory_dir=tmp_path, **change)


def test_help_shows_all_demonstrations(capsys: pytest.CaptureFixture[str]) -> None:
    for args, word in (
        (["demo", "--help"], "moetion demo ranks"),
        (["demo", "--help"], "moetion demo pipeline"),
        (["demo", "ranks", "--help"], "--strategy"),
        (["demo", "pipeline", "--help"], "--stage"),
    ):
        with pytest.raises(SystemExit) as done:
            main(args)
        assert done.value.code == 0
        assert word in capsys.readouterr().out


def _event(rank: int, pid: int, time: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"rank": rank, "pid": pid, "time": time, "event": kind, **fields}


_LOSS = [
    *(_event(rank, 10 + rank, 1.0, "IterationFinished", iteration=4) for rank in (0, 1, 2)),
    _event(0, 10, 5.01, "IterationFinished", iteration=5),  # the kill at 5.0 came during step 6 of the others
    _event(0, 10, 9.0, "RestoreStarted", tier="memory"),
    _event(2, 99, 9.0, "RestoreStarted", tier="memory of rank 0"),
    *(_event(rank, 99 if rank == 2 else 10, 9.1, "RestoreApplied", iteration=3, replay=1) for rank in (0, 2)),
    _event(0, 10, 9.5, "IterationFinished", iteration=4),
    _event(0, 10, 9.6, "ReplayFinished", verified=True),
    _event(2, 99, 10.0, "IterationFinished", iteration=5),
    _event(0, 10, 11.0, "IterationFinished", iteration=6),
]


def test_events_tell_the_recovery() -> None:
    found = Recovery.of(_LOSS, killed=2, kill_time=5.0)
    assert found.before == {0: 10, 1: 11, 2: 12}
    assert found.after == {0: 10, 1: 11, 2: 99}
    assert (found.reached, found.again, found.seconds, found.verified) == (5, 2, 6.0, True)
    assert found.tiers == {0: "memory", 2: "memory of rank 0"}


def test_recovery_without_a_newcomer_or_a_new_step_is_an_error() -> None:
    with pytest.raises(RunError, match="no process took the place of rank 1"):
        Recovery.of(_LOSS, killed=1, kill_time=5.0)
    with pytest.raises(RunError, match="no step after step 5"):
        Recovery.of(_LOSS[:-1], killed=2, kill_time=5.0)


_STAGE_LOSS = [
    *(_event(rank, 10 + rank, 1.0, "IterationFinished", iteration=14) for rank in (0, 1, 2)),
    *(_event(rank, 10 + rank, 9.0, "RestoreStarted", tier="live state") for rank in (0, 2)),
    _event(1, 99, 9.0, "RestoreStarted", tier="logs of its neighbours"),
    _event(
        1, 99, 9.5, "StageReplayFinished", stage=1, first_iteration=9, last_iteration=14, seconds=0.5, verified=True
    ),
    *(_event(rank, 99 if rank == 1 else 10 + rank, 9.6, "RestoreApplied", iteration=14) for rank in (0, 1, 2)),
    _event(1, 99, 10.0, "IterationFinished", iteration=15),
]


def _stage_rows(folder: Path, events: list[dict[str, Any]]) -> dict[str, str]:
    options = PipelineOptions(folder=folder, memory_dir=folder / "memory")
    job = pipeline.make_job(options, "failing")
    for rank in range(3):
        (job.folder / f"boundary-log-{rank}.json").write_text(json.dumps({"step_bytes": 10_000, "most_bytes": 1e6}))
    return dict(pipeline._table(options, job, Recovery.of(events, killed=1, kill_time=5.0)))


def test_table_of_a_lost_stage_says_who_replayed_what(tmp_path: Path) -> None:
    rows = _stage_rows(tmp_path, _STAGE_LOSS)
    assert rows["stage 0"] == "process 10: the same process; replayed 0 steps"
    assert rows["stage 1"] == "process 11: replaced by process 99; replayed 5 steps in 0.5 s, verified"
    assert rows["state of stage 1"] == "logs of its neighbours"
    assert rows["steps that the other stages did again"] == "0"
    assert rows["boundary log a step, by stage"] == "0.01 / 0.01 / 0.01 MB (most ever held: 1.0 MB)"


def test_lost_stage_that_did_not_recover_alone_is_an_error(tmp_path: Path) -> None:
    """A rollback of all stages is exact too, but not what is to be shown."""
    rolled_back = [event for event in _STAGE_LOSS if event["event"] != "StageReplayFinished"]
    with pytest.raises(RunError, match=r"stages \[\] were replayed .* expected stage 1 alone"):
        _stage_rows(tmp_path, rolled_back)


def test_replay_that_was_not_exact_is_told(tmp_path: Path) -> None:
    events = [{**event, "verified": False} if "verified" in event else event for event in _STAGE_LOSS]
    assert _stage_rows(tmp_path, events)["stage 1"].endswith("NOT verified")


def _write_run(job: Job, loss: float) -> None:
    for rank, (final, losses) in enumerate(zip(job.final, job.losses)):
        tensors = {"parameter:w": torch.full((3,), float(rank)), "optimizer:0:w:exp_avg": torch.zeros(3)}
        write_state(final, tensors, {"optimizer:0:group0:lr": "0x1p-3"})
        losses.write_text(json.dumps({"epoch": 0, "batch_idx": 0, "loss": loss.hex()}) + "\n")


@pytest.mark.parametrize("change", ["nothing", "parameter:w", "optimizer:0:w:exp_avg", "loss"])
def test_one_different_element_of_one_rank_is_not_equal(
    tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = RanksOptions(folder=tmp_path, memory_dir=tmp_path / "memory", ranks=2, kill_rank=1)
    failing, twin = ranks.make_job(options, "failing"), ranks.make_job(options, "twin")
    _write_run(failing, 1.0)
    _write_run(twin, 1.0)
    if change == "loss":
        twin.losses[1].write_text(json.dumps({"epoch": 0, "batch_idx": 0, "loss": (2.0).hex()}) + "\n")
    elif change != "nothing":
        tensors = {"parameter:w": torch.full((3,), 1.0), "optimizer:0:w:exp_avg": torch.zeros(3)}
        tensors[change][1] += 1e-7
        write_state(twin.final[1], tensors, {"optimizer:0:group0:lr": "0x1p-3"})
    assert finish([], compare(failing, twin)) == (0 if change == "nothing" else 1)
    out = capsys.readouterr().out
    assert ("NOT EQUAL" in out) == (change != "nothing")
    assert change in ("nothing", "loss") or f"{change}: 1 of 3 elements differ" in out
