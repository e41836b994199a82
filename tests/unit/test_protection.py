"""What goes wrong in captures gives windows up, is said once, and never ends training."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moetion_lightning.engine.protection import Protection
from moetion_lightning.engine.slot_files import SlotFiles
from moetion_lightning.errors import ConfigurationError, HostMemoryError, UnsupportedStateError
from moetion_lightning.events import Event, EventBus
from moetion_lightning.integrations.loop import SparseCheckpointing
from moetion_lightning.storage.disk import DirectoryTier
from moetion_lightning.storage.host_memory import HostMemoryTier

STEPS = 30


class Training:
    """A plain loop over a small model, and what is told of it."""

    def __init__(self, memory: Path, **settings: Any) -> None:
        torch.manual_seed(0)
        self.module = settings.pop("module", None) or nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.optimizer = settings.pop("optimizer", torch.optim.AdamW)(self.module.parameters())
        self.events: list[Event] = []
        self.settings = {"window": 2, "job_id": "job", "memory_dir": memory, "sinks": [self.events.append], **settings}
        self.buffers: Counter[str] = Counter()

    def run(self, before: Callable[[int], None] = lambda step: None, steps: int = STEPS) -> Training:
        stateful = self.settings.pop("stateful", {})
        with SparseCheckpointing(self.module, self.optimizer, **self.settings) as run:
            run.register(**stateful)
            self.of_windows: list[Any] = []
            for step, batch in run.steps([torch.randn(4, 8) for _ in range(steps)]):
                before(step)
                newest = run._run.engine._need().writer.newest
                self.of_windows += [] if newest is None else [newest]
                loss = self.module(batch).pow(2).mean()
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
            assert run._run is not None
            engine = run._run.engine
            engine._no_batch_to_come()
            engine._need().thread.drain()
            engine._windows.settle_last()
            pool = engine.tiers.host._pool._buffers.values()
            self.buffers = Counter(buffer.state.value for buffer in pool)
            self.windows = engine.tiers.host.windows()
            self.protected = engine.protection.protected
        return self

    def of(self, kind: str) -> list[Any]:
        return [event for event in self.events if event.kind == kind]

    def said(self, text: str) -> list[str]:
        return [event.message for event in self.of("Notice") if text in event.message]


def failing(error: Exception, until: int = 10**9) -> Callable[..., Any]:
    """Raises the first ``until`` times."""
    calls = iter(range(10**9))

    def work(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if next(calls) < until:
            raise error
        return original(*args, **kwargs)

    return work


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def put(owner: type, name: str, error: Exception, until: int = 10**9) -> None:
        original, work = getattr(owner, name), failing(error, until)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: work(original, *args, **kwargs))

    return put


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("place", [(HostMemoryTier, "seal"), (HostMemoryTier, "commit"), (SlotFiles, "acquire")])
def test_a_lasting_error_is_one_error_and_nothing_leaks(
    memory_dir: Path, broken: Any, window: int, place: Any, caplog: pytest.LogCaptureFixture
) -> None:
    broken(*place, HostMemoryError("no room"))
    training = Training(memory_dir, window=window).run()
    assert training.windows == []
    assert not training.protected
    (said,) = training.said("TRAINING IS NOT PROTECTED")
    assert "no room" in said
    assert "a restart would go back to none" in said
    assert [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("moetion")] == [
        record for record in caplog.records if record.levelno == logging.ERROR
    ]
    assert training.buffers["sealed"] <= 3, "but for those of a window that has just begun, no file stays"
    assert [event.protected for event in training.of("ProtectionChanged")] == [False]


@pytest.mark.parametrize("error", [RuntimeError("cast"), ValueError("layout"), torch.OutOfMemoryError("full")])
@pytest.mark.parametrize("place", [(SlotFiles, "compiled"), (HostMemoryTier, "commit")])
def test_errors_of_any_kind_give_the_window_up_and_are_said_once(
    memory_dir: Path, broken: Any, error: Exception, place: Any
) -> None:
    broken(*place, error, until=2)
    training = Training(memory_dir).run()
    (said,) = training.said("was given up")
    assert str(error) in said
    assert training.windows
    assert training.protected
    assert training.of("ProtectionChanged")[-1].protected


def test_captures_are_tried_ever_more_rarely(memory_dir: Path, broken: Any) -> None:
    broken(HostMemoryTier, "commit", HostMemoryError("no room"))
    training = Training(memory_dir, window=1).run(steps=60)
    assert 2 <= len(training.of("CaptureStarted")) <= 6


def test_windows_come_again_and_that_is_said(memory_dir: Path, broken: Any) -> None:
    broken(HostMemoryTier, "commit", HostMemoryError("no room"), until=1)
    training = Training(memory_dir).run()
    assert len(training.said("TRAINING IS NOT PROTECTED")) == len(training.said("windows are whole again")) == 1
    assert [event.protected for event in training.of("ProtectionChanged")] == [False, True]


class Handle:
    """Cannot be taken apart."""

    def __init__(self) -> None:
        self.lock = iter(())


class WithHandles(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("handle", Handle())
        return super().step(closure)


def test_state_that_cannot_be_captured_is_one_error(memory_dir: Path) -> None:
    training = Training(memory_dir, optimizer=WithHandles).run(steps=60)
    (said,) = training.said("TRAINING IS NOT PROTECTED")
    assert "holds 'handle" in said
    assert training.said("was given up") == []
    assert len(training.of("CaptureStarted")) <= 8


def test_state_that_cannot_be_captured_and_is_there_already_is_refused_before_the_first_step(memory_dir: Path) -> None:
    training = Training(memory_dir, optimizer=WithHandles)
    training.optimizer.step()
    with pytest.raises(UnsupportedStateError, match="holds 'handle"):
        training.run()


def test_persisting_goes_on_after_an_error_of_any_kind(memory_dir: Path, tmp_path: Path, broken: Any) -> None:
    broken(DirectoryTier, "persist", RuntimeError("driver"), until=1)
    training = Training(memory_dir, persist_dir=str(tmp_path / "stored")).run()
    assert len(training.said("could not be persisted: driver")) == 1
    assert training.of("WindowPersisted")


@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_devices_that_cannot_be_copied_from_are_refused_before_the_first_step(memory_dir: Path, what: str) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    if what == "parameter":
        module[0].to("meta")
    else:
        module[1].running_mean = torch.zeros(8, device="meta")
    training = Training(memory_dir, module=module)
    with pytest.raises(ConfigurationError, match=r"on the device 'meta': state can be captured from the CPU"):
        training.run()


def test_frozen_parameters_count_before_the_first_step(memory_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 100_000, bias=False).requires_grad_(False))
    training = Training(memory_dir, module=module)
    monkeypatch.setattr(HostMemoryTier, "free_bytes", lambda self: 1 << 20)
    with pytest.raises(HostMemoryError, match="and 3.2 MB of frozen parameters need"):
        training.run()


def test_what_does_not_train_is_stored_once_and_never_lost_with_its_window(memory_dir: Path, broken: Any) -> None:
    broken(HostMemoryTier, "commit", RuntimeError("once"), until=1)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False))
    training = Training(memory_dir, module=module, window=1)
    seen = [manifest.static for manifest in training.run().of_windows]
    assert None not in seen
    assert 1 <= len(set(seen)) <= 2


def test_frozen_parameters_that_change_behind_a_capture_are_noticed(memory_dir: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False))
    training = Training(memory_dir, module=module)
    training.settings["sinks"].append(lambda event: event.kind == "CaptureStarted" and module[1].weight.data.add_(1))
    training.run()
    assert training.said("weights were changed between")
    assert training.said("captures are made at once now")


def test_user_code_that_fails_when_asked_for_its_state_does_not_end_training(memory_dir: Path) -> None:
    class Counter:
        calls = 0

        def state_dict(self) -> dict[str, int]:
            self.calls += 1
            if self.calls == 5:
                raise KeyError("nothing there")
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None:
            pass

    torch.manual_seed(0)
    training = Training(memory_dir)
    training.settings["stateful"] = {"counter": Counter()}
    assert training.run().windows


def test_causes_are_named_apart() -> None:
    said: list[tuple[int, str]] = []
    protection = Protection(EventBus(), lambda text, level: said.append((level, text)))
    protection.begin(restored=True)
    assert protection.protected
    protection.failed(5, "the window", "thawed", None, "none")
    assert protection.protected, "one window is no loss"
    protection.failed(9, "the window", "UnsupportedStateError: x", UnsupportedStateError("x"), "none")
    protection.failed(10, "the window", "UnsupportedStateError: y", UnsupportedStateError("y"), "none")
    protection.failed(11, "the window", "HostMemoryError: z", HostMemoryError("z"), "none")
    assert [level for level, _ in said] == [logging.INFO, logging.ERROR, logging.ERROR]
    assert not protection.may_begin(12)
    protection.committed(7)
    assert not protection.may_begin(12), "it began before the failure, and tells nothing of what came after"
    protection.committed(11)
    assert protection.may_begin(12)
    assert protection.protected


def test_ranks_that_begin_again_together_fall_back_to_dense_together(memory_dir: Path) -> None:
    """A rank that joins has a sparse policy; with dense ones on the others they would ask each other other things."""
    training = Training(memory_dir, optimizer=lambda parameters: torch.optim.LBFGS(parameters, max_iter=1))
    module, optimizer = training.module, training.optimizer

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = module(batch).pow(2).mean()
        loss.backward()
        return loss

    with SparseCheckpointing(module, optimizer, **training.settings) as run:
        names = []
        for step, batch in run.steps([torch.randn(4, 8) for _ in range(12)]):  # noqa: B007 (the closure does)
            assert run._run is not None
            names.append(run._run.engine.policy.name)
            if step == 6:
                run._run.engine._abandon()
                names.append(run._run.engine.policy.name)
            optimizer.step(closure)
    assert names == ["sparse", *["dense"] * 6, "sparse", *["dense"] * 5]
    assert len(training.said("windows are dense now")) == 1
