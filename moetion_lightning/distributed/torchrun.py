"""Under ``torchrun``: process groups of a restarted attempt must not connect to stale addresses of the one before.

The agent of ``torchrun`` keeps one store over all restarts, and by default process groups put the addresses of their
ranks there, under the same keys each time. A restarted rank may read the address of a process that is dead, and then
waits for it (gloo, torch 2.13: about every second restart; pytorch issues 135712 and 167288). Here each attempt gets a
store of its own, on a port that rank 0 reserves and tells the others through the agent's store.

``TORCHELASTIC_RESTART_COUNT`` does not tell attempts apart: each agent counts for itself, and a restart because a node
joins is not counted. So every process draws a random word; rank 0 answers the word of each rank, and each rank confirms
the word of rank 0. Whatever an earlier attempt left in the store is recognised by that, and it does not pile up.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from moetion_lightning.config import TorchrunWorker, torchrun_worker, update_environment
from moetion_lightning.errors import RankLostError

__all__ = ["separate_restarts"]

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.02
_reserved: list[socket.socket] = []  # kept open while this process lives


def separate_restarts(timeout_seconds: float = 600.0) -> bool:
    """Give the process groups of this attempt a store of their own.

    Call it before the process group is initialised. It does nothing outside ``torchrun``, under ``moetion launch``,
    when a process group exists, when ``torchrun`` itself uses a store for each attempt, and when it was called before.

    Ranks:
        All, each once per attempt at least.

    Args:
        timeout_seconds: How long to wait for the slowest rank to call it.

    Returns:
        Whether the environment was changed (``MASTER_PORT``, ``TORCHELASTIC_USE_AGENT_STORE``) by this call.

    Raises:
        RankLostError: Another rank did not call it in time, or the agent's store is gone.
    """
    worker = torchrun_worker()
    if worker is None or dist.is_initialized():
        return False
    port = _reserve_port(worker.store_host) if worker.rank == 0 else 0
    if worker.world_size > 1:
        try:
            port = _agree(worker, port, timeout_seconds)
        except DistError as error:
            raise RankLostError(
                f"rank {worker.rank}: the store of the torchrun agent at {worker.store_host}:{worker.store_port} does "
                f"not answer ({error}). The agent has ended, or its host cannot be reached; start the job again."
            ) from error
    update_environment({"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"})
    _log.debug("process groups of this attempt use a store of their own on %s:%d", worker.store_host, port)
    return True


def _reserve_port(host: str) -> int:
    """A free port on this machine that no other program is given before the store listens there.

    A socket that is bound and does not listen keeps others away; torch's store may bind to it, as both allow reuse.
    """
    for name in (host, "localhost"):  # a host name that stands for a gateway cannot be bound to
        try:
            family, _, _, _, address = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0]
            reservation = socket.socket(family, socket.SOCK_STREAM)
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reservation.bind(address)
        except OSError:
            continue
        _reserved.append(reservation)
        return int(reservation.getsockname()[1])
    raise RankLostError(
        f"rank 0 cannot bind to {host!r} nor to 'localhost': check the network interfaces of this machine"
    )


def _agree(worker: TorchrunWorker, port: int, timeout_seconds: float) -> int:
    """Rank 0 tells its port, the others return it."""
    agent = TCPStore(
        worker.store_host,
        worker.store_port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
    )
    store = PrefixStore(f"moetion/{worker.run_id}", agent)
    deadline = time.monotonic() + timeout_seconds
    return _tell(store, worker, port, deadline) if worker.rank == 0 else _ask(store, worker, deadline)


def _tell(store: Store, worker: TorchrunWorker, port: int, deadline: float) -> int:
    word = secrets.token_hex(8)
    waiting = list(range(1, worker.world_size))
    answered: dict[int, str] = {}
    while True:
        for rank in waiting:
            asked = _read(store, f"asks/{rank}")
            if asked and answered.get(rank) != asked:  # perhaps a dead process's word, which a live one's replaces
                store.set(f"answer/{rank}", f"{asked} {word} {port}")
                answered[rank] = asked
        waiting = [rank for rank in waiting if _read(store, f"confirms/{rank}") != word]
        if not waiting:
            return port
        if time.monotonic() > deadline:
            raise RankLostError(
                f"rank 0 waits in separate_restarts(), and these ranks do not call it: {waiting[:16]} (of "
                f"{worker.world_size}). Make the same callbacks on every rank; if they are only slow, allow more time."
            )
        time.sleep(_POLL_SECONDS)


def _ask(store: Store, worker: TorchrunWorker, deadline: float) -> int:
    word = secrets.token_hex(8)
    store.set(f"asks/{worker.rank}", word)
    while True:
        asked, word_of_rank_0, port = (_read(store, f"answer/{worker.rank}") or "- - 0").split()
        if asked == word:
            store.set(f"confirms/{worker.rank}", word_of_rank_0)
            return int(port)
        if time.monotonic() > deadline:
            raise RankLostError(
                f"rank {worker.rank} waits in separate_restarts(), and rank 0 does not answer. Make the same callbacks "
                "on every rank; if some are only slow, allow more time."
            )
        time.sleep(_POLL_SECONDS)


def _read(store: Store, key: str) -> str | None:
    """The value, without waiting for one."""
    return bytes(store.get(key)).decode() if store.check([key]) else None
