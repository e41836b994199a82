"""Plain Python attributes of users' objects: what training changes in them is training state.

A window holds the attributes that have changed since training began, and no others: a value that the script sets and
nobody changes is the script's own. Changes are looked for when a window begins, by cheap stamps; nothing is copied
for that.
"""

from __future__ import annotations

import datetime
import dis
import functools
import itertools
import logging
import operator
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import Metric

from moetion_lightning.core.kept_values import ClassFinder, LiveValues, MissingClassError, Reviver, class_name
from moetion_lightning.core.packed_lists import PackedLists
from moetion_lightning.store.tree import FlatTree, flatten_tree

__all__ = ["PlainAttributes"]

_log = logging.getLogger(__name__)

_FIXED = (
    *(type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size),
    *(datetime.date, datetime.datetime, datetime.timedelta),
)
_FIXED_TYPES = frozenset(_FIXED)
#: Their state is captured otherwise, or is no state of training.
_NOT_FOLLOWED = (
    *(nn.Module, Optimizer, LRScheduler, Dataset, DataLoader, Sampler, torch.Generator, np.random.Generator),
    *(type, types.ModuleType, types.FunctionType, types.MethodType, Iterator),
)
_LIBRARIES = ("lightning", "pytorch_lightning", "lightning_fabric", "moetion_lightning", "torchmetrics")
_LIBRARY_FOLDERS = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
_WHOLE_BYTES = 1 << 20  # larger tensors and arrays are stamped by a sample
_SAMPLE = 4096
_LONG = 10_000  # longer containers are stamped by a sample
_MAX_DEPTH = 8
#: Of torch: their own attributes say what they are, and do not change; what users add to them is watched.
_STRUCTURAL = frozenset(
    (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.Identity)
    + (nn.GELU, nn.SiLU, nn.ReLU, nn.Conv1d, nn.Conv2d, nn.Conv3d)
)
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
        #: Names by owner: once changed, an attribute is state for the rest of the run, also in later processes.
        self._changed: dict[str, set[str]] = {}
        self._refused: dict[tuple[str, str], type] = {}
        self._packed = PackedLists()

    def begin(self) -> None:
        """What changes from now on is state: hooks at the start of training and of an epoch may draw random values."""
        self._owners = {}
        self._find_owners()

    def start(self) -> None:
        """The first batch begins: what cannot be stored and was made until now is made again in the next process."""
        refused: list[tuple[str, str]] = []
        flatten_tree(
            LiveValues(self._values(), _is_users_object, lambda *found: refused.append(found[:2]), PackedLists())
        )
        for owner, name in refused:
            self._changed[owner].discard(name)
        self.begin()

    def capture(self) -> LiveValues:
        """The attributes that have changed, to be stored with a window; live values, not copies."""
        values = self._values()
        self._packed.begin()
        return LiveValues(values, _is_users_object, self._on_refused, self._packed)

    def copy_of(self, owners: Collection[str]) -> FlatTree:
        """A copy of what :meth:`capture` gives of some owners, for :meth:`restore`.

        Args:
            owners: Their names; what is below them is left out.
        """
        values = {name: found for name, found in self._values(owners).items() if name in owners}
        return flatten_tree(LiveValues(values, _is_users_object, lambda *found: None, PackedLists()), clone=True)

    def _values(self, only: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
        if only is None and not all(owner.holds_the_same() for owner in self._owners.values()):
            self._find_owners()
        for name, owner in self._owners.items():
            if only is not None and name not in only:
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
        for name, value in self._all_owners():
            owner = before.get(name)
            if owner is None or owner.value is not value:
                owner = _Owner(value, self._changed.get(name, set()))
            self._owners[name] = owner

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

    def _all_owners(self) -> Iterator[tuple[str, Any]]:
        for root, value in self._roots().items():
            if isinstance(value, nn.Module):
                for name, module in value.named_modules():
                    if not isinstance(module, Metric):  # the engine captures its states
                        yield (f"{root}.{name}" if name else root), module
            elif hasattr(value, "__dict__"):
                yield root, value

    def _on_refused(self, owner: str, name: str, reason: str) -> None:
        value = self._owners[owner].value
        self._refused[owner, name] = type(vars(value)[name])
        kind = type(value)
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
        known: Names that have changed before; a set that grows.
    """

    def __init__(self, value: Any, known: set[str]) -> None:
        self.value = value
        self._left_out = _left_out(type(value))
        self._modules: dict[str, Any] = value._modules if isinstance(value, nn.Module) else {}
        self._children = list(self._modules.values())
        self._stamp_all(known)

    def holds_the_same(self) -> bool:
        """Whether no module was added, removed or replaced in it."""
        return len(self._children) == len(self._modules) and (
            not self._children or all(map(operator.is_, self._children, self._modules.values()))
        )

    def _stamp_all(self, known: set[str]) -> None:
        own = vars(self.value)
        self._known = set(known)
        self._size = len(own)
        self._names: list[str] = []  # with values that cannot change in place
        self._fixed: list[Any] = []
        self._stamps: dict[str, Any] = {}
        for name, value in own.items():
            if name in self._left_out or name in self._known:
                continue
            if type(value) in _FIXED_TYPES:
                self._names.append(name)
                self._fixed.append(value)
            else:
                self._stamps[name] = _stamp(value)

    def new_changes(self) -> set[str]:
        """Names whose values have changed since the last call."""
        own = vars(self.value)
        found: set[str] = set()
        if len(own) != self._size or not all(map(operator.is_, map(own.get, self._names), self._fixed)):
            found = {n for n, v in zip(self._names, self._fixed) if n not in own or _differs(own[n], v)}
            watched = {*self._names, *self._stamps, *self._left_out, *self._known}
            found.update(name for name in own if name not in watched)
        for name, stamp in self._stamps.items():
            if name not in own or _stamp(own[name]) != stamp:
                found.add(name)
        if found or len(own) != self._size:
            self._stamp_all(self._known | found)
        return found


def _differs(first: Any, second: Any) -> bool:
    return first is not second and (type(first) is not type(second) or first != second)


@functools.cache
def _left_out(kind: type) -> frozenset[str]:
    """Attributes that are no state of a user: a library's classes, among the bases, set them themselves."""
    names = {"training", "log", "log_dict"}
    for base in kind.__mro__:
        if base is nn.Module or kind in _STRUCTURAL or base.__module__.split(".")[0] in _LIBRARIES:
            names.update(_assigned(base))
    if issubclass(kind, nn.Module):
        names |= set(vars(nn.Module()))
    return frozenset(names - {"_hparams"})  # hyper-parameters are the user's


def _assigned(kind: type) -> Iterator[str]:
    for member in vars(kind).values():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        for candidate in (function, getattr(member, "fset", None)):
            code = getattr(candidate, "__code__", None)
            if code is not None:
                yield from (i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR")


@functools.cache
def _is_users_class(kind: type) -> bool:
    """Whether its file is neither of the standard library nor of an installed package."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if kind.__module__ == "__main__":
        return True
    return (
        file is not None and not file.startswith(_LIBRARY_FOLDERS) and kind.__module__.split(".")[0] not in _LIBRARIES
    )


def _is_users_object(value: object) -> bool:
    """Whether an object is stored by its attributes, and restored into the object that is there."""
    kind = type(value)
    return hasattr(value, "__dict__") and not isinstance(value, _NOT_FOLLOWED) and _is_users_class(kind)


# --- stamps ------------------------------------------------------------------------------------------------------


def _stamp(value: Any, depth: int = 0) -> Any:
    """Something small that is equal as long as the value is; it refers to nothing that a user may want to give up."""
    kind = type(value)
    if kind in _FIXED_TYPES:
        return value
    if isinstance(value, Tensor):
        return _stamp_tensor(value)
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype.str, _digest_array(value))
    if isinstance(value, (np.generic, PurePath, Enum)):
        return value
    if depth >= _MAX_DEPTH or isinstance(value, _NOT_FOLLOWED):
        return (kind, id(value))
    if isinstance(value, Mapping) and isinstance(value, dict):
        items = list(dict.items(value)) if len(value) <= _LONG else _sampled_dict(value)
        return (kind, len(value), tuple(map(_key, items)), tuple(_stamp(item, depth + 1) for _, item in items))
    if isinstance(value, (list, tuple, deque)):
        some: Any = value if len(value) <= _LONG else _sampled(value)
        if set(map(type, some)) <= _FIXED_TYPES:
            return (kind, len(value), tuple(some))
        return (kind, len(value), tuple(_stamp(item, depth + 1) for item in some))
    if isinstance(value, (set, frozenset)):
        return (kind, len(value), frozenset(map(_stamp_item, value)) if len(value) <= _LONG else None)
    if _is_users_object(value):
        own = vars(value)
        return (kind, tuple(own), tuple(_stamp(item, depth + 1) for item in own.values()))
    attributes = getattr(value, "__dict__", None)
    if attributes is not None and class_name(kind) in ("argparse:Namespace", "types:SimpleNamespace"):
        return (kind, tuple(attributes), tuple(_stamp(item, depth + 1) for item in attributes.values()))
    return (kind, id(value))


def _stamp_item(value: Any) -> Any:
    return value if type(value) in _FIXED_TYPES else _stamp(value)


def _key(item: tuple[Any, Any]) -> Any:
    return _stamp_item(item[0])


def _sampled(values: Any) -> list[Any]:
    if isinstance(values, deque):
        return [values[0], values[len(values) // 2], values[-1]]
    return [*values[:: max(1, len(values) // _SAMPLE)], *values[-16:]]


def _sampled_dict(value: dict[Any, Any]) -> list[tuple[Any, Any]]:
    return [*itertools.islice(value.items(), _SAMPLE), next(reversed(value.items()))]


def _stamp_tensor(value: Tensor) -> Any:
    if isinstance(value, nn.Parameter) or type(value) is not Tensor or value.layout is not torch.strided:
        return (type(value), id(value))
    head = (tuple(value.shape), value.dtype)
    version = None if value.is_inference() else value._version
    if value.device.type != "cpu":  # to look at it would wait for the device
        return (*head, value.data_ptr(), version)
    value = value.detach().resolve_conj().resolve_neg()
    if value.numel() * value.element_size() <= _WHOLE_BYTES:
        return (*head, _digest_tensor(value))
    flat = value.reshape(-1) if value.is_contiguous() else value.select(0, 0).reshape(-1)
    return (*head, value.data_ptr(), version, _digest_tensor(flat[:: max(1, flat.numel() // _SAMPLE)]))


def _digest_tensor(value: Tensor) -> int:
    if not value.numel():
        return 0
    return xxhash.xxh3_64_intdigest(value.contiguous().reshape(-1).view(torch.uint8).numpy())


def _digest_array(value: np.ndarray[Any, Any]) -> Any:
    if value.dtype.hasobject:
        return id(value)
    if value.nbytes > _WHOLE_BYTES:
        flat = value.reshape(-1) if value.flags.c_contiguous else value[0].reshape(-1)
        value = flat[:: max(1, flat.size // _SAMPLE)]
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(value).tobytes())
