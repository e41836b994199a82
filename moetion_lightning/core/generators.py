"""Random number generators of user objects: found by reachability, and made where they are not there yet."""

from __future__ import annotations

import ast
import random
import time
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetion_lightning.core.containers import item, length
from moetion_lightning.core.device_random import accelerator_kind
from moetion_lightning.core.reachable import Reached, attributes_of, reach

__all__ = [
    "Generators",
    "find_generators",
    "generator_state",
    "is_generator",
    "packed_python",
    "set_generator",
    "unpacked_python",
]

_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
#: Of the time that passes, looking again may take one part in this many.
_SELDOM = 1000
_MISSING = object()
_TRIES = 8
_NEVER = frozenset({"_is_full_backward_hook"})  # of every module


def is_generator(value: object) -> bool:
    """Whether something is a random number generator of torch, numpy or python whose state can be told."""
    if isinstance(value, random.Random):  # not the system's, which has no state, nor one that keeps it in its own way
        return type(value).getstate is random.Random.getstate
    return isinstance(value, _KINDS)


def find_generators(roots: Mapping[str, object]) -> dict[str, object]:
    """Generators that objects lead to, by name.

    Attributes of attributes are looked at, containers, closures, bound methods and partial functions, submodules, and
    the global variables of the user's files that define them.

    Args:
        roots: Where to begin, by name.
    """
    return {name: value for name, _, _, value in reach(roots, is_generator).slots}


class Generators:
    """The generators that objects lead to, looked for again only when something has changed.

    Args:
        roots: Gives the objects to begin with, by name; called often.
    """

    def __init__(self, roots: Callable[[], Mapping[str, object]]) -> None:
        self._roots = roots
        self._known: dict[str, object] = {}
        self._reached = Reached()
        self._watch = _Watch()
        self._found: dict[str, object] = {}
        self._looked_at, self._took = float("-inf"), 0.0
        self._to_come: dict[str, Any] = {}  # recorded states whose generator is not there

    def find(self, *, again: bool = False) -> dict[str, object]:
        """By name.

        Args:
            again: Whether to look again even if nothing seems to have changed.
        """
        roots = self._roots()
        if again or self._is_stale(roots):
            self._look(roots)
        return self._found

    def states(self) -> dict[str, Any]:
        """Their states by name; every tensor is a copy."""
        return {name: generator_state(generator) for name, generator in self.find().items()}

    def take(self, states: Mapping[str, Any]) -> list[str]:
        """Put states back.

        A generator that is not there yet is made, where what holds it is there: code that makes one when it first needs
        it finds it made. What is left over is kept for when it appears.

        Args:
            states: From :meth:`states`.

        Returns:
            Names of those that nothing could be found for.
        """
        self._to_come = {}
        found = self.find(again=True)
        missing = {name: state for name, state in states.items() if name not in found}
        made = [name for name, state in missing.items() if self._make(name, state)]
        if made:
            found = self.find(again=True)
        other = [name for name, state in states.items() if name in found and not set_generator(found[name], state)]
        self._to_come = {name: state for name, state in missing.items() if name not in found}
        return [*self._to_come, *other]

    # --- inside --------------------------------------------------------------------------------------------------

    def _is_stale(self, roots: Mapping[str, object]) -> bool:
        known = self._known
        if len(roots) != len(known) or any(known.get(name, _MISSING) is not root for name, root in roots.items()):
            return True
        if any(_current(holder, key) is not value for holder, key, value in self._reached.links):
            return True
        if time.monotonic() - self._looked_at > _SELDOM * self._took:
            return True
        return self._watch.changed()

    def _look(self, roots: Mapping[str, object]) -> None:
        began, before = time.thread_time(), self._found
        self._known = dict(roots)
        self._reached = reached = reach(roots, is_generator)
        self._found = {name: value for name, _, _, value in reached.slots}
        self._watch.renew(reached.tables, useful=self._found.keys() != before.keys())
        for name in [name for name in self._to_come if name in self._found]:
            set_generator(self._found[name], self._to_come.pop(name))
        self._took = time.thread_time() - began
        self._looked_at = time.monotonic()

    def _make(self, name: str, state: Any) -> bool:
        """A generator where one was when the state was recorded."""
        owner_name, key = _parent(name)
        owner = self._reached.owners.get(owner_name, _MISSING)
        if owner is _MISSING or key is None:
            return False
        generator = _new_generator(state)
        if isinstance(owner, dict) and not isinstance(key, _Attribute):
            if dict.get(owner, key) is not None:
                return False
            owner[key] = generator
            return True
        if not isinstance(key, _Attribute) or attributes_of(owner).get(key) is not None:
            return False
        try:
            setattr(owner, str(key), generator)
        except (AttributeError, TypeError):
            return False
        return True


