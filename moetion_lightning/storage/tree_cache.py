"""Parts of a run state that need not be walked: those that do not change, and those that are told by their bytes."""

from __future__ import annotations

import json
import marshal
from collections.abc import Callable
from typing import Any

from moetion_lightning.core.kept_values import Unchanging

__all__ = ["Plain", "TreeCache"]

_SCALARS = frozenset({type(None), bool, int, float, str})
_MARSHAL = 2  # the last version whose bytes depend on nothing but the values
_MAX_PATHS = 20_000
_MAX_DEPTH = 40


class Plain:
    """A copy of numbers, text, and dicts, lists and tuples of those; made into JSON by whoever writes the file.

    Args:
        data: The values in Python's own format, which is written in a tenth of the time that a walk takes.
    """

    __slots__ = ("_data", "_node")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._node: dict[str, Any] | None = None

    def node(self, walk: Callable[[Any], Any]) -> dict[str, Any]:
        """What is stored: the values themselves, if JSON gives back all of them as they are.

        Args:
            walk: Makes JSON of others.
        """
        if self._node is None:
            value = marshal.loads(self._data)
            copy = _through_json(value, self._data)
            self._node = {"apart": walk(value)} if copy is None else {"plain": copy}
        return self._node


class TreeCache:
    """What was made of :class:`Unchanging` and :class:`Fresh` dicts of a tree, by where they are in it.

    Trees that are taken apart time and again have the same form, and most of what they hold changes seldom.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], tuple[Any, Any, int]] = {}

    def find(self, path: tuple[str, ...], value: Any) -> tuple[Any, int]:
        """What a value is stored as, and how many containers that counts; None if it must be walked."""
        known, node, count = self._known.get(path, (None, None, 0))
        if type(value) is Unchanging:
            return (node, count) if known is value else (None, 0)
        try:
            data = marshal.dumps(dict(value), _MARSHAL)
        except ValueError:
            return None, 0
        if type(node) is Plain and data == known:  # types included
            return node, 1
        if not _is_plain(value, 0):  # arrays, and whatever else has memory of its own, became bytes
            return None, 0
        plain = Plain(data)
        self.keep(path, data, plain, 1)
        return plain, 1

    def keep(self, path: tuple[str, ...], value: Any, node: Any, count: int) -> None:
        """Remember what was made.

        Args:
            path: Where it is.
            value: A dict that does not change, or the bytes of one that may.
            node: What was made of it, without reference to anything outside.
            count: Containers that it has, itself included.
        """
        if len(self._known) > _MAX_PATHS:  # keys that come and go
            self._known.clear()
        self._known[path] = value, node, count


def _through_json(value: Any, data: bytes) -> Any:
    """A copy, if JSON gives all of it back; None otherwise."""
    try:
        copy = json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
        return copy if marshal.dumps(copy, _MARSHAL) == data else None
    except (ValueError, TypeError):  # infinite numbers, text that is none, other keys
        return None


def _is_plain(value: Any, depth: int) -> bool:
    """Whether there is nothing in a container but what its bytes tell apart."""
    if depth > _MAX_DEPTH:
        return False
    for item in value.values() if isinstance(value, dict) else value:
        kind = type(item)
        if kind not in _SCALARS and (kind not in (dict, list, tuple) or not _is_plain(item, depth + 1)):
            return False
    return not isinstance(value, dict) or all(type(key) in _SCALARS for key in value)
