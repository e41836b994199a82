"""`moetion launch`: real processes of plain torch scripts, killed and stopped from outside.

Where a test says ``as_users_do`` the launcher and its ranks are new interpreters; elsewhere they are forks of a process
that has imported everything, which differ in nothing that is looked at.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.command import Command, until
from tests.runs.drill import Zygote

STEPS = Path(__file__).with_name("workers") / "steps.py"
ENDING = Path(__file__).with_name("workers") / "ending.py"
LAST = 5

pytestmark = pytest.mark.slow


class Job:
    """Commands of one test and the folder in which their ranks write."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        #: What forks the commands; None: they are new interpreters.
        self.zygote: Zygote | None = zygote
        self.folder = folder / "ranks"
        self.folder.mkdir()
        self.commands: list[Command] = []

    def start(self, *args: object, netns: str | None = None, **env: str) -> Command:
        log = self.folder.parent / f"{len(self.commands)}.log"
        command = Command(log, *args, zygote=self.zygote, netns=netns, **env)
        self.commands.append(command)
        return command

    def launch(self, *options: object, steps: int = LAST, **env: str) -> Command:
        return self.start("launch", *options, STEPS, self.folder, steps, **env)

    def go(self) -> None:
        """Let the ranks make their last step: what was done to them was done before their end."""
        (self.folder / "go").touch()

    def starts(self, rank: int) -> list[dict[str, Any]]:
        path = self.folder / f"{rank}.pids"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def pids(self, world_size: int) -> list[list[int]]:
        return [[start["pid"] for start in self.starts(rank)] for rank in range(world_size)]

    def step(self, rank: int) -> tuple[int, int]:
        path = self.folder / f"{rank}.step"
        step, pid = path.read_text().split() if path.exists() else (0, 0)
        return int(step), int(pid)

    def wait_for_step(self, world_size: int, least: int = 2) -> list[int]:
        ranks = range(world_size)
        until(lambda: all(self.step(r)[0] >= least for r in ranks), f"step {least} of all ranks; {self.logs()}")
        return [self.step(rank)[1] for rank in ranks]

    def close(self) -> None:
        for command in self.commands:
            if command.process.poll() is None:
                left = command.children()
                for process in [psutil.Process(command.process.pid), *left]:
                    if process.is_running():
                        process.kill()
                command.process.wait()

    def logs(self) -> str:
        return "\n".join(f"--- {command.log.name}\n{command.text}" for command in self.commands)


@pytest.fixture
def job(tmp_path: Path, zygote: Zygote) -> Iterator[Job]:
    job = Job(tmp_path, zygote)
    yield job
    job.close()


@pytest.fixture
def as_users_do(job: Job) -> None:
    job.zygote = None


@pytest.mark.usefixtures("as_users_do")
def test_killed_rank_alone_is_started_again(job: Job) -> None:
    launcher = job.launch("--nproc-per-node", 3)
    before = job.wait_for_step(3)
    os.kill(before[1], signal.SIGKILL)
    job.go()
    assert launcher.wait() == 0, job.logs()
    pids = job.pids(3)
    assert [len(p) for p in pids] == [1, 2, 1]
    assert [p[0] for p in pids] == before
    assert [job.step(rank) for rank in range(3)] == [(LAST, p[-1]) for p in pids]
    assert [start["started_in"] for start in job.starts(1)] == [0, 1]
    assert "rank 1: killed by SIGKILL" in launcher.text


