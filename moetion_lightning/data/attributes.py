"""Plain attributes of what draws: samplers, batch samplers, datasets, collate functions.

Samplers count epochs or samples in attributes, in ``__iter__`` or for each batch. What they hold when a pass begins is
noted, and put back before the pass is made again: whoever else has moved them meanwhile (a hook of the user's that
restores a position) is undone, so that nothing is moved twice.

Of samplers all plain attributes come back. Of datasets and collate functions, which hold settings and paths too, only
those that training has changed, and those that were changed here since they were first seen.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from moetion_lightning.core.containers import is_proxy
from moetion_lightning.core.reachable import attributes_of, has_attributes, reach

__all__ = ["Attributes", "Seen", "copied", "equal", "is_plain"]

_log = logging.getLogger(__name__)
_SCALARS = (type(None), bool, int, float, str)
_CONTAINERS = (list, tuple, dict, set, deque)
_MAX_ITEMS = 1000
_MAX_LARGE = 1 << 24  # items of a sampler's own order
_MAX_OWNERS = 500
_LIBRARIES = ("torch", "torchdata", "lightning", "lightning_fabric", "accelerate")
_ABSENT = object()


def is_plain(value: object, depth: int = 4) -> bool:
    """Whether a value is small and can be stored: numbers, text, tensors, arrays, containers of those."""
    kind = type(value)
    if kind in _SCALARS:
        return True
    if is_proxy(kind):
        return False
    if kind is Tensor:
        return value.layout is torch.strided and value.numel() <= _MAX_ITEMS  # type: ignore[attr-defined]
    if isinstance(value, (np.ndarray, np.generic)):
        return value.size <= _MAX_ITEMS and value.dtype.kind in "biuf"
    if kind not in _CONTAINERS or not depth or len(value) > _MAX_ITEMS:  # type: ignore[arg-type]
        return False
    if isinstance(value, dict):
        return all(type(k) in _SCALARS and is_plain(v, depth - 1) for k, v in value.items())
    return all(is_plain(item, depth - 1) for item in value)  # type: ignore[attr-defined]


def copied(value: Any) -> Any:
    """A copy of a plain value that later changes do not reach."""
    if type(value) in _SCALARS:
        return value
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def equal(a: Any, b: Any) -> bool:
    """Whether two plain values are the same."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b.to(a.device)))
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


