"""What the control plane costs the run's store: CPU seconds of the server for a vote, a window and a start-up exchange.

    python benchmarks/control_plane.py --ranks 4 64 256 1024 --local-size 8

Every simulated rank is a thread with the real classes and a connection of its own; the server is a process of its own,
whose CPU time is measured. In jobs of more ranks than ``--full`` only one rank of each node is simulated, the one that
talks to the run's store: that server sees the same requests, and the ranks of a node meet elsewhere. Beyond what is
simulated the table is arithmetic: the cost per node of the largest simulation. Token counts do not pass the store: they
are summed over the training's process group, whatever the model (61 layers of 256 experts and a window of 8 are 125k
counters).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moetion_lightning.distributed.bounded_store import BoundedStore
from moetion_lightning.distributed.control import StoreControl
from moetion_lightning.engine.ranks import _as_merged, _merge

_RANKS_PER_PROCESS = 128
_SERVE = """
import sys
from moetion_lightning.distributed.stable_store import host_store
store = host_store("127.0.0.1")
print(store.port, flush=True)
sys.stdin.read()
"""
FACTS: dict[str, Any] = {
    "iteration": 800, "iteration_seconds": 0.8123, "bytes_per_second": 2.1e10, "capacity_bytes": 137_438_953_472,
    "committed": [783, 791, 799], "held": [783, 791], "behind": False, "persist": None, "dense": "",
    "digest": "5bd8a1c2f0e94d77",
}  # fmt: skip


class Server:
    """The run's store in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", _SERVE], stdin=-1, stdout=-1, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def seconds(self) -> float:
        """CPU seconds so far."""
        tasks = Path(f"/proc/{self._process.pid}/task").glob("*/schedstat")
        return 1e-9 * sum(int(task.read_text().split()[0]) for task in tasks)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def simulate_part(port: int, ranks: range, world_size: int, local_size: int, orders: int, answers: int) -> None:
    """In a process of its own: some of the ranks, which do together what each line of ``orders`` names."""
    threading.stack_size(256 * 1024)
    with ThreadPoolExecutor(len(ranks)) as pool:

        def make(rank: int) -> StoreControl:
            store = BoundedStore("127.0.0.1", port, 600.0)
            return StoreControl(store, rank, world_size, scope="job", local_size=local_size, timeout_seconds=3600.0)

        controls = list(pool.map(make, ranks))
        work = {
            "votes": lambda control, times: [control.vote("step") for _ in range(times)],
            "windows": lambda control, times: [
                control.all_reduce("window", _as_merged(FACTS), _merge) for _ in range(times)
            ],
            "gathers": lambda control, times: [control.all_gather("domains", "host-0123") for _ in range(times)],
        }
        os.write(answers, b"ready\n")
        with os.fdopen(orders) as lines:
            for line in lines:
                name, times = line.split()
                list(pool.map(lambda control: work[name](control, int(times)), controls))  # noqa: B023
                os.write(answers, b"done\n")
        for control in controls:
            control.close()


class Ranks:
    """All simulated ranks, in forked processes."""

    def __init__(self, port: int, world_size: int, local_size: int) -> None:
        self._orders: list[int] = []
        self._answers: list[Any] = []
        self._children: list[int] = []
        for start in range(0, world_size, _RANKS_PER_PROCESS):
            ranks = range(start, min(world_size, start + _RANKS_PER_PROCESS))
            orders, orders_in = os.pipe()
            answers, answers_in = os.pipe()
            child = os.fork()
            if child == 0:
                for other in self._orders:
                    os.close(other)
                os.close(orders_in)
                simulate_part(port, ranks, world_size, local_size, orders, answers_in)
                os._exit(0)
            os.close(orders)
            os.close(answers_in)
            self._orders.append(orders_in)
            self._answers.append(os.fdopen(answers))
            self._children.append(child)
        self._hear()

    def do(self, name: str, times: int) -> float:
        """Have all ranks do something together. Returns the seconds it took."""
        begin = time.perf_counter()
        for orders in self._orders:
            os.write(orders, f"{name} {times}\n".encode())
        self._hear()
        return time.perf_counter() - begin

    def _hear(self) -> None:
        for answers in self._answers:
            if not answers.readline():
                raise SystemExit("a process with simulated ranks has died")

    def close(self) -> None:
        for orders in self._orders:
            os.close(orders)
        for child in self._children:
            os.waitpid(child, 0)


def measure(world_size: int, local_size: int, votes: int, windows: int, *, full: bool) -> dict[str, float]:
    """Milliseconds of the server's CPU, and of the clock, for each of what the ranks do together."""
    server = Server()
    ranks = Ranks(server.port, world_size if full else world_size // local_size, local_size if full else 1)
    found: dict[str, float] = {"ranks": world_size, "local_size": local_size, "full": full}
    for name, times in (("gathers", 2), ("votes", votes), ("windows", windows)):
        ranks.do(name, 1)  # the first one meets
        before = server.seconds()
        seconds = ranks.do(name, times)
        found[f"{name[:-1]}_ms"] = 1e3 * (server.seconds() - before) / times
        found[f"{name[:-1]}_clock_ms"] = 1e3 * seconds / times
    ranks.close()
    server.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 64, 256, 1024])
    parser.add_argument("--local-size", type=int, default=8, help="ranks of a node")
    parser.add_argument("--full", type=int, default=128, help="ranks up to which all are simulated")
    parser.add_argument("--votes", type=int, default=20)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=8, help="iterations of a window")
    parser.add_argument("--beyond", type=int, nargs="*", default=[4096, 16384], help="by arithmetic")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    print(f"{'ranks':>6} {'a node':>7} {'vote':>8} {'window':>8} {'exchange':>9} {'a step':>8}   ms of the store's CPU")
    rows = []
    for world_size in args.ranks:
        local_size = min(args.local_size, world_size)
        row = measure(world_size, local_size, args.votes, args.windows, full=world_size <= args.full)
        rows.append(row)
        show(row, args.iterations, "" if row["full"] else "one rank of each node")
    for world_size in args.beyond:
        last = rows[-1]
        scale = world_size / last["ranks"]
        show(
            {**{k: v * scale for k, v in last.items()}, "local_size": last["local_size"]}, args.iterations, "arithmetic"
        )
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1))


def show(row: dict[str, float], iterations: int, note: str = "") -> None:
    step = row["vote_ms"] + row["window_ms"] / iterations
    print(
        f"{row['ranks']:6.0f} {row['local_size']:7.0f} {row['vote_ms']:8.3f} {row['window_ms']:8.3f} "
        f"{row['gather_ms']:9.3f} {step:8.3f}   {note}",
        flush=True,
    )


if __name__ == "__main__":
    main()
