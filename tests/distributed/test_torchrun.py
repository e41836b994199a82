"""`torchrun` restarts the ranks in place: every attempt gets through its process group's start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from moetion_lightning.config import TorchrunWorker, torchrun_worker
from moetion_lightning.distributed import torchrun
from moetion_lightning.errors import RankLostError
from tests.command import Forked
from tests.runs import forked
from tests.runs.drill import Zygote
from tests.runs.elastic import StoreHost

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "workers" / "restarts.py"


@pytest.mark.slow
def test_job_survives_kills_at_any_moment(tmp_path: Path, zygote: Zygote) -> None:
    """torchrun and its ranks are forks of a process that has imported everything; below, new interpreters."""
    kills = ["stepping", "separated", "stepping", "initialised", "before", "stepping"]
    command = ["--standalone", "--nproc-per-node=2", f"--max-restarts={len(kills)}", "--monitor-interval=0.1"]
    command += [str(SCRIPT), str(tmp_path), "separate", ",".join(kills)]
    log = tmp_path / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = Forked(zygote, forked.spec(*command, module="torch.distributed.run"), log, environment)
    try:
        assert launcher.wait(120) == 0, log.read_text()[-3000:]
    finally:
        launcher.kill()
    for rank in (0, 1):  # no attempt failed but those that were killed; the second call had nothing to do
        assert (tmp_path / f"rank{rank}").read_text(encoding="utf-8") == f"{len(kills)} 32.0 (True, False)"


@pytest.mark.slow
def test_rendezvous_of_this_package_serves_torchrun(tmp_path: Path) -> None:
    """Stock torchrun; a rank is killed, and all meet again in a new round (of several nodes: see test_rendezvous)."""
    installed = tmp_path / "path" / "a_name-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: a-name\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[torchrun.handlers]\nmoetion = moetion_lightning.entry_points:torchrun_rendezvous\n"
    )
    server = StoreHost()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2"]
    command += ["--rdzv-backend=moetion", f"--rdzv-endpoint=127.0.0.1:{server.port}", "--rdzv-id=job"]
    command += ["--monitor-interval=0.1", str(SCRIPT), str(tmp_path), "shared", "stepping"]
    path = os.pathsep.join([str(tmp_path / "path"), str(ROOT)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MOETION_MEMORY_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    server.close()
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text(encoding="utf-8").split()[1] == "32.0"


@pytest.fixture
def agent() -> dist.TCPStore:
    """A store as the agent of torchrun keeps it over restarts."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


def attempt(agent: dist.TCPStore, ranks: list[int], *, port: int = 1, timeout: float = 0.5) -> dict[int, Any]:
    """The port that each of three ranks was told, or its error; only some of them live."""
    results: dict[int, Any] = {}

    def run(rank: int) -> None:
        worker = TorchrunWorker(rank=rank, world_size=3, store_host="127.0.0.1", store_port=agent.port, run_id="run")
        try:
            results[rank] = torchrun._agree(worker, port, timeout)
        except RankLostError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_attempts_do_not_meet_what_earlier_ones_left(agent: dist.TCPStore) -> None:
    assert attempt(agent, [0, 1, 2], port=1001, timeout=20) == {0: 1001, 1: 1001, 2: 1001}
    keys = agent.num_keys()
    results = attempt(agent, [1, 2])
    assert all("rank 0 does not answer" in results[rank] for rank in (1, 2))
    results = attempt(agent, [0, 1], port=1002)
    assert "do not call it: [2] (of 3)" in results[0]
    assert attempt(agent, [0, 1, 2], port=1003, timeout=20) == {0: 1003, 1: 1003, 2: 1003}
    assert agent.num_keys() == keys


def test_reserved_port_is_left_to_the_store() -> None:
    port = torchrun._reserve_port("name.invalid")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    for libuv in (True, False):
        store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False, use_libuv=libuv)
        assert store.port == port
        del store


@pytest.mark.parametrize("variable", ["MOETION_STORE", "TORCHELASTIC_USE_AGENT_STORE", "RANK"])
def test_nothing_is_done_elsewhere(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert torchrun_worker() is not None
    if variable == "RANK":
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, "False")
    assert not torchrun.separate_restarts()
