"""The demonstration's own decisions; the demonstration itself is run in tests/integrations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moetion_lightning.demo import DemoOptions, _KillMidWindow, _Run, _Tail
from moetion_lightning.errors import ConfigurationError


def _capture(slot: int, num_slots: int = 4) -> dict[str, object]:
    return {"event": "CaptureFinished", "slot": slot, "num_slots": num_slots}


def test_kill_falls_into_the_middle_of_the_window_after_the_nth_commit() -> None:
    kill = _KillMidWindow(2)
    committed = {"event": "WindowCommitted"}
    assert not kill.watch([_capture(s) for s in range(4)] + [committed])
    assert not kill.watch([_capture(s) for s in range(4)])
    assert not kill.watch([committed, _capture(0)])
    assert kill.watch([{"event": "IterationFinished", "iteration": 10}, _capture(1)])
    assert kill.last_step == 10
    assert kill.due


def test_tail_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = _Tail(path)
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
        run = _Run(options, name)
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
