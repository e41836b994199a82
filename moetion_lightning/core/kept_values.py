"""Values of users' own classes, as they are stored without pickle, and how they come back.

Stored is the name of a class, never the class: it is looked for among the classes that the running process reaches from
the user's own objects, and nothing is imported by a name from a file. No code of a class runs when a value comes back.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from moetion_lightning.core.packed_lists import PackedLists

__all__ = [
    "ClassFinder",
    "Fresh",
    "Kept",
    "LiveValues",
    "MissingClassError",
    "Reviver",
    "Unchanging",
    "class_name",
    "describe",
]

FindClass = Callable[[str], "type | None"]
_NOTHING: Any = object()
_NAMESPACES: dict[str, type] = {"Namespace": argparse.Namespace, "SimpleNamespace": types.SimpleNamespace}
_MAX_ITEMS = 1000


class MissingClassError(LookupError):
    """A stored value's class is nowhere to be found, or an object of it is not there."""


@dataclasses.dataclass(eq=False)
class Kept:
    """A stored value that is none of the plain types.

    Args:
        kind: ``enum``, ``flag``, ``namedtuple``, ``dict``, ``list``, ``set``, ``attributes`` (dataclasses), ``object``,
            ``namespace``, ``tensor`` (of a device), ``reference`` (to a parameter).
        name: Name of the class, of the namespace, or of the device.
        items: What a container holds, or the member's name or value.
        attributes: Attributes of the instance.
    """

    kind: str
    name: str
    items: Any = None
    attributes: dict[str, Any] | None = None


class Unchanging(dict[str, Any]):
    """A dict that nobody changes any more, nor anything in it: what was once made of it holds."""


class Fresh(dict[str, Any]):
    """A dict that was made for this moment: nothing in it is looked for anywhere else, as the same object."""


class LiveValues:
    """Values that are restored into the objects that have them then; objects in them are stored by their attributes.

    Args:
        values: By owner, by attribute.
        is_object: Whether an object may be stored so.
        on_refused: Gets owner, attribute and reason for each value that cannot be stored, and is left out.
        packed: Remembers long lists.
    """

    def __init__(
        self,
        values: Mapping[str, Mapping[str, Any]],
        is_object: Callable[[object], bool],
        on_refused: Callable[[str, str, str], None],
        packed: PackedLists,
    ) -> None:
        self.packed = packed
        self.values = values
        self.is_object = is_object
        self.on_refused = on_refused


def class_name(kind: type) -> str:
    """What is stored for a class."""
    return f"{kind.__module__}:{kind.__qualname__}"


def describe(value: Any, is_object: Callable[[object], bool] | None) -> Kept | None:
    """A value of a class that is not plain, taken apart by one level; None if it cannot be stored.

    Args:
        value: The value.
        is_object: Whether any object may be stored by its attributes; None: none may.
    """
    kind = type(value)
    name = class_name(kind)
    if isinstance(value, Enum):
        member = value.name in kind.__members__
        return Kept("enum", name, value.name) if member else Kept("flag", name, value.value)
    if isinstance(value, tuple):
        return Kept("namedtuple", name, list(value)) if hasattr(kind, "_fields") else None
    bases: tuple[Any, ...] = (OrderedDict, dict, list, set)
    for base in bases:
        if isinstance(value, base):
            items: list[Any] = list(base.items(value) if issubclass(base, dict) else base.__iter__(value))
            kept_as = "dict" if issubclass(base, dict) else base.__name__
            return Kept(kept_as, name, items, dict(getattr(value, "__dict__", {})))
    if kind in _NAMESPACES.values():
        return Kept("namespace", kind.__name__, None, dict(vars(value)))
    if dataclasses.is_dataclass(value):
        return Kept("attributes", name, None, _attributes(value))
    if is_object is not None and is_object(value):
        return Kept("object", name, None, dict(vars(value)))
    return None


def _attributes(value: Any) -> dict[str, Any]:
    found = dict(getattr(value, "__dict__", {}))
    for field in dataclasses.fields(value):
        if field.name not in found and hasattr(value, field.name):
            found[field.name] = getattr(value, field.name)  # of a class with slots
    return found


