"""What a recovery compared with the original run, what differed, and why: words and values, no acting on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Comparison", "Difference", "Suspects", "Verdict", "compare_next", "compare_records", "likely_causes"]

#: Quantities of a record by their keys, in the order in which they are named.
WORDS = {
    "losses": "losses",
    "norms": "gradient norms",
    "gradients": "gradients",
    "lrs": "learning rates",
    "rng": "RNG",
    "batches": "batches",
    "indices": "sampler indices",
    "weights": "weights",
}
#: In the order in which differences are named: what others may follow from comes first.
_ORDER = ("batches", "indices", "compute weights", "lrs", "rng", "losses", "norms", "gradients", "weights")
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One quantity that is not what it was.

    Args:
        quantity: Its key in a record.
        recorded: The original run's value.
        replayed: The value now.
        where: Which part of it, for messages.
    """

    quantity: str
    recorded: str
    replayed: str
    where: str = ""

    def __str__(self) -> str:
        name = WORDS.get(self.quantity, self.quantity)
        return f"{name}{f' ({self.where})' if self.where else ''}: recorded {self.recorded}, replayed {self.replayed}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One iteration, or the batch behind the last one.

    Args:
        compared: Keys of the quantities that both runs have.
        differences: Those of them that differ.
        operators: Operators whose weights were compared.
    """

    compared: tuple[str, ...]
    differences: tuple[Difference, ...]
    operators: frozenset[str] = frozenset()


def compare_records(
    recorded: Mapping[str, Any], replayed: Mapping[str, Any], *, gradients_skipped: bool = False
) -> Comparison:
    """Compare two records of one iteration.

    A quantity that the original run did not have is not compared.

    Args:
        recorded: Of the original run.
        replayed: Of its replay; its ``weights`` are those of the operators that are whole there.
        gradients_skipped: Whether the replay leaves gradients out.
    """
    compared, differences = [], []
    for key in WORDS:
        before, now = recorded.get(key), replayed.get(key)
        if isinstance(before, Mapping) and key in ("gradients", "weights") and (gradients_skipped or key == "weights"):
            now = now or {}
            before = {name: value for name, value in before.items() if name in now}
            now = {name: value for name, value in now.items() if name in before}
        if not before or (key == "indices" and not now):
            continue
        compared.append(key)
        if before != now:
            differences.append(_difference(key, before, now))
    differences.sort(key=lambda difference: _ORDER.index(difference.quantity))
    operators = frozenset(recorded.get("weights", {})) & frozenset(replayed.get("weights", {}))
    return Comparison(compared=tuple(compared), differences=tuple(differences), operators=operators)


def compare_next(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Comparison:
    """Compare the first batch that comes behind the restored state.

    Args:
        recorded: Of the original run; empty if it drew none.
        now: Of this one.
    """
    found = compare_records(recorded, now)
    return Comparison(compared=found.compared, differences=found.differences)


def _difference(key: str, before: Any, now: Any) -> Difference:
    if isinstance(before, Mapping):
        now = now or {}
        names = [name for name in [*before, *now] if before.get(name) != now.get(name)]
        names = list(dict.fromkeys(names))
        shown = names[:_SHOWN]
        return Difference(
            quantity=key,
            recorded=", ".join(str(before.get(name, "none")) for name in shown),
            replayed=", ".join(str(now.get(name, "none")) for name in shown),
            where=", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""),
        )
    now = now or []
    if key in ("batches", "indices"):
        if len(before) != len(now):
            return Difference(quantity=key, recorded=f"{len(before)} of them", replayed=f"{len(now)} of them")
        first = next(index for index, (a, b) in enumerate(zip(before, now)) if a != b)
        where = f"micro-batch {first + 1} of {len(before)}" if len(before) > 1 else ""
        return Difference(quantity=key, recorded=before[first], replayed=now[first], where=where)
    return Difference(quantity=key, recorded=_numbers(before), replayed=_numbers(now))


def _numbers(values: Sequence[str]) -> str:
    return "[" + ", ".join(f"{float.fromhex(value):.9g}" for value in values) + "]"


@dataclass(frozen=True, kw_only=True)
class Suspects:
    """What may explain a difference, and is known before there is one.

    Args:
        elementwise: Optimizers in use that the user has declared to work element by element.
        generators: Random generators that the window has the state of and that are not there.
        changed: Settings that the user has changed since the window was captured, and whose new values are in use.
        rebuilt: Whether the state was rebuilt from logged gradients: no iteration ran again.
    """

    elementwise: tuple[str, ...] = ()
    generators: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    rebuilt: bool = False


def likely_causes(differences: Sequence[Difference], compared: Sequence[str], suspects: Suspects) -> list[str]:
    """Why a replay differs, as far as it can be told: the most specific cause first, kernels last.

    Args:
        differences: What differs in the first iteration that does: later ones follow from it.
        compared: What was compared there.
        suspects: What is known besides.
    """
    keys = {difference.quantity for difference in differences}
    if suspects.rebuilt and "weights" in keys:
        return [
            "weights, gradients or optimizer state were changed outside of the optimizers' steps (through .data, where "
            "no counter counts), or the optimizer keeps state where it is not seen"
        ]
    causes = []
    if suspects.changed:
        causes.append(f"what was changed since the window was captured ({', '.join(suspects.changed)})")
    if keys & {"batches", "indices"}:
        causes.append(_data_cause(keys, compared))
    if suspects.generators and keys - {"lrs"}:
        names = ", ".join(suspects.generators)
        causes.append(f"random generators whose state was saved were not found again ({names})")
    if "compute weights" in keys:
        causes.append("parameters are read in full precision of which only 16-bit compute weights had been kept")
    if "lrs" in keys:
        causes.append("a learning-rate scheduler that was not restored, or that steps elsewhere")
    if "rng" in keys:
        which = next(d.where for d in differences if d.quantity == "rng")
        causes.append(
            f"the global random generators stand elsewhere ({which}): something seeds anew, or draws only where a "
            "process starts"
        )
    if causes:
        return causes
    if suspects.elementwise:
        names = ", ".join(suspects.elementwise)
        causes.append(
            f"elementwise_optimizers= declares {names}: if its update of an element depends on other elements, leave "
            "it out there"
        )
    if keys & {"losses", "gradients"}:
        same = " although the batches are the same" if "batches" in compared else ""
        causes.append(
            f"the forward differs{same}: state that is in no parameter, buffer or state_dict(), or data that was not "
            "compared"
        )
    if "weights" in keys:
        causes.append("the optimizer keeps state outside of its .state and state_dict()")
    causes.append("kernels that are not deterministic (torch.use_deterministic_algorithms(True) names them)")
    return causes


def _data_cause(keys: set[str], compared: Sequence[str]) -> str:
    if "indices" in keys:
        return "the data differ, and the sampler's indices do, too: the data position is wrong"
    if "indices" in compared:
        return (
            "the data differ though the sampler's indices are the same: the dataset, its transforms or the collate "
            "function give something else for them"
        )
    return "the data differ: the data position is wrong, or the dataset gives something else than before"


@dataclass(kw_only=True)
class Verdict:
    """What a whole recovery compared.

    Args:
        num_operators: Operators of the window.
    """

    num_operators: int
    replayed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    operators: set[str] = field(default_factory=set)
    differing: list[int] = field(default_factory=list)
    next_batch: Comparison | None = None

    def add(self, iteration: int, comparison: Comparison) -> None:
        """An iteration was replayed."""
        self.replayed += 1
        self.counts.update(comparison.compared)
        self.operators |= comparison.operators
        if comparison.differences:
            self.differing.append(iteration)

    @property
    def compared(self) -> list[str]:
        """The quantities, in words: of the replayed iterations, and the next batch."""
        names = [self._quantity(key) for key in WORDS if self.counts[key]]
        following = self.next_batch.compared if self.next_batch is not None else ()
        return [*names, *["next batch"] * ("batches" in following), *["RNG at the next batch"] * ("rng" in following)]

    @property
    def verified(self) -> bool:
        """Whether something was compared, and all of it agreed."""
        return bool(self.compared) and not self.differs

    @property
    def differs(self) -> bool:
        """Whether anything differed."""
        return bool(self.differing) or self._next_differs

    @property
    def _next_differs(self) -> bool:
        return self.next_batch is not None and bool(self.next_batch.differences)

    def _quantity(self, key: str) -> str:
        if key == "weights":
            return f"weights of {len(self.operators)} of {self.num_operators} operators"
        count = self.counts[key]
        return WORDS[key] if count == self.replayed else f"{WORDS[key]} (in {count} of {self.replayed})"

    def __str__(self) -> str:
        parts = []
        if not self.replayed:
            parts.append("nothing was replayed")
        elif not self.counts:
            parts.append("no quantity of the replayed iterations could be compared")
        else:
            names = ", ".join(self._quantity(key) for key in WORDS if self.counts[key])
            if self.differing:
                shown = ", ".join(str(iteration) for iteration in self.differing)
                plural = "iterations" if len(self.differing) > 1 else "iteration"
                parts.append(f"{plural} {shown} DIFFERED; compared in each: {names}")
            else:
                parts.append(f"compared and equal in each: {names}")
        parts.append(self._about_next_batch())
        text = "; ".join(part for part in parts if part)
        return text if self.compared else f"nothing could be compared: {text}"

    def _about_next_batch(self) -> str:
        if self.next_batch is None:
            return "no batch followed"
        if self._next_differs:
            return "the next batch DIFFERS" if self._batch_differs() else "the next batch agrees, the RNG there DIFFERS"
        if "batches" in self.next_batch.compared:
            return "the next batch agrees" + (", and the RNG there" if "rng" in self.next_batch.compared else "")
        return "the next batch was not recorded"

    def _batch_differs(self) -> bool:
        assert self.next_batch is not None
        return any(difference.quantity in ("batches", "indices") for difference in self.next_batch.differences)
