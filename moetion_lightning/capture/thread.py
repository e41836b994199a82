"""The capture thread: copies from live state into host memory, behind the next forward and backward.

One thread does the copying. The training thread only hands it a job (:meth:`CaptureThread.submit`) and, before anything
may change the source, waits for the job's copies (:meth:`CaptureThread.wait_copied`): the one place that may stall.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from moetion_lightning.capture.copies import move
from moetion_lightning.capture.fence import DeviceFence

__all__ = ["CaptureThread", "measure_bandwidth"]

_MEASURE_BYTES = 16 << 20
_log = logging.getLogger(__name__)


@torch.no_grad()
def measure_bandwidth(device: torch.device) -> float:
    """Copy bandwidth from ``device`` into host memory, pinned as captures have it, here and now, in bytes per second.

    Args:
        device: Where the training state lives.
    """
    target = torch.empty(_MEASURE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    source = torch.ones(target.numel(), dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        if device.type == "cpu":
            move(target.data_ptr(), source.data_ptr(), target.numel())
        else:
            target.copy_(source)  # waits until it is there
        best = min(best, time.perf_counter() - started)
    return target.numel() / max(best, 1e-9)


class _Job(NamedTuple):
    copy: Callable[[], None]
    finish: Callable[[], None]
    failed: Callable[[Exception], None]
    copied: threading.Event


class CaptureThread:
    """Runs capture jobs one after the other. What goes wrong is the job's own affair, never the training thread's.

    Args:
        fence: Orders copies on an accelerator.
    """

    def __init__(self, fence: DeviceFence) -> None:
        self.fence = fence
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._copied = threading.Event()
        self._copied.set()
        self._thread: threading.Thread | None = None
        self._unchecked: list[Callable[[], None]] = []

    def submit(
        self,
        copy: Callable[[], None],
        finish: Callable[[], None],
        failed: Callable[[Exception], None],
        check: Callable[[], None] | None = None,
    ) -> None:
        """Training thread: queue a job.

        Args:
            copy: Copies the job's bytes (on CUDA: queues the copies). Its sources must not change before it is done.
            finish: Seals and commits; may take longer.
            failed: Called on the capture thread with an error of either, or of the device; no copy runs any more then.
            check: Called on the training thread when it waits for the copies, where these are only queued by ``copy``:
                looks whether user code has changed the sources meanwhile. It is called before an update, and before
                anybody waits for ``finish``, which may wait for it.
        """
        if check is not None and self.fence.enabled:
            self._unchecked.append(check)
        self._copied = threading.Event()
        self._queue(_Job(copy, finish, failed, self._copied))

    def submit_beside(
        self,
        copy: Callable[[], None],
        finish: Callable[[], None],
        failed: Callable[[Exception], None],
        copied: threading.Event,
    ) -> None:
        """Training thread: queue a job whose sources are nobody's state: :meth:`wait_copied` does not wait for it.

        Args:
            copy: As of :meth:`submit`.
            finish: As of :meth:`submit`.
            failed: As of :meth:`submit`.
            copied: Set when the copies are done, or queued; for :meth:`wait_for`.
        """
        self._queue(_Job(copy, finish, failed, copied))

    def wait_for(self, copied: threading.Event) -> None:
        """Training thread: wait until the copies of one job are done (on CUDA: the device waits for them)."""
        copied.wait()
        self.fence.hold_training()

    def _queue(self, job: _Job) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="moetion-capture", daemon=True)
            self._thread.start()
        self.fence.mark_ready()
        self._jobs.put(job)

    def wait_copied(self) -> float:
        """Training thread: wait until the last job's copies are done. Returns the seconds waited (the stall)."""
        if self._copied.is_set() and not self.fence.enabled:
            return 0.0
        started = time.perf_counter()
        self._copied.wait()
        self.fence.hold_training()
        self._check()
        return time.perf_counter() - started

    def drain(self) -> None:
        """Training thread: wait until every job is finished."""
        self._check()
        if self._thread is not None:
            self._jobs.join()

    def close(self) -> None:
        """Finish the queued jobs and end the thread."""
        self._check()
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _check(self) -> None:
        """Jobs may wait for this: whoever waits for them does it before."""
        unchecked, self._unchecked = self._unchecked, []
        for check in unchecked:
            check()

    def _run(self) -> None:
        self.fence.enter_thread()
        while True:
            job = self._jobs.get()
            try:
                if job is None:
                    return
                self._work(job)
            except Exception:
                _log.exception("a capture could not be cleaned up; training goes on")
            finally:
                self._jobs.task_done()

    def _work(self, job: _Job) -> None:
        try:
            try:
                self.fence.begin()
                job.copy()
                self.fence.mark_done()
            finally:
                job.copied.set()
            self.fence.synchronize()
            job.finish()
        except Exception as error:
            try:
                self.fence.settle()  # what was queued still writes into the job's memory
            finally:
                job.failed(error)
