"""window="auto": what captures cost is measured, and the window with the least expected cost is taken."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from moetion_lightning.core.capture_cost import CaptureCost, Measured
from moetion_lightning.core.operators import Operator, OperatorKind, Piece
from moetion_lightning.core.policy import PacedDensePolicy, PolicyContext, Sizes, SparsePolicy
from moetion_lightning.core.two_phase_policy import TwoPhasePolicy
from moetion_lightning.core.window_choice import Facts, choose, dense_interval, describe, expected_costs

MB = 1 << 20
PARAMETERS, ROWS = 24, 100


def sizes(megabytes: int, *, compute_share: float = 1 / 3) -> Sizes:
    """Of a model whose dense copy has so many megabytes."""
    names = [f"p{i}" for i in range(PARAMETERS)]
    full = megabytes * MB // PARAMETERS
    return Sizes(
        full=dict.fromkeys(names, full),
        compute=dict.fromkeys(names, int(full * compute_share)),
        rows=dict.fromkeys(names, ROWS),
        sliceable=dict.fromkeys(names, True),
    )


OPERATORS = tuple(
    Operator(name=f"p{i}", kind=OperatorKind.EXPERT, pieces=(Piece(parameter=f"p{i}"),), layer="layer", expert=i)
    for i in range(PARAMETERS)
)


class Training:
    """A simulated run of one rank: iterations take time, and captures add to it.

    Args:
        cost: Seconds that capturing so many bytes adds to an iteration.
        iteration: Seconds of an iteration without captures, by its number.
        noise: Standard deviation of an iteration, as a share of it.
        megabytes: Of a dense copy.
        bandwidth: Bytes per second.
        per_window: Seconds that each window costs besides.
        capacity: Bytes of host memory for one window.
    """

    def __init__(
        self,
        cost: Callable[[int], float],
        *,
        iteration: Callable[[int], float] = lambda number: 0.1,
        noise: float = 0.0,
        megabytes: int = 600,
        bandwidth: float = 5e9,
        per_window: float = 0.0,
        capacity: int = 1 << 40,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.cost, self.base, self.noise, self.per_window = cost, iteration, noise, per_window
        self.sizes, self.bandwidth, self.capacity = sizes(megabytes), bandwidth, capacity
        self.policy = SparsePolicy("auto", 32, 0.8, **settings)
        self.random = random.Random(seed)
        self.iteration = 0
        self.windows: list[int] = []
        self.reasons: list[str] = []
        self.began: list[int] = []
        self._seconds: list[float] = []
        self._slots: list[int] = []  # bytes of the slots to come
        self._behind: tuple[int, int] | None = None

    def run(self, iterations: int) -> Training:
        for _ in range(iterations):
            self._iterate()
        return self

    def _iterate(self) -> None:
        self.iteration += 1
        seconds = self.base(self.iteration) * (1 + self.noise * self.random.gauss(0, 1))
        if self._behind is not None:
            slot, nbytes = self._behind
            seconds += self.cost(nbytes) + (self.per_window if slot == 0 else 0.0)
        self._seconds.append(seconds)
        slot = None if self._behind is None else self._behind[0]
        self.policy.iteration(self.iteration, seconds, slot)
        if not self._slots and self.policy.begins(self.iteration):
            self._begin()
        self._behind = (self.windows[-1] - len(self._slots), self._slots.pop(0)) if self._slots else None

    def _begin(self) -> None:
        recent = sorted(self._seconds[-50:])
        context = PolicyContext(
            iteration=self.iteration,
            operators=OPERATORS,
            sizes=self.sizes,
            iteration_seconds=recent[len(recent) // 2],
            bytes_per_second=self.bandwidth,
            capacity_bytes=self.capacity,
            protected=len(self.windows) > 1,
        )
        plan = self.policy.plan(context)
        assert plan.schedule is not None
        self.windows.append(plan.schedule.window)
        self.began.append(self.iteration)
        self._slots = list(plan.schedule.slot_bytes)
        if plan.changed:
            self.reasons.append(plan.changed)

    @property
    def window(self) -> int:
        return self.windows[-1]

    def changes(self, after: int = 0) -> int:
        """How often the window changed."""
        sized = [w for w, begin in zip(self.windows, self.began) if begin > after]
        return sum(a != b for a, b in zip(sized, sized[1:]))

    def bytes_at(self, window: int) -> int:
        return self.policy._heaviest[window]

    def best_cost(self) -> float:
        """The least true cost of all windows, seconds per iteration; of 24 operators no schedule has more than 11."""
        return min(self.true_cost(w) for w in range(1, 12))

    def true_cost(self, window: int) -> float:
        """Seconds per iteration: captures, and failures at the expected rate."""
        seconds = self.base(self.iteration)
        replay = seconds * seconds / self.policy.mtbf * (1.5 * window - 0.5)
        return self.cost(self.bytes_at(window)) + self.per_window / window + replay


for_noise = pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])


@for_noise
def test_a_fast_cpu_that_loses_a_share_of_each_copy_gets_a_longer_window(noise: float) -> None:
    """Copies fit behind an iteration by far, and still take 15 % of it when everything is copied every time."""
    training = Training(lambda nbytes: 0.015 * nbytes / (600 * MB), noise=noise).run(3000)
    assert training.window >= 4
    assert training.true_cost(training.window) <= training.best_cost() + 0.01 * 0.1
    assert "auto: captures cost" in training.reasons[0]


def test_the_reason_says_what_was_measured() -> None:
    training = Training(lambda nbytes: 0.006 * nbytes / (600 * MB), bandwidth=1e10).run(2000)
    assert "assumed until it is measured" in training.reasons[0]
    first = next(reason for reason in training.reasons if "(measured)" in reason)
    assert first.startswith("what captures cost is measured now; auto: captures cost 2")
    assert re.search(r"2\.\d+% of an iteration of 100\.0 ms, [56]\.\d+% with W = 1", first)
    assert "a failure every 2.8 h" in first


@for_noise
def test_slow_copies_that_training_waits_for_get_a_window_that_hides_them(noise: float) -> None:
    """As on a disk: 600 MB at 2.6 GB/s behind iterations of 0.1 s; a third of them fits, a half does not."""

    def cost(nbytes: int) -> float:
        return max(0.0, nbytes / 2.6e9 - 0.09)

    training = Training(cost, noise=noise, bandwidth=2.6e9).run(3000)
    assert training.true_cost(training.window) <= training.best_cost() + 0.01 * 0.1
    assert 5 <= training.window <= 11


def test_copies_that_cost_nothing_are_no_reason_for_a_long_window() -> None:
    """As on CUDA, where copies run beside the kernels."""
    training = Training(lambda nbytes: 0.0, noise=0.005, bandwidth=2e10).run(5000)
    assert training.window <= 2
    assert training.true_cost(training.window) <= training.best_cost() + 0.001 * 0.1


def test_one_iteration_is_taken_where_it_is_the_least() -> None:
    """Failures every minute, and copies that cost nothing: a further iteration costs more than it saves."""
    training = Training(lambda nbytes: 0.0, bandwidth=2e10, iteration=lambda number: 1.0, mtbf=60.0).run(2000)
    assert training.window == 1


def test_frequent_failures_get_short_windows() -> None:
    def window(mtbf: float) -> int:
        return Training(
            lambda nbytes: 0.05 * nbytes / (600 * MB), iteration=lambda number: 1.0, mtbf=mtbf
        ).run(1000).window  # fmt: skip

    assert window(30.0) < window(300.0) <= window(1e6)


def test_what_each_window_costs_once_gets_longer_windows_although_bytes_cost_nothing() -> None:
    """A tiny model: its window's beginning and commit take longer than its copies."""
    training = Training(
        lambda nbytes: 0.0, megabytes=1, per_window=0.004, iteration=lambda number: 0.02, noise=0.02
    ).run(4000)
    assert training.window >= 6
    assert training.true_cost(training.window) <= training.best_cost() + 0.02 * 0.02


