"""Where two recordings of a run part: the first step, the first quantity, and what was still equal there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moetion_lightning.testing.records import Execution, RankRecords, Recording

__all__ = ["QUANTITIES", "Divergence", "Outcome", "compare_recordings"]

#: In the order in which one follows from another within a step.
QUANTITIES = ("inputs", "settings", "losses", "gradient", "optimizer", "parameter", "buffer", "rng")
#: Generators that scripts need not use.
_OFTEN_IDLE = ("python", "numpy")
_KEYS = {"gradient": "tensors", "optimizer": "tensors", "parameter": "tensors", "buffer": "tensors"}


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first thing that differs.

    Args:
        step: Optimizer step.
        rank: Global rank.
        start: Which start of the first run executed it, from 1; 0 if it did not.
        is_replay: Whether that was in a replay.
        is_undisturbed: Whether it was before any failure that the rank was touched by.
        quantity: Of :data:`QUANTITIES`, or "steps" where one run lacks the step.
        name: Which one of it: a tensor, a micro-batch, a setting, a generator.
        first: Value in the first run.
        second: Value in the second one.
        others: How many more things differ in the same step.
        equal: Quantities that both have and that are equal in this step.
        parted: Quantities that differ in it.
        is_first: Whether it is the first step that both have.
        skipped: Generators that the runs have not seeded alike: they were not compared in this step.
    """

    step: int
    rank: int
    start: int
    is_replay: bool
    is_undisturbed: bool
    quantity: str
    name: str
    first: str
    second: str
    others: int = 0
    equal: tuple[str, ...] = ()
    parted: tuple[str, ...] = ()
    is_first: bool = False
    skipped: tuple[str, ...] = ()

    @property
    def begins_apart(self) -> bool:
        """Whether the runs differ before anything that a step does could have made them differ."""
        if not (self.is_first and self.is_undisturbed):
            return False
        if "torch" in self.skipped:
            return True
        if self.step != 1 or self.quantity not in ("inputs", "losses"):
            return False
        seeded_alike = "rng" in self.equal  # then initial weights are the same; data may be drawn from other generators
        return not seeded_alike or (self.quantity == "inputs" and bool(self.skipped))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a comparison.

    Args:
        divergence: Where the runs part; None if they do not.
        steps: Steps of all ranks that both runs have.
        executions: How often the first run executed them: more where steps were done again.
        compared: Values that were compared, by quantity, up to the first difference.
        unseeded: Global generators that stand elsewhere from the first step on, and that something draws from: the
            script does not seed them. They are compared with the first run itself.
    """

    divergence: Divergence | None
    steps: int
    executions: int
    compared: dict[str, int]
    unseeded: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether something was compared, and nothing differs."""
        return self.steps > 0 and self.divergence is None


def compare_recordings(first: Recording, second: Recording) -> Outcome:
    """Compare every value of every step, every time that it was executed.

    Args:
        first: A run that may have executed steps again; each time must be as every other time.
        second: What it is compared with; of a step that it executed again, the last time counts.
    """
    found: list[Divergence] = []
    counts = dict.fromkeys(QUANTITIES, 0)
    unseeded: set[str] = set()
    steps = executions = 0
    for rank in sorted({*first.ranks, *second.ranks}):
        a, b = first.ranks.get(rank, RankRecords()), second.ranks.get(rank, RankRecords())
        mine, theirs = a.by_step(), {step: times[-1] for step, times in b.by_step().items()}
        free = _unseeded(mine, theirs)
        unseeded |= {name for name in free if _draws(a, name) or _draws(b, name)}
        common = {*mine} & {*theirs}
        steps += len(common)
        executions += sum(len(mine[step]) for step in common)
        for step in sorted({*mine, *theirs}):
            if step not in mine and _taken_over(a, step):
                continue
            if step not in mine or step not in theirs:
                found.append(_missing(rank, step, a, b, step in mine))
                break
            parted = _parted(rank, mine[step], theirs[step], free, counts)
            if parted:
                found.append(replace(min(parted, key=lambda d: d.start), is_first=step == min(common)))
                break
    divergence = min(found, key=lambda d: (d.step, (*QUANTITIES, "steps").index(d.quantity)), default=None)
    return Outcome(
        divergence=divergence, steps=steps, executions=executions, compared=counts, unseeded=tuple(sorted(unseeded))
    )