class ClassFinder:
    """Finds classes by name among those that objects of the user reach.

    Args:
        roots: The user's objects: their classes, the classes of what they hold, and what the files define that define
            these.
    """

    def __init__(self, roots: Iterable[object]) -> None:
        self._roots = list(roots)
        self._found: dict[str, type] | None = None

    def __call__(self, name: str) -> type | None:
        """The class of that name, or None."""
        if self._found is None:
            self._found = {}
            for root in self._roots:
                self._look(root, depth=3)
        return self._found.get(name)

    def _look(self, value: object, depth: int) -> None:
        kind = type(value)
        if class_name(kind) not in self._found:  # type: ignore[operator]
            for base in kind.__mro__:
                self._add_file(base)
        if not depth or isinstance(value, Tensor):
            return
        inner: list[object] = []
        if isinstance(value, nn.Module):
            inner += value.children()
            depth += 1  # modules below modules do not count
        if isinstance(value, Mapping):
            inner += list(value.values())[:_MAX_ITEMS]
        elif isinstance(value, (list, tuple, set, deque)):
            inner += list(value)[:_MAX_ITEMS]
        inner += list(getattr(value, "__dict__", {}).values())
        for item in inner:
            if not isinstance(item, (type, types.ModuleType, int, float, str, bytes)):
                self._look(item, depth - 1)

    def _add_file(self, kind: type) -> None:
        assert self._found is not None
        self._found[class_name(kind)] = kind
        file = sys.modules.get(kind.__module__)
        if file is None or kind.__module__ == "builtins" or kind.__module__.split(".")[0] in _LIBRARIES:
            return
        for value in list(vars(file).values()):
            if isinstance(value, type):
                self._found.setdefault(class_name(value), value)


_LIBRARIES = ("torch", "lightning", "pytorch_lightning", "numpy", "collections", "typing")


