"""Where the wall time goes: every second once, over restarts, for several ranks, and through a kill."""

from __future__ import annotations

import mmap
import random
from collections.abc import Sequence

import pytest
import torch

from moetion_lightning.badput import NANOSECONDS, Ledger, Use
from moetion_lightning.callbacks import _account as accounts
from moetion_lightning.callbacks._account import NOTE_BYTES, Account
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.events import (
    CaptureFinished,
    Event,
    GroupsFormed,
    IterationFinished,
    LastIterationFinished,
    LossNoticed,
    ProcessEnded,
    ProcessStarted,
    RestoreApplied,
    RestoreStarted,
    StageReplayFinished,
    StartedAfresh,
    StateRebuilt,
    ValidationFinished,
)
from moetion_lightning.metrics import Badput

S = NANOSECONDS


def started(created: float, groups: float = 0.0) -> ProcessStarted:
    return ProcessStarted(created_at=created, groups_seconds=groups, predecessor="", environment={}, settings={})


def iteration(number: int, stall: float = 0.0) -> IterationFinished:
    return IterationFinished(iteration=number, seconds=1.0, stall_seconds=stall)


CAPTURED = CaptureFinished(iteration=3, slot=0, num_slots=1, nbytes=1, seconds=0.1)
#: A rank that is killed in its fourth iteration, and replays two; when its events come, and what they are.
LIFE: Sequence[tuple[float, Event]] = (
    (4.0, started(0.0, groups=1.5)),
    (6.0, iteration(1, stall=0.25)),
    (6.5, ValidationFinished(seconds=0.5)),
    (7.0, iteration(2, stall=0.125)),
    (8.0, iteration(3)),
    (8.25, CAPTURED),  # the last sign of life
    (15.0, started(12.0, groups=0.5)),
    (16.0, RestoreStarted(first_iteration=1, last_iteration=2, tier="host memory", nbytes=1)),
    (18.0, RestoreApplied(iteration=1, replay=1, seconds=0.75)),
    (19.0, iteration(2, stall=0.5)),
    (20.0, iteration(3)),
    (21.0, iteration(4)),
    (22.0, LastIterationFinished(iteration=5, seconds=1.0, stall_seconds=0.0)),
    (24.0, ProcessEnded(completed=True, reason="")),
    (31.0, started(30.0)),
)
SPENT = {
    Use.START: 2.5 + 1.0 + (15.0 - 12.0 - 0.5) + 1.25 + 1.0,
    Use.GROUPS: 1.5 + 0.5,
    Use.PRODUCTIVE: 0.75 + (1.0 - 0.5 - 0.125) + 1.0 + 1.0 + 1.0,
    Use.STALL: 0.25 + 0.125,
    Use.VALIDATION: 0.5,
    Use.REDO: 0.25 + 1.0,
    Use.DETECTION: 12.0 - 8.25,
    Use.RESTORE: 1.0 + 0.75,
    Use.REPLAY: 1.0,
    Use.IDLE: 2.0 + 6.0,
}


def lived(events: Sequence[tuple[float, Event]]) -> Ledger:
    ledger = Ledger(0)
    for at, event in events:
        ledger.add(event, round(at * S))
    return ledger


def test_each_cause_is_told_from_the_others() -> None:
    ledger = lived(LIFE)
    assert {use: total / S for use, total in ledger.totals.items()} == SPENT
    assert sum(ledger.totals.values()) == ledger.wall == 31 * S


def test_ranks_that_live_on_wait_for_the_one_that_is_replaced() -> None:
    events = (
        (1.0, iteration(1)),
        (4.0, LossNoticed(iteration=1)),
        (9.0, RestoreStarted(first_iteration=1, last_iteration=1, tier="others", nbytes=0)),
        (12.0, GroupsFormed(seconds=2.0)),
        (14.0, StageReplayFinished(stage=0, first_iteration=0, last_iteration=1, seconds=1.5, verified=True)),
        (15.0, RestoreApplied(iteration=1, replay=0, seconds=3.0)),
        (16.0, StateRebuilt(iteration=1, rebuilt=1, steps=1, seconds=1.0)),
        (17.0, iteration(2)),
    )
    totals = {use: total / S for use, total in lived(events).totals.items() if total}
    expected = {Use.PRODUCTIVE: 2.0, Use.DETECTION: 3.0, Use.START: 6.5, Use.GROUPS: 2.0, Use.REPLAY: 2.5}
    assert totals == {**expected, Use.RESTORE: 1.0}


