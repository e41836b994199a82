"""What runs on a GPU leaves no setting behind for the tests that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moetion_lightning.session import fits
from tests.runs.devices import KINDS, Run


@pytest.fixture(autouse=True)
def _leaves_no_setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOETION_JOB_ID", "on-a-device")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as a deterministic Trainer sets it
    monkeypatch.setattr(fits, "_fits", {})
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """The device: the test runs once on each that there is."""
    return str(request.param)


@pytest.fixture
def make_run(
    kind: str, tmp_path: Path, memory_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Run]]:
    """Makes runs on the device."""
    runs: list[Run] = []

    def make(window: int = 3, **faults: Any) -> Run:
        runs.append(Run(kind, tmp_path, memory_dir, monkeypatch, window, **faults))
        return runs[-1]

    yield make
    for run in runs:
        run.close()