@pytest.mark.parametrize("seed", range(6))
def test_noise_alone_changes_nothing_for_long(seed: int) -> None:
    training = Training(lambda nbytes: 0.01 * nbytes / (600 * MB), noise=0.25, seed=seed).run(6000)
    assert training.changes(after=1500) <= 2
    assert training.window > 1


def test_iterations_that_validate_do_not_count() -> None:
    def iteration(number: int) -> float:
        return 5.0 if number % 17 == 0 else 0.1

    training = Training(lambda nbytes: 0.015 * nbytes / (600 * MB), iteration=iteration).run(4000)
    plain = Training(lambda nbytes: 0.015 * nbytes / (600 * MB)).run(4000)
    assert abs(training.window - plain.window) <= plain.window // 2
    assert training.window >= 4


def test_iterations_that_get_slower_and_slower_are_no_cost_of_captures() -> None:
    """Longer sequences, a hot CPU: it is compared with what lies beside it, on both sides."""
    training = Training(
        lambda nbytes: 0.0, iteration=lambda number: 0.1 * (1 + number / 2000), noise=0.005, bandwidth=2e10
    ).run(4000)
    measured = training.policy._cost.measured()[training.window]
    assert abs(measured.seconds) <= 3 * measured.error
    assert training.window <= 2


