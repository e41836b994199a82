"""`moetion demo`, end to end, with the recipe's small model."""

from __future__ import annotations

from pathlib import Path

import pytest

from moetion_lightning.cli import main


@pytest.mark.slow
def test_demo_ends_bitwise_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    status = main(
        ["demo", "--small", "--steps", "30", "--window", "4", "--kill-after-windows", "3", "--dir", str(folder)]
    )
    out = capsys.readouterr().out
    assert status == 0, out
    assert "bitwise equal: parameters, optimizer state, losses" in out
    assert (folder / "failing" / "events.jsonl").exists()
