"""What is asked of CUDA, and in which order, on a machine without it: streams and events that write it down."""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moetion_lightning.capture import cuda
from moetion_lightning.capture.copies import copy_tensors
from moetion_lightning.capture.thread import CaptureThread

DEVICE = torch.device("cpu")  # where the tensors of this machine are


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.enable_timing, self.blocking = enable_timing, blocking
        self.stream: Stream | None = None
        self.at = -1

    def synchronize(self) -> None:
        assert self.blocking, "a thread that waits on the host must sleep"
        self.stream.driver.log.append(("host waits", self.stream.name, self.at))

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        assert self.enable_timing
        assert end.enable_timing
        assert end.stream is self.stream, "events of two streams have no time between them"
        return float(end.at - self.at)


class Stream:
    def __init__(self, driver: Driver, name: str) -> None:
        self.driver, self.name = driver, name

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.stream, event.at = self, len(self.driver.log)
        self.driver.log.append(("record", self.name, event.at))
        return event

    def wait_event(self, event: Event) -> None:
        assert event.stream is not None, "waits for nothing"
        self.driver.log.append(("wait", self.name, event.at))

    def synchronize(self) -> None:
        self.driver.log.append(("settle", self.name, len(self.driver.log)))


class Driver:
    """``torch.cuda``, as far as the fence uses it; what a stream is asked to do is done at once."""

    Event = Event

    def __init__(self) -> None:
        self.log: list[tuple[str, str, int]] = []
        self.training = Stream(self, "training")
        self.refuses = 0
        self.registered: dict[int, tuple[int, int]] = {}
        self.device: torch.device | None = None
        self.now = self.training

    def Stream(self, device: torch.device) -> Stream:
        return Stream(self, "side")

    def current_device(self) -> int:
        return 0

    def set_device(self, device: torch.device) -> None:
        self.device = device

    def current_stream(self, device: torch.device) -> Stream:
        return self.training

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    def cudart(self) -> Driver:
        return self

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        if not self.refuses:
            self.registered[pointer] = (size, flags)
        return self.refuses

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.registered[pointer]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """In torch's place in the fence's module: the rest is torch's own."""
    driver = Driver()

    def foreach_copy(targets: Any, sources: Any, non_blocking: bool) -> None:
        assert non_blocking
        driver.log.append(("copy", driver.now.name, len(targets)))
        torch._foreach_copy_(targets, sources)

    def empty(shape: Any, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        driver.log.append(("fetch", driver.now.name, 0))
        return torch.empty(shape, dtype=dtype)

    def zeros(*args: Any, **kwargs: Any) -> None:
        driver.log.append(("launch", driver.now.name, 0))
        raise RuntimeError("the error that was pending")

    fake = types.SimpleNamespace(
        cuda=driver, device=lambda *args: DEVICE, no_grad=torch.no_grad, _foreach_copy_=foreach_copy, empty=empty,
        zeros=zeros,
    )  # fmt: skip
    monkeypatch.setattr(cuda, "torch", fake)
    return driver


def test_copies_run_behind_training_and_the_next_update_behind_the_copies(driver: Driver) -> None:
    fence = cuda.CudaFence([DEVICE])
    thread = CaptureThread(fence)
    source, target, half = torch.arange(4.0), torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    seconds: list[float] = []
    looked: list[torch.Tensor] = []

    def copy() -> None:
        copy_tensors([target, half], [source, source], fence)
        looked.append(fence.fetch(DEVICE, lambda: source[:2].clone()))

    thread.submit(copy, lambda: seconds.append(fence.copy_seconds()), lambda error: None)
    thread.wait_copied()
    thread.close()
    assert driver.device is DEVICE, "a thread begins on device 0"
    assert torch.equal(target, source)
    assert torch.equal(half, source.bfloat16())
    assert torch.equal(looked[0], source[:2])
    # The host's wait is the capture thread's own, and comes somewhere behind the record of "done".
    waits = [step for step in driver.log if step[0] == "host waits"]
    steps = [step for step in driver.log if step[0] != "host waits"]
    ready, wait, first, copied, fetched, done = steps[:6]
    assert [step[:2] for step in (ready, wait, first, copied, fetched, done)] == [
        ("record", "training"), ("wait", "side"), ("record", "side"), ("copy", "side"), ("fetch", "side"),
        ("record", "side"),
    ]  # fmt: skip
    assert wait[2] == ready[2], "the copies wait for what training had queued"
    before, held, after = steps[6:]
    assert [step[:2] for step in (before, held, after)] == [
        ("record", "training"), ("wait", "training"), ("record", "training"),
    ]  # fmt: skip
    assert held[2] == done[2], "training waits for the copies, on the device"
    assert waits == [("host waits", "side", done[2])]
    assert seconds == [(done[2] - first[2]) / 1e3]
    assert fence.stalled_seconds() == (after[2] - before[2]) / 1e3
    assert fence.stalled_seconds() == 0.0, "each wait is counted once"


def test_each_cast_is_gone_before_the_next_one(driver: Driver) -> None:
    """On a device that training fills, the compute weights of a slot have no room beside each other."""
    alive, most = 0, 0

    class Cast(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    class Source(torch.Tensor):
        def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return self.as_subclass(torch.Tensor).to(*args, **kwargs).as_subclass(Cast)

    sources = [torch.rand(8).as_subclass(Source) for _ in range(4)]
    targets = [torch.zeros(8, dtype=torch.bfloat16) for _ in sources]
    cuda.CudaFence([DEVICE]).copy(DEVICE, targets, sources)
    assert most == 1
    assert all(torch.equal(t, s.as_subclass(torch.Tensor).bfloat16()) for t, s in zip(targets, sources))


def test_memory_is_pinned_for_all_devices_and_given_back(driver: Driver) -> None:
    memory = torch.zeros(100, dtype=torch.uint8)
    unpin = cuda.CudaFence([DEVICE]).pin(memory)
    assert driver.registered == {memory.data_ptr(): (100, 1)}
    assert unpin is not None
    unpin()
    assert driver.registered == {}


def test_refused_pinning_is_said_once_and_leaves_no_error_behind(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.refuses = 2
    fence = cuda.CudaFence([DEVICE])
    with caplog.at_level(logging.WARNING):
        assert [fence.pin(torch.zeros(8)) for _ in range(3)] == [None] * 3
    assert [step[0] for step in driver.log] == ["launch"] * 3, "the pending error is taken each time"
    assert len(caplog.records) == 1
    assert "error 2" in caplog.text
    assert "ulimit -l" in caplog.text


def test_failed_copy_is_settled_before_its_memory_is_given_back(driver: Driver) -> None:
    thread = CaptureThread(cuda.CudaFence([DEVICE]))

    def copy() -> None:
        raise torch.OutOfMemoryError("no memory for a cast")

    errors: list[Exception] = []
    thread.submit(copy, lambda: None, lambda error: (errors.append(error), driver.log.append(("failed", "", 0))))
    thread.wait_copied()
    thread.close()
    assert [type(error) for error in errors] == [torch.OutOfMemoryError]
    names = [step[0] for step in driver.log]
    assert names.index("settle") < names.index("failed")
