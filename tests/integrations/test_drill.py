"""`moetion drill`, end to end: every start of the script is a fork of a process that has imported everything."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from moetion_lightning.cli import main
from moetion_lightning.testing import processes
from tests.command import Forked
from tests.runs import counting_script, program
from tests.runs.drill import Zygote

pytestmark = pytest.mark.slow


@pytest.fixture
def script(zygote: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user with one script."""

    def popen(command: Sequence[str], *, stdout: BinaryIO, stderr: int, env: dict[str, str], cwd: Path) -> Forked:
        return Forked(zygote, program.spec(cwd, *command[1:]), Path(stdout.name), env)

    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=popen, STDOUT=subprocess.STDOUT))
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Path(shutil.copy(counting_script.__file__, folder / "train.py"))


def test_drill_proves_a_script_and_finds_the_step_in_which_a_global_counter_shows(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = ["--kills", "2", "--phase", "anytime", "--phase", "replay", "--steps", "24", "--seed", "1"]
    out, kept = tmp_path / "page.md", tmp_path / "kept"
    status = main(["drill", *kills, "--keep", str(kept), "--out", str(out), "--", "train.py"])
    said = capsys.readouterr().out
    assert status == 0, said
    assert "EXACT: after 2 kills" in said
    assert "in which nothing of this package takes part" in said
    assert "EXACT" in out.read_text()
    assert list(script.parent.iterdir()) == [script], "nothing is written into the user's folder"
    assert main(["diff", str(kept / "disturbed"), str(kept / "twin")]) == 0
    capsys.readouterr()

    assert main(["drill", *kills, "--json", "--", "train.py", "--count"]) == 1
    page = json.loads(capsys.readouterr().out)
    found, first = page["divergence"], page["restarts"][0]
    assert (found["quantity"], found["rank"], found["start"] > 1) == ("inputs", 0, True)
    assert first["step"] < found["step"] <= first["reached"] + 1, "at once behind the first restart"
    assert "losses" not in found["equal"]
    assert "global" in page["remedy"]


_FAULTY = """
import lightning.pytorch as pl
from moetion_lightning import SparseExpertCheckpoint
from moetion_lightning.testing import FaultInjection
from tests.runs.counting_script import Net, Samples, torch

callbacks = [FaultInjection(at=9, point=point) for point in ("backward", "restore")]
callbacks.append(SparseExpertCheckpoint(job_id="faulty"))
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = pl.Trainer(max_steps=12, accelerator="cpu", callbacks=callbacks, **quiet)
trainer.fit(Net(), torch.utils.data.DataLoader(Samples(), batch_size=2))
print("ended at", trainer.global_step)
"""


def test_injected_faults_kill_once_each_and_the_third_start_passes(
    zygote: Zygote, tmp_path: Path, memory_dir: Path
) -> None:
    """In a backward pass; then, in the restarted run, when a restore point was chosen."""
    log = tmp_path / "log"
    spec = program.spec(tmp_path, "-c", _FAULTY)
    codes = [zygote.run_group([spec], [log], [{"MOETION_MEMORY_DIR": str(memory_dir)}]).codes[0] for _ in range(3)]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0], log.read_text()
    assert "ended at 12" in log.read_text()
    assert {path.name for path in tmp_path.glob(".moetion-fault-*")} == {
        ".moetion-fault-backward-9-0",
        ".moetion-fault-restore-9-0",
    }
