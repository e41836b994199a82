"""The benchmark of a GPU, as far as a machine without one can run it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def test_without_a_gpu_it_says_so_and_writes_nothing(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="no CUDA device is available to torch: nothing was run, and no result"):
        gpu.main()
    assert list(tmp_path.iterdir()) == []


def test_its_loop_trains_with_and_without_captures(gpu: Any) -> None:
    rows = gpu.measure(torch.device("cpu"), rounds=1, iterations=8, layers=2, experts=4, width=8, tokens=2)
    assert [row["window"] for row in rows] == [None, 8, 4, 1]
    assert all(row["iteration_ms"] > 0 for row in rows)
    assert [row["copy_ms"] is None for row in rows] == [True, False, False, False]
    counts = {"tests": 20, "skipped": 2, "failures": 1, "errors": 0}
    text = gpu.markdown({"machine": gpu.machine(), "gpu": "a GPU", "tests": counts, "rows": rows})
    assert "17 passed, 1 failed, 2 skipped" in text
