"""Orders the copies after the training step that made the state, and the next step after the copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["DeviceFence"]


class DeviceFence:
    """On the CPU program order is enough: a copy is done when the call returns.

    Devices on which work is queued have a fence of their own (:mod:`.cuda`): copies run there beside the forward and
    backward, and the optimizer's step waits for them on the device, not on the host.
    """

    #: Whether copies are only queued: they have run when :meth:`synchronize` returns.
    enabled = False

    def orders(self, device: torch.device) -> bool:
        """Whether copies from a device are queued by :meth:`copy`."""
        return False

    def enter_thread(self) -> None:
        """Capture thread: it begins."""

    def pin(self, memory: Tensor) -> Callable[[], None] | None:
        """Register host memory with the driver, so that copies into it are asynchronous and fast.

        Args:
            memory: Host tensor that nobody resizes until it is unpinned.

        Returns:
            Undoes it; None if the driver refuses (copies are then staged by the driver, and still correct).
        """
        return None

    def mark_ready(self) -> None:
        """Training thread: everything queued so far must precede the copies."""

    def begin(self) -> None:
        """Capture thread: the first copy of a job follows."""
        self._begun = time.perf_counter()

    def copy(self, device: torch.device, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Capture thread: queue copies from one device, converting dtypes."""
        raise NotImplementedError(f"{type(self).__name__} has no copies from {device}")

    def fetch(self, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """Capture thread: something small, computed on a device behind the copies that are queued already.

        Args:
            device: Which one.
            make: Gives a new tensor there. What it reads must live until the job's copies have arrived.

        Returns:
            It, or host memory into which it has arrived with the job's other copies.
        """
        return make()

    def mark_done(self) -> None:
        """Capture thread: all copies of the job are queued."""
        self._ended = time.perf_counter()

    def hold_training(self) -> None:
        """Training thread: later work on the current stream waits for the copies, on the device."""

    def synchronize(self) -> None:
        """Capture thread: block until the copies have arrived in host memory."""

    def settle(self) -> None:
        """Capture thread: block until nothing is being copied any more, whatever was queued."""

    def copy_seconds(self) -> float:
        """Capture thread, after :meth:`synchronize`: how long the job's copies took."""
        return self._ended - self._begun

    def stalled_seconds(self) -> float:
        """Training thread: how long the device has waited in :meth:`hold_training` since the last call."""
        return 0.0
