"""When gradients must be copied, which optimizers draw, and which weights change outside of the optimizers' steps."""

from __future__ import annotations

import ctypes
import enum
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from moetion_lightning.core.digests import digest_of, rng_digests
from moetion_lightning.core.generators import Generators
from moetion_lightning.core.local import local
from moetion_lightning.core.state import LiveState, state_of
from moetion_lightning.gradient_log.steps import Call

__all__ = ["DrawWatch", "GradientWatch", "WaitFor", "WeightWatch"]

_LEARNED_AFTER = 3  # steps of an optimizer
_LOOKED_AT_ALL = 8  # looks in which all values are compared: of the first three iterations or so
_IN_TURN = 32  # parameters whose values are compared in each iteration after that,
_MOST_ELEMENTS = 1 << 16  # as far as they are no larger
_MOST_STATES = 1024  # parameters whose optimizer state is compared in each iteration


class WaitFor(enum.Enum):
    """Until when the training thread waits for the copies of a step's gradients."""

    BEFORE_STEP = "before the step"
    AFTER_STEP = "after the step"
    NOTHING = "nothing"


class GradientWatch:
    """How an optimizer, and the code around it, treat gradients.

    Most code drops them (``set_to_none``): a reference keeps them until they are copied, and nothing waits. Code that
    zeroes them in place, or a reducer whose buckets they are views of, writes to them after the step: the step's end
    waits. Some optimizers write to them in the step: its beginning waits, as in the first steps, until it is known.
    """

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}
        self._changed_in_step: set[int] = set()
        self._changed_after: set[int] = set()
        self._entered: dict[int, tuple[list[int], list[int]]] = {}
        self._left: dict[int, list[tuple[weakref.ref[Tensor], int]]] = {}

    def begin(self, call: Call) -> WaitFor:
        """At the entry of a step."""
        index = call.optimizer
        count = self._steps[index] = self._steps.get(index, 0) + 1
        for reference, version in self._left.pop(index, ()):
            gradient = reference()
            if gradient is not None and local(gradient)._version != version:
                self._changed_after.add(index)
        if count <= _LEARNED_AFTER:
            self._entered[index] = call.versions(), _digests(call.gradients)
        if count <= _LEARNED_AFTER or index in self._changed_in_step or call.scaling is not None:
            return WaitFor.BEFORE_STEP
        if index in self._changed_after or _has_views(call.gradients):
            return WaitFor.AFTER_STEP
        return WaitFor.NOTHING

    def end(self, call: Call) -> None:
        """At the end of a step."""
        before = self._entered.pop(call.optimizer, None)
        if before is None:
            return
        after = call.versions(), _digests(call.gradients)  # through ``.data`` no counter counts
        if after != before:
            self._changed_in_step.add(call.optimizer)
        self._left[call.optimizer] = [
            (weakref.ref(g), version)
            for g, version in zip(call.gradients, after[0])
            if g is not None and g.layout is torch.strided
        ]

    def torn(self, index: int) -> None:
        """Gradients were changed before their copies had run: from now on the step's end waits."""
        self._changed_after.add(index)


class DrawWatch:
    """Which optimizers draw random numbers in their step: gradients do not repeat it.

    Every step is looked at, before a restore point is made of it. torch's own optimizers have no generators; of others
    all that they lead to are compared, in whatever object or global variable of the user's files.

    Args:
        live: The live state.
    """

    def __init__(self, live: LiveState) -> None:
        self._live = live
        self._generators: dict[int, Generators] = {}
        self._before: dict[int, Any] = {}
        self._drawing: set[int] = set()

    def begin(self, index: int) -> None:
        """An optimizer is about to update weights."""
        self._before[index] = self._states(index)

    def end(self, index: int) -> None:
        """It has."""
        if self._before.pop(index) != self._states(index):
            self._drawing.add(index)

    @property
    def names(self) -> list[str]:
        """Classes of those that have drawn."""
        return sorted(type(self._live.optimizers[index]).__name__ for index in self._drawing)

    def _states(self, index: int) -> tuple[dict[str, str], str]:
        optimizer = self._live.optimizers[index]
        if type(optimizer).__module__.partition(".")[0] == "torch":
            return rng_digests(), ""
        if index not in self._generators:
            self._generators[index] = Generators(lambda: {"optimizer": optimizer})
        return rng_digests(), digest_of(self._generators[index].states()).read()


def _digests(tensors: Iterable[Tensor | None]) -> list[int]:
    """Digests of all values that lie in host memory; 0 for others."""
    return [0 if tensor is None else _digest(tensor) for tensor in tensors]


