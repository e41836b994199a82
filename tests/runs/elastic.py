"""Ranks that are replaced one at a time: what ``moetion launch`` does, by forking instead of starting.

With ``hosts`` in the spec (a name for each rank), ranks live on hosts with host memory and a failure domain of their
own. A rank that is killed takes its host with it: all its other ranks are killed, its memory is removed, and one
generation announces them all; a spare host with empty memory takes their place. A kill with ``with_hosts`` ends
those hosts at the same time. A rank that ends by an error is not replaced then: the others are given time to end, too.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore

from moetion_lightning.distributed.generations import announce_loss
from moetion_lightning.distributed.stable_store import connect_store, host_store
from tests.runs.ranks import Ended

Fork = Callable[[dict[str, Any], str, dict[str, str]], int]


def environment(rank: int, ranks: int, job_id: str, port: int, generation: int, host: str = "here") -> dict[str, str]:
    """What ``moetion launch`` tells a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": job_id,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
        "MOETION_STORE": f"127.0.0.1:{port}",
        "MOETION_GENERATION": str(generation),
        "MOETION_SECRET": "secret-of-this-job",
        "MOETION_FAILURE_DOMAIN": host,
    }


class StoreHost:
    """A process that serves the store: ranks forked beside the server's thread would inherit the locks it holds."""

    def __init__(self) -> None:
        reads, writes = os.pipe()
        alive, self._alive = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._alive)
            try:
                store = host_store("127.0.0.1")
                os.write(writes, str(store.port).encode())
                os.read(alive, 1)  # until this one closes the other end, or is gone
            finally:
                os._exit(0)
        os.close(alive)
        os.close(writes)
        self.port = int(os.read(reads, 16))
        os.close(reads)

    def close(self) -> None:
        os.close(self._alive)
        os.waitpid(self.pid, 0)


def run_elastic(
    fork: Fork, spec: dict[str, Any], logs: list[str], *, restarts: int, timeout_seconds: float, control: int
) -> tuple[Ended, list[list[int]]]:
    """Start all ranks; replace those that die, until all have ended.

    Returns:
        How the last processes ended (``failed``: every rank that was replaced, in order), and the pids of each rank.
    """
    job = _Job(fork, spec, logs, control)
    for rank in range(spec["ranks"]):
        job.start(rank, 0)
    deadline = time.monotonic() + timeout_seconds
    while job.waiting:
        dead = job.wait(deadline)
        if dead is None:
            job.ended.timed_out = True
            break
        lost = job.take_along(dead)
        job.ended.failed += lost
        if job.losses > restarts:
            break
        job.replace(lost)
    job.close()
    return job.ended, job.pids


class _Job:
    """The processes of a job, and the hosts that they are on."""

    def __init__(self, fork: Fork, spec: dict[str, Any], logs: list[str], control: int) -> None:
        self._fork, self._spec, self._logs, self._control = fork, spec, logs, control
        self._ranks, self._id = spec["ranks"], spec.get("job_id", "job")
        self._server = StoreHost()
        self._announced = PrefixStore(self._id, connect_store("127.0.0.1", self._server.port))
        self._hosts: list[str] = list(spec.get("hosts") or ["here"] * self._ranks)
        self._has_hosts = "hosts" in spec
        self._spares = 0
        self._generations = [0] * self._ranks
        self._poll = select.poll()
        self._poll.register(control, 0)
        self.waiting: dict[int, int] = {}
        self.pids: list[list[int]] = [[] for _ in range(self._ranks)]
        self.ended = Ended([0] * self._ranks)
        self.losses = 0

    def start(self, rank: int, generation: int) -> None:
        host = self._hosts[rank]
        spec = self._spec
        if self._has_hosts:
            memory = Path(spec["memory_dir"], host)
            memory.mkdir(mode=0o700, exist_ok=True)
            spec = {**spec, "memory_dir": str(memory)}
        env = environment(rank, self._ranks, self._id, self._server.port, generation, host)
        pid = self._fork(spec, self._logs[rank], env)
        self.pids[rank].append(pid)
        self._generations[rank] = generation
        descriptor = os.pidfd_open(pid)
        self.waiting[descriptor] = rank
        self._poll.register(descriptor, select.POLLIN)

    def wait(self, deadline: float) -> list[int] | None:
        """The ranks that have died; None when nobody waits any longer."""
        ready = [d for d, _ in self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
        if not ready or self._control in ready:
            return None
        return [rank for rank in map(self._reap, ready) if self._is_lost(rank)]

    def take_along(self, dead: list[int]) -> list[int]:
        """The ranks that are lost with these: all of their hosts, whose memory goes."""
        if not self._has_hosts:
            self.losses += len(dead)
            return dead
        hosts = {self._hosts[rank] for rank in dead}
        for kill in self._spec["kills"]:
            if kill["rank"] in dead and kill["generation"] == self._generations[kill["rank"]]:
                hosts.update(kill.get("with_hosts", ()))
        lost = [rank for rank, host in enumerate(self._hosts) if host in hosts]
        for descriptor, rank in list(self.waiting.items()):
            if rank in lost:
                os.killpg(self.pids[rank][-1], signal.SIGKILL)
                self._reap(descriptor)
        for host in sorted(hosts):
            shutil.rmtree(Path(self._spec["memory_dir"], host))
            self._spares += 1
            self._hosts = [f"spare{self._spares}" if h == host else h for h in self._hosts]
        self.losses += len(hosts)
        return lost

    def replace(self, lost: list[int]) -> None:
        if lost:
            generation = announce_loss(self._announced, lost, "killed by the test")
            assert generation is not None, "training was over"
            for rank in lost:
                self.start(rank, generation)

    def close(self) -> None:
        for descriptor, rank in list(self.waiting.items()):
            os.killpg(self.pids[rank][-1], signal.SIGKILL)
            self._reap(descriptor)
        self._server.close()

    def _is_lost(self, rank: int) -> bool:
        code = self.ended.codes[rank]
        return code < 0 or (code > 0 and not self._has_hosts)

    def _reap(self, descriptor: int) -> int:
        rank = self.waiting.pop(descriptor)
        self._poll.unregister(descriptor)
        os.close(descriptor)
        pid = self.pids[rank][-1]
        self.ended.codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, os.WUNTRACED)[1])
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return rank
