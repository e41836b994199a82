"""Turns, clocks and memory: what both benchmarks measure with."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from lightning.pytorch import Callback

from moetion_lightning.events import (
    CaptureFinished,
    CaptureStarted,
    Event,
    IterationFinished,
    SlotSealed,
    WindowCommitted,
)

__all__ = ["CaptureLog", "HookClock", "MemoryPeak", "Turns", "cpu_seconds", "folder_bytes"]

_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def cpu_seconds() -> float:
    """CPU seconds of this process (all threads) and of its living children."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:  # removed meanwhile
            pass
    return total


class Turns:
    """Lets two threads run in turn, never together: each waits until the other passes.

    Args:
        players: Number of threads; number 0 begins.
    """

    def __init__(self, players: int) -> None:
        self._condition = threading.Condition()
        self._players = players
        self._turn = 0
        self._gone: set[int] = set()

    def wait(self, player: int) -> None:
        """Block until it is this player's turn."""
        with self._condition:
            self._condition.wait_for(lambda: self._turn == player)

    def pass_on(self, player: int) -> None:
        """End the turn."""
        with self._condition:
            for step in range(1, self._players + 1):
                following = (player + step) % self._players
                if following not in self._gone:
                    self._turn = following
                    break
            self._condition.notify_all()

    def leave(self, player: int) -> None:
        """End the turn for good."""
        with self._condition:
            self._gone.add(player)
        self.pass_on(player)


class HookClock:
    """Adds up the time that callbacks spend in their hooks on the training thread: the *stall*."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, callback: Callback) -> None:
        """Time this callback's hooks from now on."""
        for name in _HOOKS:
            setattr(callback, name, self._timed(getattr(callback, name)))

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


class CaptureLog:
    """An event sink of our callbacks: bytes captured, time waited in the optimizer's hook, and what is unfinished.

    Args:
        clock: Gets the time waited.
    """

    def __init__(self, clock: HookClock | None = None) -> None:
        self._clock = clock
        self._condition = threading.Condition()
        self._unfinished = 0
        self.nbytes: list[int] = []
        self.capture_seconds: list[float] = []
        self.windows: list[tuple[int, int]] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, IterationFinished) and self._clock is not None:
            self._clock.seconds += event.stall_seconds
        elif isinstance(event, CaptureFinished):
            self.nbytes.append(event.nbytes)
            self.capture_seconds.append(event.seconds)
            self._last = event.slot == event.num_slots - 1
        elif isinstance(event, WindowCommitted):
            self.windows.append((event.first_iteration, event.last_iteration))
        with self._condition:
            if isinstance(event, CaptureStarted):
                self._unfinished += 1
            elif (isinstance(event, SlotSealed) and not self._last) or isinstance(event, WindowCommitted):
                self._unfinished -= 1
            self._condition.notify_all()

    def drain(self) -> None:
        """Wait until every capture that has begun is sealed, or its window committed."""
        with self._condition:
            self._condition.wait_for(lambda: self._unfinished <= 0, timeout=60)


class MemoryPeak:
    """Samples the process's own memory and a folder in host memory.

    Args:
        folder: Folder in /dev/shm that belongs to this process.
        interval_seconds: Time between samples.
    """

    def __init__(self, folder: Path, interval_seconds: float = 0.4) -> None:
        self._folder = folder
        self._interval = interval_seconds
        self._stop = threading.Event()
        self.private_bytes = 0
        self.shared_bytes = 0
        self.total_bytes = 0
        self._thread = threading.Thread(target=self._run, name="memory-peak", daemon=True)

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            private, shared = _private_bytes(), folder_bytes(self._folder)
            self.private_bytes = max(self.private_bytes, private)
            self.shared_bytes = max(self.shared_bytes, shared)
            self.total_bytes = max(self.total_bytes, private + shared)


def _private_bytes() -> int:
    """Resident memory without files and shared memory: /dev/shm is counted by its files instead."""
    with open(f"/proc/{os.getpid()}/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    return psutil.Process().memory_info().rss