class Reviver:
    """Brings stored values back, where possible as the very objects that are there now.

    Two stored places that held the same list hold the same list again.

    Args:
        find_class: Finds classes that no present value has.
        parameters: Live parameters and buffers, for references to them.
        device: Where tensors go that were on a device of that kind; None: where they were.
    """

    def __init__(
        self, find_class: FindClass, parameters: Mapping[str, Tensor] | None = None, device: torch.device | None = None
    ) -> None:
        self._find = find_class
        self._parameters = dict(parameters or {})
        self._addresses = {tensor.data_ptr() for tensor in self._parameters.values() if tensor.numel()}
        self._device = device
        self._done: dict[int, tuple[Any, Any]] = {}  # with the stored value, so that its id stays its own
        self._claimed: set[int] = set()

    def revive(self, value: Any, live: Any = _NOTHING) -> Any:
        """The value itself.

        Args:
            value: As it was loaded.
            live: What is there now.

        Raises:
            MissingClassError: See there.
        """
        if id(value) in self._done:
            return self._done[id(value)][1]
        if isinstance(value, Kept):
            return self._kept(value, live)
        kind = type(value)
        if kind in (list, dict, OrderedDict, Counter, set, deque):
            target = self._target(kind, value, live)
            self._done[id(value)] = (value, target)
            self._fill(target, value)
            return target
        if kind in (tuple, frozenset):
            before = live if type(live) is tuple and kind is tuple else ()
            return kind(self.revive(item, _at(before, index)) for index, item in enumerate(value))
        if isinstance(value, Tensor) and isinstance(live, Tensor):
            if live.data_ptr() in self._addresses and live.shape == value.shape:
                return live  # a parameter or buffer under another name: it is restored as such
            return value.to(live.device)
        return value

    def _target(self, kind: type, value: Any, live: Any) -> Any:
        fits = type(live) is kind or (kind is dict and type(live) is defaultdict)
        if fits and kind is deque:
            fits = live.maxlen == value.maxlen
        if fits and self._claim(live):
            return live
        return deque(maxlen=value.maxlen) if kind is deque else kind()

    def _claim(self, live: object) -> bool:
        """Whether this object is still to be given a stored value."""
        free = id(live) not in self._claimed
        self._claimed.add(id(live))
        return free

    def _fill(self, target: Any, value: Any) -> None:
        if isinstance(value, dict):
            self._fill_dict(target, value.items())
        elif isinstance(value, set):
            items = [self.revive(item) for item in value]
            target.clear()
            target.update(items)
        else:
            old = list(target)
            items = [self.revive(item, _at(old, index)) for index, item in enumerate(value)]
            target.clear()
            target.extend(items)

    def _fill_dict(self, target: dict[Any, Any], pairs: Iterable[Any]) -> None:
        factory = getattr(target, "default_factory", None)
        old = dict(target)
        found = {}
        for key, item in pairs:
            key = self.revive(key)
            before = old.get(key, _NOTHING)
            if before is _NOTHING and factory is not None and isinstance(item, (dict, list, set, deque)):
                before = factory()  # a dict of dicts knows how the inner ones are made
            found[key] = self.revive(item, before)
        base = OrderedDict if isinstance(target, OrderedDict) else dict  # what a subclass does there is its own code
        base.clear(target)
        for key, item in found.items():
            base.__setitem__(target, key, item)

    def _kept(self, value: Kept, live: Any) -> Any:
        if value.kind == "reference":
            return self._reference(value.items[1], live)
        if value.kind == "tensor":
            return self._on_device(value, live)
        made: Any
        if value.kind == "namespace":
            made = live if type(live) is _NAMESPACES[value.name] and self._claim(live) else _NAMESPACES[value.name]()
            self._done[id(value)] = (value, made)
            self._set_attributes(made, value, exact=True)
            return made
        kind = type(live) if live is not _NOTHING and class_name(type(live)) == value.name else self._find(value.name)
        if kind is None:
            raise MissingClassError(f"the class {value.name.replace(':', '.')} is not to be found")
        if value.kind in ("enum", "flag", "namedtuple"):
            return self._immutable(value, kind, live)
        if type(live) is kind and self._claim(live):
            made = live
        elif value.kind == "object":
            raise MissingClassError(f"there is no {value.name.replace(':', '.')} at its place yet")
        else:
            make: Any = kind.__new__  # no code of an `__init__` runs
            made = make(kind)
        self._done[id(value)] = (value, made)
        if value.kind == "dict":
            self._fill_dict(made, value.items)
        elif value.kind in ("list", "set"):
            base: Any = {"list": list, "set": set}[value.kind]
            items = [self.revive(item) for item in value.items]
            base.clear(made)
            (base.extend if base is list else base.update)(made, items)
        self._set_attributes(made, value, exact=value.kind != "object")
        return made

    def _immutable(self, value: Kept, kind: Any, live: Any) -> Any:
        if value.kind == "enum":
            if value.items not in kind.__members__:
                raise MissingClassError(f"{value.name.replace(':', '.')} has no member {value.items!r} any more")
            return kind[value.items]
        if value.kind == "flag":
            return kind(value.items)
        before = live if isinstance(live, tuple) else ()
        return tuple.__new__(kind, [self.revive(item, _at(before, i)) for i, item in enumerate(value.items)])

    def _set_attributes(self, made: Any, value: Kept, *, exact: bool) -> None:
        attributes = value.attributes or {}
        for name, item in attributes.items():
            object.__setattr__(made, name, self.revive(item, getattr(made, name, _NOTHING)))
        if exact:
            for name in set(getattr(made, "__dict__", {})) - set(attributes):
                object.__delattr__(made, name)

    def _reference(self, name: str, live: Any) -> Any:
        parameter = self._parameters.get(name)
        if parameter is None:
            raise MissingClassError(f"there is no parameter {name!r}")
        if isinstance(live, Tensor) and live.data_ptr() == parameter.data_ptr():
            return live
        return parameter.detach()

    def _on_device(self, value: Kept, live: Any) -> Any:
        device = torch.device(value.name)
        if isinstance(live, Tensor):
            device = live.device
        elif self._device is not None and self._device.type == device.type:
            device = self._device
        if isinstance(value.items, list):
            return [item.to(device) for item in value.items]
        return value.items.to(device)


def _at(items: Any, index: int) -> Any:
    return items[index] if index < len(items) else _NOTHING