def test_environment_of_a_rank(job: Job) -> None:
    launcher = job.launch("--nproc-per-node", 2, "--failure-domain", "rack7", "--job-id", "mine", steps=2)
    job.go()
    assert launcher.wait() == 0, job.logs()
    seen = job.starts(0)[0]["env"]
    assert seen["MOETION_STORE"] == f"{seen['MASTER_ADDR']}:{seen['MASTER_PORT']}"
    assert seen["MASTER_ADDR"] == seen["MOETION_LOCAL_ADDR"] == "127.0.0.1"
    assert len(bytes.fromhex(seen["MOETION_SECRET"])) == 32
    assert seen["MOETION_SECRET"] == job.starts(1)[0]["env"]["MOETION_SECRET"]
    assert (seen["MOETION_JOB_ID"], seen["MOETION_FAILURE_DOMAIN"]) == ("mine", "rack7")
    assert (seen["TORCHELASTIC_RESTART_COUNT"], seen["TORCHELASTIC_USE_AGENT_STORE"]) == ("0", "True")
    assert job.starts(0)[0]["argv"] == [str(STEPS), str(job.folder), "2"]


def test_two_ranks_killed_at_once(job: Job) -> None:
    launcher = job.launch("--nproc-per-node", 3)
    before = job.wait_for_step(3)
    os.kill(before[0], signal.SIGKILL)
    os.kill(before[2], signal.SIGKILL)
    job.go()
    assert launcher.wait() == 0, job.logs()
    assert [len(p) for p in job.pids(3)] == [2, 1, 2]
    assert {job.step(rank)[0] for rank in range(3)} == {LAST}


@pytest.mark.usefixtures("as_users_do")
def test_replacement_killed_while_it_starts(job: Job) -> None:
    launcher = job.launch("--nproc-per-node", 2)
    before = job.wait_for_step(2)
    os.kill(before[0], signal.SIGKILL)
    replacement = until(lambda: launcher.pids_of("rank") - set(before), "a replacement").pop()
    os.kill(replacement, signal.SIGKILL)
    job.go()
    assert launcher.wait() == 0, job.logs()
    assert [p[0] for p in job.pids(2)] == before
    assert job.starts(0)[-1]["started_in"] == 2
    assert job.starts(0)[-1]["pid"] != replacement
    assert {job.step(rank)[0] for rank in range(2)} == {LAST}


def test_stopped_rank_is_killed_and_replaced(job: Job) -> None:
    launcher = job.launch("--nproc-per-node", 2, "--hang-timeout", 3)
    before = job.wait_for_step(2)
    os.kill(before[1], signal.SIGSTOP)
    job.go()
    assert launcher.wait() == 0, job.logs()
    assert [len(p) for p in job.pids(2)] == [1, 2]
    assert not psutil.pid_exists(before[1])
    assert "rank 1: hung: nothing of it runs for" in launcher.text


@pytest.mark.usefixtures("as_users_do")
def test_standby_takes_over(job: Job) -> None:
    launcher = job.launch("--nproc-per-node", 2, "--standby", 1)
    before = job.wait_for_step(2)
    match = until(lambda: re.search(r"process (\d+) stands by", launcher.text), f"a standby; {job.logs()}")
    os.kill(before[1], signal.SIGKILL)
    until(lambda: len(job.starts(1)) == 2, "the standby to run")
    first, second = job.starts(1)
    assert second["pid"] == int(match[1])
    assert second["started_in"] == 1
    same = ("rng_untouched", "cuda", "threads", "argv")
    assert {k: second[k] for k in same} == {k: first[k] for k in same}
    assert second["rng_untouched"]
    assert second["lightning_rank"] == 1
    assert not second["cuda"]
    assert second["stdin"] == ""
    os.kill(second["pid"], signal.SIGKILL)  # it is looked after like any other rank
    until(lambda: len(job.starts(1)) == 3, "the next one")
    launcher.process.terminate()
    assert launcher.wait() == 128 + signal.SIGTERM


@pytest.mark.usefixtures("as_users_do")
def test_module_runs_as_python_would_run_it(job: Job) -> None:
    launcher = job.start("launch", "--max-restarts", 0, "-m", "json.tool", "--no-such-option")
    assert launcher.wait() == 1
    assert "unrecognized arguments: --no-such-option" in launcher.text
    assert "rank 0: exit code 2" in launcher.text


