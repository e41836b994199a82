"""Plans: costs of the policies, the closed form against a simulation of events, traces, quantities."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from moetion_lightning.core.policy_table import policy_table
from moetion_lightning.core.schedule import window_bytes
from moetion_lightning.core.window_memory import held_windows, log_bytes
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.planning.comparison import compare
from moetion_lightning.planning.cycle import Cycle, Fallback, closed_form
from moetion_lightning.planning.failures import Failure, FailureModel, loss_share
from moetion_lightning.planning.job import Job, Outage, RankState, state_of
from moetion_lightning.planning.plan import plan
from moetion_lightning.planning.policies import checkpoint_files, dense_in_memory, gradient_log, sparse, two_phase
from moetion_lightning.planning.quantities import byte_count, count, count_text, duration, number_text, time_text
from moetion_lightning.planning.simulation import simulate
from moetion_lightning.planning.sources import group_seconds
from moetion_lightning.planning.traces import read_trace
from moetion_lightning.units import size_text

TRACES = Path(__file__).resolve().parents[2] / "benchmarks" / "papers" / "traces"
#: DeepSeek-V3's size on 16,384 ranks (docs/planning.md has where each number comes from).
LARGE = Job(
    state=state_of(671e9, 16_384, experts=256, expert_parameters=654e9), ranks=16_384, iteration_seconds=5.0,
    mtbf=600.0, outage=Outage(detection=5.0, groups=group_seconds(16_384)),
)  # fmt: skip
#: 16.4 billion parameters on 96 ranks with slow links: every cost is large.
SLOW = Job(
    state=state_of(16.4e9, 96, experts=64, expert_parameters=15e9), ranks=96, iteration_seconds=3.0, mtbf=600.0,
    copy_bandwidth=2e9, network_bandwidth=1.25e9, storage_bandwidth=0.1e9,
    outage=Outage(detection=5.0, start=10.0, groups=5.0),
)  # fmt: skip


@pytest.mark.parametrize(
    "job",
    [
        LARGE,
        SLOW,
        replace(SLOW, replicas=0),
        replace(SLOW, replicas=0, persist_seconds=900.0),
        replace(SLOW, live_copies=True),
        replace(SLOW, mtbf=7200.0),
    ],
    ids=["16,384 ranks", "slow links", "no replicas", "rarely on storage", "live copies", "2 h"],
)
def test_closed_form_and_simulation_agree(job: Job) -> None:
    for row in compare(job, FailureModel(mtbf=job.mtbf), 5000 * job.mtbf, seed=3):
        assert abs(row.difference) < 0.015, row.cost.callback
        for cause, share in row.cost.shares.causes.items():
            assert abs(row.simulated.shares.causes[cause] - share) < 0.015, (row.cost.callback, cause)


def test_failures_of_several_nodes_cost_what_their_replicas_held() -> None:
    model = FailureModel(kind="correlated", mtbf=600.0)
    rare = replace(SLOW, persist_seconds=1800.0)
    (found,) = compare(rare, model, 5000 * 600.0, names=["dense"], seed=2)
    (single,) = compare(rare, FailureModel(mtbf=600.0), 5000 * 600.0, names=["dense"], seed=2)
    assert found.simulated.from_storage > 0 == single.simulated.from_storage
    assert found.simulated.shares.ettr < 0.95 * single.simulated.shares.ettr
    assert abs(found.difference) < 0.015


def test_a_small_case_by_hand() -> None:
    """Iterations of 10 s, a restore point every 2, an outage of 6 s; failures at 55 s, and at 58 s in the outage."""
    cycle = Cycle(
        iteration_seconds=10.0,
        stall_seconds=0.0,
        interval=2,
        lag_seconds=1.0,
        outage=Outage(detection=2.0, restore=4.0),
    )
    found = simulate(cycle, [Failure(55.0), Failure(58.0), Failure(1e9)], 104.0)
    # Back to iteration 4 at 64 s; four more iterations until 104 s. Of the 5 s behind iteration 5 nothing is left.
    assert found.iterations == 8
    assert found.shares.ettr == pytest.approx(80 / 104)
    lost = {cause: share * 104 for cause, share in found.shares.causes.items() if share}
    assert lost == pytest.approx({"detection": 4.0, "restore": 5.0, "redo": 15.0})


def test_restore_point_counts_once_its_lag_is_over() -> None:
    cycle = Cycle(iteration_seconds=10.0, stall_seconds=0.0, interval=2, lag_seconds=5.0, outage=Outage())
    late = simulate(cycle, [Failure(44.0), Failure(1e9)], 64.0)
    early = simulate(cycle, [Failure(46.0), Failure(1e9)], 66.0)
    assert (late.iterations, early.iterations) == (4, 6)


def test_every_second_is_accounted_for() -> None:
    for row in compare(replace(SLOW, replicas=0), FailureModel(kind="weibull", mtbf=300.0), 300_000.0):
        for shares in (row.cost.shares, row.simulated.shares):
            assert shares.ettr + sum(shares.causes.values()) == pytest.approx(1.0)


def test_closed_form_is_the_papers_to_first_order() -> None:
    """1 / (1 + stall / T) x 1 / (1 + E[R] / MTBF), with E[R] the outage and half of an interval."""
    cycle = Cycle(
        iteration_seconds=2.0, stall_seconds=0.1, interval=10, lag_seconds=0.0, outage=Outage(groups=30.0)
    )  # fmt: skip
    mtbf = 1e6
    first_order = 1 / (1 + 0.1 / 2.0) / (1 + (30.0 + 10 * 2.1 / 2) / mtbf)
    assert closed_form(cycle, mtbf).ettr == pytest.approx(first_order, abs=1e-8)


def test_memory_that_is_always_lost_leaves_what_storage_has() -> None:
    outage = Outage(groups=5.0)
    fallback = Fallback(share=1.0, interval=20, lag_seconds=4.0, outage=outage)
    memory = Cycle(
        iteration_seconds=2.0, stall_seconds=0.0, interval=1, lag_seconds=0.0, outage=outage, fallback=fallback
    )
    storage = replace(memory, interval=20, lag_seconds=4.0, fallback=None)
    assert closed_form(memory, 600.0).ettr == pytest.approx(closed_form(storage, 600.0).ettr)


def test_hopeless_job_has_no_effective_time() -> None:
    assert checkpoint_files(replace(SLOW, storage_bandwidth=1e3, mtbf=1.0), every=10_000).shares.ettr == 0.0


def test_bytes_and_memory_are_those_of_the_engine() -> None:
    full, compute, gradient = SLOW.state.full_bytes, SLOW.state.compute_bytes, SLOW.state.gradient_bytes
    alone = replace(SLOW, replicas=0)
    table = policy_table(full, compute, gradient, 8)
    assert [size_text(cost.bytes_per_iteration) for cost in (sparse(alone, 8), gradient_log(alone))] == [
        row[1] for row in table[:2]
    ]
    assert sparse(SLOW, 8).host_memory == held_windows(1) * window_bytes(full, compute, 8)
    assert gradient_log(alone).host_memory == log_bytes(full, gradient, 8)


def test_interval_of_files_is_youngs_and_daly_s() -> None:
    job = replace(SLOW, mtbf=36_000.0)
    save = job.state.full_bytes / job.storage_bandwidth
    best = checkpoint_files(job).cycle.interval * job.iteration_seconds
    assert best == pytest.approx(math.sqrt(2 * save * job.mtbf), rel=0.05)
    best_ratio = checkpoint_files(job).shares.ettr
    assert all(checkpoint_files(job, every).shares.ettr < best_ratio for every in (50, 1500))


def test_two_phase_stays_within_its_budget_and_keeps_one_in_flight() -> None:
    job = replace(SLOW, copy_bandwidth=0.5e9, storage_bandwidth=10e9)
    cost = two_phase(job, budget=0.02)
    assert 0.015 < cost.overhead <= 0.02
    slow = two_phase(SLOW)
    assert slow.cycle.interval * SLOW.iteration_seconds >= SLOW.state.full_bytes / SLOW.storage_bandwidth


def test_dense_copy_hides_behind_one_iteration_only() -> None:
    """The next optimizer step changes what is copied, however long it is until the next snapshot."""
    job = replace(SLOW, copy_bandwidth=0.2e9, replicas=0)
    copy = job.state.full_bytes / job.copy_bandwidth
    for every in (10, 100):
        lost = dense_in_memory(job, every).cycle.stall_seconds * every
        assert lost > copy - job.iteration_seconds


def test_windows_are_longer_where_copies_are_slower() -> None:
    windows = [sparse(replace(SLOW, copy_bandwidth=bandwidth)).cycle.interval for bandwidth in (50e9, 1e9, 0.3e9)]
    assert windows == sorted(windows)
    assert windows[-1] > 1


def test_goal_of_the_largest_job_is_reached() -> None:
    """671 billion parameters, 16,384 ranks, a failure every 10 minutes, a warm standby: at least 0.93."""
    for row in compare(LARGE, FailureModel(mtbf=600.0), 3000 * 600.0, names=["sparse", "gradient_log"]):
        assert row.simulated.shares.ettr >= 0.93
    cold = plan(replace(LARGE, outage=replace(LARGE.outage, start=120.0)))
    assert cold.best is not None
    assert cold.best.shares.ettr < 0.80


def test_policy_without_enough_memory_is_not_recommended() -> None:
    needed = {cost.name: cost.host_memory for cost in plan(LARGE).costs}
    little = plan(replace(LARGE, host_memory=0.5 * min(needed["sparse"], needed["dense"], needed["two_phase"])))
    assert {cost.name for cost in little.costs if not cost.fits} == {
        "sparse",
        "gradient_log",
        "dense",
        "partial",
        "two_phase",
    }
    assert little.best is not None
    assert little.best.name == "files"
    assert "Too little host memory for" in little.why


def test_recommended_policy_has_the_highest_ratio_or_a_reason() -> None:
    """What is taken in place of a slightly higher ratio needs less memory, or no determinism; the text says which."""
    reasons = 0
    for job in (LARGE, SLOW, replace(LARGE, mtbf=36_000.0), replace(SLOW, mtbf=86_400.0)):
        found = plan(job)
        assert found.best is not None
        exact = [cost for cost in found.costs if cost.exact and cost.fits]
        highest = max(exact, key=lambda cost: cost.shares.ettr)
        if highest is not found.best:
            reasons += 1
            assert highest.shares.ettr - found.best.shares.ettr <= 0.002
            assert highest.deterministic > found.best.deterministic or highest.host_memory > found.best.host_memory
            assert f"{highest.callback} has slightly more" in found.why
            assert ("of host memory a rank. " in found.why) or ("only where training is deterministic" in found.why)
        else:
            assert "slightly more" not in found.why
    assert reasons


def test_no_policy_is_recommended_where_none_makes_progress() -> None:
    found = plan(replace(LARGE, mtbf=1.0))
    assert found.best is None
    assert found.why.startswith("No policy makes progress: with a failure every 1 s")


def test_state_smaller_than_its_copies_time_has_a_plan() -> None:
    tiny = plan(replace(LARGE, state=RankState(full_bytes=1, compute_bytes=0, gradient_bytes=0)))
    assert all(cost.cycle.interval >= 1 for cost in tiny.costs)
    with pytest.raises(ConfigurationError, match="full_bytes=0"):
        replace(LARGE, state=RankState(full_bytes=0, compute_bytes=0, gradient_bytes=0))


def test_simulation_needs_a_time() -> None:
    with pytest.raises(ConfigurationError, match="seconds=0"):
        simulate(plan(LARGE).costs[0].cycle, FailureModel(mtbf=600.0).draw(0), 0.0)


@pytest.mark.parametrize(
    "wrong", [{"shape": 0.0}, {"burst_nodes": 0.5}, {"repeats": 1.0}, {"repeat_seconds": 0.0}, {"mtbf": 0.0}]
)
def test_wrong_failures_are_named(wrong: dict[str, float]) -> None:
    ((name, _),) = wrong.items()
    with pytest.raises(ConfigurationError, match=f"^{name}="):
        replace(FailureModel(mtbf=600.0), **wrong)  # type: ignore[arg-type]


def test_lossy_policy_is_never_recommended() -> None:
    found = plan(replace(SLOW, copy_bandwidth=0.3e9))
    assert found.best is not None
    ratios = {cost.name: cost.shares.ettr for cost in found.costs}
    assert max(ratios, key=ratios.__getitem__) == "partial" != found.best.name


def test_dense_model_has_no_partial_experts() -> None:
    assert "partial" not in {cost.name for cost in plan(replace(SLOW, state=state_of(7e9, 96))).costs}


@pytest.mark.parametrize(
    ("name", "failures", "nodes"),
    [
        ("bamboo-aws-p3.csv", 79, 167),
        ("bamboo-aws-g4dn.csv", 48, 74),
        ("bamboo-gcp-a100x1-east1b.txt", 36, 154),
        ("bamboo-gcp-v100x1-east1c.txt", 55, 518),  # 68 falls, if its overlapping polls are only put in order
    ],
)
def test_public_traces(name: str, failures: int, nodes: int) -> None:
    found, seconds = read_trace(TRACES / name)
    assert (len(found), sum(failure.nodes for failure in found)) == (failures, nodes)
    assert 10 * 3600 < seconds < 28 * 3600


def test_part_of_a_trace() -> None:
    found, seconds = read_trace(TRACES / "bamboo-gcp-a100x1-east1b.txt", start=470 * 60.0, stop=830 * 60.0)
    assert (len(found), sum(failure.nodes for failure in found), seconds) == (19, 88, 6 * 3600.0)
    turns = FailureModel(kind="trace", trace=found, trace_seconds=seconds)
    drawn = turns.draw(0)
    twice = [next(drawn) for _ in range(38)]
    assert twice[19].at == pytest.approx(twice[0].at + seconds)
    assert turns.mean_seconds == pytest.approx(seconds / 19)


@pytest.mark.parametrize("text", ["", "hello\n", "1,add,a\n2,fly,b\n", "2021-12-11, 11:11:30, 55\n"])
def test_file_that_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"trace\.csv"):
        read_trace(path)


def test_line_that_is_no_part_of_a_trace_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("1,add,a\n\n2,fly,b\n")
    with pytest.raises(ConfigurationError, match=r"line 3 is '2,fly,b', expected `milliseconds,add\|remove,node`"):
        read_trace(path)
    path.write_text("hello\n")
    with pytest.raises(ConfigurationError, match=r"line 1 is 'hello', expected `milliseconds.* or `date, time, nodes`"):
        read_trace(path)
    path.write_text("1,remove,a\n")
    with pytest.raises(ConfigurationError, match="covers no time"):
        read_trace(path)


@pytest.mark.parametrize("kind", ["exponential", "weibull", "correlated"])
def test_failures_come_as_often_as_they_should(kind: str) -> None:
    model = FailureModel(kind=kind, mtbf=600.0)  # type: ignore[arg-type]
    drawn = model.draw(1)
    times = [next(drawn).at for _ in range(20_000)]
    assert times == sorted(times)
    assert times[-1] / len(times) == pytest.approx(600.0, rel=0.03)


def test_probability_that_all_copies_are_lost() -> None:
    assert loss_share(1, 100, 1) == 0.0
    assert loss_share(5, 100, 0) == 1.0
    assert loss_share(100, 100, 1) == pytest.approx(1.0)
    assert 0 < loss_share(3, 100, 2) < loss_share(3, 100, 1) < 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"mtbf": 0.0},
        {"iteration_seconds": -1.0},
        {"node_losses": 2.0},
        {"replicas": -1},
        {"outage": Outage(start=-1.0)},
    ],
)
def test_wrong_values_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(wrong))}|start"):
        replace(LARGE, **wrong)  # type: ignore[arg-type]


def test_quantities_as_people_write_them() -> None:
    assert (count("671B"), count("1.5k"), count("2e3")) == (671e9, 1500.0, 2000.0)
    assert (byte_count("25GB/s"), byte_count("64 GiB"), byte_count("7")) == (25e9, 64 * 2**30, 7.0)
    assert (duration("10min"), duration("400ms"), duration("2 d"), duration("3")) == (600.0, 0.4, 172_800.0, 3.0)
    assert [time_text(seconds) for seconds in (0.0, 0.02, 5.0, 600.0, 360_000.0, 1e9, 4e10)] == [
        "0 s", "20 ms", "5 s", "10 min", "4.17 d", "31.7 years", "1,268 years",
    ]  # fmt: skip
    assert [number_text(number, "rank") for number in (1, 16_384)] == ["1 rank", "16,384 ranks"]
    assert [count_text(number) for number in (671e9, 57e6, 2e12, 12)] == ["671B", "57M", "2T", "12"]
    for wrong in ("", "B", "ten", "10 parsecs", "-3s"):
        with pytest.raises(ConfigurationError, match="expected"):
            duration(wrong)


def test_state_of_a_rank() -> None:
    assert state_of(1e9, 4, experts=8, expert_parameters=9e8) == RankState(
        full_bytes=3_000_000_000,
        compute_bytes=500_000_000,
        gradient_bytes=1_000_000_000,
        expert_share=0.9,
        num_experts=8,
    )
