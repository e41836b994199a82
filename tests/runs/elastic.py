"""Ranks that are replaced one at a time: what ``moetion launch`` does on one node, by forking instead of starting."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

from torch.distributed import PrefixStore

from moetion_lightning.distributed.generations import announce_loss
from moetion_lightning.distributed.stable_store import host_store
from tests.runs.ranks import Ended

Fork = Callable[[dict[str, Any], str, dict[str, str]], int]


def environment(rank: int, ranks: int, job_id: str, port: int, generation: int) -> dict[str, str]:
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
        "MOETION_FAILURE_DOMAIN": "here",
    }


def run_elastic(
    fork: Fork, spec: dict[str, Any], logs: list[str], *, restarts: int, timeout_seconds: float, control: int
) -> tuple[Ended, list[list[int]]]:
    """Start all ranks; start each one that dies again, until all have ended well.

    Returns:
        How the last processes ended (``failed``: every rank that was replaced, in order), and the pids of each rank.
    """
    store = host_store("127.0.0.1")
    ranks, job = spec["ranks"], spec.get("job_id", "job")
    announced = PrefixStore(job, store)
    pids: list[list[int]] = [[] for _ in range(ranks)]
    ended = Ended([0] * ranks)
    waiting: dict[int, int] = {}
    poll = select.poll()
    poll.register(control, 0)

    def start(rank: int, generation: int) -> None:
        pid = fork(spec, logs[rank], environment(rank, ranks, job, store.port, generation))
        pids[rank].append(pid)
        descriptor = os.pidfd_open(pid)
        waiting[descriptor] = rank
        poll.register(descriptor, select.POLLIN)

    for rank in range(ranks):
        start(rank, 0)
    deadline = time.monotonic() + timeout_seconds
    while waiting:
        ready = [d for d, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
        if not ready or control in ready:
            ended.timed_out = True
            break
        lost = []
        for descriptor in ready:
            rank = waiting.pop(descriptor)
            poll.unregister(descriptor)
            os.close(descriptor)
            code = _reap(pids[rank][-1])
            ended.codes[rank] = code
            if code:
                lost.append(rank)
                ended.failed.append(rank)
        if len(ended.failed) > restarts:
            break
        if lost:
            generation = announce_loss(announced, lost, "killed by the test")
            for rank in lost:
                start(rank, generation)
    for descriptor, rank in waiting.items():
        os.killpg(pids[rank][-1], signal.SIGKILL)
        os.close(descriptor)
        ended.codes[rank] = _reap(pids[rank][-1])
    return ended, pids


def _reap(pid: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, os.WUNTRACED)[1])
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return code