def test_restart_limit_names_rank_status_and_count(job: Job) -> None:
    launcher = job.launch("--nproc-per-node", 2, "--max-restarts", 1)
    for generation in (1, 2):
        until(lambda: len(job.starts(1)) == generation, f"start {generation} of rank 1; {job.logs()}")  # noqa: B023
        job.wait_for_step(2)
        os.kill(job.starts(1)[-1]["pid"], signal.SIGKILL)
    assert launcher.wait() == 1
    assert "rank 1: killed by SIGKILL: more than 1 failures on this node (--max-restarts)" in launcher.text
    assert "Deaths by rank: rank 1: 2" in launcher.text


def test_ranks_that_die_together_are_one_failure(job: Job) -> None:
    launcher = job.launch("--nproc-per-node", 3, "--max-restarts", 1)
    before = job.wait_for_step(3)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)
    job.go()
    assert launcher.wait() == 0, job.logs()
    assert "(failure 1 of at most 1)" in launcher.text


def test_crash_loop_shows_the_cause(job: Job) -> None:
    launcher = job.start("launch", "--nproc-per-node", 2, ENDING, "raise")
    assert launcher.wait() == 80
    assert "ended 2 times before its first step by the same error (ValueError: the learning rate of" in launcher.text
    summary = launcher.text[launcher.text.rindex("last lines of rank") :]
    assert re.search(r"ValueError: the learning rate of rank [01] is negative", summary)
    assert "in raise_error" in summary
    assert "runpy" not in launcher.text
    assert "distributed/rank.py" not in launcher.text


@pytest.mark.usefixtures("as_users_do")
def test_script_runs_as_python_would_run_it(job: Job) -> None:
    launcher = job.start("launch", ENDING, "print", "--nproc-per-node", "x y")
    assert launcher.wait() == 0
    argv = [str(ENDING), "print", "--nproc-per-node", "x y"]
    assert f"{argv} __main__ {ENDING.parent} ending.py" in launcher.text


def test_death_after_others_finished_makes_all_begin_again(job: Job) -> None:
    launcher = job.start("launch", "--nproc-per-node", 2, ENDING, "finish-then-die", job.folder)
    assert launcher.wait() == 0, job.logs()
    assert "rank 1: exit code 3, after 1 ranks had already finished: all ranks begin again" in launcher.text


def test_processes_of_a_dead_rank_end_with_it(job: Job) -> None:
    launcher = job.start("launch", "--max-restarts", 0, ENDING, "leave-child", job.folder)
    assert launcher.wait() == 1
    child = int((job.folder / "child").read_text())
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE, "its end")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_end_of_the_launcher_ends_all_processes(job: Job, number: signal.Signals) -> None:
    launcher = job.start("launch", "--nproc-per-node", 2, "--standby", 1, ENDING, "wait", job.folder)
    until(lambda: len(list(job.folder.iterdir())) == 2, f"both ranks; {job.logs()}")
    children = until(
        lambda: found if len(found := launcher.children()) == 6 else [],
        "the ranks with a child each, the one that stands by, and the guard",
    )
    launcher.process.send_signal(number)
    assert launcher.wait() == (-number if number == signal.SIGKILL else 128 + number)
    _, alive = psutil.wait_procs(children, timeout=5.0)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_only_the_hung_rank_is_shot_and_its_stacks_are_shown(job: Job) -> None:
    launcher = job.start("launch", "--nproc-per-node", 3, "--hang-timeout", 4, ENDING, "hang-in-lock")
    until(lambda: "goes on as process" in launcher.text, f"a shot; {job.logs()}")
    assert "rank 1: hung: its main thread runs no Python code for" in launcher.text
    stacks = launcher.text[launcher.text.index("its stacks:") :]
    assert re.search(r'ending.py", line \d+ in hang_in_lock', stacks)
    assert "moetion-progress" not in stacks or "_tick" in stacks, "all threads"
    assert not re.search(r"rank [02]: hung", launcher.text)


def test_rank_that_hangs_after_its_program_returned_is_ended(job: Job) -> None:
    launcher = job.start("launch", "--nproc-per-node", 2, "--hang-timeout", 2, ENDING, "hang-at-exit")
    assert launcher.wait() == 0, job.logs()
    assert "did not end within 2 s after its program had returned" in launcher.text


