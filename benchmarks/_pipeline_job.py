"""A few ranks of one gloo job as forked processes, which all run one function and give back what it returns."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["run_ranks"]


def run_ranks(world: int, work: Callable[[int], Any], *, timeout_seconds: float) -> list[Any]:
    """Run ``work(rank)`` in as many processes, and collect what it returns.

    They are forked, so that the imports are done once for all of them; this process must not have computed anything
    with torch yet. With one process there is no process group.

    Args:
        world: Number of ranks.
        work: What each of them runs; returns plain values.
        timeout_seconds: For all of them together.

    Raises:
        RuntimeError: A rank failed or died, or the time is up. All of them are ended then.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="moetion-bench-") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(target=_rank, args=(work, rank, world, Path(folder) / "store", end), daemon=True)
            for rank, (_, end) in enumerate(pipes)
        ]
        try:
            for process, (_, end) in zip(processes, pipes):
                process.start()
                end.close()
            found = _collect([reader for reader, _ in pipes], time.monotonic() + timeout_seconds)
            for process in processes:
                process.join()
            return found
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(readers: list[Connection], deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(readers):
        left = [reader for rank, reader in enumerate(readers) if rank not in found]
        ready = wait(left, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(readers)) if rank not in found]
            raise RuntimeError(f"ranks {late} of {len(readers)} have not finished in time (--timeout)")
        for reader in ready:
            rank = next(i for i, known in enumerate(readers) if known is reader)
            try:
                error, value = reader.recv()
            except EOFError:
                error, value = "it died without a word", None
            if error:
                raise RuntimeError(f"rank {rank} of {len(readers)} failed:\n{error}")
            found[rank] = value
    return [found[rank] for rank in range(len(readers))]


def _rank(work: Callable[[int], Any], rank: int, world: int, store: Path, answer: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        if world > 1:
            file = dist.FileStore(str(store), world)
            dist.init_process_group("gloo", store=file, rank=rank, world_size=world, timeout=timedelta(minutes=10))
        result = work(rank)
        if world > 1:
            dist.barrier()  # nobody closes connections while another one still uses them
            dist.destroy_process_group()
        answer.send(("", result))
    except BaseException:
        answer.send((traceback.format_exc(), None))
