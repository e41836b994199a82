"""Parts of a run state that are plain: told and copied by the interpreter's own C code instead of a walk."""

from __future__ import annotations

import json
import marshal
from collections.abc import Callable
from typing import Any

from moetion_lightning.core.kept_values import Unchanging
from moetion_lightning.errors import UnsupportedStateError

__all__ = ["PACK_ITEMS", "Plain", "TreeCache"]

PACK_ITEMS = 32  # lists of at least so many numbers, or small tensors of one kind, are stored as one tensor
_SCALARS = frozenset({type(None), bool, int, float, str})
_MARSHAL = 2  # the last version whose bytes depend on nothing but the values
_MAX_PATHS = 20_000
_MAX_DEPTH = 40
_UNSEEN: Any = (None, None, 0)
_MIXED: Any = (None, None, -1)


class Plain:
    """A copy of numbers, text, and dicts, lists and tuples of those; made into JSON by whoever writes the file.

    Args:
        data: The values in Python's own format, which is written in a tenth of the time that a walk takes.
        where: What knows the place that they are from, and the place.
    """

    __slots__ = ("_data", "_node", "_where")

    def __init__(self, data: bytes, where: tuple[TreeCache, tuple[str, ...]]) -> None:
        self._data = data
        self._where = where
        self._node: dict[str, Any] | None = None

    def node(self, walk: Callable[[Any], Any]) -> dict[str, Any]:
        """What is stored: the values themselves, if JSON gives back all of them as they are.

        Args:
            walk: Makes JSON of others.

        Raises:
            UnsupportedStateError: Some are of other kinds than before, of which Python's format does not tell.
        """
        if self._node is None:
            value = marshal.loads(self._data)
            copy = _through_json(value, self._data)
            if copy is None and _holds_bytes(value):
                cache, path = self._where
                cache.forget(path)
                raise UnsupportedStateError(
                    f"{'/'.join(path)}: holds values of other kinds than before. The next window holds them."
                )
            self._node = {"apart": walk(value)} if copy is None else {"plain": copy}
        return self._node


class TreeCache:
    """What was made of the dicts and lists of a tree, by where they are in it.

    Trees that are taken apart time and again have the same form, and most of what they hold changes seldom.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], tuple[Any, Any, int]] = {}

    def find(self, path: tuple[str, ...], value: Any) -> tuple[Any, int]:
        """What a value is stored as, and how many containers that counts; None if it must be walked."""
        known, node, count = self._known.get(path, _UNSEEN)
        if type(value) is Unchanging:
            return (node, count) if known is value else (None, 0)
        if count < 0:
            return None, 0
        try:
            data = marshal.dumps(value, _MARSHAL)
        except ValueError:
            data = b""
        if data and data == known:  # types included
            return node, 1
        # Arrays, and whatever else has memory of its own, become bytes, which begin with an "s". One that is there in
        # place of another one is seen when the part is written.
        trusted = type(node) is Plain and known.count(b"s") == data.count(b"s")
        plain = Plain(data, (self, path)) if data and (trusted or _is_plain(value, set(), 0)) else None
        if len(self._known) > _MAX_PATHS:  # keys that come and go
            self._known.clear()
        self._known[path] = _MIXED if plain is None else (data, plain, 1)
        return plain, 1

    def keep(self, path: tuple[str, ...], value: Any, node: Any, count: int) -> None:
        """A value that does not change was walked.

        Args:
            path: Where it is.
            value: The value.
            node: What was made of it, without reference to anything outside.
            count: Containers that it has, itself included.
        """
        self._known[path] = value, node, count

    def forget(self, path: tuple[str, ...]) -> None:
        """What is there must be walked from now on."""
        self._known[path] = _MIXED


def _through_json(value: Any, data: bytes) -> Any:
    """A copy, if JSON gives all of it back; None otherwise."""
    try:
        copy = json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
        return copy if marshal.dumps(copy, _MARSHAL) == data else None
    except (ValueError, TypeError):  # infinite numbers, text that is none, other keys and kinds
        return None


def _is_plain(value: Any, seen: set[int], depth: int) -> bool:
    """Whether a value holds nothing but what its bytes tell apart, nothing twice, and no long list."""
    kind = type(value)
    if kind in _SCALARS:
        return True
    if depth > _MAX_DEPTH:
        return False
    if kind is tuple:
        return all(_is_plain(item, seen, depth + 1) for item in value)
    if kind not in (dict, list) or id(value) in seen:
        return False
    seen.add(id(value))
    if kind is list:
        return len(value) < PACK_ITEMS and all(_is_plain(item, seen, depth + 1) for item in value)
    return all(_is_plain(k, seen, depth) and _is_plain(v, seen, depth + 1) for k, v in value.items())


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_bytes(key) or _holds_bytes(item) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(map(_holds_bytes, value))
    return isinstance(value, bytes)