def test_what_fails_after_training_each_time_ends_the_job(job: Job) -> None:
    launcher = job.start("launch", "--nproc-per-node", 2, ENDING, "die-after-training")
    assert launcher.wait() == 80
    assert "rank 1: exit code 3, after training had ended: all ranks begin again" in launcher.text
    assert "ended 2 times before its first step by the same error (exit code 3)" in launcher.text


def test_stranded_rank_makes_all_begin_again(job: Job) -> None:
    launcher = job.start("launch", "--nproc-per-node", 2, ENDING, "stranded", job.folder)
    assert launcher.wait() == 0, job.logs()
    assert "rank 1: exit code 81, and the others cannot take it back: all ranks begin again" in launcher.text


def test_hopeless_state_is_not_tried_again(job: Job) -> None:
    launcher = job.start("launch", ENDING, "lost")
    assert launcher.wait() == 79
    assert "Error: " in launcher.text[launcher.text.index("last lines of rank 0") :]
    assert "goes on as process" not in launcher.text


def test_output_and_errors_of_each_process_are_kept(job: Job) -> None:
    logs, errors = job.folder.parent / "logs", job.folder.parent / "error.json"
    options = ("--nproc-per-node", 2, "--log-dir", logs, "--tee", "3", "--max-restarts", 1)
    launcher = job.start("launch", *options, ENDING, "raise", TORCHELASTIC_ERROR_FILE=str(errors))
    assert launcher.wait() == 80, job.logs()
    (run,) = logs.iterdir()
    tried = sorted(path.parent.relative_to(run).as_posix() for path in run.rglob("stderr.log") if path.stat().st_size)
    assert len(tried) >= 3
    assert {name[:9] for name in tried} >= {"attempt_0", "attempt_1"}
    assert re.search(r"\[default[01]\]:.*ValueError: the learning rate of rank [01] is negative", launcher.text)
    assert "the learning rate" in json.loads(errors.read_text())["message"]["message"]


def serve(job: Job) -> str:
    server = job.start("rendezvous", "--port", 0)
    match = until(lambda: re.search(r"serving at (\S+)\n", server.text), "the rendezvous")
    return str(match[1])


def node(job: Job, endpoint: str, *options: object, **kwargs: Any) -> Command:
    common = ("--rdzv-endpoint", endpoint, "--nproc-per-node", 1, "--node-timeout", 3)
    return job.launch(*common, *options, **kwargs)


def wait_for_end(pid: int) -> None:
    until(
        lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, f"the end of {pid}"
    )


def wait_for_spare(spare: Command) -> None:
    until(lambda: "waiting as a spare" in spare.text, f"the spare; {spare.text}")


def test_spare_takes_the_place_of_a_lost_node(job: Job) -> None:
    endpoint = serve(job)
    nodes = [node(job, endpoint, "--nnodes", "2:3", "--node-rank", k, "--failure-domain", f"n{k}") for k in range(2)]
    before = job.wait_for_step(2)
    spare = node(job, endpoint, "--nnodes", "2:3", "--failure-domain", "spare")
    wait_for_spare(spare)
    nodes[0].process.kill()
    wait_for_end(before[0])  # its rank ends with it, but not at once
    job.go()
    assert nodes[1].wait() == 0, job.logs()
    assert spare.wait() == 0, job.logs()
    assert [len(p) for p in job.pids(2)] == [2, 1]
    assert [p[0] for p in job.pids(2)] == before
    replaced = job.starts(0)[1]
    assert (replaced["started_in"], replaced["losses"]) == (1, None)
    assert (replaced["env"]["GROUP_RANK"], replaced["env"]["MOETION_FAILURE_DOMAIN"]) == ("0", "spare")
    assert replaced["env"]["MOETION_SECRET"] == job.starts(1)[0]["env"]["MOETION_SECRET"]
    assert {job.step(rank)[0] for rank in range(2)} == {LAST}


