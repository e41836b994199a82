from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetion_lightning.core.operators import Operator, OperatorKind, Piece
from moetion_lightning.core.schedule import (
    MAX_SHARE,
    fractional_bound,
    make_schedule,
    order_operators,
    split_operators,
    window_bytes,
)
from moetion_lightning.errors import ConfigurationError


def operator(number: int, kind: OperatorKind = OperatorKind.EXPERT) -> Operator:
    return Operator(
        name=f"op{number}", kind=kind, pieces=(Piece(parameter=f"p{number}"),), layer="layer", expert=number
    )


#: (elements, optimizer bytes per element, compute bytes per element) of a parameter with `rows` rows.
parameters = st.lists(
    st.tuples(st.integers(1, 400), st.integers(1, 64), st.sampled_from([4, 8, 12]), st.sampled_from([2, 4])),
    min_size=1,
    max_size=30,
)


@given(parameters, st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_every_operator_is_active_once_and_frozen_exactly_before(rows: list[tuple[int, ...]], window: int) -> None:
    operators = [operator(i) for i in range(len(rows))]
    compute = {f"op{i}": r * width * c for i, (r, width, _, c) in enumerate(rows)}
    full = {f"op{i}": r * width * (4 + extra) for i, (r, width, extra, _) in enumerate(rows)}
    schedule = make_schedule(operators, window, full_bytes=full, compute_bytes=compute)
    assert 1 <= schedule.window <= window
    assert [op for slot in schedule.slots for op in slot] == operators
    assert all(schedule.slots)
    for number, op in enumerate(operators):
        slot = next(k for k, members in enumerate(schedule.slots) if op in members)
        frozen_in = [k for k in range(schedule.window) if op in schedule.frozen(k)]
        assert frozen_in == list(range(slot)), number
    for k, cost in enumerate(schedule.slot_bytes):
        active = sum(full[op.name] for op in schedule.slots[k])
        assert cost == active + sum(compute[op.name] for op in schedule.frozen(k))
    assert schedule.dense_bytes == sum(full.values())


@given(parameters, st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_no_contiguous_partition_is_lighter(rows: list[tuple[int, ...]], window: int) -> None:
    rows = rows[:7]
    window = min(window, len(rows))
    full = [r * w * (4 + extra) for r, w, extra, _ in rows]
    compute = [r * w * c for r, w, _, c in rows]
    names = [f"op{i}" for i in range(len(rows))]
    schedule = make_schedule(
        [operator(i) for i in range(len(rows))],
        window,
        full_bytes=dict(zip(names, full)),
        compute_bytes=dict(zip(names, compute)),
    )
    best = math.inf
    for cuts in range(2 ** (len(rows) - 1)):
        edges = [i + 1 for i in range(len(rows) - 1) if cuts >> i & 1] + [len(rows)]
        if len(edges) > window:
            continue
        best = min(best, max(sum(full[a:b]) + sum(compute[b:]) for a, b in zip([0, *edges], edges)))
    assert schedule.heaviest_bytes == best


@given(parameters, st.integers(2, 10))
@settings(max_examples=200, deadline=None)
def test_heaviest_slot_is_within_ten_percent_of_the_bound_when_rows_may_be_cut(
    rows: list[tuple[int, ...]], window: int
) -> None:
    rows = [(r + 400, w, extra, c) for r, w, extra, c in rows]  # enough rows that a twentieth of a slot can be cut
    full = {f"p{i}": r * w * (4 + extra) for i, (r, w, extra, _) in enumerate(rows)}
    compute = {f"p{i}": r * w * c for i, (r, w, _, c) in enumerate(rows)}
    counts = {f"p{i}": r for i, (r, *_) in enumerate(rows)}
    whole = [operator(i) for i in range(len(rows))]
    bound = fractional_bound(list(full.values()), list(compute.values()), window)
    parts = split_operators(
        whole,
        full_bytes=full,
        rows=counts,
        sliceable=dict.fromkeys(full, True),
        max_bytes=max(1, int(MAX_SHARE * bound)),
    )
    for name, count in counts.items():  # still a partition
        pieces = [p for op in parts for p in op.pieces if p.parameter == name]
        spans = sorted((p.start or 0, count if p.stop is None else p.stop) for p in pieces)
        assert spans[0][0] == 0
        assert spans[-1][1] == count
        assert all(a[1] == b[0] for a, b in zip(spans, spans[1:]))

    def cost(table: dict[str, int]) -> dict[str, int]:
        result = {}
        for op in parts:
            result[op.name] = sum(
                table[p.parameter] * ((counts[p.parameter] if p.stop is None else p.stop) - (p.start or 0))
                // counts[p.parameter]
                for p in op.pieces
            )  # fmt: skip
        return result

    schedule = make_schedule(parts, window, full_bytes=cost(full), compute_bytes=cost(compute))
    assert schedule.heaviest_bytes <= 1.1 * bound + 1


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_order_is_ascending_popularity_then_gates_then_shared(tokens: list[int]) -> None:
    experts = [operator(i) for i in range(len(tokens))]
    gate = Operator(name="gate", kind=OperatorKind.GATE, pieces=(Piece(parameter="g"),), layer="layer")
    shared = Operator(name="shared", kind=OperatorKind.SHARED, pieces=(Piece(parameter="s"),))
    ordered = order_operators([shared, gate, *experts], {("layer", i): n for i, n in enumerate(tokens)})
    assert [op.kind for op in ordered] == [OperatorKind.EXPERT] * len(tokens) + [OperatorKind.GATE, OperatorKind.SHARED]
    counts = [tokens[op.expert] for op in ordered if op.expert is not None]
    assert counts == sorted(counts)
    assert ordered == order_operators([shared, gate, *experts], {("layer", i): n for i, n in enumerate(tokens)})


def test_coupled_rows_stay_together() -> None:
    op = operator(0)
    parts = split_operators([op], full_bytes={"p0": 100}, rows={"p0": 10}, sliceable={"p0": False}, max_bytes=10)
    assert parts == (op,)


def test_longer_window_never_makes_the_heaviest_iteration_heavier() -> None:
    full, compute = [120] * 16, [40] * 16
    bounds = [fractional_bound(full, compute, w) for w in range(1, 17)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] == pytest.approx(sum(full))  # a bisection of floats, not a recovered state


@pytest.mark.parametrize("window", [1, 2, 3, 4, 8, 12, 16, 32])
@pytest.mark.parametrize("share", [0.0, 1 / 6, 1 / 3, 1.0])
def test_what_a_window_takes_is_known_before_it_is_planned(window: int, share: float) -> None:
    full = {f"p{i}": 1_000_000 + 50_000 * (i % 3) for i in range(40)}
    compute = {name: int(share * nbytes) for name, nbytes in full.items()}
    whole = [operator(i) for i in range(40)]
    bound = fractional_bound(list(full.values()), list(compute.values()), window)
    rows = dict.fromkeys(full, 1000)
    parts = whole
    if window > 1:
        sliceable = dict.fromkeys(full, True)
        most = max(1, int(MAX_SHARE * bound))
        parts = list(split_operators(whole, full_bytes=full, rows=rows, sliceable=sliceable, max_bytes=most))

    def cost(table: dict[str, int]) -> dict[str, int]:
        return {
            op.name: sum(
                table[p.parameter] * ((1000 if p.stop is None else p.stop) - (p.start or 0)) // 1000 for p in op.pieces
            )
            for op in parts
        }

    schedule = make_schedule(parts, window, full_bytes=cost(full), compute_bytes=cost(compute))
    estimate = window_bytes(sum(full.values()), sum(compute.values()), window)
    assert estimate == pytest.approx(schedule.total_bytes, rel=0.12)


@pytest.mark.parametrize("window", [0, -1])
def test_window_must_be_positive(window: int) -> None:
    with pytest.raises(ConfigurationError, match="window must be at least 1"):
        make_schedule([operator(0)], window, full_bytes={"op0": 1}, compute_bytes={"op0": 1})


def test_nothing_to_train_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigurationError, match="no trainable parameter"):
        make_schedule([], 2, full_bytes={}, compute_bytes={})
