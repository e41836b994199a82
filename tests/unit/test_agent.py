"""How the agent counts failures and what it does not try, with processes that are made up."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig

from moetion_lightning.distributed import agent as module
from moetion_lightning.distributed.agent import Agent
from moetion_lightning.distributed.exits import JobEndedError
from moetion_lightning.distributed.generations import announce_over
from moetion_lightning.distributed.progress import Report, State
from moetion_lightning.distributed.torch_elastic import BeginAgainError, RankStart
from moetion_lightning.distributed.watchdog import Limits, parse_limits


class Store:
    """The run's store."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def add(self, key: str, amount: int) -> int:
        self.values[key] = str(int(self.values.get(key, "0")) + amount)
        return int(self.values[key])

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        if self.values.get(key, "") == expected:
            self.values[key] = desired
        return self.values[key].encode()


class Process:
    """A process that ends when it is told to, and never by a signal."""

    def __init__(self) -> None:
        self.pid = 2**22 + 1  # there is none
        self.status: int | None = None

    def poll(self) -> int | None:
        return self.status

    def send_signal(self, number: int) -> None:
        pass


class Ranks(Agent):
    """The agent of two ranks, whose processes are made up."""

    def __init__(self, folder: Path, max_restarts: int = 3) -> None:
        self.store = Store()
        self.may_begin_again, self.asked_again = True, []
        nodes = SimpleNamespace(
            place=None, lease=None, store=self.store, run_id="job.1", stop_reason=lambda: None,
            begin_again=self._begin_again,
        )  # fmt: skip
        guard = SimpleNamespace(add=lambda pid: None, remove=lambda pid: None)
        stop = SimpleNamespace(install=lambda: None, check=lambda: None)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=2,
            max_restarts=max_restarts,
            logs_specs=DefaultLogsSpecs(str(folder)),
        )
        super().__init__(
            config,
            ["x.py"],
            nodes,
            standby=0,
            limits=Limits(parse_limits("2")),
            guard=guard,
            stop=stop,  # type: ignore[arg-type]
        )
        files = {r: str(folder / f"error{r}.json") for r in (0, 1)}
        handlers = {r: SimpleNamespace(proc=Process()) for r in (0, 1)}
        self._pcontext: Any = SimpleNamespace(subprocess_handlers=handlers, error_files=files, envs={0: {}, 1: {}})
        for worker in self._worker_group.workers:
            worker.global_rank, worker.world_size = worker.local_rank, 2
            self.variables(worker.local_rank)
        self.started: list[int] = []

    def _begin_again(self, reason: str) -> bool:
        self.asked_again.append(reason)
        return self.may_begin_again

    def prepare(self, local_rank: int, variables: Any) -> RankStart:
        return RankStart(env=variables, args=("-u", "-m", "m", "x.py"), stdout="", stderr="")

    def start(self, local_rank: int, given: RankStart) -> Any:
        self.started.append(local_rank)
        return SimpleNamespace(proc=Process())

    def report(self, rank: int) -> Report:
        return self._ranks[rank].report

    def reach(self, iteration: int, rank: int = 0, stage: int = 1) -> None:
        self.report(rank).cells[5], self.report(rank).cells[8] = iteration + 1, stage
        assert not self.look_after()

    def die(self, *ranks: int, status: int = -9, error: str = "") -> None:
        for rank in ranks:
            self.processes[rank].proc.status = status
            if error:
                text = {"message": error, "extraInfo": {"py_callstack": f"Traceback\n{error}"}}
                Path(self.context.error_files[rank]).write_text(json.dumps({"message": text}))
        self.look_after()

    def close(self) -> None:
        for rank in self._ranks.values():
            rank.report.close()


@pytest.fixture
def ranks(tmp_path: Path) -> Any:
    ranks = Ranks(tmp_path)
    yield ranks
    ranks.close()


def test_ranks_that_die_of_one_another_are_one_failure(ranks: Ranks) -> None:
    for iteration in (3, 5, 9):
        ranks.reach(iteration)
        ranks.die(0)
        ranks.die(1)
    assert ranks.started == [0, 1] * 3
    assert ranks.store.values["moetion/generation"] == "6"
    ranks.reach(10)
    with pytest.raises(JobEndedError, match=r"more than 3 failures on this node .* rank 0: 4, rank 1: 3") as caught:
        ranks.die(0)
    assert caught.value.code == 1


def test_starts_without_progress_end_the_job(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, max_restarts=100)
    ranks.reach(7)
    for _ in range(module._FRUITLESS):
        ranks.die(1)
        ranks.reach(7, rank=1)  # it comes back to where it was, and no further
    with pytest.raises(JobEndedError, match="6 starts in a row made no progress") as caught:
        ranks.die(1)
    assert caught.value.code == 80
    ranks.close()