class Seen:
    """Attributes of objects when they were first seen: before training, and before anyone restores a position."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[object, dict[str, Any], dict[str, int]]] = {}  # by id; holds the object

    def add(self, roots: Mapping[str, object], stop: Any = None) -> None:
        """See what objects lead to."""
        is_module = stop if stop is not None else _is_module
        for owner in reach(roots, code=False, stop=is_module, limit=_MAX_OWNERS).owners.values():
            if has_attributes(owner):
                self.of(owner)

    def of(self, owner: object) -> tuple[dict[str, Any], dict[str, int]]:
        """Its attributes (plain ones are copies), and fingerprints of its large ones; sees it if it was not seen."""
        if id(owner) not in self._tables:
            table = {k: copied(v) if is_plain(v) else v for k, v in attributes_of(owner).items()}
            large = {} if _of_library(owner) else {k: _fingerprint(v) for k, v in table.items() if _is_large(v)}
            self._tables[id(owner)] = owner, table, large
        return self._tables[id(owner)][1:]


class Attributes:
    """Those of one loader.

    Args:
        loader: The loader.
        seen: What was first seen.
    """

    def __init__(self, loader: object, seen: Seen) -> None:
        self._loader = loader
        self._seen = seen
        self._samplers: dict[str, object] = {}
        self._others: dict[str, object] = {}
        self._moving: dict[str, set[str]] = {}  # attributes that training changes
        self._said: set[str] = set()
        self.look()

    def look(self) -> None:
        """Find the objects (again)."""
        roots = {role: getattr(self._loader, role, None) for role in ("dataset", "collate_fn")}
        if roots["dataset"] is None and not hasattr(self._loader, "collate_fn"):  # any iterable
            roots["iterable"] = self._loader
        self._others = _owners(roots, _is_module)
        inside = {id(owner) for owner in self._others.values()}
        roots = {role: getattr(self._loader, role, None) for role in ("batch_sampler", "sampler")}
        self._samplers = _owners(roots, lambda value: _is_module(value) or id(value) in inside)
        for owner in (*self._samplers.values(), *self._others.values()):
            self._seen.of(owner)

    # --- reading -------------------------------------------------------------------------------------------------

    def at_start(self, *, look: bool = True) -> dict[str, Any]:
        """As a pass begins.

        Args:
            look: Whether to find the objects again.
        """
        if look:
            self.look()
        return {
            "samplers": {name: self._read(name, owner) for name, owner in self._samplers.items()},
            "moving": {name: sorted(keys) for name, keys in self._moving.items()},
            "states": _states(self._samplers),
            "others": self._changed(small=True),
        }

    def now(self) -> dict[str, Any]:
        """Numbers and text in the middle of a pass; cheap."""
        samplers = {
            name: {k: v for k, v in attributes_of(owner).items() if type(v) in _SCALARS}
            for name, owner in self._samplers.items()
        }
        return {"samplers": samplers, "others": self._changed(small=False)}

    def _read(self, name: str, owner: object) -> dict[str, Any]:
        base, large = self._seen.of(owner)
        moving = self._moving.setdefault(name, set())
        values = {}
        for key, value in attributes_of(owner).items():
            if is_plain(value):
                values[key] = copied(value)
                if not equal(base.get(key, _ABSENT), value):
                    moving.add(key)
            elif _is_large(value) and (key in moving or large.get(key) != _fingerprint(value)):
                moving.add(key)  # an order that is shuffled in place, pass after pass
                values[key] = np.array(value, dtype=np.int64) if isinstance(value, list) else copied(value)
        return values

    def _changed(self, *, small: bool) -> dict[str, Any]:
        """What differs from what was first seen, of those that are no samplers."""
        found: dict[str, Any] = {}
        for name, owner in self._others.items():
            base, _ = self._seen.of(owner)
            table = attributes_of(owner)
            changed = {
                key: copied(value)
                for key, value in table.items()
                if (type(value) in _SCALARS or (small and is_plain(value)))
                and base.get(key, _ABSENT) is not value
                and not equal(base.get(key, _ABSENT), value)
            }
            if changed:
                found[name] = changed
        return found

    # --- putting back --------------------------------------------------------------------------------------------

    def put_start(self, saved: Mapping[str, Any]) -> None:
        """Before a pass is made again."""
        self.look()
        for name, keys in saved["moving"].items():
            self._moving.setdefault(name, set()).update(keys)
        self._put_samplers(saved["samplers"], whole=True)
        for name, state in saved["states"].items():
            owner: Any = self._samplers.get(name)
            if owner is not None and not _has_state(owner, state):
                owner.load_state_dict(copy.deepcopy(state))
                self._put_samplers({name: saved["samplers"].get(name, {})}, whole=True)
        self._put_others(saved["others"], small=True)

    def put_now(self, saved: Mapping[str, Any], *, others: bool = True) -> None:
        """In the middle of a pass.

        Args:
            saved: From :meth:`now`.
            others: Whether what is no sampler is put back, too.
        """
        self._put_samplers(saved["samplers"], whole=False)
        if others:
            self._put_others(saved["others"], small=False)

    def _put_samplers(self, saved: Mapping[str, Any], *, whole: bool) -> None:
        for name, values in saved.items():
            owner = self._samplers.get(name)
            if owner is None:
                continue
            table = attributes_of(owner)
            base, _ = self._seen.of(owner)
            for key in [k for k, v in table.items() if k not in values and (is_plain(v) if whole else False)]:
                del table[key]
            for key, value in values.items():
                current = table.get(key, _ABSENT)
                if _same(current, value):
                    continue
                if whole and key not in self._moving.get(name, ()) and _same(base.get(key, _ABSENT), current):
                    self._say(f"{name}.{key}", current, value)
                _assign(table, key, value)

    def _put_others(self, saved: Mapping[str, Any], *, small: bool) -> None:
        for name, owner in self._others.items():
            base, _ = self._seen.of(owner)
            table, values = attributes_of(owner), saved.get(name, {})
            for key in [*table, *(key for key in values if key not in table)]:
                current, known = table.get(key, _ABSENT), base.get(key, _ABSENT)
                kinds_fit = current is _ABSENT or type(current) in _SCALARS or (small and is_plain(current))
                if key in values:
                    if not equal(current, values[key]):
                        _assign(table, key, values[key])
                elif kinds_fit and not equal(current, known):  # changed here, not so where the position was noted
                    if known is _ABSENT:
                        del table[key]
                    elif is_plain(known):
                        table[key] = copied(known)

    def _say(self, name: str, here: object, there: object) -> None:
        if name not in self._said:
            self._said.add(name)
            shown = "not there" if here is _ABSENT else repr(here)
            _log.warning(
                "%s is %s in this script and %s in the window: the window's is used, the samples would be others. To "
                "change it, start afresh with resume='never' or another job_id.", name, shown, repr(there),
            )  # fmt: skip


def _owners(roots: Mapping[str, object], stop: Any) -> dict[str, object]:
    given = {name: root for name, root in roots.items() if root is not None and not stop(root)}
    found = reach(given, code=False, stop=stop, limit=_MAX_OWNERS).owners
    return {name: owner for name, owner in found.items() if has_attributes(owner) and not _of_library(owner)}


def _of_library(owner: object) -> bool:
    return (type(owner).__module__ or "").partition(".")[0] in _LIBRARIES


def _is_module(value: object) -> bool:
    """Of modules, others take care; lightning's DataModules and callbacks are known by what they have."""
    return isinstance(value, nn.Module) or hasattr(type(value), "prepare_data") or hasattr(type(value), "on_fit_start")


