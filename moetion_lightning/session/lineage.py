"""Which windows belong to a fit: decided in one place, by how the fits began.

A *course* is one fit's way through training, over all the processes that continue it. Every window says of which
course it is, and how that began. A fit continues a course if it began in the same way; see :func:`decide`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moetion_lightning.errors import ForeignWindowError
from moetion_lightning.session.beginning import Beginning, Difference, differences

__all__ = [
    "ANOTHER_CHECKPOINT",
    "LIMITS",
    "MOVING_CHECKPOINTS",
    "REMEDY",
    "SCRIPT_COUNTS",
    "Course",
    "Decision",
    "decide",
    "same_checkpoint",
    "structure_difference",
]

#: Settings that end or pace a fit: the script's values are used, also where training is complete already.
LIMITS = ("max_epochs", "max_steps", "min_epochs", "min_steps", "num_train_epochs")
SCRIPT_COUNTS = (
    *(*LIMITS, "gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches", "precision"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm"),
)
#: Words in place of a path that stand for whatever is the newest at that time.
MOVING_CHECKPOINTS = ("last", "latest", "best", "hpc")
ANOTHER_CHECKPOINT = "it began from another checkpoint"
#: Settings with which a window cannot be restored if they differ.
_STRUCTURE = {
    "ranks": (
        "is of a run with {} ranks, each of which holds a part of the state; this one has {}: start as many as before"
    ),
    "optimizers": "was captured with the optimizers {}, this run has {}",
    "schedulers": "was captured with the learning-rate schedulers {}, this run has {}",
    "loaders": "was captured in a loop over {} loaders, this one has {}",
    "batches an epoch": "was captured in a loop over {} batches an epoch, this one has {}",
}
REMEDY = "Undo the change, or start afresh with resume='never' or another job_id."


@dataclass(frozen=True, kw_only=True)
class Course:
    """A course of training of which there are windows.

    Args:
        job: Name under which they are stored.
        name: Identity of the course.
        ordinal: Which fit of its process began it, from 1.
        beginning: How it began.
        step: Optimizer steps before its first iteration, as its adapter counts them.
        last_iteration: Of its newest window.
        created_at: When that was committed, seconds since the epoch.
        trained: Whether training came to its end.
        left: Whether its script has gone on to another fit since its newest window: it failed, or was stopped.
        mine: Whether this very process began or continued it.
        busy: Whether a live process owns it.
        completed: Whether the process that trained it ended well.
    """

    job: str
    name: str
    ordinal: int
    beginning: Beginning
    step: int
    last_iteration: int
    created_at: float
    trained: bool = False
    left: bool = False
    mine: bool = False
    busy: bool = False
    completed: bool = False

    def __str__(self) -> str:
        state = ", where training is complete" if self.trained else ""
        return f"job {self.job} that ends with iteration {self.last_iteration}{state}"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a fit continues.

    Args:
        course: The course; None: it begins anew.
        changed: Settings that differ from the course's, and whose values count.
        refused: Courses that it does not continue, and why.
    """

    course: Course | None = None
    changed: tuple[Difference, ...] = ()
    refused: tuple[tuple[Course, str], ...] = field(default=())


def decide(
    here: Beginning,
    ordinal: int,
    courses: Sequence[Course],
    *,
    resume: str = "auto",
    sweeping: bool = False,
    named: bool = False,
) -> Decision:
    """Find the course that a fit continues.

    1. A course that began in exactly the same way; of several, the one that was as many fits into its process, then the
       one that is not complete, then the newest.
    2. Else a course that was as many fits into its process, is not complete, and can alone be meant: if nothing but
       initial values differ (a script that sets no seed begins with others each time), or if nothing but settings do,
       which are named. In a sweep over settings those are not the same fit.
    3. Else none. Of what this very process has begun only 1. counts, and only what is not complete: there the user's
       code decides, and runs a cell or a trial again. The same of what a script has left for another fit, without
       completing it: a trial that was stopped.

    Args:
        here: How this fit begins; what is not known yet is left out.
        ordinal: Which fit of this process it is, from 1.
        courses: Courses of the same job.
        resume: ``"auto"``; ``"newest"``: the newest course of this model, whatever began it; ``"never"``.
        sweeping: Whether the process looks for good settings, so that a difference in them means another fit.
        named: Whether the user has given the job its identity: then also a fit of this process is meant to go on.

    Raises:
        ForeignWindowError: The only course that could be meant is of another model, or of other optimizers.
    """
    if resume == "never":
        return Decision()
    refused: list[tuple[Course, str]] = []
    possible: list[tuple[Course, _Comparison]] = []
    for course in courses:
        compared = _Comparison.of(course.beginning, here)
        if course.busy:
            refused.append((course, "a live process owns it"))
        elif course.mine and resume == "auto" and (course.trained or compared.code or not compared.equal):
            if named and not course.trained and not sweeping:
                _refuse_another_model(course, compared)
            refused.append((course, compared.why_not() or "this very process has begun it"))
        elif course.left and not course.trained and resume == "auto" and (compared.code or not compared.equal):
            refused.append((course, compared.why_not(sweeping=True) or "its script went on to another fit"))
        else:
            possible.append((course, compared))
    if resume == "newest":
        fitting = [item for item in possible if not item[1].model]
        refused += [(course, compared.why_not()) for course, compared in possible if compared.model]
        best = max(fitting, key=lambda item: item[0].created_at, default=None)
        return Decision(refused=tuple(refused)) if best is None else _taken(best, refused)
    exact = [item for item in possible if item[1].equal]
    if exact:
        return _taken(max(exact, key=lambda i: (i[0].ordinal == ordinal, not i[0].trained, i[0].created_at)), refused)
    meant = [item for item in possible if item[0].ordinal == ordinal and (not item[0].trained or item[1].extended)]
    if len(meant) == 1:
        course, compared = meant[0]
        if not compared.why_not(sweeping=sweeping):
            return _taken(meant[0], refused)
        if not sweeping:
            _refuse_another_model(course, compared)
    for course, compared in possible:
        reason = compared.why_not(sweeping=sweeping) or (
            "training is complete there" if course.trained else "another one could be meant as well"
            if course.ordinal == ordinal else f"it was fit {course.ordinal} of its process, this is fit {ordinal}"
        )  # fmt: skip
        refused.append((course, reason))
    return Decision(refused=tuple(refused))


