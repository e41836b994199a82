"""`moetion punish`: random kills of a job's own processes, and of no others."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moetion_lightning.cli import main
from moetion_lightning.commands.punish import Punishment, parse_rate
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.storage.holder import holder_of
from moetion_lightning.storage.jobs import find_jobs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")

_HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("holds", flush=True)
sys.stdin.read()
"""


class Rank:
    """A process that holds the lock of a rank's directory, as a training does."""

    def __init__(self, base: Path, rank: int = 0, job: str = "mine") -> None:
        self.folder = base / job / f"rank-{rank:05d}"
        self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        command = [sys.executable, "-S", "-c", _HOLD, str(self.folder / "lock")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "holds\n"
        self.note(self.process.pid)

    def note(self, pid: int) -> None:
        (self.folder / "job.json").write_text(json.dumps({"pid": pid, "created": time.time()}))

    def end(self) -> int:
        self.process.communicate()
        return self.process.returncode


@pytest.fixture
def base(memory_dir: Path) -> Path:
    """Of host memory."""
    return memory_dir


@pytest.fixture
def rank(base: Path) -> Iterator[Rank]:
    made = Rank(base)
    yield made
    made.end()


def punishment(base: Path, **changed: Any) -> Punishment:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += max(seconds, 0.01)

    given = {"job": "mine", "per_second": 1.0, "duration_seconds": 3.0, "grace_seconds": 1.0, "say": lambda text: None}
    look = lambda: [info for info in find_jobs(base) if info.name == "mine"]  # noqa: E731
    return Punishment(look=look, clock=lambda: now[0], sleep=sleep, **{**given, **changed})


def test_without_yes_it_only_says_whom_and_when(base: Path, rank: Rank, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["punish", "mine", "--rate", "600/h", "--seed", "1", "--memory-dir", str(base)]) == 0
    said = capsys.readouterr().out
    assert f"rank-00000 (process {rank.process.pid}); seed 1" in said
    assert "would kill a random rank" in said
    assert rank.process.poll() is None


def test_rank_is_killed_and_then_the_job_is_gone(base: Path, rank: Rank) -> None:
    said: list[str] = []
    found = punishment(base, duration_seconds=60.0, say=said.append)
    assert len(found.times()) > 1
    assert found.times() == punishment(base, duration_seconds=60.0).times()
    assert not found.carry_out(), "nothing started it again"
    assert rank.end() == -signal.SIGKILL
    assert [holder.rank_name for holder in found.killed] == ["rank-00000"]
    assert said[-1] == "job mine had no live rank for 1 s (--grace); 1 kill"


def test_a_process_without_the_lock_is_never_killed(base: Path, rank: Rank) -> None:
    """The note may be old, and its number another process's by now."""
    bystander = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        rank.note(bystander.pid)
        assert punishment(base).ranks() == []
        assert not punishment(base).carry_out()
        assert bystander.poll() is None
        assert rank.process.poll() is None
    finally:
        bystander.communicate()


def test_a_holder_that_has_ended_meanwhile_is_left_alone(base: Path, rank: Rank) -> None:
    holder = holder_of(find_jobs(base)[0])
    assert holder is not None
    rank.end()
    assert not holder.kill()


def test_in_the_commit_phase_it_waits_for_the_next_window(base: Path, rank: Rank) -> None:
    said: list[str] = []
    assert not punishment(base, phase="commit", say=said.append).carry_out()
    assert said == ["job mine committed no window for 1 s (--grace); 0 kills"]
    assert rank.process.poll() is None, "no window was committed"


def test_a_stop_says_how_many_were_killed(
    base: Path, rank: Rank, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Punishment) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(Punishment, "carry_out", interrupted)
    assert main(["punish", "mine", "--yes", "--memory-dir", str(base)]) == 130
    assert capsys.readouterr().out.endswith("stopped; 0 kills\n")


def test_no_time_is_refused(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["punish", "mine", "--duration", "0", "--memory-dir", str(base)]) == 2
    assert "--duration 0: expected more than no time" in capsys.readouterr().err


def test_job_that_does_not_live_is_refused(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["punish", "mine", "--memory-dir", str(base)]) == 2
    assert "no process of this user holds the lock of job 'mine'" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [("6/h", 600), ("1/10m", 600), ("0.5/s", 2), ("2/d", 43200)])
def test_rate_is_kills_for_a_time(text: str, seconds: float) -> None:
    assert 1 / parse_rate(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["6", "0/h", "h", "6/y", "1/0m", "-1/h"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="expected a number for a time"):
        parse_rate(text)
