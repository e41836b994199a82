"""Windows of several ranks are never taken for the whole: one process alone refuses them, and says what to start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moetion_lightning.storage.manifest import Manifest
from tests.runs.drill import Drill, read_logs
from tests.runs.ranks import Ended

pytestmark = pytest.mark.slow

DDP: dict[str, Any] = {"ranks": 2, "strategy": "ddp", "samples": 24, "epochs": 6, "block": "fused"}


def restarted(drill: Drill, change: Any = lambda memory: None, **last: Any) -> tuple[Ended, str]:
    """A run of two ranks that is killed, and another start of the same job."""
    out = drill._directory("ranks")
    memory = drill.memory_dir / out.name
    memory.mkdir(mode=0o700)
    common = {**DDP, "memory_dir": str(memory)}
    assert not drill.start({**common, "kill": {"hook": "backward", "step": 9}}, out).good
    change(memory)
    return drill.start({**common, **last}, out), read_logs(out)


def test_one_process_refuses_the_windows_of_two_ranks(drill: Drill) -> None:
    ended, said = restarted(drill, ranks=1, strategy="")
    assert ended.codes == [1]
    assert "is of a run with 2 ranks, each of which holds a part of the state; this one has 1" in said
    assert "start as many as before" in said


def edit(change: Any) -> Any:
    """Manifests of rank 0 are written anew."""

    def work(memory: Path) -> None:
        paths = list(memory.glob("*/rank-00000/windows/*.json"))
        assert paths
        for path in paths:
            path.write_bytes(change(Manifest.from_bytes(path.read_bytes(), path=path)).to_bytes())

    return work


def without_an_operator(manifest: Manifest) -> Manifest:
    """As if one operator had been in nobody's share."""
    slots = [
        {**slot, "active": [i for i in slot["active"] if i != 0], "frozen": [i for i in slot["frozen"] if i != 0]}
        for slot in manifest.slots
    ]
    return dataclasses.replace(manifest, slots=slots)


def test_ranks_refuse_a_window_that_lacks_an_operator(drill: Drill) -> None:
    ended, said = restarted(drill, edit(without_an_operator))
    assert not ended.good
    assert "StateLostError" in said
    assert "Nothing was restored. Start 2 ranks, as before" in said
