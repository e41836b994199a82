"""The papers' numbers that were not put in, and those that were: of the testbed's one set of parameters."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

PAPERS = Path(__file__).resolve().parents[2] / "benchmarks" / "papers"


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(PAPERS), *sys.path])
    known = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and str(PAPERS.parent) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_four_systems_at_a_failure_every_ten_minutes(paper: Any) -> None:
    found = {name: cost.shares.ettr for name, cost in paper("_testbed").systems().items()}
    assert 0.951 <= found["MoEvement"] <= 0.964
    assert found["Gemini"] == pytest.approx(0.728, abs=0.005)
    assert found["CheckFreq"] == pytest.approx(0.672, abs=0.045)  # predicted
    assert found["MoC-System"] == pytest.approx(0.134, abs=0.01)  # predicted, but for its overhead


def test_a_checkpoint_of_everything_in_every_iteration(paper: Any) -> None:
    slower = paper("_testbed").every_iteration()
    assert slower["Gemini"] == pytest.approx(2.5, abs=0.05)
    assert slower["CheckFreq"] == pytest.approx(27.4, abs=0.5)  # predicted


def test_size_of_a_checkpoint_of_one_expert(paper: Any) -> None:
    module = paper("checkpoint_size")
    assert module.size(module.GPT_350M, 1, True, False) == pytest.approx(0.88, abs=0.005)
    assert module.size(module.GPT_350M, 16, True, True) == 1.0
    base, sharded = module.heaviest(module.GPT_350M, 16, 8, "adaptive", 16)
    assert sharded < base