@pytest.mark.parametrize(("later", "within"), [(0.05, 4000), (0.5, 500)])
def test_a_cost_that_changes_is_followed(later: float, within: int) -> None:
    """At the next pause; at once, where iterations take another time altogether."""
    share = 0.0005

    def cost(nbytes: int) -> float:
        return share * nbytes / (600 * MB)

    training = Training(cost, noise=0.01, bandwidth=2e10).run(1500)
    before = training.window
    share = later
    training.run(within)
    assert before <= 2 < 6 <= training.window


def test_memory_bounds_the_window() -> None:
    training = Training(lambda nbytes: 0.05 * nbytes / (600 * MB), capacity=900 * MB).run(500)
    assert training.policy._schedule is not None
    assert sum(training.policy._schedule.slot_bytes) <= 900 * MB
    assert training.window > 1


# --- pauses ----------------------------------------------------------------------------------------------------------


def pauses(cost: CaptureCost, window: int, until: int, protected_from: int = 0) -> list[int]:
    """Iterations after which a window would have begun and did not."""
    found, iteration = [], 1
    while iteration < until:
        if cost.pauses(iteration):
            found.append(iteration)
            iteration += 1
        else:
            cost.window_begins(iteration, window, 0.1, protected=iteration >= protected_from)
            iteration += window
    return found


def test_no_pause_before_a_window_is_committed() -> None:
    assert pauses(CaptureCost(), 4, 2000, protected_from=10_000) == []
    assert min(pauses(CaptureCost(), 4, 2000, protected_from=700)) > 700


def test_pauses_are_short_and_come_ever_more_rarely() -> None:
    found = pauses(CaptureCost(), 4, 5000)
    starts = [i for i in found if i - 1 not in found]
    assert len(found) == 6 * len(starts)
    gaps = [b - a for a, b in zip(starts, starts[1:])]
    assert len(gaps) >= 5
    assert all(b > 1.5 * a for a, b in zip(gaps, gaps[1:]))
    assert len(found) < 0.015 * 5000


def test_pauses_are_the_same_on_all_ranks_whatever_they_measure() -> None:
    one, other = CaptureCost(), CaptureCost()
    for number in range(1, 50):
        one.iteration(number, 0.1, number % 4)
    assert pauses(one, 4, 1000) == pauses(other, 4, 1000)


def test_what_runs_outside_of_pauses_without_captures_is_not_compared() -> None:
    """Captures that failed wait, and a restore replays: that says nothing."""
    cost = CaptureCost()
    cost.window_begins(1, 4, 0.1, protected=True)
    for number in range(1, 40):
        cost.iteration(number, 0.1, None)
    assert cost.measured() == {}
    assert cost.plain_seconds == 0.0


# --- the decision ----------------------------------------------------------------------------------------------------


def facts(measured: dict[int, Measured] | None = None, **changed: Any) -> Facts:
    heaviest = {w: int(600 * MB * (1 / w + (w - 1) / (6 * w))) for w in range(1, 33)}
    values = dict(
        heaviest_bytes=heaviest, iteration_seconds=0.1, bytes_per_second=5e9, overlap_target=0.8, mtbf=1e4,
        measured=measured or {},
    )  # fmt: skip
    return Facts(**{**values, **changed})  # type: ignore[arg-type]


def test_a_failure_throws_away_one_and_a_half_windows() -> None:
    costs = expected_costs(facts(iteration_seconds=1.0, mtbf=100.0))
    assert costs[1].replay == pytest.approx(1.0 / 100 * 1.0)  # W to 2 W - 1 iterations: one
    assert costs[8].replay == pytest.approx((8 + 15) / 2 / 100)


def test_a_precise_measurement_counts_and_a_noisy_one_does_not() -> None:
    assumed = expected_costs(facts())[4].overhead
    precise = expected_costs(facts({4: Measured(seconds=0.02, error=0.0001, rounds=4)}))[4].overhead
    noisy = expected_costs(facts({4: Measured(seconds=0.02, error=2.0, rounds=2)}))[4].overhead
    assert precise == pytest.approx(0.02, rel=0.01)
    assert noisy == pytest.approx(assumed, rel=0.1)


def test_what_is_the_same_for_all_windows_is_no_reason_for_a_longer_one() -> None:
    """Two windows of different weight were measured, and cost the same."""
    found = Measured(seconds=0.01, error=0.00005, rounds=8)
    assert choose(facts({4: found, 16: found}), 16) < 8


