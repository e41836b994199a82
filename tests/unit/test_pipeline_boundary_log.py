"""The boundary log: what it holds, what it will vouch for, and that it never grows past its bound."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetion_lightning.pipeline.boundary_log import BoundaryLog, Control, Key, Round

ROW = 16  # bytes of one row of four floats
CONTROL = Control(norms=("0x1p+0",), stage_norms=("0x1p+0",), groups=[{"lr": {"f": "0x1p-3"}}], scale=None, divisor=4)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def log(said: list[str]) -> BoundaryLog:
    log = BoundaryLog(10**6, said.append)
    log.begin(1)
    return log


def rows(value: float, count: int = 1) -> Tensor:
    return torch.full((count, 4), value)


def run(batch: list[Tensor] | None = None, index: int = 0) -> Round:
    return Round(batch=tuple(batch or []), index=index, seed=index, losses=("0x1p+0",))


def make(log: BoundaryLog, *values: float) -> None:
    """Iterations of one row each, sealed."""
    for value in values:
        log.record(1, "F", 0, [rows(value)])
        log.end_round(run())
        log.seal(CONTROL)


# --- iterations ------------------------------------------------------------------------------------------------------


def test_a_sealed_iteration_is_complete_and_the_next_one_begins(log: BoundaryLog) -> None:
    assert (log.current, log.complete()) == (1, None)
    make(log, 1.0)
    assert (log.current, log.complete()) == (2, (1, 1))
    assert log.control(1) == CONTROL
    make(log, 2.0, 3.0)
    assert log.complete() == (1, 3)


def test_an_iteration_in_flight_is_not_complete(log: BoundaryLog) -> None:
    make(log, 1.0)
    log.record(1, "F", 0, [rows(2.0)])
    assert log.complete() == (1, 1)
    assert log.holds(2)


def test_an_empty_iteration_holds_nothing(log: BoundaryLog) -> None:
    assert not log.holds(1)
    assert not log.holds(7)
    log.record(1, "F", 0, [rows(1.0)])
    assert log.holds(1)


def test_records_before_the_first_iteration_are_nobodys(said: list[str]) -> None:
    log = BoundaryLog(10**6, said.append)
    log.record(1, "F", 0, [rows(1.0)])
    log.end_round(run([rows(1.0)]))
    assert (log.nbytes, log.high_water_bytes, log.complete()) == (0, 0, None)


def test_skipped_steps_leave_nothing(log: BoundaryLog) -> None:
    make(log, 1.0)
    log.record(1, "F", 0, [rows(9.0)])
    log.end_round(run([rows(9.0)]))
    log.skip()
    assert (log.current, log.holds(2), log.nbytes, log.complete()) == (2, False, ROW, (1, 1))
    make(log, 2.0)
    ((key, (tensor,)),) = log.sent(2, 1, "F")
    assert key == Key(0, 0, 1, "F")
    assert torch.equal(tensor, rows(2.0))


def test_beginning_again_drops_what_a_course_that_was_given_up_had_left(log: BoundaryLog) -> None:
    make(log, 1.0, 2.0, 3.0)
    log.record(1, "F", 0, [rows(4.0)])
    log.begin(2)
    assert (log.current, log.complete(), log.nbytes) == (2, (1, 1), ROW)
    assert not any(map(log.holds, (2, 3, 4)))
    make(log, 20.0)
    assert torch.equal(log.sent(2, 1, "F")[0][1][0], rows(20.0))


def test_a_gap_ends_the_row_that_can_be_served(log: BoundaryLog) -> None:
    make(log, 1.0, 2.0)
    log.begin(4)
    assert log.complete() is None  # iteration 3 was never sealed
    make(log, 4.0, 5.0)
    assert log.complete() == (4, 5)
    log.free(5)
    assert log.complete() == (5, 5)


def test_freed_iterations_are_gone_and_the_others_are_not(log: BoundaryLog) -> None:
    make(log, 1.0, 2.0, 3.0)
    log.free(1)
    assert log.complete() == (1, 3)
    log.free(3)
    assert (log.complete(), log.nbytes, log.iteration_bytes) == ((3, 3), ROW, ROW)
    log.free(3)
    assert log.complete() == (3, 3)


def test_clear_gives_everything_up(log: BoundaryLog) -> None:
    make(log, 1.0, 2.0)
    log.record(1, "F", 0, [rows(3.0)])
    log.clear()
    assert (log.nbytes, log.complete(), log.holds(3)) == (0, None, False)
    log.record(1, "F", 1, [rows(3.0)])
    assert log.nbytes == 0


# --- what was sent ---------------------------------------------------------------------------------------------------


def test_transfers_come_in_the_order_of_runs_and_micro_batches(log: BoundaryLog) -> None:
    for number in range(2):
        for micro_batch in (1, 0, 2):
            log.record(1, "F", micro_batch, [rows(10 * number + micro_batch)])
            log.record(1, "B", micro_batch, [rows(-micro_batch)])
            log.record(2, "F", micro_batch, [rows(99.0)])
        log.end_round(run(index=number))
    log.seal(CONTROL)
    found = log.sent(1, 1, "F")
    assert [key for key, _ in found] == [Key(number, m, 1, "F") for number in range(2) for m in range(3)]
    assert [float(tensors[0][0, 0]) for _, tensors in found] == [0, 1, 2, 10, 11, 12]
    assert log.sent(1, 3, "F") == []


def test_transfers_of_several_tensors_or_none_keep_their_number(log: BoundaryLog) -> None:
    log.record(1, "F", 0, [rows(1.0), torch.arange(3), torch.tensor(2.0)])
    log.record(1, "B", 0, [])
    log.seal(CONTROL)
    ((_, sent),) = log.sent(1, 1, "F")
    assert [tuple(tensor.shape) for tensor in sent] == [(1, 4), (3,), ()]
    assert log.sent(1, 1, "B") == [(Key(0, 0, 1, "B"), [])]
    assert log.nbytes == ROW + 24 + 4


def test_runs_come_back_with_their_batches(log: BoundaryLog) -> None:
    given = [[rows(1.0), torch.arange(2)], [rows(2.0), torch.arange(3)]]
    for index, batch in enumerate(given):
        log.record(1, "F", 0, [rows(0.0)])
        log.end_round(run(batch, index + 7))
    log.seal(CONTROL)
    found = log.rounds(1)
    assert [(r.index, r.seed, r.losses) for r in found] == [(7, 7, ("0x1p+0",)), (8, 8, ("0x1p+0",))]
    assert all(torch.equal(a, b) for r, batch in zip(found, given) for a, b in zip(r.batch, batch, strict=True))


# --- what it vouches for ---------------------------------------------------------------------------------------------


def test_a_record_that_was_written_to_afterwards_is_not_served(log: BoundaryLog) -> None:
    sent = [rows(value) for value in (1.0, 2.0, 3.0)]
    for tensor in sent:
        log.record(1, "F", 0, [tensor.detach()])
        log.seal(CONTROL)
    assert log.complete() == (1, 3)
    sent[1].add_(1)
    assert log.complete() == (3, 3)
    sent[2].zero_()
    assert log.complete() is None


def test_writing_through_a_view_is_noticed(log: BoundaryLog) -> None:
    sent = rows(1.0, 3)
    log.record(1, "F", 0, [sent])
    log.seal(CONTROL)
    sent[1].mul_(2)
    assert log.complete() is None


def test_a_batch_that_was_written_to_afterwards_is_not_served(log: BoundaryLog) -> None:
    batch = rows(1.0)
    log.end_round(run([batch]))
    log.seal(CONTROL)
    batch.neg_()
    assert log.complete() is None


def test_views_are_compacted_and_no_longer_depend_on_their_base(log: BoundaryLog) -> None:
    base = rows(1.0, 100)
    log.record(1, "F", 0, [base[:2]])
    log.seal(CONTROL)
    assert log.nbytes == 2 * ROW
    held = log.sent(1, 1, "F")[0][1][0]
    assert held.untyped_storage().nbytes() == 2 * ROW
    base.zero_()
    assert log.complete() == (1, 1)
    assert torch.equal(held, rows(1.0, 2))
    left = weakref.ref(base)
    del base
    assert left() is None


def test_batches_are_compacted_too(log: BoundaryLog) -> None:
    base = rows(1.0, 100)
    log.end_round(run([base[:2]]))
    log.seal(CONTROL)
    left = weakref.ref(base.untyped_storage())
    del base
    assert left() is None
    assert torch.equal(log.rounds(1)[0].batch[0], rows(1.0, 2))


def test_whole_tensors_are_kept_without_a_copy(log: BoundaryLog) -> None:
    sent = rows(1.0)
    log.record(1, "F", 0, [sent])
    assert log.sent(1, 1, "F")[0][1][0].data_ptr() == sent.data_ptr()


def test_inference_tensors_are_copied(log: BoundaryLog) -> None:
    """They have no version counter that could tell of a change."""
    with torch.inference_mode():
        sent = rows(1.0)
    log.record(1, "F", 0, [sent])
    log.seal(CONTROL)
    with torch.inference_mode():
        sent.zero_()
    assert log.complete() == (1, 1)
    assert torch.equal(log.sent(1, 1, "F")[0][1][0], rows(1.0))


# --- the bound -------------------------------------------------------------------------------------------------------


def test_oldest_iterations_go_first_and_it_is_said_once(said: list[str]) -> None:
    log = BoundaryLog(3 * ROW, said.append)
    log.begin(1)
    make(log, 1.0, 2.0, 3.0)
    assert (said, log.complete()) == ([], (1, 3))
    make(log, 4.0)
    assert (log.complete(), log.nbytes) == ((2, 4), 3 * ROW)
    make(log, 5.0, 6.0)
    assert log.complete() == (4, 6)
    (message,) = said
    for part in ("reached its bound", "gave up iteration 1", "rollback of all stages", "max_bytes=", "smaller window"):
        assert part in message


def test_an_iteration_larger_than_the_bound_is_given_up_itself(said: list[str]) -> None:
    log = BoundaryLog(2 * ROW, said.append)
    log.begin(1)
    make(log, 1.0)
    for micro_batch in range(5):
        log.record(1, "F", micro_batch, [rows(2.0)])
        assert log.nbytes <= 2 * ROW
    log.end_round(run([rows(2.0)]))
    log.seal(CONTROL)
    assert (log.nbytes, log.complete(), log.current, len(said)) == (0, None, 3, 1)
    make(log, 3.0)
    assert log.complete() == (3, 3)


def test_a_batch_that_does_not_fit_gives_the_iteration_up(said: list[str]) -> None:
    log = BoundaryLog(2 * ROW, said.append)
    log.begin(1)
    log.end_round(run([rows(1.0, 3), rows(1.0)]))
    log.record(1, "F", 0, [rows(1.0)])
    log.seal(CONTROL)
    assert (log.nbytes, log.complete()) == (0, None)


def test_high_water_mark_outlives_what_is_freed(log: BoundaryLog) -> None:
    make(log, 1.0, 2.0)
    log.free(3)
    assert (log.nbytes, log.high_water_bytes) == (0, 2 * ROW)
    make(log, 3.0)
    assert log.high_water_bytes == 2 * ROW


def test_bytes_of_the_newest_iteration_count_runs_and_batches(log: BoundaryLog) -> None:
    for _ in range(2):
        log.record(1, "F", 0, [rows(1.0)])
        log.end_round(run([torch.arange(2)]))
    assert log.iteration_bytes == 0
    log.seal(CONTROL)
    assert log.iteration_bytes == 2 * (ROW + 16)


actions: Any = st.lists(
    st.one_of(
        st.tuples(st.just("record"), st.integers(0, 5)),
        st.tuples(st.just("round"), st.integers(0, 3)),
        st.tuples(st.sampled_from(["seal", "skip", "clear"]), st.just(0)),
        st.tuples(st.sampled_from(["begin", "free"]), st.integers(-3, 3)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(actions, st.integers(1, 12))
def test_no_course_breaks_the_bound_or_the_account(course: list[tuple[str, int]], bound: int) -> None:
    said: list[str] = []
    log = BoundaryLog(bound * ROW, said.append)
    log.begin(1)
    for micro_batch, (action, value) in enumerate(course):
        if action == "record":
            log.record(1, "F", micro_batch, [rows(1.0, value)])
        elif action == "round":
            log.end_round(run([rows(1.0, value)]))
        elif action == "seal":
            log.seal(CONTROL)
        elif action in ("begin", "free"):
            getattr(log, action)(max(1, log.current + value))
        else:
            getattr(log, action)()
        assert 0 <= log.nbytes <= log.high_water_bytes <= log.max_bytes
        found = log.complete()
        if found is not None:
            first, last = found
            assert 1 <= first <= last == log.current - 1
            assert all(log.control(iteration) == CONTROL for iteration in range(first, last + 1))
    assert len(said) <= 1
    log.clear()
    assert log.nbytes == 0
