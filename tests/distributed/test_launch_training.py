"""An ordinary Lightning script under `moetion launch` and under torchrun: real processes, killed and stopped.

The launchers and their ranks are forks of a process that has imported everything; new interpreters, as users start
them, are in test_demos.py, test_launch.py and test_torchrun.py.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from moetion_lightning.testing.compare import compare_states
from tests.command import Forked
from tests.runs import forked, program
from tests.runs.drill import Zygote
from tests.runs.drill import start as run
from tests.runs.references import References
from tests.sockets import connections_of, reset

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "workers" / "lightning_job.py"
PHASES = Path(__file__).parent / "workers" / "phases_job.py"
STEPS = 40
LIMIT_SECONDS = 200.0
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
        if event["pid"] not in found[event.get("rank", 0)]:  # a job of one rank does not say it
            found[event.get("rank", 0)].append(event["pid"])
    return found


class Training:
    """One start of the script by a launcher.

    Args:
        folder: Where its ranks write.
        launcher: Module and arguments that start the ranks.
        arguments: Further arguments of the script.
        zygote: Forks the launcher and its ranks.
        go: Whether training may begin at once.
        script: What they run.
        steps: Length of each fit.
    """

    def __init__(
        self,
        folder: Path,
        launcher: tuple[str, ...],
        *arguments: object,
        zygote: Zygote,
        go: bool = True,
        script: Path = SCRIPT,
        steps: int = STEPS,
    ) -> None:
        self.folder = folder
        folder.mkdir()
        if go:
            self.go()
        module, *options = launcher
        command = forked.spec(*options, script, folder, steps, *arguments, module=module)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        (folder / "log").touch()
        self.process = Forked(zygote, command, folder / "log", environment)

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


def test_killed_rank_is_replaced_and_the_other_lives_on(start: Start, reference: Path, zygote: Zygote) -> None:
    training = start(launch(), zygote=zygote)
    training.signal(1, signal.SIGKILL)
    training.finish()
    assert [len(pids) for pids in training.pids()] == [1, 2]
    assert training.differences(reference) == []
    causes = [event["predecessor"] for event in training.events("ProcessStarted")]
    assert causes == ["", "", "killed by SIGKILL"]


def test_a_job_of_one_rank_is_started_again_and_goes_on(start: Start, zygote: Zygote) -> None:
    alone = ("moetion_lightning", "launch", "--nproc-per-node", "1")
    training, undisturbed = start(alone, zygote=zygote), start(alone, zygote=zygote)
    training.signal(0, signal.SIGKILL)
    training.finish()
    undisturbed.finish()
    assert [len(run.pids()[0]) for run in (training, undisturbed)] == [2, 1]
    assert [event["tier"] for event in training.events("RestoreStarted")] == ["host memory"]
    result = compare_states(training.folder / "final.safetensors", undisturbed.folder / "final.safetensors")
    assert result.compared > 50
    assert not result.differences


def test_rank_lost_in_a_later_fit_in_test_or_at_the_end_makes_all_begin_again(start: Start, zygote: Zygote) -> None:
    """One that is lost in the first fit is replaced alone; later ones have no others that could take them back."""
    undisturbed = start(launch(), zygote=zygote, script=PHASES, steps=12)
    training = start(launch("--max-restarts", 4), go=False, zygote=zygote, script=PHASES, steps=12)
    kills = {"fit1": 0, "fit2": 1, "test": 0, "end": 1}
    for phase in kills:
        (training.folder / f"hold-{phase}").touch()
    pids: dict[str, list[int]] = {}
    for phase, rank in kills.items():
        notes = [training.folder / f"at-{phase}-{r}" for r in (0, 1) if phase != "end" or r == rank]
        training.until(lambda: all(note.exists() for note in notes), f"ranks in {phase}")  # noqa: B023
        pids[phase] = [int(note.read_text()) for note in notes]
        victim = pids[phase][-1 if phase == "end" else rank]
        if phase == "end":  # the other one has ended well, and is complete
            training.until(lambda: not psutil.pid_exists(int(at_test[0].read_text())), "the end of the other")  # noqa: B023
        at_test = notes
        os.kill(victim, signal.SIGKILL)
        training.until(lambda: not psutil.pid_exists(victim), "an end")  # noqa: B023
        for note in notes if phase == "test" else ():
            note.unlink()
        (training.folder / f"hold-{phase}").unlink()
    training.finish()
    undisturbed.finish()
    assert training.log.count("all ranks begin again from the newest state") == 3
    assert "after 1 ranks had already finished: all ranks begin again" in training.log
    assert "(failure 4 of at most 4)" in training.log, "each of them is one failure"
    assert pids["fit1"][1] == pids["fit2"][1], "the other one lived on"
    assert not set(pids["fit2"]) & set(pids["test"])
    assert training.differences(undisturbed.folder) == []
    for rank in (0, 1):
        assert (training.folder / f"test-{rank}").read_text() == (undisturbed.folder / f"test-{rank}").read_text()


def test_every_connection_of_a_rank_may_be_reset(start: Start, reference: Path, zygote: Zygote) -> None:
    """One after the other, from outside: those to the store are opened again, ranks whose groups break meet again."""
    # gloo does not notice each time that its own end was reset: then both are shot as hung
    training = start(launch("--hang-timeout", "step=5"), zygote=zygote)
    training.until(lambda: len(training.events("WindowCommitted")) >= 4, "windows")
    pid = training.pids()[1][0]
    try:
        found = connections_of(pid)
    except PermissionError as error:
        pytest.skip(f"this system does not let a process have another one's sockets: {error}")
    for connection in found:
        with connection:
            reset(connection)
        count = len(training.events("IterationFinished"))
        if training.process.poll() is None:
            training.until(lambda: len(training.events("IterationFinished")) >= count + 4, "progress")  # noqa: B023
    training.finish()
    assert len(found) >= 3
    assert training.differences(reference) == []


def test_hung_rank_is_replaced(start: Start, reference: Path, zygote: Zygote) -> None:
    training = start(launch("--hang-timeout", "step=5,validation=5,save=5"), zygote=zygote)
    training.signal(1, signal.SIGSTOP)
    training.finish()
    assert "rank 1: hung: nothing of it runs for" in training.log
    assert len(training.pids()[1]) == 2
    assert training.differences(reference) == []


def test_warm_standby_takes_over(start: Start, reference: Path, zygote: Zygote) -> None:
    training = start(launch("--standby", 1), go=False, zygote=zygote)
    training.until(lambda: "stands by" in training.log, "standbys")
    training.go()
    training.signal(0, signal.SIGKILL)
    training.finish()
    survivors, replacement = training.pids()[1], training.pids()[0][1]
    assert len(survivors) == 1
    assert f"process {replacement} stands by" in training.log
    assert training.differences(reference) == []


def test_torchrun_restarts_all_ranks_and_they_continue(start: Start, reference: Path, zygote: Zygote) -> None:
    training = start(TORCHRUN, 23, zygote=zygote)
    training.finish()
    assert [len(pids) for pids in training.pids()] == [2, 2]
    assert all(16 <= event["first_iteration"] <= 22 for event in training.events("RestoreStarted"))
    assert training.differences(reference) == []
