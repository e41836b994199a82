"""A device on which copies run later, on another thread: faults of their order show on every machine.

Tensors stay on the CPU, where training works at once. Copies are only queued, and run in their order after a delay, as
on a side stream of an accelerator; until then they read whatever is there. What a real device does by events between
streams (the next update waits for the copies) happens by waiting.
"""

# ruff: noqa: D102 - the methods are documented in DeviceFence

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moetion_lightning.capture.fence import DeviceFence

__all__ = ["FakeDeviceFence"]


def _pass(gate: threading.Event) -> None:
    gate.wait()


class FakeDeviceFence(DeviceFence):
    """Install it in place of what :func:`moetion_lightning.capture.make_fence` gives.

    Args:
        delay: Seconds before each queued copy runs.
        orders_training: Whether training waits for the copies; False is the fault that tests must notice.
        pins: Whether the driver registers host memory.
        out_of_memory: Numbers of the jobs, counted from 0, in which the device has no memory for a cast.
        gates: By the number of a job, what its copies wait for.
    """

    enabled = True

    def __init__(
        self,
        delay: float = 0.0,
        *,
        orders_training: bool = True,
        pins: bool = True,
        out_of_memory: Sequence[int] = (),
        gates: Mapping[int, threading.Event] | None = None,
    ) -> None:
        self._delay = delay
        self._orders_training = orders_training
        self._pins = pins
        self._out_of_memory = frozenset(out_of_memory)
        self._gates = dict(gates or {})
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._done = threading.Event()
        self._done.set()
        self._stalled = 0.0
        self._jobs = -1
        #: Buffers that are registered with the driver now.
        self.pinned = 0
        #: Set when a job's copies are queued.
        self.queued = threading.Event()
        threading.Thread(target=self._run, name="fake-device", daemon=True).start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            self._work.task_done()

    def close(self) -> None:
        """End the device's thread, when nothing is queued any more."""
        self._work.put(None)

    def _queue(self, target: Tensor, read: Callable[[], Tensor]) -> None:
        def work() -> None:
            time.sleep(self._delay)
            with torch.no_grad():
                target.copy_(read())

        self._work.put(work)

    def orders(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def pin(self, memory: Tensor) -> Callable[[], None] | None:
        if not self._pins:
            return None
        self.pinned += 1

        def unpin() -> None:
            self.pinned -= 1

        return unpin

    def begin(self) -> None:
        self._jobs += 1
        self._done.clear()
        if self._jobs in self._gates:
            self._work.put(functools.partial(_pass, self._gates[self._jobs]))
        self._work.put(super().begin)

    def copy(self, device: torch.device, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        if self._jobs in self._out_of_memory:
            raise torch.OutOfMemoryError("fake device out of memory. Tried to allocate 2.00 GiB")
        for target, source in zip(targets, sources):
            self._queue(target, source.detach)

    def fetch(self, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        target = torch.empty_like(make())
        self._queue(target, make)
        return target

    def mark_done(self) -> None:
        def done() -> None:
            super(FakeDeviceFence, self).mark_done()
            self._done.set()

        self._work.put(done)
        self.queued.set()

    def hold_training(self) -> None:
        if self._orders_training:
            started = time.perf_counter()
            self._done.wait()
            self._stalled += time.perf_counter() - started

    def synchronize(self) -> None:
        self._done.wait()

    def settle(self) -> None:
        self._work.join()
        self._done.set()

    def stalled_seconds(self) -> float:
        stalled, self._stalled = self._stalled, 0.0
        return stalled
