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
    assert "lock" not in said[0]
