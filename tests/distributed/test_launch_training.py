"""An ordinary Lightning script under `moetion launch` and under torchrun: real processes, killed and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from moetion_lightning.testing.compare import compare_states
from tests.runs import program
from tests.runs.drill import Zygote
from tests.runs.drill import start as run
from tests.runs.references import References

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "workers" / "lightning_job.py"
STEPS = 40
LIMIT_SECONDS = 90.0
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3", "--monitor-interval=0.1")

pytestmark = pytest.mark.slow


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def pids_of(folder: Path) -> list[list[int]]:
    """The processes of both ranks that finished steps, in order."""
    found: list[list[int]] = [[], []]
    for event in events_of(folder, "IterationFinished"):
        if event["pid"] not in found[event["rank"]]:
            found[event["rank"]].append(event["pid"])
    return found


class Training:
    """One start of the script by a launcher.

    Args:
        folder: Where its ranks write.
        launcher: Module and arguments that start the ranks.
        arguments: Further arguments of the script.
        go: Whether training may begin at once.
    """

    def __init__(self, folder: Path, launcher: tuple[str, ...], *arguments: object, go: bool = True) -> None:
        self.folder = folder
        folder.mkdir()
        if go:
            self.go()
        command = [sys.executable, "-m", *launcher, SCRIPT, folder, STEPS, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def go(self) -> None:
        (self.folder / "go").touch()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return events_of(self.folder, kind)

    def pids(self) -> list[list[int]]:
        return pids_of(self.folder)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert self.process.poll() is None, f"it ended before there were {what}\n{self.log}"
            assert time.monotonic() < deadline, f"no {what}\n{self.log}"
            time.sleep(0.01)

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank in the midst of training."""
        self.until(lambda: len(self.events("WindowCommitted")) >= 4, "windows")
        os.kill(self.pids()[rank][0], number)

    def finish(self) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"no end within {LIMIT_SECONDS:.0f} s\n{self.log}"
            time.sleep(0.05)
        assert self.process.returncode == 0, self.log

    def differences(self, other: Path) -> list[str]:
        names = [f"final-{rank}.safetensors" for rank in (0, 1)]
        results = [compare_states(self.folder / name, other / name) for name in names]
        assert all(result.compared > 50 for result in results)
        return [difference for result in results for difference in result.differences]

    def end(self) -> None:
        if self.process.poll() is None:
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                process.kill()
            self.process.wait()


Start = Callable[..., Training]


def launch(*options: object) -> tuple[str, ...]:
    return ("moetion_lightning", "launch", "--nproc-per-node", "2", *map(str, options))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Training] = []

    def begin(*args: Any, **kwargs: Any) -> Training:
        started.append(Training(tmp_path / f"run{len(started)}", *args, **kwargs))
        return started[-1]

    yield begin
    for training in started:
        training.end()


@pytest.fixture
def reference(zygote: Zygote, references: References) -> Path:
    """Folder of the job that is never disturbed."""

    def make(folder: Path) -> None:
        (folder / "go").touch()
        run(zygote, {**program.spec(folder, SCRIPT, folder, STEPS), "ranks": 2}, folder, LIMIT_SECONDS)
        assert [len(pids) for pids in pids_of(folder)] == [1, 1]

    return references.get("lightning job", make)


def test_killed_rank_is_replaced_and_the_other_lives_on(start: Start, reference: Path) -> None:
    training = start(launch())
    training.signal(1, signal.SIGKILL)
    training.finish()
    assert [len(pids) for pids in training.pids()] == [1, 2]
    assert training.differences(reference) == []


def test_hung_rank_is_replaced(start: Start, reference: Path) -> None:
    training = start(launch("--hang-timeout", 3))
    training.signal(1, signal.SIGSTOP)
    training.finish()
    assert "rank 1: hung: no heartbeat for 3 s" in training.log
    assert len(training.pids()[1]) == 2
    assert training.differences(reference) == []


def test_warm_standby_takes_over(start: Start, reference: Path) -> None:
    training = start(launch("--standby", 1), go=False)
    training.until(lambda: "stands by" in training.log, "standbys")
    training.go()
    training.signal(0, signal.SIGKILL)
    training.finish()
    survivors, replacement = training.pids()[1], training.pids()[0][1]
    assert len(survivors) == 1
    assert f"process {replacement} stands by" in training.log
    assert training.differences(reference) == []


def test_torchrun_restarts_all_ranks_and_they_continue(start: Start, reference: Path) -> None:
    training = start(TORCHRUN, 23)
    training.finish()
    assert [len(pids) for pids in training.pids()] == [2, 2]
    assert all(16 <= event["first_iteration"] <= 22 for event in training.events("RestoreStarted"))
    assert training.differences(reference) == []
