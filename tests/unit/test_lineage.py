"""Which windows belong to a fit: the same beginning continues, what cannot belong is never taken."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from moetion_lightning.config import EngineConfig
from moetion_lightning.errors import ForeignWindowError
from moetion_lightning.session.beginning import (
    adopt,
    differences,
    merged,
    of_attributes,
    of_loaders,
    of_module,
    of_optimizers,
    of_schedulers,
)
from moetion_lightning.session.fits import Fit
from moetion_lightning.session.lineage import Course, Decision, decide

HERE: dict[str, Any] = {
    "model": "m1",
    "parameters": {"w": ["float32", [2, 3]]},
    "weights": "w1",
    "seed": 1,
    "data": "d1",
    "checkpoint": {"given": None},
    "settings": {"lr of AdamW": 0.01, "max_steps": 10, "optimizers": "AdamW", "schedulers": "none"},
    "attributes": {"width of Net": 8},
}


def _began(**changes: Any) -> dict[str, Any]:
    began = copy.deepcopy(HERE)
    for name, value in changes.items():
        if name in ("settings", "attributes"):
            began[name] = {**began[name], **value}
        else:
            began[name] = value
    return began


def _course(name: str = "a", ordinal: int = 1, age: float = 10.0, **more: Any) -> Course:
    flags = {key: more.pop(key) for key in ("trained", "mine", "busy", "left") if key in more}
    return Course(
        job=f"job-{name}", name=name, ordinal=ordinal, beginning=_began(**more), step=0, last_iteration=8,
        created_at=1000.0 - age, **flags,
    )  # fmt: skip


def _taken(courses: list[Course], ordinal: int = 1, **options: Any) -> str:
    course = decide(HERE, ordinal, courses, **options).course
    return "" if course is None else course.name


def test_the_same_beginning_continues() -> None:
    assert _taken([_course()]) == "a"


def test_of_equal_beginnings_the_one_in_the_same_place_of_its_process_is_meant() -> None:
    folds = [_course("first", 1), _course("second", 2, age=1.0)]
    assert [_taken(folds, 1), _taken(folds, 2), _taken(folds, 3)] == ["first", "second", "second"]


def test_a_phase_is_found_again_where_finished_phases_are_skipped() -> None:
    phases = [_course("one", 1, weights="w0", trained=True), _course("two", 2)]
    assert _taken(phases, ordinal=1) == "two"


def test_a_finished_phase_is_not_taken_for_the_one_after_it() -> None:
    assert _taken([_course("one", 1, weights="w0", trained=True)], ordinal=1) == ""


def test_complete_training_is_found_again() -> None:
    assert _taken([_course(trained=True)]) == "a"


def test_complete_training_goes_on_with_more_steps() -> None:
    decision = decide(HERE, 1, [_course(trained=True, settings={"max_steps": 5})])
    assert decision.course is not None
    assert [(d.name, d.there, d.here, d.counts) for d in decision.changed] == [("max_steps", "5", "10", "script")]


def test_complete_training_with_another_learning_rate_is_another_fit() -> None:
    assert _taken([_course(trained=True, settings={"lr of AdamW": 0.1})]) == ""


def test_other_initial_values_alone_are_no_difference_without_a_seed() -> None:
    assert _taken([_course(weights="w0", data="d0", seed=None)]) == "a"


def test_other_initial_values_are_not_taken_where_two_courses_could_be_meant() -> None:
    assert _taken([_course("a", weights="w0"), _course("b", weights="w2")]) == ""


def test_another_seed_is_another_fit() -> None:
    decision = decide(HERE, 1, [_course(weights="w0", seed=2)])
    assert decision.course is None
    assert decision.refused[0][1] == "seed 2 there, 1 here"


def test_other_initial_values_and_another_setting_are_another_fit() -> None:
    decision = decide(HERE, 1, [_course(weights="w0", seed=None, settings={"lr of AdamW": 0.1})])
    assert decision.course is None
    assert decision.refused[0][1] == "lr of AdamW is 0.1 there, 0.01 here, and other initial values"


def test_a_changed_setting_is_named_with_both_values_and_who_counts() -> None:
    decision = decide(HERE, 1, [_course(settings={"lr of AdamW": 0.1}, attributes={"width of Net": 4})])
    assert decision.course is not None
    assert [str(d) for d in decision.changed] == [
        "lr of AdamW is 0.1 in the window and 0.01 in this script (the window's counts)",
        "width of Net is 4 in the window and 8 in this script (this script's counts)",
    ]


def test_a_changed_setting_is_another_fit_in_a_sweep() -> None:
    course = _course(settings={"lr of AdamW": 0.1})
    assert _taken([course], sweeping=True) == ""
    assert _taken([_course()], sweeping=True) == "a"


def test_a_changed_setting_in_another_place_of_the_process_is_another_fit() -> None:
    assert _taken([_course(ordinal=2, settings={"lr of AdamW": 0.1})]) == ""


def test_a_process_does_not_continue_what_it_has_begun_itself() -> None:
    """Unless it begins in exactly the same way, and was not complete: then that is tried again."""
    assert _taken([_course(mine=True)]) == "a"
    assert _taken([_course(mine=True, trained=True)]) == ""
    assert _taken([_course(mine=True, weights="w0", seed=None)]) == ""
    assert _taken([_course(mine=True, settings={"lr of AdamW": 0.1})]) == ""
    assert _taken([_course(mine=True, code="c")], ordinal=2) == "a"
    assert decide({**HERE, "code": "d"}, 2, [_course(mine=True, code="c")]).course is None
    assert _taken([_course(mine=True, model="m2")]) == ""
    with pytest.raises(ForeignWindowError, match="another model"):
        _taken([_course(mine=True, model="m2")], named=True)
    assert _taken([_course(mine=True, settings={"lr of AdamW": 0.1})], resume="newest") == "a"


def test_a_trial_that_its_script_has_left_is_taken_by_the_same_beginning_only() -> None:
    """Sweeps without a library: a pruned trial is not complete, and the next one may have the same place."""
    assert _taken([_course(left=True)]) == "a"
    assert _taken([_course(left=True)], ordinal=2) == "a"
    assert _taken([_course(left=True, settings={"lr of AdamW": 0.1})]) == ""
    assert _taken([_course(left=True, settings={"optimizers": "Lion"})]) == ""
    assert _taken([_course(left=True, weights="w0", data="d0", seed=None)]) == ""
    assert _taken([_course(left=True, model="m2")]) == ""
    assert decide({**HERE, "code": "d"}, 1, [_course(left=True, code="c")]).course is None
    assert _taken([_course(left=True, settings={"lr of AdamW": 0.1})], resume="newest") == "a"
    refused = decide(HERE, 1, [_course(left=True, weights="w0", seed=None)]).refused
    assert [reason for _, reason in refused] == ["its script went on to another fit"]


def test_complete_training_that_was_left_is_found_again() -> None:
    assert _taken([_course(left=True, trained=True)]) == "a"
    assert _taken([_course(left=True, trained=True, settings={"max_steps": 5})]) == "a"


def test_a_course_of_a_live_process_is_left_to_it() -> None:
    assert _taken([_course(busy=True)]) == ""
    assert _taken([_course(busy=True)], resume="newest") == ""


def test_resume_never_takes_nothing_and_newest_takes_what_fits() -> None:
    courses = [
        _course("old", weights="w0", seed=9),
        _course("new", age=1.0, weights="w3"),
        _course("x", 1, 0, model="m2"),
    ]
    assert _taken(courses, resume="never") == ""
    assert _taken(courses, resume="newest") == "new"


def test_another_model_is_refused_with_the_parameter_and_the_remedy() -> None:
    other = _course(model="m2", weights="w2", parameters={"w": ["float32", [4, 3]]})
    with pytest.raises(ForeignWindowError, match=r"another model: parameter 'w' is float32 \(4, 3\) there.*never"):
        decide(HERE, 1, [other])
    assert _taken([other], sweeping=True) == ""
    assert _taken([_course("b", 2, model="m2")]) == ""
    assert _taken([other, _course()]) == "a"


@pytest.mark.parametrize("name", ["optimizers", "schedulers"])
def test_other_optimizers_are_refused(name: str) -> None:
    with pytest.raises(ForeignWindowError, match=f"{name} Lion, this run has"):
        decide(HERE, 1, [_course(settings={name: "Lion"})])


@pytest.mark.parametrize(
    ("there", "here", "same"),
    [
        ({"given": None}, {"given": None}, True),
        ({"given": "a.ckpt", "stamp": [1, 2]}, {"given": "a.ckpt", "stamp": [1, 2]}, True),
        ({"given": "a.ckpt", "stamp": [1, 2]}, {"given": "a.ckpt", "stamp": [1, 3]}, False),
        ({"given": "last", "stamp": None}, {"given": "last", "stamp": [1, 3]}, True),
        ({"given": None}, {"given": "a.ckpt", "stamp": [1, 2]}, False),
    ],
)
def test_a_run_that_began_from_another_checkpoint_is_another_one(there: Any, here: Any, same: bool) -> None:
    found = decide({**HERE, "checkpoint": here}, 1, [_course(checkpoint=there)])
    assert (found.course is not None) is same


# --- what a beginning consists of ------------------------------------------------------------------------------------


class _Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.stamp = 1.7e9
        self.run = "2026-11-29 10:00"
        self.out = nn.Linear(width, 2)


def test_weights_count_by_value_and_the_model_by_shape() -> None:
    torch.manual_seed(1)
    first, again = of_module(_Net()), None
    torch.manual_seed(1)
    again = of_module(_Net())
    assert first == again
    other = of_module(_Net())
    assert first["model"] == other["model"]
    assert first["weights"] != other["weights"]
    assert of_module(_Net(5))["model"] != first["model"]


def test_a_seed_is_told_from_none() -> None:
    state = torch.get_rng_state()
    torch.seed()
    assert of_module(_Net())["seed"] is None
    torch.manual_seed(7)
    assert of_module(_Net())["seed"] == 7
    torch.set_rng_state(state)


def test_what_moves_with_every_start_is_no_setting() -> None:
    assert of_attributes(_Net()) == {"width of _Net": 4, "training of _Net": True}


def test_subsets_differ_by_their_choice() -> None:
    data = TensorDataset(torch.arange(10.0))
    folds = [of_loaders([DataLoader(Subset(data, range(i, i + 5)), batch_size=5)]) for i in (0, 5)]
    assert folds[0]["settings"] == folds[1]["settings"]
    assert folds[0]["data"] != folds[1]["data"]


def test_a_script_can_let_its_own_learning_rate_count() -> None:
    def make(lr: float) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=lr, betas=(0.9, 0.99 if lr == 1.0 else 0.95))
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    optimizer, scheduler = make(1.0)
    there = {"settings": {**of_optimizers([optimizer]), **of_schedulers([scheduler])}}
    optimizer.step()
    scheduler.step()
    here_optimizer, here_scheduler = make(0.1)
    here = merged({}, {"settings": {**of_optimizers([here_optimizer]), **of_schedulers([here_scheduler])}})
    changed = [difference.name for difference in differences(there, here)]
    assert "initial_lr of AdamW" in changed
    adopt(changed, here, [optimizer], [scheduler])
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.25)


@pytest.mark.parametrize(
    ("other", "known", "continued"),
    [
        (["b", "job-b"], ["job-b"], True),
        (None, [], True),
        (None, ["job-a"], True),  # of another fit it has a window: of this one its memory is lost
        (None, ["job-a", "job-b"], False),  # it knows better
        (["c", "job-b"], ["job-b"], False),
    ],
)
def test_rank_that_lost_its_memory_of_a_fit_continues_what_the_others_do(
    tmp_path: Path, other: list[str] | None, known: list[str], continued: bool
) -> None:
    asked = []

    def agree(topic: str, value: Any) -> list[Any]:
        asked.append(value)
        return [value, [other, known]]

    fits = Fit(EngineConfig(job_id="job"), tmp_path, SimpleNamespace(agree=agree))  # type: ignore[arg-type]
    mine = _course("b")
    assert (fits._agreed(Decision(course=mine), ["job-b"]).course == mine) is continued
    assert asked == [[["b", "job-b"], ["job-b"]]]
