"""What a recovery says that it has compared, and the cause that it names: a test for each sentence."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from moetion_lightning.core.grad_norm import GradNormSeam
from moetion_lightning.engine.replay_check import (
    Comparison,
    Suspects,
    Verdict,
    compare_next,
    compare_records,
    likely_causes,
)
from moetion_lightning.engine.replay_record import BatchToCome, IterationRecorder, describe_batch

RECORD: dict[str, Any] = {
    "losses": [(1.5).hex()],
    "norms": [(2.0).hex()],
    "gradients": {"a": "1", "b": "2"},
    "lrs": [(0.1).hex()],
    "rng": {"python": "1", "torch": "2"},
    "batches": ["d1", "d2"],
    "indices": ["i1", "i2"],
    "weights": {"op1": "w1", "op2": "w2"},
}


def compare(changed: dict[str, Any], recorded: dict[str, Any] = RECORD, **options: bool) -> Comparison:
    return compare_records(recorded, {**recorded, **changed}, **options)


def causes(other: dict[str, Any], recorded: dict[str, Any] = RECORD, **suspects: tuple[str, ...]) -> list[str]:
    found = compare(other, recorded)
    return likely_causes(found.differences, found.compared, Suspects(**suspects))


# --- comparing -------------------------------------------------------------------------------------------------------


def test_equal_records_agree_in_all_that_they_have() -> None:
    found = compare({})
    assert set(found.compared) == set(RECORD)
    assert found.differences == ()
    assert found.operators == {"op1", "op2"}


def test_what_the_original_run_did_not_have_is_not_compared() -> None:
    nothing: dict[str, Any] = {key: type(value)() for key, value in RECORD.items()}
    assert compare_records(nothing, RECORD).compared == ()
    assert compare_records({}, RECORD).compared == ()
    assert compare_records(RECORD, {**RECORD, "indices": []}).compared == tuple(k for k in RECORD if k != "indices")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"losses": [(1.25).hex()]}, "losses: recorded [1.5], replayed [1.25]"),
        ({"losses": []}, "losses: recorded [1.5], replayed []"),
        ({"norms": [(3.0).hex()]}, "gradient norms: recorded [2], replayed [3]"),
        ({"gradients": {"a": "1", "b": "x"}}, "gradients (b): recorded 2, replayed x"),
        ({"lrs": [(0.2).hex()]}, "learning rates: recorded [0.1], replayed [0.2]"),
        ({"rng": {"python": "1", "torch": "x"}}, "RNG (torch): recorded 2, replayed x"),
        ({"batches": ["d1", "x"]}, "batches (micro-batch 2 of 2): recorded d2, replayed x"),
        ({"batches": ["d1"]}, "batches: recorded 2 of them, replayed 1 of them"),
        ({"indices": ["x", "i2"]}, "sampler indices (micro-batch 1 of 2): recorded i1, replayed x"),
        ({"weights": {"op1": "w1", "op2": "x"}}, "weights (op2): recorded w2, replayed x"),
    ],
)
def test_a_difference_shows_both_values(changed: dict[str, Any], said: str) -> None:
    (difference,) = compare(changed).differences
    assert str(difference) == said


def test_many_operators_are_counted_not_listed() -> None:
    recorded = {"weights": {f"op{i}": "w" for i in range(5)}}
    (difference,) = compare({"weights": {f"op{i}": "x" for i in range(5)}}, recorded).differences
    assert str(difference) == "weights (op0, op1, op2 and 2 more): recorded w, w, w, replayed x, x, x"


def test_weights_are_compared_where_both_have_them() -> None:
    found = compare({"weights": {"op2": "w2", "op3": "x"}})
    assert found.differences == ()
    assert found.operators == {"op2"}
    assert "weights" not in compare({"weights": {}}).compared


def test_gradients_that_a_replay_skips_are_no_difference() -> None:
    assert compare({"gradients": {"a": "1"}}, gradients_skipped=True).differences == ()
    assert compare({"gradients": {"a": "1"}}).differences != ()
    assert compare({"gradients": {"a": "x"}}, gradients_skipped=True).differences != ()


# --- causes ----------------------------------------------------------------------------------------------------------

OTHER_BATCH = {"batches": ["x", "d2"]}
OTHER_LOSS = {"losses": [(9.0).hex()]}
KERNELS = "kernels that are not deterministic"


def test_cause_what_the_user_has_changed_comes_first() -> None:
    first, *others = causes({"weights": {"op1": "x"}}, changed=("gradient_clip_val",))
    assert first == "what was changed since the window was captured (gradient_clip_val)"
    assert others == []
    first, data = causes(OTHER_BATCH, changed=("batch size",))
    assert first.startswith("what was changed")
    assert data.startswith("the data differ")


def test_cause_data_with_other_indices() -> None:
    assert causes({**OTHER_BATCH, "indices": ["x", "i2"], **OTHER_LOSS}) == [
        "the data differ, and the sampler's indices do, too: the data position is wrong"
    ]


def test_cause_data_with_the_same_indices() -> None:
    assert causes({**OTHER_BATCH, **OTHER_LOSS}) == [
        "the data differ though the sampler's indices are the same: the dataset, its transforms or the collate "
        "function give something else for them"
    ]


def test_cause_data_where_indices_are_not_known() -> None:
    assert causes({**OTHER_BATCH, **OTHER_LOSS}, {**RECORD, "indices": []}) == [
        "the data differ: the data position is wrong, or the dataset gives something else than before"
    ]


def test_cause_a_generator_that_was_not_found_comes_with_the_data() -> None:
    data, generator = causes(OTHER_BATCH, generators=("dataset.noise",))
    assert data.startswith("the data differ though")
    assert generator == "random generators whose state was saved were not found again (dataset.noise)"


def test_cause_a_learning_rate() -> None:
    assert causes({"lrs": [(0.2).hex()], **OTHER_LOSS}) == [
        "a learning-rate scheduler that was not restored, or that steps elsewhere"
    ]


def test_cause_random_generators() -> None:
    assert causes({"rng": {"python": "x", "torch": "x"}, **OTHER_LOSS}) == [
        "the global random generators stand elsewhere (python, torch): something seeds anew, or draws only where a "
        "process starts"
    ]


def test_cause_an_optimizer_that_was_declared_elementwise_comes_first() -> None:
    found = causes({"weights": {"op1": "x"}}, elementwise=("mine.Muon",))
    assert found[0] == (
        "elementwise_optimizers= declares mine.Muon: if its update of an element depends on other elements, leave it "
        "out there"
    )
    assert found[1] == "the optimizer keeps state outside of its .state and state_dict()"
    assert found[-1].startswith(KERNELS)


def test_cause_weights_though_data_and_losses_agree() -> None:
    first, last = causes({"weights": {"op1": "x"}})
    assert first == "the optimizer keeps state outside of its .state and state_dict()"
    assert last.startswith(KERNELS)


@pytest.mark.parametrize("quantity", ["losses", "gradients"])
def test_cause_the_forward(quantity: str) -> None:
    changed: dict[str, Any] = {"losses": [(9.0).hex()], "gradients": {"a": "x"}}
    first, last = causes({quantity: changed[quantity]})
    assert first.startswith("the forward differs although the batches are the same: state that is in no parameter")
    assert last.startswith(KERNELS)


def test_kernels_are_blamed_alone_only_where_nothing_else_can_be() -> None:
    (only,) = causes({"norms": [(9.0).hex()]})
    assert only.startswith(KERNELS)


# --- the verdict -----------------------------------------------------------------------------------------------------


def verdict(*iterations: Comparison, next_batch: Comparison | None = None) -> Verdict:
    made = Verdict(num_operators=9)
    for number, comparison in enumerate(iterations, start=10):
        made.add(number, comparison)
    made.next_batch = next_batch
    return made


NEXT = {"batches": ["d"], "indices": [], "rng": {"torch": "1"}}
AGREES = compare_next(NEXT, NEXT)


def test_says_what_was_compared_in_each_iteration() -> None:
    few = {key: RECORD[key] for key in ("losses", "norms", "lrs", "rng", "batches", "weights")}
    made = verdict(compare({}, few), compare({}, few), next_batch=AGREES)
    assert str(made) == (
        "compared and equal in each: losses, gradient norms, learning rates, RNG, batches, weights of 2 of 9 "
        "operators; the next batch agrees, and the RNG there"
    )
    assert made.verified
    assert made.compared[-3:] == ["weights of 2 of 9 operators", "next batch", "RNG at the next batch"]


def test_says_where_a_quantity_was_compared_in_some_iterations_only() -> None:
    made = verdict(compare({}, {"lrs": ["0x1p+0"]}), compare({}, {"lrs": ["0x1p+0"], "losses": ["0x1p+0"]}))
    assert str(made) == "compared and equal in each: losses (in 1 of 2), learning rates; no batch followed"


def test_says_that_nothing_was_replayed() -> None:
    made = verdict(next_batch=AGREES)
    assert str(made) == "nothing was replayed; the next batch agrees, and the RNG there"
    assert made.verified


def test_says_that_nothing_could_be_compared() -> None:
    made = verdict()
    assert str(made) == "nothing could be compared: nothing was replayed; no batch followed"
    assert not made.verified
    made = verdict(next_batch=compare_next({}, NEXT))
    assert str(made) == "nothing could be compared: nothing was replayed; the next batch was not recorded"
    made = verdict(compare_records({}, RECORD))
    assert str(made) == (
        "nothing could be compared: no quantity of the replayed iterations could be compared; no batch followed"
    )
    assert not made.verified


def test_says_which_iterations_differed() -> None:
    made = verdict(compare({}), compare(OTHER_LOSS), compare(OTHER_LOSS), next_batch=AGREES)
    assert str(made).startswith("iterations 11, 12 DIFFERED; compared in each: losses, ")
    assert made.differs
    assert not made.verified
    assert str(verdict(compare(OTHER_LOSS))).startswith("iteration 10 DIFFERED; ")


def test_says_that_the_next_batch_differs() -> None:
    made = verdict(next_batch=compare_next(NEXT, {**NEXT, "batches": ["x"]}))
    assert str(made) == "nothing was replayed; the next batch DIFFERS"
    assert not made.verified
    made = verdict(next_batch=compare_next(NEXT, {**NEXT, "rng": {"torch": "x"}}))
    assert str(made) == "nothing was replayed; the next batch agrees, the RNG there DIFFERS"


# --- recording -------------------------------------------------------------------------------------------------------


def test_losses_are_copies_of_any_form() -> None:
    recorder = IterationRecorder(GradNormSeam())
    loss = torch.tensor(1.5, requires_grad=True) * 1
    for value in (loss, loss.reshape(1, 1), torch.ones(3)):
        recorder.add_loss(value)
    loss.detach().zero_()
    record = recorder.take()
    assert record.read()["losses"] == [x.hex() for x in (1.5, 1.5, 3.0)]
    assert recorder.take().read()["losses"] == []


def test_gradients_stand_for_a_loss_that_nobody_tells() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder, named = IterationRecorder(GradNormSeam()), dict(net.named_parameters())
    net(torch.ones(3, 4)).sum().backward()
    recorder.look_at_gradients(optimizer, named)
    first = recorder.take().read()["gradients"]
    assert set(first) == set(named)
    named["0.weight"].grad.mul_(2)  # type: ignore[union-attr]
    recorder.look_at_gradients(optimizer, named)
    second = recorder.take().read()["gradients"]
    assert {name for name in first if first[name] != second[name]} == {"0.weight"}
    recorder.add_loss(torch.tensor(1.0))
    recorder.look_at_gradients(optimizer, named)
    assert recorder.take().read()["gradients"] == {}


def test_indices_are_recorded_where_they_are_known_of_every_batch() -> None:
    class Position:
        def __init__(self, digest: str | None) -> None:
            self.digest = digest

        def indices_digest(self) -> str | None:
            return self.digest

    recorder = IterationRecorder(GradNormSeam())
    recorder.add_batch(describe_batch(1, [Position("a"), Position("b"), object()]))
    assert recorder.take().read()["indices"] == ["ab"]
    recorder.add_batch(describe_batch(1, [Position("a")]))
    recorder.add_batch(describe_batch(2, [Position(None)]))
    record = recorder.take().read()
    assert len(record["batches"]) == 2
    assert record["indices"] == []


def test_who_waits_for_the_batch_behind_a_window_gets_it_or_learns_that_none_comes() -> None:
    found: list[dict[str, Any]] = []
    for come in (True, False):
        to_come = BatchToCome()
        waiting = threading.Thread(target=lambda waits=to_come: found.append(waits.wait()))
        waiting.start()
        if come:
            to_come.came(describe_batch(torch.ones(2)), {"torch": "1"})
        to_come.never_comes()
        waiting.join(timeout=30)
    assert found == [
        {"batches": [describe_batch(torch.ones(2)).content.read()], "indices": [], "rng": {"torch": "1"}},
        {},
    ]