def test_the_window_stays_until_another_one_is_clearly_better() -> None:
    now = facts({8: Measured(seconds=0.004, error=0.0001, rounds=8)})
    target = choose(now)
    for near in range(max(2, target - 2), target + 3):
        assert choose(now, near) == near
    assert choose(now, 1) == target
    assert choose(now, 2) == target


def test_doubt_is_no_reason_for_one_iteration() -> None:
    assert choose(facts({2: Measured(seconds=-0.01, error=0.02, rounds=2)}), 2) > 1


def test_nothing_fits_but_one_iteration() -> None:
    assert choose(facts(), longest=1) == choose(facts(), 8, longest=0) == 1


def test_description_has_the_numbers() -> None:
    text = describe(facts({8: Measured(seconds=0.004, error=0.00001, rounds=8)}), 8)
    assert text.startswith("captures cost 4.00% of an iteration of 100.0 ms, ")
    assert "with W = 1 (measured), a failure every 2.8 h 0.01%" in text


# --- where windows have to be dense ----------------------------------------------------------------------------------


def dense_run(
    megabytes: int,
    cost: float,
    *,
    iteration_seconds: float = 0.3,
    mtbf: float = 1e4,
    bandwidth: float = 5e9,
    iterations: int = 600,
) -> list[int]:
    """Iterations after which a snapshot begins; each adds ``cost`` seconds to the iteration behind it."""
    policy, begun, slot = PacedDensePolicy(0.8, mtbf), [], None
    for iteration in range(1, iterations + 1):
        policy.iteration(iteration, iteration_seconds + (0.0 if slot is None else cost), slot)
        slot = None
        if policy.begins(iteration):
            slot = 0
            begun.append(iteration)
            policy.plan(
                PolicyContext(
                    iteration=iteration, operators=OPERATORS, sizes=sizes(megabytes),
                    iteration_seconds=iteration_seconds, bytes_per_second=bandwidth, capacity_bytes=1 << 40,
                )
            )  # fmt: skip
    return begun


def last_gap(begun: list[int]) -> int:
    return begun[-1] - begun[-2]


def test_dense_snapshots_of_a_large_state_pace_themselves_although_each_fits_behind_an_iteration() -> None:
    begun = dense_run(684, 0.05)
    assert begun[:37] == [*range(1, 25), *range(25, 50, 2)], "closely at first, and then to compare"
    assert 15 <= last_gap(begun) <= 60
    assert last_gap(dense_run(684, 0.3)) > last_gap(begun)


def test_dense_snapshots_that_were_measured_to_cost_nothing_come_often() -> None:
    assert last_gap(dense_run(684, 0.0)) == 1
    assert last_gap(dense_run(1, 0.0)) == 1


def test_frequent_failures_get_frequent_dense_snapshots() -> None:
    assert last_gap(dense_run(684, 0.05, mtbf=30.0)) < last_gap(dense_run(684, 0.05))


def test_dense_interval_is_within_half_a_percent_of_the_least_cost() -> None:
    given = facts(heaviest_bytes={1: 684 * MB}, iteration_seconds=0.3, mtbf=200.0)
    overhead = expected_costs(given)[1].overhead + expected_costs(given)[1].doubt

    def cost(interval: int) -> float:
        return overhead / interval + 0.3 * 0.3 / 200 * (interval + 1) / 2

    least = min(range(1, 1000), key=cost)
    chosen = dense_interval(given)
    assert chosen < least
    assert cost(chosen) <= cost(least) + 0.005 * 0.3 < cost(chosen - 1)


# --- two phases ------------------------------------------------------------------------------------------------------


def test_two_phases_keep_within_their_budget() -> None:
    """A snapshot costs 59 ms; at 2 % of iterations of 300 ms it is made every ten of them."""
    policy = TwoPhasePolicy(0.02, 0.8, lambda: 0.0)
    measured = Measured(seconds=0.059, error=1e-9, rounds=9)
    given = facts({1: measured}, heaviest_bytes={1: 684 * MB}, iteration_seconds=0.3)
    assert policy.interval(given) == 10
    assert TwoPhasePolicy(0.5, 0.8, lambda: 0.0).interval(given) == 1


def test_two_phases_wait_for_what_is_on_its_way_to_storage() -> None:
    given = facts({1: Measured(seconds=0.0, error=1e-9, rounds=9)}, heaviest_bytes={1: MB}, iteration_seconds=0.5)
    assert TwoPhasePolicy(0.02, 0.8, lambda: 7.2).interval(given) == 15