def _refuse_another_model(course: Course, compared: _Comparison) -> None:
    """A window of the course that is meant cannot be restored: the user decides, before anything is lost."""
    if (compared.model or compared.structure) and not compared.checkpoint:
        what = f"belongs to another model: {compared.model}" if compared.model else compared.structure
        raise ForeignWindowError(f"the window of {course} {what}. {REMEDY}")


def structure_difference(settings: Sequence[Difference]) -> str:
    """What makes it impossible to restore a window, among settings that differ; "" if nothing does."""
    for difference in settings:
        if difference.name in _STRUCTURE:
            return _STRUCTURE[difference.name].format(difference.there, difference.here)
    return ""


def same_checkpoint(there: Any, here: Any) -> bool:
    """Whether two fits were told to begin from the same checkpoint, or from none."""
    there, here = there or {}, here or {}
    if there.get("given") != here.get("given"):
        return False
    if here.get("given") in (None, *MOVING_CHECKPOINTS):
        return True
    return bool(there.get("stamp") == here.get("stamp"))


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """How two beginnings differ; what one of them does not know is no difference."""

    model: str
    code: bool
    initial: bool
    seed: str
    checkpoint: bool
    settings: tuple[Difference, ...]

    @classmethod
    def of(cls, there: Beginning, here: Beginning) -> _Comparison:
        def differ(name: str) -> bool:
            return name in there and name in here and there[name] != here[name]

        if "model_now" in there and there["model_now"] == here.get("model"):  # made as it had become by then
            there = {name: value for name, value in there.items() if name not in ("model", "weights")}
        seeds = there.get("seed"), here.get("seed")
        return cls(
            model=_model_difference(there, here),
            code=differ("code"),
            initial=differ("weights") or differ("data"),
            seed=f"seed {seeds[0]} there, {seeds[1]} here" if None not in seeds and differ("seed") else "",
            checkpoint=not same_checkpoint(there.get("checkpoint"), here.get("checkpoint")),
            settings=tuple(differences(there, here, SCRIPT_COUNTS)),
        )

    @property
    def structure(self) -> str:
        return structure_difference(self.settings)

    @property
    def equal(self) -> bool:
        return not (self.model or self.initial or self.seed or self.checkpoint or self.settings)

    @property
    def extended(self) -> bool:
        """Whether nothing but the limits differ: training that was complete goes on."""
        only_limits = all(change.name in LIMITS for change in self.settings)
        return only_limits and not (self.model or self.initial or self.seed or self.checkpoint)

    def why_not(self, *, sweeping: bool = False) -> str:
        """Why they cannot be the same fit, or ""."""
        if self.model or self.structure:
            return f"it is of another model ({self.model})" if self.model else f"it {self.structure}"
        if self.checkpoint:
            return ANOTHER_CHECKPOINT
        if self.seed:
            return self.seed
        if self.settings and (sweeping or self.initial):
            also = ", and other initial values" if self.initial else ""
            return "; ".join(f"{d.name} is {d.there} there, {d.here} here" for d in self.settings[:4]) + also
        return ""


def _model_difference(there: Beginning, here: Beginning) -> str:
    if there.get("model") == here.get("model") or "model" not in there or "model" not in here:
        return ""
    ours, theirs = here.get("parameters", {}), there.get("parameters", {})
    for name in {**theirs, **ours}:
        if theirs.get(name) != ours.get(name):
            return f"parameter {name!r} is {_shape(theirs.get(name))} there and {_shape(ours.get(name))} here"
    return "other parameters"


def _shape(entry: Sequence[Any] | None) -> str:
    return "absent" if entry is None else f"{entry[0]} {tuple(entry[1])}"


def _taken(item: tuple[Course, _Comparison], refused: Sequence[tuple[Course, str]]) -> Decision:
    return Decision(course=item[0], changed=item[1].settings, refused=tuple(refused))
