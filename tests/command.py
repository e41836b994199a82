"""Running `moetion` commands, and waiting for what they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.runs import forked
from tests.runs.drill import Zygote

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 180.0


def until(condition: Callable[[], Any], what: str | Callable[[], str], limit_seconds: float = LIMIT_SECONDS) -> Any:
    """Wait until a condition holds, and return its value."""
    deadline = time.monotonic() + limit_seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {limit_seconds} s: {what() if callable(what) else what}")


def _heed_interrupts() -> None:
    """What a shell starts in the background ignores SIGINT, and so would this command."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Forked:
    """A process that the zygote has started, with the methods of ``subprocess.Popen`` that tests need."""

    def __init__(self, zygote: Zygote, spec: dict[str, Any], log: Path, env: dict[str, str]) -> None:
        self._zygote = zygote
        self.returncode: int | None = None
        self.pid = zygote.begin(spec, log, env)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.reap(self.pid)
        return self.returncode

    def wait(self, timeout: float = LIMIT_SECONDS) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked command", timeout)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Command:
    """A running `moetion` command.

    Args:
        log: What it says.
        *args: What follows ``moetion``.
        zygote: Forks it and all that it starts, so that nothing is imported again; None: as a user starts it.
        netns: Network namespace in which it runs (with a zygote only).
        **env: Variables of its environment.
    """

    def __init__(
        self, log: Path, *args: object, zygote: Zygote | None = None, netns: str | None = None, **env: str
    ) -> None:
        self.log = log
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **env}
        log.write_text("")
        self.process: subprocess.Popen[bytes] | Forked
        if zygote is not None:
            self.process = Forked(zygote, forked.spec(*args, netns=netns), log, env)
            return
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moetion_lightning", *map(str, args)],
                cwd=ROOT,
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=_heed_interrupts,
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        return self.process.wait(timeout=LIMIT_SECONDS)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def pids_of(self, module: str) -> set[int]:
        found = set()
        for child in self.children():
            try:
                if f"moetion_lightning.distributed.{module}" in child.cmdline():
                    found.add(child.pid)
            except psutil.Error:  # it ended meanwhile
                pass
        return found
