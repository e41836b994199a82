"""A rank that ends in the way that its arguments say: ending.py KIND [ARGUMENT]."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from moetion_lightning.config import launched_process
from moetion_lightning.distributed.membership import Membership


def raise_error() -> None:
    raise ValueError("the learning rate of rank " + os.environ["RANK"] + " is negative")


def die_after_others() -> None:
    process = launched_process()
    assert process is not None
    membership = Membership(process)
    store = membership.store()
    while store.add("moetion/finished", 0) == 0:
        time.sleep(0.02)
    sys.exit(3)


def main() -> None:
    kind = sys.argv[1]
    if kind == "raise":
        raise_error()
    elif kind == "exit":
        sys.exit(int(sys.argv[2]))
    elif kind == "print":
        print(sys.argv, __name__, sys.path[0], Path(__file__).name)
    elif kind == "wait":
        Path(sys.argv[2], os.environ["RANK"]).write_text(str(os.getpid()))
        time.sleep(120)
    elif kind == "leave-child":
        child = subprocess.Popen(["sleep", "120"])
        Path(sys.argv[2], "child").write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "finish-then-die" and os.environ["RANK"] == "1":
        die_after_others()


if __name__ == "__main__":
    main()
