"""`moetion demo ranks`, end to end: a rank is killed and replaced, the other lives on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moetion_lightning.cli import main


@pytest.mark.slow
def test_demo_of_ranks_ends_bitwise_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    few = ["--ranks", "2", "--steps", "14", "--window", "3", "--kill-after-windows", "1"]
    status = main(["demo", "ranks", *few, "--dir", str(folder)])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "bitwise equal: parameters, optimizer state, losses" in out
    state = "state: (live state|host memory)"  # which of them: at which instant the signal came
    assert re.search(rf"rank 0 +process \d+: the same process; {state}", out), out
    assert re.search(rf"rank 1 +process \d+: replaced by process \d+; {state}", out), out
    assert re.search(r"seconds from the kill to the next new step +\d", out), out