def _is_large(value: object) -> bool:
    if is_proxy(type(value)):
        return False
    if isinstance(value, list):
        return _MAX_ITEMS < len(value) <= _MAX_LARGE and type(value[0]) is int and type(value[-1]) is int
    if type(value) is Tensor:
        return _MAX_ITEMS < value.numel() <= _MAX_LARGE and value.layout is torch.strided
    return isinstance(value, np.ndarray) and _MAX_ITEMS < value.size <= _MAX_LARGE and value.dtype.kind in "biuf"


def _fingerprint(value: Any) -> int:
    if isinstance(value, list):
        return hash(tuple(value))
    array = value.detach().cpu().contiguous().view(torch.uint8).numpy() if isinstance(value, Tensor) else value
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(array).view(np.uint8).data)


def _same(current: Any, saved: Any) -> bool:
    if isinstance(current, list) and isinstance(saved, np.ndarray):
        return len(current) == len(saved) and bool(np.array_equal(np.array(current), saved))
    return equal(current, saved)


def _assign(table: dict[str, Any], key: str, value: Any) -> None:
    current = table.get(key)
    if isinstance(current, list) and isinstance(value, (list, np.ndarray)):
        current[:] = value.tolist() if isinstance(value, np.ndarray) else copied(value)
    elif isinstance(current, Tensor) and isinstance(value, Tensor):
        table[key] = copied(value).to(current.device)
    else:
        table[key] = copied(value)


def _states(owners: Mapping[str, object]) -> dict[str, Any]:
    """What samplers say of themselves, beside their attributes."""
    found = {}
    for name, owner in owners.items():
        if callable(getattr(owner, "state_dict", None)) and callable(getattr(owner, "load_state_dict", None)):
            state = owner.state_dict()  # type: ignore[attr-defined]
            if is_plain(state):
                found[name] = copied(state)
    return found


def _has_state(owner: Any, state: Any) -> bool:
    return equal(owner.state_dict(), state)
