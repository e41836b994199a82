"""After SIGTERM: what is committed goes to storage, and a storage that hangs does not hold the process up."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from moetion_lightning.callbacks._termination_seam import give_exit_code
from moetion_lightning.engine.persist import Persister
from moetion_lightning.events import EventBus
from moetion_lightning.session import process_end


class Manifest:
    finite = True
    first_iteration, nbytes = 1, 8

    def __init__(self, iteration: int) -> None:
        self.extra: dict[str, Any] = {}
        self.iteration = self.last_iteration = iteration


class Memory:
    """Committed windows, the newest first."""

    def __init__(self, *iterations: int) -> None:
        self._iterations = iterations

    def windows(self) -> list[int]:
        return list(self._iterations)

    def read_manifest(self, iteration: int) -> Manifest:
        return Manifest(iteration)

    def pin(self, iteration: int) -> Manifest:
        return Manifest(iteration)

    def unpin(self, iteration: int) -> None:
        pass


class Storage:
    """Takes windows when it is let."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.held: list[int] = []

    def windows(self) -> list[int]:
        return sorted(self.held, reverse=True)

    def persist(self, manifest: Manifest, source: Memory) -> None:
        self.ready.wait()
        self.held.append(manifest.iteration)

    def forget_aside(self) -> None:
        pass

    def renew(self) -> None:
        pass


def persister(memory: Memory, storage: Storage) -> Persister:
    return Persister(memory, storage, EventBus(), every_n_windows=100)  # type: ignore[arg-type]


def test_all_committed_windows_are_on_storage_when_it_is_closed() -> None:
    storage = Storage()
    storage.ready.set()
    made = persister(Memory(6, 3), storage)
    made.persist_all()
    made.close(60.0)
    assert storage.held == [3, 6]


def test_storage_that_hangs_is_given_up() -> None:
    storage = Storage()
    made = persister(Memory(6, 3), storage)
    made.persist_all()
    made.close(0.05)  # returns
    assert storage.held == []
    storage.ready.set()  # the thread ends


@pytest.mark.parametrize("code", [None, 143])
def test_sigterm_is_no_success(code: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_end, "_exit_code", [])
    error = SIGTERMException() if code is None else SIGTERMException(code)
    give_exit_code(error)
    assert error.code == 143
    assert not process_end._ended_well()


def test_other_ends_keep_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_end, "_exit_code", [])
    error = SystemExit()
    give_exit_code(error)
    assert error.code is None
    assert process_end._exit_code == []
