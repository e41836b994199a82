"""Runs on a device: on CUDA, or on one that pretends to be a device, with the same faults on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from moetion_lightning.callbacks import SparseExpertCheckpoint
from moetion_lightning.capture.cuda import CudaFence
from moetion_lightning.engine import facade
from moetion_lightning.events import Event
from moetion_lightning.testing.fake_device import FakeDeviceFence
from tests.lightning.test_callbacks import StopAt, loader, module, trainer

#: Of a test: on the device that pretends, in every run of the suite; on CUDA where there is one.
KINDS = [
    "fake",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]

_CYCLES = 2_000_000_000  # of a GPU, in a second, about


def accelerator_of(kind: str) -> str:
    """What Lightning calls it."""
    return "gpu" if kind == "cuda" else "cpu"


class FaultyCudaFence(CudaFence):
    """As :class:`~moetion_lightning.testing.fake_device.FakeDeviceFence`, on CUDA.

    Copies come late because the side stream is busy, memory is missing because far too much is asked for, and pinning
    is refused because the memory is registered already.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        delay: float = 0.0,
        *,
        orders_training: bool = True,
        pins: bool = True,
        out_of_memory: Sequence[int] = (),
        gates: Mapping[int, threading.Event] | None = None,
    ) -> None:
        super().__init__(devices)
        self._delay, self._orders_training, self._pins = delay, orders_training, pins
        self._out_of_memory = frozenset(out_of_memory)
        self._late = frozenset(gates or ())
        self._jobs = -1
        self.pinned = 0
        self.queued = threading.Event()

    def close(self) -> None:
        """There is nothing to end."""

    def pin(self, memory: Tensor) -> Callable[[], None] | None:
        if not self._pins:
            runtime = torch.cuda.cudart()
            assert int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 1)) == 0
            assert super().pin(memory) is None
            assert int(runtime.cudaHostUnregister(memory.data_ptr())) == 0
            return None
        unpin = super().pin(memory)
        assert unpin is not None
        self.pinned += 1

        def undo() -> None:
            self.pinned -= 1
            unpin()

        return undo

    def begin(self) -> None:
        super().begin()
        self._jobs += 1
        seconds = 1.0 if self._jobs in self._late else self._delay
        for stream in self._streams.values():
            with torch.cuda.stream(stream):
                torch.cuda._sleep(int(seconds * _CYCLES))

    def copy(self, device: torch.device, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        if self._jobs in self._out_of_memory:
            torch.empty(1 << 50, dtype=torch.uint8, device=device)
        super().copy(device, targets, sources)

    def mark_done(self) -> None:
        super().mark_done()
        self.queued.set()

    def hold_training(self) -> None:
        if self._orders_training:
            super().hold_training()


class Run:
    """One run on a device.

    Args:
        kind: Which one.
        folder: For everything that it writes.
        memory_dir: Host memory.
        monkeypatch: Installs the device.
        window: Iterations of a window.
        **faults: Of the device.
    """

    def __init__(
        self, kind: str, folder: Path, memory_dir: Path, monkeypatch: pytest.MonkeyPatch, window: int = 3, **faults: Any
    ) -> None:
        self.kind, self.folder, self.memory_dir, self.window = kind, folder, memory_dir, window
        self.deterministic = True
        self.events: list[Event] = []
        self.fences: list[FaultyCudaFence | FakeDeviceFence] = []

        def make(devices: Sequence[torch.device]) -> FaultyCudaFence | FakeDeviceFence:
            fence = FaultyCudaFence(devices, **faults) if kind == "cuda" else FakeDeviceFence(**faults)
            self.fences.append(fence)
            return fence

        monkeypatch.setattr(facade, "make_fence", make)

    def fit(
        self, *callbacks: pl.Callback, net: pl.LightningModule | None = None, precision: str = "32-true",
        **settings: Any,
    ) -> pl.LightningModule:  # fmt: skip
        """Train to the end, with captures."""
        capture = SparseExpertCheckpoint(
            window=self.window, memory_dir=str(self.memory_dir), sinks=(self.events.append,), **settings
        )
        return self._train(capture, *callbacks, net=net, precision=precision)

    def twin(
        self, *callbacks: pl.Callback, net: pl.LightningModule | None = None, precision: str = "32-true"
    ) -> pl.LightningModule:
        """The same training without captures."""
        return self._train(*callbacks, net=net, precision=precision)

    def interrupted(
        self, *callbacks: pl.Callback, net: pl.LightningModule | None = None, step: int = 9, precision: str = "32-true"
    ) -> None:
        """Train with captures, until an error."""
        with pytest.raises(ZeroDivisionError):
            self.fit(*callbacks, StopAt(step, ZeroDivisionError()), net=net, precision=precision)

    def _train(self, *callbacks: pl.Callback, net: pl.LightningModule | None, precision: str) -> pl.LightningModule:
        net = module(block="fused") if net is None else net
        options: dict[str, Any] = {}
        if self.kind == "cuda":  # on the CPU nothing depends on it
            options["deterministic"] = "warn" if self.deterministic else False
        trainer(
            self.folder, *callbacks, max_epochs=2, gradient_clip_val=1.0, precision=precision,
            accelerator=accelerator_of(self.kind), **options,
        ).fit(net, loader())  # fmt: skip
        return net

    def close(self) -> None:
        for fence in self.fences:
            fence.close()

    def of(self, kind: type) -> list[Any]:
        """The events of a kind."""
        return [event for event in self.events if type(event) is kind]


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether all parameters and buffers are bitwise equal."""
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
