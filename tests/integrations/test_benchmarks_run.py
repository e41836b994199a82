"""The benchmarks of jobs with several ranks: each runs, and the arithmetic of its ratios is right."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs import program
from tests.runs.drill import Zygote

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/, whose helpers lie beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def run(zygote: Zygote, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a script as a user would, and reads its results."""

    def of(script: str, *arguments: str) -> dict[str, Any]:
        log = tmp_path / "log"
        command = program.spec(tmp_path, BENCHMARKS / f"{script}.py", "--quick", "--results", tmp_path, *arguments)
        ended = zygote.run_group([command], [log], [{}], timeout_seconds=180)
        printed = log.read_text(encoding="utf-8")
        assert ended.good, f"{ended}\n{printed}"
        assert (tmp_path / f"{script}.md").read_text(encoding="utf-8") in printed
        results: dict[str, Any] = json.loads((tmp_path / f"{script}.json").read_text(encoding="utf-8"))
        return results

    return of


@pytest.mark.slow
def test_replication_runs(run: Any) -> None:
    (ours,) = run("replication", "--variants", "ours-r1")["rows"]
    # One replica of a window of four, by both ranks; on a busy machine not each window begins when it could.
    assert 0 < ours["wire_bytes"] / ours["dense_bytes"] < 0.6


@pytest.mark.slow
def test_failover_runs(run: Any) -> None:
    (row,) = run("failover", "--variants", "launch-warm")["rows"]
    assert row["failed"] == 0, row
    assert row["survivors"] == 1


@pytest.mark.slow
def test_ettr_runs(run: Any) -> None:
    (row,) = run("ettr", "--variants", "launch-warm")["rows"]
    assert "note" not in row, row
    assert row["last_step"] > row["first_step"]
    assert [kill["rank"] for kill in row["kills"] if kill["at"] is not None]


@pytest.mark.slow
def test_boundary_log_runs(run: Any) -> None:
    results = run("boundary_log")
    emulated, row = results["rows"]
    assert emulated["emulated"]
    assert emulated["iteration_seconds"] > 0.036  # 4 + 2 micro-batches, one after the other, of 6 ms
    assert row["traffic_with"]["sends"] == row["traffic_without"]["sends"]
    assert row["traffic_with"]["send_bytes"] == row["traffic_without"]["send_bytes"]
    first, middle, last = (rank["iteration_bytes"]["4"] for rank in row["ranks"])
    assert middle["sent"] == first["sent"] + last["sent"]
    assert all(rank["iteration_bytes"]["3"]["batch"] == first["batch"] for rank in row["ranks"])
    assert results["goals"][-1]["met"]  # the log holds exactly what is sent


@pytest.mark.slow
def test_stage_recovery_runs(run: Any) -> None:
    """Final states are compared bit for bit by the script itself; how long it takes says nothing in so short a run."""
    results = run("stage_recovery")
    alone, replicated = results["rows"]
    assert alone["work"] == [pytest.approx(1 / 3)] * 2
    assert replicated["work"] == [pytest.approx(1 / 2)] * 2
    assert sorted(alone["replays"]) == ["0", "1", "2"]
    assert len(replicated["copy_seconds"]) == 3
    assert results["frozen"]["exact"]
    assert 0 < results["frozen"]["skipped_share"] < results["frozen"]["frozen_share"] < 1


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
    standing = ettr.Progress(lambda: 7, 0.05)
    standing.check()
    time.sleep(0.1)
    with pytest.raises(ettr.JobError, match="no new step for 0 s behind step 7"):
        standing.check()
    assert ettr.training_ratio(2, 102, 0.1, 20.0) == pytest.approx(0.5)
    assert ettr.best_interval(0.5, 100.0, 0.2) == 50
    assert ettr.best_interval(0.0, 100.0, 0.2) == 1
    records = [{"what": "step", "rank": rank, "step": step, "time": step + rank} for rank in (0, 1) for step in (1, 2)]
    assert ettr.newest_common(records, 2, 2.5) == 1
    assert ettr.newest_common(records, 3, 9.0) == 0


def test_simulator_repeats_a_run(benchmark_module: Any) -> None:
    """Steps of 1 s at a pace of 1.25 s, a kill at 10.5 s that costs 5 s and the step in flight."""
    module = benchmark_module("_predicted")
    times = [1.25 * step for step in range(1, 9)] + [16.75 + 1.25 * step for step in range(40)]
    found = module.observed(times, [10.5])
    assert found["pace_seconds"] == pytest.approx(1.25)
    assert found["outages"] == pytest.approx([5.0])
    said = module.predicted(step_seconds=1.0, every=4, kills=[10.5], seconds=65.5, mtbf=60.0, **found)
    assert said["simulated"] == pytest.approx(48 / 65.5)
    assert said["closed_form"] == pytest.approx(said["simulated"], abs=0.05)


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


