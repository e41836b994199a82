"""Copies from CUDA devices: one side stream per device, timed by events."""

# ruff: noqa: D102 - the methods are documented in DeviceFence

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moetion_lightning.capture.fence import DeviceFence

__all__ = ["CudaFence"]

_log = logging.getLogger(__name__)
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of the process


class CudaFence(DeviceFence):
    """See :class:`.DeviceFence`.

    Args:
        devices: CUDA devices that hold captured state, the training thread's own first.
    """

    enabled = True

    def __init__(self, devices: Sequence[torch.device]) -> None:
        current = torch.cuda.current_device()
        known = [torch.device("cuda", current if device.index is None else device.index) for device in devices]
        self._streams = {device: torch.cuda.Stream(device=device) for device in dict.fromkeys(known)}
        self._ready: dict[torch.device, torch.cuda.Event] = {}
        self._first: dict[torch.device, torch.cuda.Event] = {}
        self._done: dict[torch.device, torch.cuda.Event] = {}
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._said_refused = False

    def orders(self, device: torch.device) -> bool:
        return device in self._streams

    def enter_thread(self) -> None:
        """Threads begin on device 0, and would make a context there."""
        torch.cuda.set_device(next(iter(self._streams)))

    def pin(self, memory: Tensor) -> Callable[[], None] | None:
        runtime = torch.cuda.cudart()
        pointer = memory.data_ptr()
        error = int(runtime.cudaHostRegister(pointer, memory.numel() * memory.element_size(), _PORTABLE))
        if error:
            # It stays with this thread until a kernel is launched, which would be the next cast.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=next(iter(self._streams)))
            if not self._said_refused:
                self._said_refused = True
                _log.warning(
                    "the CUDA driver refuses to pin host memory (cudaHostRegister: error %d): captures stay exact, but "
                    "are several times slower. A limit on locked memory (ulimit -l) is the usual cause.",
                    error,
                )
            return None

        def unpin() -> None:
            runtime.cudaHostUnregister(pointer)

        return unpin

    def mark_ready(self) -> None:
        for device in self._streams:
            self._ready[device] = torch.cuda.current_stream(device).record_event()

    def begin(self) -> None:
        for device, stream in self._streams.items():
            stream.wait_event(self._ready[device])
            self._first[device] = stream.record_event(torch.cuda.Event(enable_timing=True))

    @torch.no_grad()
    def copy(self, device: torch.device, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        with torch.cuda.stream(self._streams[device]):
            alike: tuple[list[Tensor], list[Tensor]] = ([], [])
            for target, source in zip(targets, sources):
                if source.dtype != target.dtype:  # one after the other: each cast takes the memory of the one before
                    target.copy_(source.to(target.dtype), non_blocking=True)
                else:
                    alike[0].append(target)
                    alike[1].append(source)
            if alike[0]:
                torch._foreach_copy_(*alike, non_blocking=True)

    @torch.no_grad()
    def fetch(self, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        stream = self._streams.get(device)
        if stream is None:
            return super().fetch(device, make)
        with torch.cuda.stream(stream):
            found = make()
            target = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            return target.copy_(found, non_blocking=True)

    def mark_done(self) -> None:
        for device, stream in self._streams.items():
            # Blocking: whoever waits for it on the host sleeps, and leaves the core to the training thread.
            event = torch.cuda.Event(enable_timing=True, blocking=True)
            self._done[device] = stream.record_event(event)

    def hold_training(self) -> None:
        for device, event in self._done.items():
            stream = torch.cuda.current_stream(device)
            before = stream.record_event(torch.cuda.Event(enable_timing=True))
            stream.wait_event(event)
            self._waits.append((before, stream.record_event(torch.cuda.Event(enable_timing=True))))

    def synchronize(self) -> None:
        for event in list(self._done.values()):
            event.synchronize()

    def settle(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()

    def copy_seconds(self) -> float:
        spans = [self._first[device].elapsed_time(self._done[device]) for device in self._streams]
        return float(max(spans)) / 1e3

    def stalled_seconds(self) -> float:
        spans = []
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.pop(0)
            spans.append(before.elapsed_time(after))
        return float(sum(spans)) / 1e3
