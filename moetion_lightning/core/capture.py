"""Copies from live state into host memory, behind the next forward and backward.

One thread does the copying. The training thread only hands it a job (:meth:`CaptureThread.submit`) and, before anything
may change the source, waits for the job's copies (:meth:`CaptureThread.wait_copied`): the one place that may stall.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moetion_lightning.core.digests import sample_positions
from moetion_lightning.core.slot_contents import CopyItem
from moetion_lightning.errors import UnsupportedStateError

__all__ = ["CaptureThread", "DeviceFence", "copy_items", "measure_bandwidth"]

_log = logging.getLogger(__name__)
# ATen runs an elementwise kernel on the calling thread alone up to this many elements. Staying below it keeps the
# capture thread from opening a thread team of its own, which would compete with the training step for the same cores.
_SERIAL_ELEMENTS = 32_767
_MEMMOVE_BYTES = 4 << 20


class DeviceFence:
    """Orders copies on an accelerator after the training stream, and the training stream after the copies.

    On the CPU it does nothing: program order is enough. On CUDA it owns a side stream, so that copies into pinned
    memory run beside the forward and backward, and the optimizer step waits for them on the device, not on the host.

    Args:
        devices: Devices that hold captured state.
    """

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self._devices = tuple(d for d in dict.fromkeys(devices) if d.type == "cuda")
        self._streams = {d: torch.cuda.Stream(device=d) for d in self._devices}
        self._ready: dict[torch.device, torch.cuda.Event] = {}
        self._done: dict[torch.device, torch.cuda.Event] = {}

    @property
    def enabled(self) -> bool:
        """Whether any state lives on a CUDA device."""
        return bool(self._devices)

    def pin(self, memory: Tensor) -> Callable[[], None] | None:
        """Register host memory with the driver, so that copies into it are asynchronous and fast.

        Args:
            memory: Host tensor that nobody resizes until it is unpinned.

        Returns:
            Undoes it; None if the driver refuses (copies are then staged by the driver, and still correct).
        """
        runtime = torch.cuda.cudart()
        pointer = memory.data_ptr()
        if int(runtime.cudaHostRegister(pointer, memory.numel(), 0)) != 0:
            return None

        def unpin() -> None:
            runtime.cudaHostUnregister(pointer)

        return unpin

    def mark_ready(self) -> None:
        """Training thread: everything queued so far must precede the copies."""
        for device in self._devices:
            self._ready[device] = torch.cuda.current_stream(device).record_event()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Capture thread: queue one copy on the side stream of the source's device."""
        stream = self._streams[source.device]
        with torch.cuda.stream(stream):
            stream.wait_event(self._ready[source.device])
            converted = source if source.dtype == target.dtype else source.to(target.dtype)
            target.copy_(converted, non_blocking=True)

    def sample(self, source: Tensor, count: int) -> Tensor:
        """Capture thread: some elements of a flat tensor; on CUDA they arrive with the job's other copies."""
        stream = self._streams.get(source.device)
        if stream is None:
            return source.index_select(0, sample_positions(source.numel(), source.device, count))
        with torch.cuda.stream(stream):
            stream.wait_event(self._ready[source.device])
            found = source.index_select(0, sample_positions(source.numel(), source.device, count))
            target = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            return target.copy_(found, non_blocking=True)

    def mark_done(self) -> None:
        """Capture thread: all copies of the job are queued."""
        for device, stream in self._streams.items():
            self._done[device] = stream.record_event()

    def hold_training(self) -> None:
        """Training thread: later work on the current stream waits for the copies, on the device."""
        for device, event in self._done.items():
            torch.cuda.current_stream(device).wait_event(event)

    def synchronize(self) -> None:
        """Capture thread: block until the copies have arrived in host memory."""
        for event in self._done.values():
            event.synchronize()

    def settle(self) -> None:
        """Capture thread: block until nothing is being copied any more, whatever was queued."""
        for stream in self._streams.values():
            stream.synchronize()