def test_boundary_log_ratios(benchmark_module: Any) -> None:
    """Blocks by turns: one without the log, then one with and three without; the slowest rank's time counts."""
    boundary_log = benchmark_module("boundary_log")

    def block(seconds: float) -> dict[str, Any]:
        counts = {"sends": 4.0, "send_bytes": 80.0, "collectives": 2.0, "faults": 0.0}
        return {"seconds": seconds, "cpu": 2 * seconds, "record_seconds": 0.1, "norm_seconds": 0.2, **counts}

    fast = {"blocks": [block(0.5) for _ in range(9)]}
    slow = {"blocks": [block(seconds) for seconds in (1.0, 3.0, 2.0, 1.0, 1.0, 2.0, 3.0, 4.0, 1.0)]}
    row = boundary_log.summarise([fast, slow])
    assert row["ratio"]["range"] == [pytest.approx(1.0), pytest.approx(2.0)]
    assert row["noise"]["range"] == [pytest.approx(2 / 3), pytest.approx(2.0)]
    assert row["cpu_ratio"]["median"] == pytest.approx((3.5 / 2 + 1.0) / 2)
    assert row["norm_share"] == pytest.approx(0.4)
    assert row["traffic_with"] == row["traffic_without"] == {
        "sends": [8.0, 8.0], "send_bytes": [160.0, 160.0], "collectives": [4.0, 4.0],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("median", "error", "noise", "met"),
    [
        (1.0, 0.005, 1.01, True),
        (1.1, 0.01, 1.0, False),
        (1.02, 0.02, 1.0, None),
        (1.0, 0.2, 1.0, None),
        (0.9, 0.01, 1.07, None),
        (1.0, None, 1.0, None),
    ],
)
def test_boundary_log_says_when_noise_hides_the_answer(
    benchmark_module: Any, median: float, error: float | None, noise: float, met: bool | None
) -> None:
    ratio = {"median": median, "error": error}
    assert benchmark_module("boundary_log").verdict(ratio, {"median": noise}) is met


def test_stage_recovery_ratios(benchmark_module: Any) -> None:
    def found(seconds: float, count: int) -> dict[str, Any]:
        return {"seconds": seconds, "forwards": count, "backwards": count}

    recovery, script = benchmark_module("_pipeline_recovery"), benchmark_module("stage_recovery")
    case = recovery.Case(
        stages=2, micro_batches=3, iterations=1, rounds=2, forward_seconds=0.0, backward_seconds=0.0, samples=1,
        width=1, copy_bytes=0,
    )  # fmt: skip
    assert case.bound == pytest.approx(3 / 4)
    back = [found(4.0, 3), found(8.0, 3)]
    lost = {"rollback": back, "replay 1": [found(3.0, 3), found(8.0, 3)], "copy": []}
    served = {"rollback": back, "replay 1": [found(2.0, 0), found(1.0, 0)], "copy": []}
    row = recovery.summarise(case, [served, lost])
    assert row["ratio_range"] == [0.75, 1.0]
    assert row["work"] == [0.5, 0.5]
    for median, error, met in ((0.3, 0.01, False), (0.3, 0.02, None), (0.4, 0.01, True), (0.4, None, None)):
        frozen = {"saved_of_skipped": {"median": median, "error": error}}
        goals = script.goals({"rows": [row], "frozen": frozen})
        assert [goal["met"] for goal in goals] == [False, True, met]
    found_at = {0.6: None, 0.7: True, 0.8: True, 0.9: False}
    for ratio, met in found_at.items():
        goal = script.goals({"rows": [{**row, "ratio": ratio}], "frozen": frozen})[0]
        assert goal["met"] is met


def test_saving_of_frozen_gradients(benchmark_module: Any) -> None:
    """Half of the elements are skipped, which saves a quarter of the time: half of what they cost."""
    kept = {"passes": [6.0], "steps": [2.0], "skipped": [0.0], "frozen": [0.6], "exact": True}
    skipped = {"passes": [4.5], "steps": [1.5], "skipped": [0.5], "frozen": [0.6], "exact": True}
    found = benchmark_module("_pipeline_frozen").saving([{"full": kept, "skip": skipped}])
    assert found["saved"]["median"] == pytest.approx(0.25)
    assert found["saved_of_skipped"]["median"] == pytest.approx(0.5)
    assert found["saved_passes"]["median"] == pytest.approx(0.25)
    assert found["exact"]


def test_rank_that_fails_ends_the_whole_job(benchmark_module: Any) -> None:
    """In a process of its own: ranks are forked, which a process that has computed must not be."""
    code = (
        "import sys; from _pipeline_job import run_ranks\n"
        "def work(rank):\n"
        "    import torch.distributed as dist\n"
        "    if rank: raise ValueError('this rank is broken')\n"
        "    dist.barrier()\n"
        "try: run_ranks(2, work, timeout_seconds=60)\n"
        "except RuntimeError as error: sys.exit('rank 1 of 2' in str(error) and 'is broken' in str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, timeout=90)
    assert done.returncode == 1
