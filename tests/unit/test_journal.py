"""Run states between iterations, where a replacement finds them."""

from __future__ import annotations

import threading
from typing import Any

import torch

from moetion_lightning.engine.journal import Boundary, Journal
from moetion_lightning.storage.tree import flatten_tree


class Files:
    """Small files in memory; a gate can hold a write up."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.open = threading.Event()
        self.open.set()

    def write(self, name: str, data: bytes) -> None:
        assert self.open.wait(10)
        self.kept[name] = data

    def journal(self) -> Journal:
        return Journal(self.write, self.kept.get)


def boundary(serial: int) -> Any:
    fields = {
        "serial": serial,
        "iteration": serial - 1,
        "tree": {"rng": torch.tensor([serial])},
        "extra": {"first_captured_at": 1.5},
        "copies": [0, 2],
    }
    return flatten_tree(fields, clone=True)


def test_the_last_two_boundaries_are_on_file() -> None:
    files = Files()
    journal = files.journal()
    for serial in (4, 5, 6):
        journal.record(serial, boundary(serial))
        journal.wait()
    journal.close()
    left = {b.serial: b for b in files.journal().left_behind()}
    assert sorted(left) == [5, 6]
    assert left[6].iteration == 5
    assert left[6].copies == (0, 2)
    assert torch.equal(left[6].tree["rng"], torch.tensor([6]))


def test_its_own_last_boundary_needs_no_file() -> None:
    files = Files()
    files.open.clear()
    journal = files.journal()
    journal.record(7, boundary(7))
    last = journal.boundary(boundary(7))
    assert isinstance(last, Boundary)
    assert last.serial == 7
    files.open.set()
    journal.wait()
    journal.close()


def test_recording_does_not_wait_for_the_file() -> None:
    files = Files()
    files.open.clear()
    journal = files.journal()
    journal.record(1, boundary(1))
    journal.record(2, boundary(2))  # would hang here
    files.open.set()
    journal.wait()
    journal.close()
    assert 2 in [b.serial for b in files.journal().left_behind()]


def test_what_was_forgotten_is_not_found() -> None:
    files = Files()
    journal = files.journal()
    journal.record(3, boundary(3))
    journal.wait()
    journal.forget()
    assert files.journal().left_behind() == []
    journal.close()


def test_a_damaged_file_is_passed_over() -> None:
    files = Files()
    journal = files.journal()
    for serial in (1, 2):
        journal.record(serial, boundary(serial))
        journal.wait()
    journal.close()
    files.kept["journal-0"] = files.kept["journal-0"][:40]
    assert [b.serial for b in files.journal().left_behind()] == [1]


def test_a_full_disk_does_not_stop_training() -> None:
    def write(name: str, data: bytes) -> None:
        raise OSError("no space left")

    journal = Journal(write, lambda name: None)
    journal.record(1, boundary(1))
    journal.wait()
    journal.close()
