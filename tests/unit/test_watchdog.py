"""Signs of life, and who hangs."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from moetion_lightning.distributed.progress import STACKS_SIGNAL, Report, Section, State
from moetion_lightning.distributed.watchdog import (
    DEFAULT_LIMITS,
    Limits,
    Sign,
    Standing,
    Watch,
    behind_all,
    parse_limits,
)
from moetion_lightning.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[2]


class Life:
    """A process that is made up: its numbers, and the watch over them."""

    def __init__(self, limits: Limits, **values: object) -> None:
        given = {
            "state": State.RUNNING, "ticks": 1, "beats": 1, "section": Section.STEP, "changes": 1, "iteration": 7,
            "collectives": 3, "waits": False, "stage": 1,
        }  # fmt: skip
        self.report = SimpleNamespace(**{**given, **values})
        self.watch = Watch(self.report, limits)  # type: ignore[arg-type]
        self.watch.look(0.0)

    def live(self, seconds: float, *counting: str) -> str | None:
        """Look once a second, while these numbers grow."""
        for _ in range(int(seconds)):
            for name in counting:
                setattr(self.report, name, getattr(self.report, name) + 1)
            self.watch.look(1.0)
        return self.watch.complaint()


@pytest.fixture
def limits() -> Limits:
    return Limits(parse_limits("start=100,step=10,validation=30,save=50"))


def test_main_thread_that_runs_python_is_alive(limits: Limits) -> None:
    life = Life(limits)
    assert life.live(90, "ticks", "beats") is None
    assert life.live(9, "ticks") is None
    assert "its main thread runs no Python code" in (life.live(2, "ticks") or "")
    assert "nothing of it runs" in (life.live(60) or "")
    assert life.live(1, "ticks", "beats", "changes") is None


def test_each_section_has_a_limit(limits: Limits) -> None:
    for section, seconds in ((Section.VALIDATION, 30), (Section.SAVE, 50), (Section.START, 100)):
        life = Life(limits, section=section)
        assert life.live(seconds, "ticks") is None
        assert f"in section {section.name.lower()!r}" in (life.live(2, "ticks") or "")


def test_iteration_that_never_ends_though_python_runs(limits: Limits) -> None:
    """A loop that polls, as a DataLoader does whose worker hangs."""
    life = Life(limits)
    assert life.live(100, "ticks", "beats") is None
    assert "iteration 7 takes longer" in (life.live(2, "ticks", "beats") or "")


def test_limits_learn_from_silences_that_ended_well(limits: Limits) -> None:
    life = Life(limits)
    life.live(8, "ticks")
    life.live(1, "ticks", "beats")
    assert limits.of(Section.STEP) == 80.0
    assert limits.of(Section.SAVE) == 50.0
    assert life.live(79, "ticks") is None


def test_first_iteration_shows_how_long_the_others_may_be_silent(limits: Limits) -> None:
    life = Life(limits, section=Section.START, iteration=0)
    assert life.live(40, "ticks") is None
    life.live(1, "ticks", "beats", "changes")
    assert limits.of(Section.STEP) == 80.0, "twice that: it compiles, too"


def test_wait_for_a_lost_rank_teaches_nothing(limits: Limits) -> None:
    life = Life(limits)
    life.live(8, "ticks")
    life.watch.disturb()
    life.live(8, "ticks")
    life.live(1, "ticks", "beats", "changes")
    assert limits.of(Section.STEP) == 10.0


@pytest.mark.parametrize("values", [{"state": State.DONE}, {"waits": True}])
def test_silence_that_is_announced_is_no_hang(limits: Limits, values: dict[str, object]) -> None:
    assert Life(limits, **values).live(1000, "ticks") is None


def test_imports_have_time(limits: Limits) -> None:
    assert Life(limits, beats=0, ticks=0, changes=0, section=Section.START).live(800) is None


def hung(lives: list[Life], *elsewhere: Standing) -> list[int]:
    return behind_all({n: life.watch.standing() for n, life in enumerate(lives)}, elsewhere)


def test_only_who_is_behind_is_shot(limits: Limits) -> None:
    lives = [Life(limits, collectives=number) for number in (4, 3, 4)]  # all but one have begun the next collective
    for life in lives:
        life.live(20, "ticks")
    assert hung(lives) == [1]
    lives[2].report.iteration = 6
    assert hung(lives) == [2]
    assert hung(lives, (1, 6, 2, Sign.WORKS)) == [], "a rank of another node is behind them all, and may be at work"
    assert hung(lives, (1, 6, 2, Sign.FROZEN)) == [], "its own node shoots it"
    assert hung(lives, (1, 6, 2, Sign.WAITS)) == [2]


@pytest.mark.parametrize("collectives", [3, 4])
def test_who_waits_for_one_that_works_is_not_shot(limits: Limits, collectives: int) -> None:
    """Also where collectives of groups of its own are not counted."""
    lives = [Life(limits, collectives=collectives), Life(limits)]
    lives[0].live(50, "ticks")
    lives[1].live(50, "ticks", "beats")
    assert hung(lives) == []
    assert hung(lives[:1], lives[1].watch.standing()) == []


def test_rank_that_is_seen_to_hang_first_is_not_shot_for_another_one(limits: Limits) -> None:
    """Who waits is silent a little earlier than who was stopped before it came to the same collective."""
    lives = [Life(limits), Life(limits)]
    lives[1].live(1, "ticks", "beats")
    lives[0].live(11, "ticks")
    lives[1].live(10)
    assert hung(lives) == []
    lives[1].live(1)
    assert hung(lives) == [1]


def test_who_waits_for_the_control_plane_does_not_hide_who_hangs(limits: Limits) -> None:
    lives = [Life(limits, waits=True), Life(limits)]
    for life in lives:
        life.live(20, "ticks")
    assert hung(lives) == [1]


def test_stopped_process_is_shot_before_those_that_are_as_far(limits: Limits) -> None:
    lives = [Life(limits), Life(limits)]
    lives[0].live(20, "ticks")
    lives[1].live(20)
    assert hung(lives) == [1]
    assert hung(lives[:1], lives[1].watch.standing()) == [], "that of another node is shot there"


@pytest.mark.parametrize("values", [{"waits": True}, {"iteration": 8}, {"collectives": 5}])
def test_process_that_is_stopped_while_it_waits_or_is_ahead_is_shot(limits: Limits, values: dict[str, object]) -> None:
    """Who waits for it, in a collective or for the control plane, ticks."""
    for others in (Life(limits), Life(limits, waits=True)):
        lives = [others, Life(limits, **values)]
        lives[0].live(20, "ticks")
        assert "nothing of it runs" in (lives[1].live(20) or "")
        assert hung(lives) == [1]
        assert hung(lives[:1], lives[1].watch.standing()) == [], "that of another node is shot there"


def test_limits_by_section() -> None:
    assert parse_limits(None) == DEFAULT_LIMITS
    assert set(parse_limits("30").values()) == {30.0}
    assert parse_limits("step=5")[Section.STEP] == 5.0
    assert parse_limits("step=5")[Section.SAVE] == DEFAULT_LIMITS[Section.SAVE]
    assert DEFAULT_LIMITS[Section.STEP] > 30.0, "C code that holds the interpreter for 20 s is at work"


@pytest.mark.parametrize("text", ["1.5", "no", "step=", "steps=5", "step=nan", "=5x"])
def test_wrong_limits_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--hang-timeout .* at least 2 seconds"):
        parse_limits(text)


# --- a real process ---------------------------------------------------------------------------------------------

SCRIPTS: dict[str, str] = {
    "sleep": "time.sleep(600)",
    "lock": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "fifo": "os.mkfifo(sys.argv[1]); open(sys.argv[1]).read()",
    "holds the interpreter": "while True: ctypes.PyDLL(None).usleep(600_000_000)",  # a signal ends one
}


@pytest.fixture
def start(tmp_path: Path) -> Callable[[str], tuple[Report, subprocess.Popen[bytes]]]:
    def begin(code: str) -> tuple[Report, subprocess.Popen[bytes]]:
        report = Report()
        body = (
            "import ctypes, os, sys, threading, time\n"
            "from moetion_lightning.distributed import progress\n"
            "progress.start(progress.State.RUNNING)\n"
            "end = time.monotonic() + 2\n"
            "while time.monotonic() < end: pass\n"
            "progress.enter(progress.Section.SAVE, 4)\n"
            f"{code}\n"
        )
        env = {**os.environ, "MOETION_REPORT": report.path, "MOETION_LAUNCHER_PID": str(os.getpid())}
        return report, subprocess.Popen([sys.executable, "-c", body, str(tmp_path / "fifo")], env=env, cwd=ROOT)

    return begin


@pytest.mark.parametrize("name", SCRIPTS)
def test_main_thread_that_does_not_go_on_is_seen(
    name: str, start: Callable[[str], tuple[Report, subprocess.Popen[bytes]]]
) -> None:
    report, process = start(SCRIPTS[name])
    try:
        deadline = time.monotonic() + 60
        while report.section != Section.SAVE:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert report.beats >= 2, "it ran Python code before"
        time.sleep(1.2)  # a beat that was asked for may come late
        beats, ticks = report.beats, report.ticks
        time.sleep(2.0)
        assert report.beats == beats
        assert (report.ticks > ticks) == (name != "holds the interpreter")
        assert report.iteration == 4
        process.send_signal(STACKS_SIGNAL)
        while 'File "<string>", line 7 in <module>' not in report.stacks():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        report.close()


def test_sign_of_life_costs_nothing(start: Callable[[str], tuple[Report, subprocess.Popen[bytes]]]) -> None:
    """Two calls a second: what is counted is how often the main thread is asked, not how fast this machine is."""
    report, process = start("while True: pass")
    deadline = time.monotonic() + 60
    while report.iteration != 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before = report.beats
    time.sleep(3.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= report.beats - before <= 8
    report.close()


def test_report_leaves_nothing(tmp_path: Path) -> None:
    report = Report()
    path = report.path
    assert ctypes.sizeof(ctypes.c_uint64) == report.cells.itemsize
    report.close()
    assert not os.path.exists(path)
