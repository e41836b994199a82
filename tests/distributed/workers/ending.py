"""A rank that ends in the way that its arguments say: ending.py KIND [ARGUMENT]."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moetion_lightning.config import launched_process
from moetion_lightning.distributed.membership import StoreMembership
from moetion_lightning.errors import StateLostError, StrandedRankError


def raise_error() -> None:
    raise ValueError("the learning rate of rank " + os.environ["RANK"] + " is negative")


def is_first_time() -> bool:
    """Whether this rank has not been here before, in a process that is gone."""
    note = Path(sys.argv[2], os.environ["RANK"])
    is_first = not note.exists()
    note.touch()
    return is_first


def die_after_others() -> None:
    process = launched_process()
    assert process is not None
    membership = StoreMembership(process)
    store = membership.store()
    while store.add("moetion/finished", 0) == 0:
        time.sleep(0.02)
    sys.exit(3)


def hang_in_lock() -> None:
    """Rank 1 hangs; the others wait for it in a collective."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for step in range(1000):
        dist.all_reduce(torch.ones(1))
        if step == 20 and os.environ["RANK"] == "1":
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        time.sleep(0.02)


def main() -> None:
    kind = sys.argv[1]
    if kind == "raise":
        raise_error()
    elif kind == "exit":
        sys.exit(int(sys.argv[2]))
    elif kind == "print":
        print(sys.argv, __name__, sys.path[0], Path(__file__).name)
    elif kind == "wait":
        child = subprocess.Popen(["sleep", "120"])
        Path(sys.argv[2], os.environ["RANK"]).write_text(str(child.pid))
        time.sleep(120)
    elif kind == "hang-in-lock":
        hang_in_lock()
    elif kind == "hang-at-exit":
        atexit.register(time.sleep, 120)
    elif kind == "die-after-training":
        process = launched_process()
        assert process is not None
        StoreMembership(process).finish()
        time.sleep(1.0 if os.environ["RANK"] == "1" else 120)
        sys.exit(3)
    elif kind == "lost":
        raise StateLostError("no rank has a window")
    elif kind == "stranded" and is_first_time():
        time.sleep(120 if os.environ["RANK"] == "0" else 0)
        raise StrandedRankError("lost in another fit")
    elif kind == "leave-child":
        child = subprocess.Popen(["sleep", "120"])
        Path(sys.argv[2], "child").write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "finish-then-die" and os.environ["RANK"] == "1" and is_first_time():
        die_after_others()


if __name__ == "__main__":
    main()
