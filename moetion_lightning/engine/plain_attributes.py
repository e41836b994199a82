"""Plain Python attributes of users' objects: what training changes in them is training state.

A window holds the attributes that have changed since training began, and no others: a value that the script sets and
nobody changes is the script's own. Changes are looked for when a window begins, by cheap stamps; nothing is copied
for that.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from moetion_lightning.core.generators import is_generator
from moetion_lightning.core.kept_values import ClassFinder, LiveValues, MissingClassError, Reviver
from moetion_lightning.core.module_table import ModuleTable, module_table
from moetion_lightning.core.packed_lists import PackedLists
from moetion_lightning.engine.attribute_stamps import FIXED_TYPES, stamp
from moetion_lightning.engine.users_classes import UsersClasses, is_framework
from moetion_lightning.storage.tree import FlatTree, flatten_tree

__all__ = ["PlainAttributes"]

_EMPTY = object()
_CONTAINERS = (list, dict, set, collections.deque)
_STORABLE = FIXED_TYPES.union(_CONTAINERS)
_ABSENT = ""  # no attribute has that name; under it: those that were deleted


class PlainAttributes:
    """Watches, captures and restores them.

    Args:
        roots: Gives the objects by name: modules (with all submodules), and others.
        say_once: Tells the user something, once.
    """

    def __init__(self, roots: Callable[[], Mapping[str, object]], say_once: Callable[[str], None]) -> None:
        self._roots = roots
        self._say_once = say_once
        self._owners: dict[str, _Owner] = {}
        self._generations: list[tuple[str, int]] = []
        self._tables: list[ModuleTable] = []
        #: Names by owner: once changed, an attribute is state for the rest of the run, also in later processes.
        self._changed: dict[str, set[str]] = {}
        self._refused: dict[tuple[str, str], type] = {}
        #: By owner: values that attributes had when training began, where keeping them costs nothing.
        self._initial: dict[str, dict[str, Any]] = {}
        self._is_under_way = False  # then attributes have what the script has given them, and what was restored
        self._packed = PackedLists()
        self._users = UsersClasses(())

    def begin(self) -> None:
        """What changes from now on is state: hooks at the start of training and of an epoch may draw random values."""
        self._owners = {}
        self._users = UsersClasses(self._roots().values())
        self._hold_tables()
        for table in self._tables:
            table.refresh()
        self._find_owners()

    def start(self) -> None:
        """The first batch begins: what cannot be stored and was made until now is made again in the next process."""
        refused: list[tuple[str, str]] = []
        flatten_tree(
            LiveValues(self._values(), self._users.is_object, lambda *found: refused.append(found[:2]), PackedLists())
        )
        for owner, name in refused:
            self._changed[owner].discard(name)
        self._is_under_way = True
        self.begin()

    def capture(self) -> LiveValues:
        """The attributes that have changed, to be stored with a window; live values, not copies."""
        values = self._values()
        self._packed.begin()
        return LiveValues(values, self._users.is_object, self._on_refused, self._packed)

    def copy_of(self, owners: Collection[str]) -> FlatTree:
        """A copy of what :meth:`capture` gives of some owners, for :meth:`restore`.

        Args:
            owners: Their names; what is below them is left out.
        """
        values = {name: found for name, found in self._values(owners).items() if name in owners}
        return flatten_tree(LiveValues(values, self._users.is_object, lambda *found: None, PackedLists()), clone=True)

    def _values(self, only: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
        if only is None and self._generations != self._generations_now():
            self._find_owners()
        for name, owner in self._owners.items():
            if owner.seems_the_same() or (only is not None and name not in only):
                continue
            changed = owner.new_changes()
            if changed:
                self._changed.setdefault(name, set()).update(changed)
        values: dict[str, dict[str, Any]] = {}
        for name, known in self._changed.items():
            if name in self._owners:
                own = vars(self._owners[name].value)
                there = [key for key in sorted(known) if key in own]
                kept = {key: own[key] for key in there if self._refused.get((name, key)) is not type(own[key])}
                values[name] = {**kept, _ABSENT: sorted(known - set(there))}
        return values

    def _find_owners(self) -> None:
        """All objects that there are now, with the stamps of those that were there before."""
        before, self._owners = self._owners, {}
        self._hold_tables()
        self._generations = self._generations_now()
        for name, value in self._all_owners():
            owner = before.get(name)
            if owner is None or owner.value is not value:
                owner = _Owner(value, self._changed.get(name, set()), self._users)
            self._owners[name] = owner
            if self._is_under_way:
                self._initial[name] = {**owner.initial(), **self._initial.get(name, {})}

    def _hold_tables(self) -> None:
        self._tables = [module_table(root) for root in self._roots().values() if isinstance(root, nn.Module)]

    def _generations_now(self) -> list[tuple[str, int]]:
        """Tells whether the objects are still the same ones. The engine looks when a window begins."""
        return [
            (root, module_table(value).generation if isinstance(value, nn.Module) else id(value))
            for root, value in self._roots().items()
        ]

    def restore(self, saved: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, Tensor]) -> None:
        """Put captured attributes back, before the first forward.

        Args:
            saved: What was stored of :meth:`capture`.
            parameters: Live parameters and buffers by name.
        """
        roots = self._roots()
        device = next((parameter.device for parameter in parameters.values()), None)
        reviver = Reviver(ClassFinder(roots.values()), parameters, device)
        owners = dict(self._all_owners())
        self._undo(saved, owners)
        for name, values in saved.items():
            if name not in owners:
                self._say_once(f"attributes {_list(values)} were captured of {name}, which this run does not have")
                continue
            own = vars(owners[name])
            values = dict(values)
            for key in values.pop(_ABSENT):
                own.pop(key, None)
                self._changed.setdefault(name, set()).add(key)
            self._changed.setdefault(name, set()).update(values)
            for key, value in values.items():
                try:
                    own[key] = reviver.revive(value, own[key]) if key in own else reviver.revive(value)
                except MissingClassError as error:
                    self._say_once(f"the attribute {key!r} of {name} is not restored: {error}")
        self._is_under_way = True

    def _undo(self, saved: Mapping[str, Mapping[str, Any]], owners: Mapping[str, Any]) -> None:
        """In a process that goes back: what had not changed there, and has since, is as it was when training began.

        Not where something is now that cannot be stored, like a metric made on demand: nobody knows since when.
        """
        for name, initial in self._initial.items():
            known = saved.get(name, {})
            for key, value in initial.items():
                own = vars(owners[name]) if name in owners else {}
                if key not in own or key in known or key in known.get(_ABSENT, ()):
                    continue
                if value is _EMPTY:
                    if type(own[key]) in _CONTAINERS:
                        own[key].clear()
                elif type(own[key]) in _STORABLE and _differs(own[key], value):
                    own[key] = value

    def _all_owners(self) -> Iterator[tuple[str, Any]]:
        for root, value in self._roots().items():
            if isinstance(value, nn.Module):
                for name, module in module_table(value).modules.items():
                    if not isinstance(module, Metric):  # the engine captures its states
                        yield (f"{root}.{name}" if name else root), module
            elif hasattr(value, "__dict__"):
                yield root, value

    def _on_refused(self, owner: str, name: str, reason: str) -> None:
        value = self._owners[owner].value
        refused = vars(value)[name]
        self._refused[owner, name] = type(refused)
        kind = type(value)
        # Generators are captured as such. Lightning puts a function in place of `forward` for a moment, and then what
        # the class has anyway.
        if is_generator(refused) or (isinstance(refused, FunctionType) and is_framework(refused)):
            return
        if (
            isinstance(refused, MethodType)
            and refused.__self__ is value
            and refused.__func__ is getattr(kind, name, None)
        ):
            return
        self._say_once(
            f"the attribute {name!r} of {kind.__qualname__} changes while training and cannot be stored "
            f"({reason.partition(': ')[2].partition(' cannot be stored')[0]}): after a restart it is as the script "
            "makes it"
        )


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in names)


class _Owner:
    """Stamps of one object's attributes.

    Args:
        value: The object.
        known: Names that have changed before.
        users: Tells what is the user's.
    """

    def __init__(self, value: Any, known: set[str], users: UsersClasses) -> None:
        self.value = value
        self._users = users
        self._left_out = users.left_out(type(value))
        self._own: dict[str, Any] = vars(value)
        self._stamp_all(known)

    def seems_the_same(self) -> bool:
        """Whether nothing has changed, as far as it can be seen at a glance; there are tens of thousands to ask."""
        own = self._own
        return (
            not self._stamps
            and len(own) == self._size
            and all(map(operator.is_, map(own.get, self._names), self._fixed))
        )

    def _stamp_all(self, known: set[str]) -> None:
        own, users, kind = vars(self.value), self._users, type(self.value)
        self._known = set(known)
        self._size = len(own)
        self._names: list[str] = []  # with values that cannot change in place
        self._fixed: list[Any] = []
        self._stamps: dict[str, Any] = {}
        for name, value in own.items():
            if name in self._left_out or name in self._known or not users.allows(kind, name, value):
                continue
            if type(value) in FIXED_TYPES:
                self._names.append(name)
                self._fixed.append(value)
            else:
                self._stamps[name] = stamp(value, self._users)

    def initial(self) -> dict[str, Any]:
        """Values that cannot change in place, and :data:`_EMPTY` for empty containers."""
        own = vars(self.value)
        empty = [name for name in self._stamps if type(own[name]) in _CONTAINERS and not own[name]]
        return {**dict(zip(self._names, self._fixed)), **dict.fromkeys(empty, _EMPTY)}

    def new_changes(self) -> set[str]:
        """Names whose values have changed since the last call."""
        own = vars(self.value)
        found: set[str] = set()
        if len(own) != self._size or not all(map(operator.is_, map(own.get, self._names), self._fixed)):
            found = {n for n, v in zip(self._names, self._fixed) if n not in own or _differs(own[n], v)}
            watched = {*self._names, *self._stamps, *self._left_out, *self._known}
            new = [name for name in own if name not in watched]
            found.update(name for name in new if self._users.allows(type(self.value), name, own[name]))
        for name, before in self._stamps.items():
            if name not in own or stamp(own[name], self._users) != before:
                found.add(name)
        if found or len(own) != self._size:
            self._stamp_all(self._known | found)
        return found


def _differs(first: Any, second: Any) -> bool:
    return first is not second and (type(first) is not type(second) or first != second)