@torch.no_grad()
def copy_items(
    items: Sequence[CopyItem],
    targets: Mapping[str, Tensor],
    fence: DeviceFence,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Copy every item into its target; on CUDA this only queues the copies.

    Args:
        items: What to copy.
        targets: Host tensors by item name, of the item's shape and stored dtype.
        fence: Orders the copies against the training stream.
        progress: Called with the number of items done after each item.

    Raises:
        UnsupportedStateError: An item has no memory that can be copied.
    """
    for index, item in enumerate(items):
        target = targets[item.name]
        if item.source.device.type == "cuda":
            fence.copy(target, item.source)
        else:
            _copy_on_host(target, item.source)
        if progress is not None:
            progress(index + 1)


def _copy_on_host(target: Tensor, source: Tensor) -> None:
    if type(source) is not Tensor or source.device.type != "cpu" or (source.numel() and not source.data_ptr()):
        raise UnsupportedStateError(
            f"a {type(source).__name__} on {source.device} has no memory of its own that could be copied: only plain "
            "tensors on the CPU and on CUDA can be captured"
        )
    if target.numel() == 0:
        return
    if not (source.is_contiguous() and target.is_contiguous()):
        target.copy_(source)
        return
    if source.dtype == target.dtype:
        # memmove through ctypes releases the GIL and never uses more than this thread.
        nbytes = source.numel() * source.element_size()
        to, frm = target.data_ptr(), source.data_ptr()
        for offset in range(0, nbytes, _MEMMOVE_BYTES):
            ctypes.memmove(to + offset, frm + offset, min(_MEMMOVE_BYTES, nbytes - offset))
        return
    flat_target, flat_source = target.view(-1), source.view(-1)
    for start in range(0, flat_source.numel(), _SERIAL_ELEMENTS):
        flat_target[start : start + _SERIAL_ELEMENTS].copy_(flat_source[start : start + _SERIAL_ELEMENTS])


@torch.no_grad()
def measure_bandwidth(target: Tensor, device: torch.device) -> float:
    """Copy bandwidth from ``device`` into ``target``, measured here and now, in bytes per second.

    Args:
        target: uint8 host tensor to write to (its content is lost), a few megabytes at least.
        device: Where the training state lives.
    """
    source = torch.ones(target.numel(), dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        if device.type == "cuda":
            target.copy_(source)
        else:
            _copy_on_host(target, source)
        best = min(best, time.perf_counter() - started)
    return target.numel() / max(best, 1e-9)


class _Job:
    def __init__(
        self, copy: Callable[[], None], finish: Callable[[], None], failed: Callable[[Exception], None]
    ) -> None:
        self.copy = copy
        self.finish = finish
        self.failed = failed


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

    def submit(self, copy: Callable[[], None], finish: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        """Training thread: queue a job.

        Args:
            copy: Copies the job's bytes (on CUDA: queues the copies). Its sources must not change before it is done.
            finish: Seals and commits; may take longer.
            failed: Called on the capture thread with an error of either, or of the device; no copy runs any more then.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="moetion-capture", daemon=True)
            self._thread.start()
        self.fence.mark_ready()
        self._copied.clear()
        self._jobs.put(_Job(copy, finish, failed))

    def wait_copied(self) -> float:
        """Training thread: wait until the last job's copies are done. Returns the seconds waited (the stall)."""
        if self._copied.is_set() and not self.fence.enabled:
            return 0.0
        started = time.perf_counter()
        self._copied.wait()
        self.fence.hold_training()
        return time.perf_counter() - started

    def drain(self) -> None:
        """Training thread: wait until every job is finished."""
        if self._thread is not None:
            self._jobs.join()

    def close(self) -> None:
        """Finish the queued jobs and end the thread."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
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
                job.copy()
                self.fence.mark_done()
            finally:
                self._copied.set()
            self.fence.synchronize()
            job.finish()
        except Exception as error:
            try:
                self.fence.settle()  # what was queued still writes into the job's memory
            finally:
                job.failed(error)
