"""The benchmarks of jobs with several ranks: each runs, and the arithmetic of its ratios is right."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/, whose helpers lie beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a script as a user would, and read its results."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{script}.py"), "--quick", "--results", str(folder), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout
    assert (folder / f"{script}.md").read_text(encoding="utf-8") in done.stdout
    results: dict[str, Any] = json.loads((folder / f"{script}.json").read_text(encoding="utf-8"))
    return results


@pytest.mark.slow
def test_replication_runs(tmp_path: Path) -> None:
    none, ours = run("replication", tmp_path, "--variants", "none", "ours-r1")["rows"]
    assert none["wire_bytes"] == 0
    assert 0.25 < ours["wire_bytes"] / ours["dense_bytes"] < 0.6  # one replica of a window of four, by both ranks


@pytest.mark.slow
def test_failover_runs(tmp_path: Path) -> None:
    (row,) = run("failover", tmp_path, "--variants", "launch-warm")["rows"]
    assert row["failed"] == 0, row
    assert row["survivors"] == 1


@pytest.mark.slow
def test_ettr_runs(tmp_path: Path) -> None:
    (row,) = run("ettr", tmp_path, "--variants", "launch-warm")["rows"]
    assert "note" not in row, row
    assert row["last_step"] > row["first_step"]
    assert [kill["rank"] for kill in row["kills"] if kill["at"] is not None]


def test_failures_are_the_same_for_all(benchmark_module: Any) -> None:
    ettr = benchmark_module("ettr")
    schedule = ettr.failures(10.0, 200.0, 3, 5)
    assert schedule == ettr.failures(10.0, 200.0, 3, 5)
    assert schedule != ettr.failures(10.0, 200.0, 3, 6)
    times = [at for at, _ in schedule]
    assert times == sorted(times)
    assert times[-1] < 200
    assert {rank for _, rank in schedule} == {0, 1, 2}
    assert ettr.failures(1e9, 10.0, 2, 0)[0][0] == 5.0  # one at least


def test_training_ratio(benchmark_module: Any) -> None:
    ettr = benchmark_module("ettr")
    assert ettr.training_ratio(2, 102, 0.1, 20.0) == pytest.approx(0.5)
    assert ettr.best_interval(0.5, 100.0, 0.2) == 50
    assert ettr.best_interval(0.0, 100.0, 0.2) == 1
    records = [{"what": "step", "rank": rank, "step": step, "time": step + rank} for rank in (0, 1) for step in (1, 2)]
    assert ettr.newest_common(records, 2, 2.5) == 1
    assert ettr.newest_common(records, 3, 9.0) == 0


def test_costs_of_a_save(benchmark_module: Any) -> None:
    """Steps 4, 8, 12 save (1.5 s more); the steps after them are slow for another reason and count for nothing."""
    steps = list(range(1, 14))
    times, now = [], 0.0
    for step in steps:
        now += 2.0 if step % 4 == 0 else 9.0 if step % 4 == 1 else 0.5
        times.append(now)
    found = benchmark_module("ettr").costs(steps, times, 4)
    assert found == {"step_seconds": pytest.approx(0.5), "save_seconds": pytest.approx(1.5)}


def test_failover_ratios(benchmark_module: Any) -> None:
    failover = benchmark_module("failover")
    kill = {"recomputed": 0, "survivors": 2}
    rows: list[dict[str, Any]] = [
        {"name": "torchrun-file", "kills": [{"seconds": s, **kill} for s in (10.0, 12.0, 20.0)]},
        {"name": "launch-warm", "kills": [{"seconds": 2.0, **kill}, {"seconds": 4.0, **kill}, {"note": "it hung"}]},
    ]
    failover.summarise(rows)
    assert rows[1]["times_faster"] == pytest.approx(4.0)
    assert rows[1]["times_range"] == [2.5, 10.0]
    assert rows[1]["failed"] == 1
    assert [goal["met"] for goal in failover.goals(rows)] == [False]
    args = failover.parse(["--rounds", "2", "--kills", "3"])
    assert [len(plan) for plan in failover.shots(args)] == [3, 3]


def test_replication_ratios(benchmark_module: Any) -> None:
    def side(step: float, loopback: int) -> dict[str, Any]:
        return {"step": step, "wall": step, "cpu": 1.0, "stall": 0.0, "wire": 800, "loopback": loopback}

    replication = benchmark_module("replication")
    row: dict[str, Any] = {"name": "ours-r1", "ranks": 2, "dense_bytes": 400}
    row["pairs"] = [
        {"before": side(1.0, 10), "block": side(3.0, 90), "after": side(2.0, 10)},
        {"before": side(2.0, 99), "block": side(2.0, 99), "after": side(2.0, 99)},
    ]
    replication.summarise(row, 8)
    assert row["ratio_range"] == [1.0, 2.0]
    assert row["wire_bytes"] == 100
    assert row["loopback_bytes"] == 10
    (goal,) = replication.goals([row], 4)
    assert goal["met"]
    assert goal["measured"] == "0.250"