class _Watch:
    """Notices that an attribute or an entry was added, or got a value, somewhere among many."""

    def __init__(self) -> None:
        self._tables: list[dict[Any, Any]] = []
        self._size = 0
        self._sizes: list[int] = []
        self._empty: list[tuple[dict[Any, Any], Any]] = []
        self._in_vain: dict[int, int] = {}  # by table: changes that brought nothing

    def changed(self) -> bool:
        # By dict's own methods: those of a subclass may do anything.
        return sum(map(dict.__len__, self._tables)) != self._size or any(
            dict.get(table, key) is not None for table, key in self._empty
        )

    def renew(self, tables: list[dict[Any, Any]], *, useful: bool) -> None:
        """After a look, which was useful if it found something new."""
        vain = {id(table) for table, key in self._empty if dict.get(table, key) is not None}
        vain |= {id(table) for table, size in zip(self._tables, self._sizes) if dict.__len__(table) != size}
        self._in_vain = {} if useful else {id(t): self._in_vain.get(id(t), 0) + (id(t) in vain) for t in tables}
        # A cache or a history grows all the time.
        self._tables = [table for table in tables if self._in_vain.get(id(table), 0) < _TRIES]
        self._sizes = list(map(dict.__len__, self._tables))
        self._size = sum(self._sizes)
        self._empty = [
            (table, key)
            for table in self._tables
            for key, value in dict.items(table)
            if value is None and key not in _NEVER
        ]


class _Attribute(str):
    """A name of an attribute, where a key might be one, too."""


def _parent(name: str) -> tuple[str, Any]:
    """Name of the object that holds something, and under which attribute or key; the key is None if it has none."""
    if not name.endswith("]"):
        owner, _, attribute = name.rpartition(".")
        return owner, _Attribute(attribute) if attribute.isidentifier() else None
    owner, _, key = name[:-1].rpartition("[")
    try:
        return owner, ast.literal_eval(key)
    except (ValueError, SyntaxError):
        return owner, None


def _current(holder: Any, key: Any) -> object:
    if isinstance(holder, dict):
        return dict.get(holder, key, _MISSING)
    if isinstance(key, int):
        return item(holder, key) if key < length(holder) else _MISSING
    try:
        return getattr(holder, key, _MISSING)  # a closure's cell
    except ValueError:
        return _MISSING


def generator_state(generator: object) -> Any:
    """Plain values and tensors, from which its kind can be told."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.BitGenerator):
        return generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    assert isinstance(generator, random.Random)
    return packed_python(generator.getstate())


def set_generator(generator: object, state: Any) -> bool:
    """Put a state of :func:`generator_state` back.

    Returns:
        Whether it is the state of such a generator; otherwise nothing is changed.
    """
    if isinstance(state, Tensor):
        if not isinstance(generator, torch.Generator) or generator.get_state().numel() != state.numel():
            return False
        generator.set_state(state)
    elif not isinstance(state, Mapping):
        if not isinstance(generator, random.Random):
            return False
        generator.setstate(unpacked_python(state))
    elif isinstance(generator, np.random.RandomState):
        if "has_gauss" not in state:
            return False
        generator.set_state(dict(state))
    else:
        bits: Any = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
        if not isinstance(bits, np.random.BitGenerator) or bits.state["bit_generator"] != state["bit_generator"]:
            return False
        bits.state = state
    return True


def _new_generator(state: Any) -> object:
    if isinstance(state, Tensor):
        is_cpu = state.numel() == torch.default_generator.get_state().numel()
        return torch.Generator("cpu" if is_cpu else accelerator_kind() or "cpu")
    if not isinstance(state, Mapping):
        return random.Random()
    if "has_gauss" in state:
        return np.random.RandomState()
    return np.random.Generator(getattr(np.random, str(state["bit_generator"]))())


def packed_python(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """The state of a python generator with its 625 integers as one array."""
    version, values, gauss = state
    return version, np.frombuffer(array("I", values), dtype=np.uint32), gauss


def unpacked_python(state: Any) -> tuple[Any, ...]:
    """What ``setstate`` takes."""
    version, values, gauss = state
    return version, tuple(int(value) for value in values), gauss
