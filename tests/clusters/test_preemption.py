"""SIGTERM to some ranks or to all: they end together, what is committed is on storage, and a restart is exact."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.clusters import jobs
from tests.command import Forked, until
from tests.runs import program
from tests.runs.drill import Zygote
from tests.runs.ranks import elastic_environments
from tests.runs.references import References


def start(zygote: Zygote, folder: Path, ranks: int) -> list[Forked]:
    words = [folder, jobs.STEPS, "--persist", folder / "storage", "--hold", jobs.HOLD, "--devices", ranks]
    envs = elastic_environments(ranks, "job") if ranks > 1 else [{}]
    spec = program.spec(folder, jobs.SCRIPT, *words)
    return [Forked(zygote, spec, folder / f"log-{rank}", env) for rank, env in enumerate(envs)]


def finish(processes: list[Forked]) -> list[int]:
    """Exit codes; whoever waits for ever is killed."""
    try:
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "told"), [(1, [0]), (2, [0]), (2, [1]), (2, [0, 1])])
def test_told_ranks_end_all_and_a_restart_is_exact(
    ranks: int, told: list[int], zygote: Zygote, tmp_path: Path, references: References
) -> None:
    processes = start(zygote, tmp_path, ranks)
    try:
        until(lambda: jobs.holds(tmp_path, ranks), "all ranks inside of the step")
        for rank in told:
            os.kill(processes[rank].pid, signal.SIGTERM)
        logs = [tmp_path / f"log-{rank}" for rank in told]
        until(lambda: all("SIGTERM: what is committed was persisted" in log.read_text() for log in logs), "windows")
    finally:
        (tmp_path / "go").touch()
        codes = finish(processes)
    assert codes == [143] * ranks
    last = max(event["last_iteration"] for event in jobs.events(tmp_path, "WindowCommitted"))
    persisted = {(event.get("rank", 0), event["last_iteration"]) for event in jobs.events(tmp_path, "WindowPersisted")}
    assert last > jobs.HOLD - 6  # at most one window is left out, where a commit was still under way
    assert {(rank, last) for rank in range(ranks)} <= persisted  # also of ranks that nobody has told

    shutil.rmtree(tmp_path / "memory")  # the nodes are gone
    (tmp_path / "memory").mkdir()
    assert finish(start(zygote, tmp_path, ranks)) == [0] * ranks
    assert set(jobs.restored(tmp_path)) == {last}
    assert jobs.differences(tmp_path, jobs.undisturbed(zygote, references, ranks), ranks) == []
