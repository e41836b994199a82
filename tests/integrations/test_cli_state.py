"""`moetion jobs`, `inspect` and `clean` on what a killed run really left."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from moetion_lightning.cli import main
from tests.command import Forked
from tests.runs import program
from tests.runs.drill import Zygote


@pytest.fixture
def killed_run(memory_dir: Path, tmp_path: Path, zygote: Zygote) -> Path:
    """The memory directory of a run that was killed after its first committed window."""
    environment = {**os.environ, "MOETION_MEMORY_DIR": str(memory_dir), "MOETION_JOB_ID": "killed"}
    command = ["-m", "moetion_lightning", "fit", "--config", "recipe:tiny_moe_cpu"]
    command += ["--trainer.max_steps", "5000", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    log = tmp_path / "log"
    deadline = time.monotonic() + 120
    child = Forked(zygote, program.spec(tmp_path, *command), log, environment)
    try:
        windows = memory_dir / "killed" / "rank-00000" / "windows"
        while not (windows.is_dir() and any(windows.glob("[0-9]*.json"))):
            assert child.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "no window was committed"
            time.sleep(0.02)
    finally:
        child.kill()
        child.wait()
    return memory_dir


def test_state_of_a_killed_run_is_listed_inspected_and_cleaned(
    killed_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = str(killed_run)
    assert main(["jobs", "--memory-dir", memory]) == 0
    listed = capsys.readouterr().out.splitlines()[1].split()
    assert listed[:3] == ["killed", "rank-00000", "dead"]
    assert main(["jobs", "--memory-dir", memory, "--json"]) == 0
    (job,) = json.loads(capsys.readouterr().out)
    assert (job["name"], job["rank_name"], job["alive"]) == ("killed", "rank-00000", False)

    assert main(["inspect", memory]) == 0
    assert "verified" in capsys.readouterr().out
    assert main(["inspect", memory, "--json"]) == 0
    (root,) = json.loads(capsys.readouterr().out)["roots"]
    assert root["windows"][0]["last_iteration"] == job["windows"][0]

    assert main(["clean", "--memory-dir", memory]) == 0  # too young: it may be started again
    assert "0 removed, 1 left" in capsys.readouterr().out

    largest = max((p for p in killed_run.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    committed = [p for p in killed_run.rglob("*") if p.is_file() and p.stat().st_size > largest.stat().st_size // 4]
    for path in committed:
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    assert main(["inspect", memory]) == 1
    capsys.readouterr()

    assert main(["clean", "--memory-dir", memory, "--older-than", "0", "--dry-run"]) == 0
    assert "1 found" in capsys.readouterr().out
    assert main(["clean", "--memory-dir", memory, "--older-than", "0"]) == 0
    assert "1 removed, 0 left" in capsys.readouterr().out