def _taken_over(records: RankRecords, step: int) -> bool:
    """Whether a process of the rank took the state behind the step from somewhere: its predecessor died in it."""
    return any(step <= max(start.began_at, *start.restored, 0) for start in records.starts)


def _unseeded(mine: dict[int, list[Execution]], theirs: dict[int, Execution]) -> frozenset[str]:
    """Generators that differ behind the first step already, without a failure."""
    step = min({*mine} & {*theirs}, default=None)
    if step is None or not mine[step][0].is_undisturbed:
        return frozenset()
    return frozenset(_unequal(mine[step][0].quantities["rng"], theirs[step].quantities["rng"]))


def _draws(records: RankRecords, name: str) -> bool:
    """Whether something draws from a generator in training; from torch's, initial weights are drawn at least."""
    states = {e.quantities["rng"].get(name) for e in records.executions if e.start == 1}
    return name not in _OFTEN_IDLE or len(states) > 1


def _parted(
    rank: int, times: list[Execution], theirs: Execution, free: frozenset[str], counts: dict[str, int]
) -> list[Divergence]:
    """How the executions of a step differ: generators that are not seeded must be as the first time."""
    first = times[0].quantities["rng"]
    shared = {name: value for name, value in theirs.quantities["rng"].items() if name not in free}
    own = {name: first[name] for name in free if name in first}
    found = [
        _differs(rank, _with_rng(times[0], {n: v for n, v in first.items() if n not in free}), theirs, shared, counts)
    ]
    found += [_differs(rank, one, theirs, {**shared, **own}, counts) for one in times[1:]]
    parted = [divergence for divergence in found if divergence is not None]
    if found[0] is not None:
        parted[0] = replace(found[0], skipped=tuple(sorted(free)))
    return parted


def _with_rng(execution: Execution, rng: dict[str, str]) -> Execution:
    return replace(execution, quantities={**execution.quantities, "rng": rng})


def _missing(rank: int, step: int, a: RankRecords, b: RankRecords, first_has_it: bool) -> Divergence:
    last = (a.last_step, b.last_step)
    return Divergence(
        step=step,
        rank=rank,
        start=0,
        is_replay=False,
        is_undisturbed=len(a.starts) < 2,
        quantity="steps",
        name="executed" if first_has_it else "not executed",
        first=f"last step {last[0]}",
        second=f"last step {last[1]}",
    )


def _values(execution: Execution, quantity: str) -> dict[str, str]:
    values = execution.quantities[_KEYS.get(quantity, quantity)]
    if quantity in _KEYS:
        return {name: value for name, value in values.items() if name.startswith(f"{quantity}:")}
    return values


def _differs(
    rank: int, mine: Execution, theirs: Execution, rng: dict[str, str], counts: dict[str, int]
) -> Divergence | None:
    theirs = _with_rng(theirs, rng)
    differing: list[tuple[str, str]] = []
    equal = []
    for quantity in QUANTITIES:
        ours, other = _values(mine, quantity), _values(theirs, quantity)
        if not ours or not other:
            continue
        counts[quantity] += len(ours)
        names = list(_unequal(ours, other))
        differing += [(quantity, name) for name in names]
        if not names:
            equal.append(quantity)
    if not differing:
        return None
    quantity, name = differing[0]
    return Divergence(
        step=mine.step,
        rank=rank,
        start=mine.start,
        is_replay=mine.is_replay,
        is_undisturbed=mine.is_undisturbed,
        quantity=quantity,
        name=name,
        first=_shown(mine, quantity, name),
        second=_shown(theirs, quantity, name),
        others=len(differing) - 1,
        equal=tuple(equal),
        parted=tuple(dict.fromkeys(parted for parted, _ in differing)),
    )


def _unequal(ours: dict[str, str], other: dict[str, str]) -> Iterator[str]:
    for name in {**ours, **other}:
        if ours.get(name) != other.get(name):
            yield name


def _shown(execution: Execution, quantity: str, name: str) -> str:
    """A value for the eye."""
    value = _values(execution, quantity).get(name)
    if value is None:
        return "none"
    if name in execution.norms:
        return f"norm {execution.norms[name]} ({value})"
    if "0x" in value:
        return repr(float.fromhex(value))
    return value