def test_progress_forgives(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, max_restarts=100)
    for iteration in range(3 * module._FRUITLESS):
        ranks.reach(iteration)
        ranks.die(1)
    assert len(ranks.started) == 3 * module._FRUITLESS
    ranks.close()


def test_later_stages_are_progress(tmp_path: Path) -> None:
    """Each fit, test or validation counts its iterations from 0."""
    ranks = Ranks(tmp_path, max_restarts=2 * module._FRUITLESS)
    ranks.reach(100)
    for stage in range(2, 2 + 2 * module._FRUITLESS):
        ranks.die(1)
        for earlier in range(stage):
            ranks.reach(100, stage=earlier)
        ranks.reach(0, stage=stage)
    assert ranks._failures == 2 * module._FRUITLESS
    ranks.close()


def test_same_error_at_the_same_place_is_tried_three_times(ranks: Ranks) -> None:
    ranks.reach(7)
    for _ in range(2):
        ranks.die(0, status=1, error="ValueError: of the test")
    with pytest.raises(JobEndedError, match=r"ended 3 times at the same place by the same error") as caught:
        ranks.die(0, status=1, error="ValueError: of the test")
    assert caught.value.code == 80


def test_same_error_before_the_first_step_is_tried_twice(ranks: Ranks) -> None:
    ranks.die(0, status=1, error="ImportError: no module torchx")
    with pytest.raises(
        JobEndedError, match=r"rank 0 ended 2 times .* same error \(ImportError: no module torchx\)"
    ) as caught:
        ranks.die(0, status=1, error="ImportError: no module torchx")
    assert caught.value.code == 80
    assert "    ImportError: no module torchx" in str(caught.value)


def test_other_errors_or_later_ones_are_tried_again(ranks: Ranks) -> None:
    ranks.die(0, status=1, error="ConnectionError: a")
    ranks.die(0, status=1, error="ConnectionError: b")
    ranks.reach(1)
    ranks.die(0, status=1, error="ConnectionError: b")
    assert ranks.started == [0] * 3


def test_hopeless_end(ranks: Ranks) -> None:
    with pytest.raises(JobEndedError, match="cannot go on") as caught:
        ranks.die(0, status=79)
    assert caught.value.code == 79


def test_what_breaks_while_a_failed_process_ends_does_not_hide_the_error(ranks: Ranks) -> None:
    ranks.report(0).cells[9] = 79
    with pytest.raises(JobEndedError, match="cannot go on"):
        ranks.die(0, status=-6)


def test_all_begin_again_when_a_rank_is_lost_after_training(ranks: Ranks) -> None:
    assert announce_over(ranks.store, 0)
    with pytest.raises(BeginAgainError):
        ranks.die(0)
    assert ranks.asked_again == ["rank 0: killed by SIGKILL, after training had ended"]


def test_a_stranded_rank_is_the_same_failure(ranks: Ranks) -> None:
    ranks.die(0)
    with pytest.raises(BeginAgainError):
        ranks.die(0, status=81)
    assert ranks._failures == 1


def test_job_ends_if_a_node_is_gone_that_would_have_to_begin_again(ranks: Ranks) -> None:
    ranks.may_begin_again = False
    ranks.store.add("moetion/finished", 1)
    with pytest.raises(JobEndedError, match="after 1 ranks had already finished: the job cannot be completed together"):
        ranks.die(0)


def test_what_ends_a_process_after_its_program_changes_nothing(ranks: Ranks) -> None:
    ranks.report(0).cells[0] = State.DONE
    ranks.die(0, status=-6)
    ranks.die(1, status=0)
    assert ranks.look_after()
    assert ranks.store.values["moetion/finished"] == "2"


def test_process_that_sigkill_does_not_end_ends_the_node(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps in the kernel: nothing else of the node may wait for it."""
    monkeypatch.setattr(module, "_STACKS_SECONDS", 0.2)
    monkeypatch.setattr(module, "_KILL_SECONDS", 0.5)
    ranks.report(0).cells[1] = ranks.report(0).cells[2] = 1
    ranks.look_after()
    ranks.report(1).cells[5] = 2  # the other one is ahead
    ranks._ranks[0].watch.silent = 100.0
    ranks.look_after()
    assert ranks._ranks[0].shot
    ranks.look_after()
    time.sleep(0.6)
    with pytest.raises(JobEndedError, match="does not end by SIGKILL .* This node leaves the job"):
        ranks.look_after()
