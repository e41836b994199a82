"""Looking at users' objects without running their code: methods of a subclass, or of a proxy, may do anything."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["CONTAINERS", "is_proxy", "item", "length", "pairs", "values"]

CONTAINERS: tuple[Any, ...] = (dict, list, tuple, deque)
_proxies: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def is_proxy(kind: type) -> bool:
    """Whether objects of a type say themselves what class they have: ``isinstance`` may make what they stand for."""
    known = _proxies.get(kind)
    if known is None:
        known = _proxies[kind] = any("__class__" in vars(base) for base in kind.__mro__[:-1])
    return known


def length(container: Any) -> int:
    """Number of items of a dict, list, tuple or deque."""
    return int(_built_in(container).__len__(container))


def pairs(container: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Keys and values, in order."""
    if isinstance(container, OrderedDict):  # it may have another order than its dict
        return [(key, dict.__getitem__(container, key)) for key in OrderedDict.__iter__(container)]
    return list(dict.items(container))


def item(container: Any, index: int | slice) -> Any:
    """An item, or items, of a list, tuple or deque."""
    return _built_in(container).__getitem__(container, index)


def values(container: Any) -> list[Any]:
    """Items of a list, tuple or deque."""
    return list(_built_in(container).__iter__(container))


def _built_in(container: Any) -> Any:
    """The type that a container is, whatever subclass it is of."""
    for kind in CONTAINERS:
        if isinstance(container, kind):
            return kind
    raise TypeError(f"expected a dict, a list, a tuple or a deque, not {type(container).__name__}")
