"""`moetion demo`, `demo ranks` and `demo pipeline`, end to end.

Of one process, what is killed runs as the user starts it; of several, `moetion launch` and its ranks are forks of a
process that has imported everything. The undisturbed twin, with which it is compared bit by bit, is forked, too, and
its ranks by an ordinary elastic agent's rules.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from moetion_lightning.cli import main
from moetion_lightning.demo import job, single
from moetion_lightning.testing import processes as running
from moetion_lightning.testing.processes import run_child
from tests.command import Forked
from tests.runs import forked, program
from tests.runs.drill import Zygote, read_logs
from tests.runs.ranks import elastic_environments

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def forked_twins(zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that were forked."""
    forked: list[str] = []

    def run(arguments: Sequence[str], log: Path, look: Callable[[], bool]) -> int:
        folder = log.parent
        if folder.name != "twin":
            return run_child(arguments, log, look)
        forked.append(folder.name)
        fit = ["-m", "moetion_lightning", *arguments[arguments.index("fit") :]]
        ranks = int(arguments[arguments.index("--nproc-per-node") + 1]) if "launch" in arguments else 1
        logs = [folder / f"log-{rank}" for rank in range(ranks)]
        given = elastic_environments(ranks, "twin") if ranks > 1 else [{}]
        ended = zygote.run_group([program.spec(folder, *fit)] * ranks, logs, given, timeout_seconds=120)
        log.write_text(read_logs(folder))
        look()
        return int(not ended.good)

    monkeypatch.setattr(job, "run_child", run)
    monkeypatch.setattr(single, "run_child", run)
    return forked


@pytest.fixture
def forked_launcher(zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    def popen(command: list[str], *, stdout: BinaryIO, stderr: int, env: dict[str, str], cwd: Path) -> Forked:
        return Forked(zygote, forked.spec(*command[3:], folder=cwd), Path(stdout.name), env)

    monkeypatch.setattr(running, "subprocess", SimpleNamespace(Popen=popen, STDOUT=subprocess.STDOUT))


def demonstrate(capsys: pytest.CaptureFixture[str], folder: Path, forked: list[str], *arguments: str) -> str:
    status = main(["demo", *arguments, "--dir", str(folder)])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "bitwise equal: parameters, optimizer state, losses" in out
    assert forked == ["twin"]
    assert (folder / "failing" / "events.jsonl").exists()
    return out


FEW = ["--steps", "14", "--window", "3", "--kill-after-windows", "1"]


def test_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str], forked_twins: list[str]) -> None:
    demonstrate(capsys, tmp_path / "demo", forked_twins, "--small", *FEW)


@pytest.mark.usefixtures("forked_launcher")
def test_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str], forked_twins: list[str]) -> None:
    """A rank is killed and replaced, the other lives on."""
    out = demonstrate(capsys, tmp_path / "demo", forked_twins, "ranks", "--ranks", "2", *FEW)
    state = "state: (live state|host memory)"  # which of them: at which instant the signal came
    assert re.search(rf"rank 0 +process \d+: the same process; {state}", out), out
    assert re.search(rf"rank 1 +process \d+: replaced by process \d+; {state}", out), out
    assert re.search(r"seconds from the kill to the next new step +\d", out), out


@pytest.mark.usefixtures("forked_launcher")
def test_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str], forked_twins: list[str]) -> None:
    """A stage is killed, and it alone is replayed from its neighbours' logs."""
    out = demonstrate(capsys, tmp_path / "demo", forked_twins, "pipeline", *FEW)
    for stage in (0, 2):
        assert re.search(rf"stage {stage} +process \d+: the same process; replayed 0 steps\n", out), out
    replaced = r"stage 1 +process \d+: replaced by process \d+; replayed [1-9] steps in [\d.]+ s, verified\n"
    assert re.search(replaced, out), out
    assert re.search(r"state of stage 1 +.*neighbours' logs.*host memory", out), out
    assert re.search(r"seconds from the kill to the next new step +\d", out), out
    assert re.search(r"boundary log a step, by stage +0\.\d+ / 0\.\d+ / 0\.\d+ MB", out), out
