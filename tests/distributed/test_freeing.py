"""A survivor is freed from a collective when a rank is lost: killed, stopped, or on a host that went silent.

The group timeout is 1,800 s, so a rank that is not freed makes a test fail by its limit.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore

from moetion_lightning.distributed.generations import announce_loss
from moetion_lightning.distributed.stable_store import host_store

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).parent / "workers" / "ring.py"
_SECONDS = 200.0


class Ring:
    """Light ranks, and what they say."""

    def __init__(self, host: str, world_size: int, *, workers: bool = False) -> None:
        self.host = host
        self.world_size = world_size
        self.workers = workers
        self.server: TCPStore = host_store(host)
        self.pids: dict[int, int] = {}
        self._said: queue.Queue[dict[str, Any]] = queue.Queue()
        self._processes: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []

    def start(self, ranks: list[int], *, generation: int = 0, inside: tuple[str, ...] = (), device: str = "lo") -> None:
        names = ",".join(map(str, ranks))
        arguments = [self.host, str(self.server.port), str(self.world_size), names, str(generation)]
        child = subprocess.Popen(
            [*inside, sys.executable, str(WORKER), *arguments, "workers" if self.workers else "none"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": device},
            start_new_session=True,
        )
        self._processes.append(child)
        self._threads.append(threading.Thread(target=self._read, args=(child,)))
        self._threads[-1].start()

    def _read(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            self._said.put(json.loads(line))

    def hear(self, key: str, ranks: set[int]) -> dict[int, dict[str, Any]]:
        """What these ranks say with this key."""
        found: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + _SECONDS
        while set(found) != ranks:
            said = self._said.get(timeout=max(deadline - time.monotonic(), 0.01))
            assert "failed" not in said, said
            if key in said and said["rank"] in ranks:
                found[said["rank"]] = said
                self.pids[said["rank"]] = said.get("pid", 0)
        return found

    def lose(self, rank: int, how: Callable[[int], None]) -> dict[int, float]:
        """Lose a rank and tell; seconds from the telling until each other rank was free."""
        everybody = set(range(self.world_size))
        self.hear("ready", everybody)
        how(self.pids[rank])
        time.sleep(1.0)  # the others come to wait for it
        told = time.time()
        announce_loss(PrefixStore("job.1", self.server), [rank], "lost")
        freed = self.hear("freed", everybody - {rank})
        return {each: said["freed"] - told for each, said in freed.items()}

    def close(self) -> None:
        for process in self._processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def rings() -> Iterator[list[Ring]]:
    made: list[Ring] = []
    yield made
    for ring in made:
        ring.close()


@pytest.mark.parametrize("workers", [False, True], ids=["plain", "workers"])
def test_eight_ranks_in_a_ring_are_freed_and_go_on(rings: list[Ring], workers: bool) -> None:
    """The lost rank is stopped: its connections stay open, and nobody gets a FIN or a reset."""
    ring = Ring("127.0.0.1", 8, workers=workers)
    rings.append(ring)
    ring.start(list(range(8)))
    seconds = ring.lose(3, lambda pid: os.kill(pid, signal.SIGSTOP))
    print("freed after", sorted(round(s, 2) for s in seconds.values()))
    assert max(seconds.values()) < 60.0
    ring.start([3], generation=1)
    said = ring.hear("total", set(range(8)))
    assert {(s["total"], s["generation"]) for s in said.values()} == {(8.0, 1)}


def test_a_killed_rank_frees_all_although_workers_hold_its_neighbours_sockets(rings: list[Ring]) -> None:
    ring = Ring("127.0.0.1", 4, workers=True)
    rings.append(ring)
    ring.start(list(range(4)))
    seconds = ring.lose(1, lambda pid: os.kill(pid, signal.SIGKILL))
    assert max(seconds.values()) < 60.0
    ring.start([1], generation=1)
    assert {s["total"] for s in ring.hear("total", set(range(4))).values()} == {4.0}


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces on a bridge with this host, which is 10.213.0.1; the device inside has the name's."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip")
    bridge = f"moe{os.getpid() % 100_000}"
    names = [f"{bridge}{letter}" for letter in "ab"]
    commands = [f"ip link add {bridge} type bridge", f"ip addr add 10.213.0.1/24 dev {bridge}"]
    for number, name in enumerate(names, 2):
        commands += [
            f"ip netns add {name}",
            f"ip link add {name}0 type veth peer name {name} netns {name}",
            f"ip link set {name}0 master {bridge} up",
            f"ip -n {name} addr add 10.213.0.{number}/24 dev {name}",
            f"ip -n {name} link set {name} up",
            f"ip -n {name} link set lo up",
        ]
    try:
        for command in [*commands, f"ip link set {bridge} up"]:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"needs network namespaces and a bridge: {command}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        for name in [*(f"{name}0" for name in names), bridge]:
            subprocess.run(["ip", "link", "del", name], capture_output=True)


def test_a_host_whose_packets_are_dropped_frees_the_others(rings: list[Ring], hosts: list[str]) -> None:
    """No FIN, no reset, no acknowledgement: as when a host loses power."""
    near, far = hosts
    ring = Ring("10.213.0.1", 3)
    rings.append(ring)
    ring.start([0, 1], inside=("ip", "netns", "exec", near), device=near)
    ring.start([2], inside=("ip", "netns", "exec", far), device=far)
    seconds = ring.lose(2, lambda pid: subprocess.run(["ip", "link", "set", f"{far}0", "down"], check=True) and None)
    print("freed after", sorted(round(s, 2) for s in seconds.values()))
    assert max(seconds.values()) < 60.0
    ring.start([2], generation=1, inside=("ip", "netns", "exec", near), device=near)
    assert {s["total"] for s in ring.hear("total", {0, 1, 2}).values()} == {3.0}