@pytest.mark.parametrize("seed", range(20))
def test_every_second_is_counted_once_whatever_comes(seed: int) -> None:
    """Events in any order, with durations that overlap, and clocks that go back."""
    draw = random.Random(seed)
    spans: list[tuple[int, int]] = []
    ledger = Ledger(0, lambda use, start, end, iteration: spans.append((start, end)))
    kinds = [event for _, event in LIFE] + [
        LossNoticed(iteration=1),
        GroupsFormed(seconds=0.7),
        iteration(9, stall=5.0),
    ]
    at = 0.0
    for _ in range(300):
        at += draw.uniform(-0.3, 1.0)
        ledger.add(draw.choice(kinds), round(at * S))
    assert ledger.wall == sum(ledger.totals.values()) == spans[-1][1]
    assert min(ledger.totals.values()) >= 0
    assert all(end > start for start, end in spans)
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    recent = ledger.last_hour()
    assert all(0 <= recent[use] <= ledger.totals[use] for use in Use)


def test_the_last_hour_forgets_what_came_before() -> None:
    ledger = Ledger(0)
    ledger.spend(1000 * S, Use.START)
    for number in range(1, 5001):
        ledger.add(iteration(number), (1000 + number) * S)
    recent = ledger.last_hour()
    assert recent[Use.START] == 0
    assert 3600 * S <= recent[Use.PRODUCTIVE] <= 3660 * S
    assert ledger.totals[Use.PRODUCTIVE] == 5000 * S


class Clock:
    now = 0.0

    def time_ns(self) -> int:
        return round(self.now * S)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(accounts, "time", made)
    return made


def tell(account: Account, clock: Clock, events: Sequence[tuple[float, Event]]) -> None:
    for at, event in events:
        clock.now = at
        account.add(event)


def test_an_account_outlives_its_process(clock: Clock) -> None:
    note = mmap.mmap(-1, NOTE_BYTES)
    first, second = Account(), Account()
    tell(first, clock, LIFE[:2])
    first.keep_in(note)
    tell(first, clock, LIFE[2:6])  # and it is killed
    tell(second, clock, LIFE[6:8])  # before it knows where it is kept
    second.keep_in(note)
    tell(second, clock, LIFE[8:-1])
    assert second.ledger.totals == lived(LIFE[:-1]).totals
    third = Account()
    third.keep_in(note)
    assert third.ledger.totals == second.ledger.totals
    assert third.ledger.last_hour() == second.ledger.last_hour()


def test_an_account_of_another_course_ends_where_training_starts_afresh(clock: Clock) -> None:
    note = mmap.mmap(-1, NOTE_BYTES)
    first, second = Account(), Account()
    first.keep_in(note)
    tell(first, clock, LIFE[:6])
    tell(second, clock, LIFE[6:7])
    second.keep_in(note)
    tell(second, clock, [(16.0, StartedAfresh(num_windows=1)), (17.0, iteration(1))])
    assert {use: total / S for use, total in second.ledger.totals.items() if total} == {
        Use.START: 4.0,
        Use.PRODUCTIVE: 1.0,
    }


def test_where_a_machine_was_lost_the_restored_account_goes_on(clock: Clock) -> None:
    first, second = Account(), Account()
    tell(first, clock, LIFE[:4])
    kept = first.ledger.dump()
    tell(second, clock, LIFE[6:8])
    second.follow(Ledger.load(kept))
    assert second.ledger.wall == sum(second.ledger.totals.values()) == 16 * S
    assert second.ledger.totals[Use.DETECTION] == 5 * S  # from the captured state on
    before = dict(second.ledger.totals)
    second.follow(Ledger.load(kept))  # once more, in a process that lives
    assert second.ledger.totals == before


def test_metric_adds_up_and_means_over_ranks() -> None:
    metrics = [Badput(), Badput()]
    for metric in metrics:
        metric.update({use.value: value for use, value in SPENT.items()})
    metrics[1].update({"idle": 2.0})
    together = Badput()
    together.seconds = metrics[0].seconds + metrics[1].seconds
    together.num_ranks = metrics[0].num_ranks + metrics[1].num_ranks
    together._update_count = 1
    values = together.compute()
    assert float(values["wall"]) == 32.0 == float(sum(values[use.value] for use in Use))
    assert float(values["idle"]) == SPENT[Use.IDLE] + 1.0
    again = Badput()
    again.load_state_dict(metrics[0].state_dict())
    assert torch.equal(again.seconds, metrics[0].seconds)
    for wrong in ({"sleep": 1.0}, {"idle": -1.0}):
        with pytest.raises(ConfigurationError, match=r"Badput\.update"):
            Badput().update(wrong)


def test_an_account_of_hours_is_kept_minute_by_minute(clock: Clock) -> None:
    """An iteration each second, for over an hour; then the process is killed."""
    note = mmap.mmap(-1, NOTE_BYTES)
    first, second = Account(), Account()
    tell(first, clock, LIFE[:2])
    first.keep_in(note)
    tell(first, clock, [(10.0 + number, iteration(number)) for number in range(4000)])
    second.keep_in(note)
    assert second.ledger.totals == first.ledger.totals
    assert second.ledger.last_hour() == first.ledger.last_hour()
    assert set(first.ledger.marks()) <= set(second.ledger.marks())
