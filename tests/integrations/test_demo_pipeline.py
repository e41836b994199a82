"""`moetion demo pipeline`, end to end: a stage is killed, and it alone is replayed from its neighbours' logs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moetion_lightning.cli import main


@pytest.mark.slow
def test_demo_of_a_pipeline_ends_bitwise_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    few = ["--steps", "14", "--window", "3", "--kill-after-windows", "1"]
    status = main(["demo", "pipeline", *few, "--dir", str(folder)])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "bitwise equal: parameters, optimizer state, losses" in out
    for stage in (0, 2):
        assert re.search(rf"stage {stage} +process \d+: the same process; replayed 0 steps\n", out), out
    replaced = r"stage 1 +process \d+: replaced by process \d+; replayed [1-9] steps in [\d.]+ s, verified\n"
    assert re.search(replaced, out), out
    assert re.search(r"state of stage 1 +.*neighbours' logs.*host memory", out), out
    assert re.search(r"seconds from the kill to the next new step +\d", out), out
    assert re.search(r"boundary log a step, by stage +0\.\d+ / 0\.\d+ / 0\.\d+ MB", out), out
