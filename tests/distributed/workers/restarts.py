"""A training script for torchrun: steps of all-reduce, killed in several attempts.

Usage: restarts.py FOLDER MODE MOMENT[,MOMENT...], where MODE is "separate" or "shared". In attempt i, rank 1 kills
itself with SIGKILL at the i-th moment. The attempt that gets through writes its results to FOLDER.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moetion_lightning.distributed.torchrun import separate_restarts


def main(folder: Path, mode: str, kills: list[str]) -> None:
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])

    def reached(moment: str) -> None:
        if rank == 1 and attempt < len(kills) and kills[attempt] == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    reached("before")
    changed = (separate_restarts(timeout_seconds=30), separate_restarts()) if mode == "separate" else ()
    reached("separated")
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    reached("initialised")
    value = torch.ones(1)
    for step in range(4):
        if step == 2:
            reached("stepping")
        dist.all_reduce(value)
    dist.destroy_process_group()
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))  # a second time in one process
    dist.all_reduce(value)
    dist.destroy_process_group()
    (folder / f"rank{rank}").write_text(f"{attempt} {value.item()} {changed}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(","))
