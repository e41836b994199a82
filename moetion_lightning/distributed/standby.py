"""Processes that have imported everything and wait to become a rank."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from moetion_lightning.config import LAUNCHER_PID_VARIABLE, REPORT_VARIABLE
from moetion_lightning.distributed.exits import describe_exit
from moetion_lightning.distributed.guard import Guard
from moetion_lightning.distributed.progress import Report, State
from moetion_lightning.distributed.torch_elastic import StandbyProcess, end_session

__all__ = ["RANK_MODULE", "StandbyPool"]

_log = logging.getLogger(__name__)

#: Arguments of the interpreter before a rank's program.
RANK_MODULE = ("-u", "-m", "moetion_lightning.distributed.rank")
_REFILL_SECONDS = 5.0
#: torch before 2.9 does not bind processes to processors.
_NO_NUMA: dict[str, Any] = {"numa_options": None} if "numa_options" in signature(SubprocessHandler).parameters else {}
_STANDBY_FAILURES = 3


class StandbyPool:
    """Keeps some of them ready.

    Args:
        size: Number of processes to keep.
        guard: Is told of each.
    """

    def __init__(self, size: int, guard: Guard) -> None:
        self._size = size
        self._guard = guard
        self._waiting: list[tuple[StandbyProcess, Report, bool]] = []
        self._refill_at = 0.0
        self._failures = 0

    def tend(self) -> None:
        """Notice who is ready or dead, and start new ones when it is time."""
        for index, (process, report, was_ready) in reversed(list(enumerate(self._waiting))):
            if report.state == State.READY and not was_ready:
                self._failures = 0
                self._waiting[index] = process, report, True
                _log.info("process %d stands by", process.proc.pid)
            status = process.proc.poll()
            if status is not None:
                del self._waiting[index]
                self._failures += 1
                self.rest()
                _log.warning("process %d, which stood by, ended: %s", process.proc.pid, describe_exit(status))
                if self._failures == _STANDBY_FAILURES:
                    _log.warning("%d of them ended in a row: no more are started", self._failures)
        if self._failures < _STANDBY_FAILURES and time.monotonic() >= self._refill_at:
            while len(self._waiting) < self._size:
                self._waiting.append(self._start())

    def _start(self) -> tuple[StandbyProcess, Report, bool]:
        report = Report()
        env = {REPORT_VARIABLE: report.path, LAUNCHER_PID_VARIABLE: str(os.getpid())}
        args = (*RANK_MODULE, "--standby")
        process = StandbyProcess(sys.executable, args, env, None, None, local_rank_id=0, **_NO_NUMA)
        self._guard.add(process.proc.pid)
        return process, report, False

    def take(self, order: Mapping[str, Any]) -> tuple[StandbyProcess, Report] | None:
        """Turn a ready process into a rank; None if none is ready."""
        for item in [item for item in self._waiting if item[2]]:
            self._waiting.remove(item)
            self.rest()
            if item[0].give(json.dumps(order).encode() + b"\n"):
                return item[:2]
            end_session(item[0])
        return None

    def rest(self) -> None:
        """Start none for a while: a recovery needs the processor."""
        self._refill_at = time.monotonic() + _REFILL_SECONDS

    def close(self) -> None:
        """End all."""
        for process, report, _ in self._waiting:
            end_session(process)
            self._guard.remove(process.proc.pid)
            report.close()
        self._waiting.clear()
