"""Strangers connect to the ports that a job has open, and training goes on as if they had not."""

from __future__ import annotations

import contextlib
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from moetion_lightning.distributed.wire import PROOF_BYTES, connect, job_key
from moetion_lightning.errors import ReplicationError
from tests.command import until
from tests.runs.drill import Drill, differences, read_events, read_logs

pytestmark = pytest.mark.slow

MAGIC = b"MOETREP1"
SPEC: dict[str, Any] = {
    "ranks": 2, "samples": 64, "epochs": 8, "strategy": "ddp", "hosts": ["a", "b"], "policy_args": {"window": 3},
    "slow_sink": "IterationFinished",
}  # fmt: skip
GARBAGE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    bytes(10_000),
    b"\xff" * 10_000,
    os.urandom(10_000),
    MAGIC + os.urandom(PROOF_BYTES - len(MAGIC)),
    MAGIC,
)


def listening(process: psutil.Process) -> set[int]:
    try:
        return {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    except psutil.Error:
        return set()


def greets(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.3) as client:
        return client.recv(len(MAGIC)) == MAGIC
    return False


def disturb(port: int) -> list[socket.socket]:
    """Everything that a stranger may send. Returns connections that stay open and say nothing, or not all."""
    kept = []
    for data in GARBAGE:
        client = socket.create_connection(("127.0.0.1", port), timeout=2.0)
        with contextlib.suppress(OSError):
            client.sendall(data)
        kept.append(client)
        torn = socket.create_connection(("127.0.0.1", port), timeout=2.0)
        with contextlib.suppress(OSError):
            torn.sendall(data[: len(data) // 2])
        torn.close()
    return [*kept, *(socket.create_connection(("127.0.0.1", port), timeout=2.0) for _ in range(40))]


def test_strangers_at_the_ports_of_a_job(drill: Drill) -> None:
    reference = drill.reference(SPEC)
    zygote = psutil.Process(drill.zygote.pid)
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        job = pool.submit(drill.elastic, SPEC, [])

        def replica_ports() -> list[int]:
            found = [p for child in zygote.children() for p in listening(child) if greets(p)]
            return found if len(found) == 2 else []

        ports = until(replica_ports, "a replica server of each rank")
        stores = listening(min(zygote.children(), key=lambda child: (child.create_time(), child.pid)))  # starts first
        assert len(stores) == 1
        for port in ports:
            with pytest.raises(ReplicationError, match="secret"):
                connect(("127.0.0.1", port), job_key("another secret", "job"), timeout_seconds=5.0)
        for port in [*ports, *stores]:
            for client in disturb(port):
                stack.callback(client.close)
        assert not job.done(), "nobody was disturbed"
        out, ended, pids = job.result()
    assert ended.good, f"{ended}\n{read_logs(out)}"
    assert [len(p) for p in pids] == [1, 1]
    assert differences(reference, out) == []
    assert len(read_events(out, "WindowReplicated")) >= 4
    assert "nothing was taken from it" in read_logs(out)
