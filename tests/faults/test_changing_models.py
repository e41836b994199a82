"""Parameters that come, go, or do not train for a while: restored exactly, or refused in words; training never ends."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs.drill import Drill, differences, read_events, read_logs

KILL = {"hook": "backward", "step": 17}

EXACT: dict[str, dict[str, Any]] = {
    "lazy": {"module": "lazy"},
    "growing": {"module": "growing", "scheduler": ""},
    "shrinking": {"module": "shrinking"},
    "alternating": {"module": "alternating"},
    "resting": {"module": "resting", "clip": 0},
}


@pytest.mark.parametrize("name", EXACT)
def test_killed_run_ends_bitwise_equal(drill: Drill, name: str) -> None:
    killed = drill.killed(EXACT[name], [KILL])
    assert differences(drill.reference(EXACT[name]), killed) == []
    assert read_events(killed, "RestoreApplied")
    assert all(event["verified"] for event in read_events(killed, "ReplayFinished"))


def test_killed_where_nothing_trains(drill: Drill) -> None:
    killed = drill.killed(EXACT["resting"], [{"hook": "batch_end", "step": 12, "committed": {"first_iteration": 8}}])
    assert differences(drill.reference(EXACT["resting"]), killed) == []
    (applied,) = read_events(killed, "RestoreApplied")
    assert applied["iteration"] > 7


def test_window_of_a_model_that_grew_is_refused_in_words(drill: Drill) -> None:
    spec = {"module": "growing_unawares"}
    out = drill._directory("unawares")
    memory = drill.memory_dir / out.name
    memory.mkdir(mode=0o700)
    common = {**spec, "memory_dir": str(memory)}
    drill.start({**common, "kill": KILL}, out)
    notices = [event["message"] for event in read_events(out, "Notice")]
    assert any("parameters joined while training (adapter.bias, adapter.weight)" in m for m in notices)
    ended = drill.start(common, out)
    assert ended.codes == [1]
    assert "It joined the model while that run trained: Add it before training begins." in read_logs(out)