def _digest(tensor: Tensor) -> int:
    tensor = local(tensor)
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.is_cpu and tensor.is_contiguous()
    if not plain or not tensor.numel():
        return 0
    nbytes = tensor.numel() * tensor.element_size()
    return xxhash.xxh3_64_intdigest(memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())))


def _has_views(gradients: Sequence[Tensor | None]) -> bool:
    return any(g is not None and type(g) is Tensor and g._base is not None for g in gradients)


class WeightWatch:
    """Finds weights, and what optimizers keep, that change outside of the optimizers' steps.

    Changes in place count (version counters), except through ``.data``. For these all values are looked at in the first
    iterations, as long as they lie in host memory, and later a few parameters in each.

    Args:
        live: The live state.
    """

    def __init__(self, live: LiveState) -> None:
        self._live = live
        self._names: tuple[str, ...] = ()
        self._generation = -1
        self._looks = 0
        self._seen: _Look | None = None

    def note(self, turn: int) -> None:
        """The weights are as they should be.

        Args:
            turn: The iteration: of many parameters others are looked at closely in each.
        """
        self._looks += 1
        names = self._watched()
        closely = names if self._looks <= _LOOKED_AT_ALL else self._in_turn(turn)
        self._seen = _Look(turn, self._live.versions(names, turn), closely, self._values(closely), self._kept(turn))

    def forget(self) -> None:
        """Another state is put in place."""
        self._seen = None

    def changed(self) -> list[str]:
        """Parameters that have changed since :meth:`note`, or of which an optimizer's state has."""
        seen, names = self._seen, self._watched()
        if seen is None or self._seen is None:  # else the parameters are others: that is found elsewhere
            return []
        found = self._by_versions(seen, names)
        found += [n for n, old, new in zip(seen.closely, seen.values, self._values(seen.closely)) if old != new]
        kept = self._kept(seen.turn)
        if kept != seen.kept:
            found += [name for name in {**kept, **seen.kept} if kept.get(name) != seen.kept.get(name)]
        return list(dict.fromkeys(found))

    @property
    def often(self) -> int:
        """Iterations within which a weight that changes all the time is seen to change twice.

        Of what changes behind the version counters' back only some parameters are looked at in each.
        """
        return 2 * self._each

    @property
    def _each(self) -> int:
        return max(1, -(-len(self._names) // _IN_TURN))

    def _by_versions(self, seen: _Look, names: Sequence[str]) -> list[str]:
        now = self._live.versions(names, seen.turn)
        if now == seen.versions:
            return []
        found = [name for name, old, new in zip(names, seen.versions[0], now[0]) if old != new]
        each = -(-len(names) // max(1, len(now[1])))  # a few bytes of some, whatever their size
        sampled = names if each <= 1 else names[seen.turn % each :: each]
        return found + [name for name, old, new in zip(sampled, seen.versions[1], now[1]) if old != new]

    def _in_turn(self, turn: int) -> tuple[str, ...]:
        some = self._names[turn % self._each :: self._each]
        return tuple(name for name in some if self._live.weight(name).numel() <= _MOST_ELEMENTS)

    def _values(self, names: Sequence[str]) -> list[int]:
        return _digests(self._live.weight(name) for name in names)

    def _kept(self, turn: int) -> dict[str, list[Any]]:
        """What optimizers keep of each parameter: tensors by identity and version, numbers by value."""
        live = self._live
        found: dict[str, list[Any]] = {}
        each = max(1, -(-len(self._names) // _MOST_STATES))
        for name in self._names[turn % each :: each]:
            parameter = live.parameters[name]
            marks: list[Any] = []
            for index in live.owners[name]:
                state = state_of(live.optimizers[index]).get(parameter)
                if isinstance(state, dict):
                    for value in state.values():
                        if isinstance(value, Tensor):
                            marks += (id(value), value._version)
                        elif isinstance(value, (int, float, str)):
                            marks.append(value)
            found[name] = marks
        return found

    def _watched(self) -> tuple[str, ...]:
        """In the order in which :meth:`LiveState.versions` goes through them."""
        live = self._live
        if self._generation != live.generation:
            self._generation = live.generation
            names = live.trainable()
            plain = [name for name in names if type(live.parameters[name]) is nn.Parameter]
            others = [name for name in names if type(live.parameters[name]) is not nn.Parameter]
            self._names = (*plain, *others)
            self._seen = None
        return self._names


@dataclass(frozen=True)
class _Look:
    """What was seen."""

    turn: int
    versions: tuple[list[int], list[bytes]]
    closely: tuple[str, ...]
    values: list[int]
    kept: dict[str, list[Any]]
