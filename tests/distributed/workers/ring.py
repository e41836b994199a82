"""Light ranks that sum until one of them is lost: ring.py HOST PORT WORLD RANKS [generation] [workers] (see ``main``).

Each rank is a fork of one process that has imported torch. It writes JSON lines: that it is ready, when and with what
error its collective ended, and the sum in the next membership.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from moetion_lightning.config import LaunchedProcess
from moetion_lightning.distributed.groups import Groups
from moetion_lightning.distributed.membership import StoreMembership

_NUM_VALUES = 1 << 16  # gloo sums as many in a ring


def say(**values: Any) -> None:
    os.write(1, (json.dumps(values) + "\n").encode())


def total() -> float:
    tensor = torch.ones(_NUM_VALUES)
    dist.all_reduce(tensor)
    return float(tensor[0])


def run(host: str, port: int, world_size: int, rank: int, generation: int, *, workers: bool) -> None:
    process = LaunchedProcess(
        rank=rank, world_size=world_size, store_host=host, store_port=port, run_id="job.1", generation=generation,
        failure_domain="", local_address="",
    )  # fmt: skip
    membership = StoreMembership(process)
    groups = Groups(membership, store_port=port)
    groups.install()
    groups.joins = True
    dist.init_process_group("gloo", timeout=timedelta(seconds=1800))
    loader = DataLoader(range(100_000), num_workers=1, persistent_workers=True, multiprocessing_context="fork")  # type: ignore[arg-type]
    batches = iter(loader) if workers and not groups.alone else None
    if not groups.alone:
        total()
        say(rank=rank, pid=os.getpid(), ready=True, worker=None if batches is None else int(next(batches)))
        try:
            while True:
                total()
        except RuntimeError as error:
            say(rank=rank, freed=time.time(), error=str(error).splitlines()[0][:100])
        assert membership.lost(600.0)
        groups.leave()
        membership.advance()
    groups.join()
    say(rank=rank, total=total(), generation=membership.generation)
    groups.control().all_gather("end", None)
    membership.close()
    if batches is not None:
        batches._shutdown_workers()  # type: ignore[attr-defined]


def main() -> None:
    """Arguments: address and port of the store, ranks, those to run here ("0,1,2"), generation, "workers" or "none"."""
    host, port, world_size, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    children = []
    for rank in map(int, ranks.split(",")):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(host, port, world_size, rank, int(sys.argv[5]), workers=sys.argv[6] == "workers")
                status = 0
            except BaseException as error:
                say(rank=rank, failed=repr(error)[:500])
            os._exit(status)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