@pytest.mark.parametrize("paused", ["launcher", "whole node"])
def test_launcher_whose_place_was_taken_ends_its_ranks(job: Job, paused: str) -> None:
    endpoint = serve(job)
    nodes = [node(job, endpoint, "--nnodes", "2:3", "--node-rank", k) for k in range(2)]
    before = job.wait_for_step(2)
    spare = node(job, endpoint, "--nnodes", "2:3")
    wait_for_spare(spare)
    cut_off = [nodes[0].process.pid, *(p.pid for p in nodes[0].children() if paused == "whole node")]
    assert (before[0] in cut_off) == (paused == "whole node")
    for pid in cut_off:
        os.kill(pid, signal.SIGSTOP)
    until(lambda: len(job.starts(0)) == 2, f"the spare's rank; {job.logs()}")
    for pid in reversed(cut_off):
        os.kill(pid, signal.SIGCONT)
    assert nodes[0].wait() == 1
    assert "did not renew its lease in time" in nodes[0].text
    assert not psutil.pid_exists(before[0])
    job.go()
    assert nodes[1].wait() == 0, job.logs()
    assert spare.wait() == 0, job.logs()
    assert len(job.starts(1)) == 1


def test_nodes_meet_again_when_all_begin_again(job: Job) -> None:
    endpoint = serve(job)
    common = ("--rdzv-endpoint", endpoint, "--nproc-per-node", 1, "--job-id", "j", "--nnodes")
    nodes = [job.start("launch", *common, "2:3", "--node-rank", k, ENDING, "stranded", job.folder) for k in (0, 1)]
    spare = job.start("launch", *common, "2:3", ENDING, "stranded", job.folder)
    assert [n.wait() for n in (*nodes, spare)] == [0, 0, 0], job.logs()
    assert "rank 1: exit code 81, and the others cannot take it back: all ranks begin again" in nodes[1].text


@pytest.mark.usefixtures("as_users_do")
def test_first_launcher_serves_the_store_if_nobody_does(job: Job) -> None:
    endpoint = free_endpoint()
    job.go()
    nodes = [node(job, endpoint, "--nnodes", 2, steps=3) for _ in range(2)]
    assert [n.wait() for n in nodes] == [0, 0], job.logs()
    assert {job.step(rank)[0] for rank in range(2)} == {3}


def test_store_that_outlives_a_run_serves_the_next(job: Job) -> None:
    endpoint = serve(job)
    job.go()
    for run in (1, 2):
        launcher = node(job, endpoint, "--job-id", "again", steps=2)
        assert launcher.wait() == 0, job.logs()
        assert job.starts(0)[-1]["env"]["TORCHELASTIC_RUN_ID"] == f"again.{run}"
        assert job.starts(0)[-1]["started_in"] == 0


def test_failed_node_ends_the_others(job: Job) -> None:
    endpoint = serve(job)
    options = ("--rdzv-endpoint", endpoint, "--nnodes", 2, "--max-restarts", 0)
    failing = job.start("launch", *options, "--node-rank", 0, "--job-id", "j", ENDING, "exit", 5)
    waiting = job.start("launch", *options, "--node-rank", 1, "--job-id", "j", ENDING, "wait", job.folder)
    assert failing.wait() == 1
    assert waiting.wait() == 1
    assert "the job failed: on node 0: rank 0: exit code 5" in waiting.text


def test_end_of_the_rendezvous_ends_the_job(job: Job) -> None:
    endpoint = serve(job)
    nodes = [node(job, endpoint, "--nnodes", 2) for _ in range(2)]
    workers = job.wait_for_step(2)
    job.commands[0].process.kill()
    assert [n.wait() for n in nodes] == [1, 1], job.logs()
    assert all("the rendezvous" in n.text and "does not answer any more" in n.text for n in nodes), job.logs()
    assert not [pid for pid in workers if psutil.pid_exists(pid)]


def free_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
