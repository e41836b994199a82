"""What users' hooks, attributes, loggers and checkpoints do in a run that is killed: as in the run that never was."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events, read_logs

RUNNER = {"runner": "tests.runs.users"}
KILLS: list[dict[str, Any]] = [{"hook": "backward", "step": 9}, {"hook": "backward", "step": 16}]
ONE = {"policy_args": {"window": 1}}

EXACT: dict[str, dict[str, Any]] = {
    "epoch-list": {"module": "epoch_list"},
    "epoch-list-window-1": {"module": "epoch_list", **ONE},
    "many-kinds": {"module": "many_kinds"},
    "many-kinds-window-1": {"module": "many_kinds", **ONE},
    "callback": {"module": "factored", "callbacks": ["users"]},
    "datamodule": {"module": "factored", "datamodule": True},
    "epoch-start": {"module": "epoch_start"},
    "filtered-checkpoints": {"module": "filtered"},
    "stripped-checkpoints-window-1": {"module": "stripped", **ONE},
    "entries-of-modules": {"module": "own_entries"},
    "best-and-last-files": {"savers": ["best"]},
    "best-and-last-files-window-1": {"savers": ["best"], **ONE},
    "files-of-one-folder": {"savers": ["fixed"]},
    "validated-first": {"savers": ["best"], "validated_first": True},
}


@pytest.mark.parametrize("name", EXACT)
def test_killed_run_ends_bitwise_equal(drill: Drill, name: str) -> None:
    spec = {**RUNNER, **EXACT[name]}
    killed = drill.killed(spec, KILLS)
    assert differences(drill.reference(spec), killed) == []
    finished = read_events(killed, "ReplayFinished")
    assert len(finished) >= 2, "nothing was restored: the test shows nothing"
    assert all(event["verified"] for event in finished)


@pytest.mark.parametrize("name", ["epoch-list", "many-kinds-window-1", "callback", "datamodule"])
def test_lost_attributes_are_noticed(drill: Drill, name: str) -> None:
    spec = {**RUNNER, **EXACT[name]}
    killed = drill.killed(spec, KILLS[:1], **{"break": "attributes"})
    assert differences(drill.reference(spec), killed)


def test_attribute_that_cannot_be_stored_is_named_once_and_only_if_it_changes(drill: Drill) -> None:
    killed = drill.killed({**RUNNER, **EXACT["callback"]}, KILLS[:1])
    said = [e["message"] for e in read_events(killed, "Notice") if "cannot be stored" in e["message"]]
    assert len(said) == 2, "once in each process"
    assert "the attribute 'handle' of Users changes while training" in said[0]
    assert not [name for name in ("lock", "late") if name in " ".join(said)]


# --- loggers ---------------------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


LOGGED: dict[str, dict[str, Any]] = {
    "csv": {"logger": "csv", "callbacks": ["rates"]},
    "csv-window-1": {"logger": "csv", "callbacks": ["rates"], **ONE},
    "csv-of-a-fixed-folder": {"logger": "csv_fixed", "savers": ["every"]},
}


@pytest.mark.parametrize("name", LOGGED)
def test_rows_of_the_whole_run_are_in_one_file(drill: Drill, name: str) -> None:
    spec = {**RUNNER, **LOGGED[name]}
    killed, whole = drill.killed(spec, KILLS), drill.reference(spec)
    assert differences(whole, killed) == []
    (path,) = whole.rglob("metrics.csv")
    assert rows(killed / path.relative_to(whole)) == rows(path)
    assert len(list(killed.rglob("metrics.csv*"))) == 1
    assert len(read_events(killed, "ReplayFinished")) == 2


def test_tensorboard_goes_on_in_its_version(drill: Drill) -> None:
    out = drill.killed({**RUNNER, "savers": ["every"]}, KILLS[:1])
    assert [path.name for path in (out / "lightning_logs").iterdir()] == ["version_0"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "lightning_logs/version_0")).Reload()
    assert [event.step for event in events.Scalars("train_loss_step")] == list(range(21))


def test_run_of_a_remote_service_goes_on(drill: Drill) -> None:
    spec = {**RUNNER, "logger": "remote"}
    killed, whole = drill.killed(spec, KILLS[:1]), drill.reference(spec)
    assert [path.name for path in killed.glob("run*")] == ["run0"]
    logged, expected = [
        {(e["step"], *e): e for e in map(json.loads, (out / "run0").read_text().splitlines())}
        for out in (killed, whole)
    ]
    assert logged == expected


# --- bars ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
@pytest.mark.parametrize("limits", [{}, {"epochs": -1, "max_steps": 12}], ids=["epochs", "steps"])
def test_bar_of_a_continued_epoch_is_that_of_the_whole_one(drill: Drill, bar: str, limits: dict[str, Any]) -> None:
    spec = {**RUNNER, "callbacks": [bar, "bar_notes"], **limits}
    killed, whole = drill.killed(spec, KILLS[:1]), drill.reference(spec)
    shown, expected = [dict(map(json.loads, (out / "bar.jsonl").read_text().splitlines())) for out in (killed, whole)]
    assert shown == expected
    assert len(read_events(killed, "ReplayFinished")) == 1


# --- files -----------------------------------------------------------------------------------------------------------


def test_file_that_a_replay_would_skip_is_written_if_it_is_not_there(drill: Drill) -> None:
    spec = {**RUNNER, "savers": ["every"], "epochs": 1, "callbacks": ["remove"], "max_steps": 7}
    kill = {"hook": "backward", "step": 5, "committed": {"last_iteration": 4}}
    out = drill.killed({**spec, "savers": ["fixed"]}, [kill])
    assert len(read_events(out, "ReplayFinished")) == 1
    assert sorted(path.name for path in (out / "fixed").iterdir()) == ["epoch=0-step=3.ckpt", "epoch=0-step=6.ckpt"]
    assert "epoch=0-step=3.ckpt is written when the replay" in read_logs(out)


def test_requeue_in_a_replay_waits_for_the_whole_state(drill: Drill) -> None:
    import torch

    spec = {**RUNNER, "signal_at": 7}
    out = drill.killed(spec, [{"hook": "backward", "step": 9, "committed": {"last_iteration": 8}}])
    (path,) = out.glob("hpc_ckpt_*.ckpt")
    saved = torch.load(path, weights_only=False)
    assert saved["global_step"] == 8
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 1
    assert (out / "scontrol.txt").read_text() == "requeue 7\n"
    assert "is handled when the replay" in read_logs(out)
    assert differences(drill.reference(spec), out) == []


@pytest.mark.parametrize(("kind", "step"), [("fixed", 9), ("none", 9), ("fixed", 2)])
def test_users_own_command_line_is_started_again(drill: Drill, kind: str, step: int) -> None:
    spec = {**RUNNER, "cli": kind}
    killed = drill.killed(spec, [{"hook": "backward", "step": step}])
    assert differences(drill.reference(spec), killed) == []
    assert len(read_events(killed, "ReplayFinished")) == (1 if step == 9 else 0)
    assert len(list(killed.rglob("config*.yaml"))) == 1


def test_changed_configuration_is_written_beside_the_older_one(drill: Drill) -> None:
    out = drill.killed({**RUNNER, "cli": "fixed"}, KILLS[:1], rate=0.01)
    assert sorted(path.name for path in (out / "x/version_0").glob("config*")) == ["config-before.yaml", "config.yaml"]
    assert "the configuration has changed since the run began" in read_logs(out)
