"""Groups of processes, one for each rank of a job: their environment, and how they are watched and ended together.

A group ends as under an agent that restarts whole groups. When one rank dies by a signal, the others are killed at
once; when one exits with an error, a moment later: it may have noticed another one's death first. Each rank leads a
process group of its own, which is killed with it, so that its data workers never outlive it.
"""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import time
from dataclasses import dataclass, field

TIMEOUT_SECONDS = 240  # compilers take a minute on a busy machine; a test has 300
_GRACE_SECONDS = 0.25


@dataclass
class Ended:
    """How a group ended.

    Args:
        codes: Exit code of each rank; negative for a signal.
        failed: Ranks that ended badly by themselves, before the others were killed.
        timed_out: Whether the group was killed because it took too long.
    """

    codes: list[int]
    failed: list[int] = field(default_factory=list)
    timed_out: bool = False

    @property
    def good(self) -> bool:
        return not any(self.codes)


def suffix(rank: int, ranks: int) -> str:
    """What the names of a rank's files end in: nothing in a job of one rank."""
    return f"-{rank}" if ranks > 1 else ""


def environments(ranks: int, job_id: str) -> list[dict[str, str]]:
    """What :func:`elastic_environments` says; nothing for a job of one rank, which is an ordinary process."""
    return elastic_environments(ranks, job_id) if ranks > 1 else [{}]


def elastic_environments(ranks: int, job_id: str) -> list[dict[str, str]]:
    """What an elastic agent on one node sets for each of its ranks; rank 0 serves the store, on a fresh port."""
    port = free_port()
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": job_id,
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        for rank in range(ranks)
    ]


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to connections until it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


class Group:
    """Children of this process that live and die together.

    Args:
        pids: One child for each rank; each leads a process group.
        control: Descriptor of a pipe; when its other end is closed, nobody waits for the group, and it is killed.
    """

    def __init__(self, pids: list[int], control: int) -> None:
        self._pids = pids
        self._control = control
        self._left = {os.pidfd_open(pid): rank for rank, pid in enumerate(pids)}
        self._poll = select.poll()
        self._poll.register(control, 0)  # hang-up only
        for descriptor in self._left:
            self._poll.register(descriptor, select.POLLIN)

    def wait(self, timeout_seconds: float = TIMEOUT_SECONDS) -> Ended:
        """Until all have ended; the first bad end, or the timeout, ends the others."""
        ended = Ended([0] * len(self._pids))
        deadline = time.monotonic() + timeout_seconds
        killed = False
        while self._left:
            timeout = None if killed else max(0.0, deadline - time.monotonic()) * 1000
            ready = [descriptor for descriptor, _ in self._poll.poll(timeout)]
            for descriptor in ready:
                self._poll.unregister(descriptor)
                if descriptor != self._control:
                    rank = self._left.pop(descriptor)
                    ended.codes[rank] = self._reap(descriptor, self._pids[rank])
                    if ended.codes[rank] and not killed:
                        ended.failed.append(rank)
            if killed:
                continue
            if not ready or self._control in ready or min(ended.codes) < 0:
                ended.timed_out = not ready and not ended.failed
                killed = True
                for rank in self._left.values():
                    os.killpg(self._pids[rank], signal.SIGKILL)
            elif ended.failed:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return ended

    @staticmethod
    def _reap(descriptor: int, pid: int) -> int:
        os.close(descriptor)
        os.killpg(pid, signal.SIGKILL)  # what the rank left; the dead leader still reserves the number
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
