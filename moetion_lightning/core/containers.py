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
    for kind in CONTAINERS:
        if isinstance(container, kind):
            return int(kind.__len__(container))
    raise TypeError(f"expected a container, not {type(container).__name__}")


def pairs(container: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Keys and values, in order."""
    if isinstance(container, OrderedDict):  # it may have another order than its dict
        return [(key, dict.__getitem__(container, key)) for key in OrderedDict.__iter__(container)]
    return list(dict.items(container))


def item(container: Any, index: int | slice) -> Any:
    """An item, or items, of a list, tuple or deque."""
    for kind in CONTAINERS[1:]:
        if isinstance(container, kind):
            return kind.__getitem__(container, index)
    raise TypeError(f"expected a list, a tuple or a deque, not {type(container).__name__}")


def values(container: Any) -> list[Any]:
    """Items of a list, tuple or deque."""
    for kind in CONTAINERS[1:]:
        if isinstance(container, kind):
            return list(kind.__iter__(container))
    raise TypeError(f"expected a list, a tuple or a deque, not {type(container).__name__}")
