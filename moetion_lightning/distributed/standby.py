"""``python -m moetion_lightning.distributed.standby``: a process that has imported everything and waits for a rank.

It blocks on one line of JSON on stdin, ``{"env": {...}, "argv": [...], "module": false}``, then becomes that rank. It
initialises no device and draws no random number before. At the end of stdin without a line it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from importlib import import_module

from moetion_lightning.config import update_environment
from moetion_lightning.distributed.heartbeat import READY, end_with_launcher, report
from moetion_lightning.distributed.worker import run_program

__all__ = ["main"]

#: What a training script imports first, by name: this room itself knows no Lightning.
_IMPORTS = ("torch", "torch.distributed", "lightning.pytorch", "moetion_lightning.callbacks")


def main() -> None:
    """Import, wait, run."""
    end_with_launcher()
    for name in (*_IMPORTS, "moetion_lightning.distributed.groups"):
        with contextlib.suppress(ImportError):  # Lightning need not be installed
            import_module(name)
    report(READY)
    line = sys.stdin.readline()
    if not line:
        return
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # as for any other worker
    os.close(null)
    order = json.loads(line)
    update_environment(order["env"])
    _tell_rank(int(order["env"]["RANK"]))
    run_program(order["argv"], is_module=order["module"])


def _tell_rank(rank: int) -> None:
    """Lightning read the rank from the environment when it was imported, before this process had one."""
    rank_zero = sys.modules.get("lightning_utilities.core.rank_zero")
    if rank_zero is not None:
        rank_zero.rank_zero_only.rank = rank


if __name__ == "__main__":
    main()
