"""What an optimizer keeps, as JSON and plain tensors; :mod:`.rebuilding` is the way back.

An optimizer may keep anything: numbers, nested containers, tensors with strides of their own, tensor subclasses, sparse
tensors, objects of the user's classes. All of it is taken apart down to plain dense tensors and JSON. Nothing of what
is read back is run as code: classes are found by name among those that the process has loaded, their instances are
made without calling them. What cannot be taken apart is refused with its path.

A description is one JSON object, whose key says what it is (``{"f": "0x1.8p+1"}`` is a float); the tensors in it are
named by paths (``{"t": "0.exp_avg"}``) and travel beside it.
"""

from __future__ import annotations

import enum
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moetion_lightning.core.local import is_wrapper, local
from moetion_lightning.errors import UnsupportedStateError

__all__ = ["FACTORIES", "Described", "Describer", "find_class", "tensor_paths"]

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that was made by a class statement
#: What a ``defaultdict`` may make.
FACTORIES: dict[str, type] = {kind.__name__: kind for kind in (list, dict, set, int, float, bool, str, tuple, deque)}
_MAX_INT_BITS = 100  # longer numbers are written in hexadecimal: readers of JSON bound their length
_REMEDY = (
    "Tensors, numbers, strings, None, containers of them, and objects of ordinary classes that hold nothing else can "
    "be captured"
)


class Described(NamedTuple):
    """A tensor in a description.

    Args:
        path: Its name there.
        tensor: Plain and dense, shares the memory of the live one.
        rows: Whether it is laid out like the parameter, so that rows of it belong to rows of the parameter.
    """

    path: str
    tensor: Tensor
    rows: bool


class Describer:
    """Takes values apart.

    Args:
        where: What holds them, for messages.
        like: The parameter that they belong to; None if there is none.
        names: Names of live parameters by ``id``: these are referred to, not stored.
    """

    def __init__(self, where: str, like: Tensor | None = None, names: Mapping[int, str] | None = None) -> None:
        self.tensors: list[Described] = []
        #: First part of the tensors' paths: one describer may take several values apart.
        self.prefix = ""
        self._where = where
        self._shape = None if like is None else like.shape
        self._names = names or {}
        self._paths: set[str] = set()
        self._open: set[int] = set()

    def describe(self, value: Any, path: str = "") -> dict[str, Any]:
        """The description of a value; its tensors are added to :attr:`tensors`.

        Args:
            value: Anything.
            path: What to call it; "" for the whole.

        Raises:
            UnsupportedStateError: It cannot be taken apart; names the path and the type.
        """
        kind = type(value)
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if value is None or kind is bool or kind is str:
            return {"v": value}
        if kind is int:
            return {"v": value} if value.bit_length() <= _MAX_INT_BITS else {"i": hex(value)}
        if kind is float:
            return {"f": value.hex()}
        if id(value) in self._open:
            raise UnsupportedStateError(
                f"{self._where} holds {path!r}, which contains itself; expected a tree. {_REMEDY}"
            )
        self._open.add(id(value))
        try:
            found = self._container(value, path) or self._leaf(value) or self._object(value, path)
        finally:
            self._open.discard(id(value))
        if found is None:
            raise UnsupportedStateError(f"{self._where} holds {path!r} of type {kind.__name__}. {_REMEDY}")
        return found

    # --- tensors -------------------------------------------------------------------------------------------------

    def _tensor(self, value: Tensor, path: str) -> dict[str, Any]:
        name = self._names.get(id(value))
        if name is not None:
            return {"p": name}
        distributed, kind = hasattr(value, "to_local"), type(value)
        grad = kind is nn.Parameter and value.requires_grad
        plain = local(value)
        if value.layout is torch.sparse_coo:
            return self._sparse(plain, path)
        if is_wrapper(plain):
            return self._wrapper(plain, path)
        if plain.layout is not torch.strided or plain.is_quantized or plain.device.type == "meta":
            raise UnsupportedStateError(
                f"{self._where} holds {path!r}, a tensor of layout {plain.layout}, dtype {plain.dtype} on "
                f"{plain.device}. Dense tensors, sparse COO tensors and subclasses with __tensor_flatten__ can be "
                "captured"
            )
        plain = plain.resolve_conj().resolve_neg()
        rows = plain.shape == self._shape
        if distributed and not rows:
            raise UnsupportedStateError(
                f"{self._where} holds {path!r}, a {kind.__name__} that is not sharded like its parameter. Keep it as "
                "an ordinary tensor on every rank"
            )
        described: dict[str, Any] = {"t": self._name(path), "rows": rows, "cpu": plain.device.type == "cpu"}
        if not plain.is_contiguous():
            described["stride"] = list(plain.stride())
        if kind is nn.Parameter:
            described["parameter"] = grad
        elif kind is not Tensor and not distributed:
            described["class"] = self._class(kind, path)
        self.tensors.append(Described(described["t"], plain, rows))
        return described

    def _sparse(self, value: Tensor, path: str) -> dict[str, Any]:
        parts = [
            self._tensor(value._indices(), _join(path, "indices")),
            self._tensor(value._values(), _join(path, "values")),
        ]
        return {"coo": parts, "size": list(value.shape), "coalesced": value.is_coalesced()}

    def _wrapper(self, value: Any, path: str) -> dict[str, Any]:
        if not hasattr(value, "__tensor_flatten__"):
            raise UnsupportedStateError(
                f"{self._where} holds {path!r}, a {type(value).__name__}: a tensor subclass that keeps its values "
                "elsewhere and has no __tensor_flatten__, so that it cannot be captured"
            )
        attributes, context = value.__tensor_flatten__()
        return {
            "wrapper": self._class(type(value), path),
            "inner": {name: self._tensor(getattr(value, name), _join(path, name)) for name in attributes},
            "context": self.describe(context, _join(path, "context")),
            "size": list(value.shape),
            "stride": list(value.stride()),
        }

    def _name(self, path: str) -> str:
        """A path that no other tensor has; colons separate the parts of a tensor's name in a file."""
        wanted = name = _join(self.prefix, path).replace(":", "_")
        number = 1
        while name in self._paths:
            number += 1
            name = f"{wanted}~{number}"
        self._paths.add(name)
        return name

    # --- everything else -----------------------------------------------------------------------------------------

    def _container(self, value: Any, path: str) -> dict[str, Any] | None:
        kind = type(value)
        if kind is dict and all(type(key) is str for key in value):
            return {"d": {key: self.describe(item, _join(path, key)) for key, item in value.items()}}
        if kind is dict:
            return {"m": self._pairs(value, path)}
        if kind is OrderedDict:
            return {"od": self._pairs(value, path)}
        if kind is defaultdict:
            factory = value.default_factory
            if factory is not None and FACTORIES.get(getattr(factory, "__name__", "")) is not factory:
                raise UnsupportedStateError(f"{self._where} holds {path!r}, a defaultdict of {factory!r}. {_REMEDY}")
            return {"dd": [None if factory is None else factory.__name__, self._pairs(value, path)]}
        if kind is torch.Size:
            return {"size": list(value)}
        if (
            isinstance(value, tuple)
            and hasattr(kind, "_fields")
            and getattr(kind, "__new__", None) is not tuple.__new__
        ):
            return {"nt": self._class(kind, path), "items": self._items(value, path)}
        tags: dict[type, str] = {list: "l", tuple: "u", set: "set", frozenset: "fset"}
        tag = tags.get(kind)
        if tag is not None:
            return {tag: self._items(value, path)}
        if kind is deque:
            return {"q": [value.maxlen, self._items(value, path)]}
        return None

    def _items(self, values: Any, path: str) -> list[Any]:
        return [self.describe(item, _join(path, index)) for index, item in enumerate(values)]

    def _pairs(self, values: Mapping[Any, Any], path: str) -> list[Any]:
        return [[self.describe(k, _join(path, "key")), self.describe(v, _join(path, k))] for k, v in values.items()]

    def _leaf(self, value: Any) -> dict[str, Any] | None:
        if type(value) is complex:
            return {"c": [value.real.hex(), value.imag.hex()]}
        if type(value) is bytes:
            return {"b": value.hex()}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, (np.generic, np.ndarray)) and value.dtype.kind in "biufc":
            array = np.ascontiguousarray(value)
            tag = "ns" if isinstance(value, np.generic) else "n"
            return {tag: [value.dtype.str, list(value.shape), array.tobytes().hex()]}
        return None

    def _object(self, value: Any, path: str) -> dict[str, Any] | None:
        kind = type(value)
        if isinstance(value, enum.Enum):
            return {"e": self._class(kind, path), "name": value.name}
        if not _is_ordinary(kind):
            return None
        return {"o": self._class(kind, path), "vars": self.describe(vars(value), path)}

    def _class(self, kind: type, path: str) -> str:
        name = f"{kind.__module__}:{kind.__qualname__}"
        if find_class(name) is not kind:
            raise UnsupportedStateError(
                f"{self._where} holds {path!r} of type {kind.__name__}, a class that a restart could not find by its "
                f"name {name!r}. Define it at the top of a module"
            )
        return name


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _is_ordinary(kind: type) -> bool:
    """Whether an instance is its ``__dict__`` and nothing else, and is made without code of its own."""
    if not kind.__flags__ & _HEAP_TYPE or issubclass(kind, (nn.Module, torch.optim.Optimizer)):
        return False
    for base in kind.__mro__[:-1]:
        own = vars(base)
        slots = own.get("__slots__", ())
        if not base.__flags__ & _HEAP_TYPE or set([slots] if isinstance(slots, str) else slots) - {"__weakref__"}:
            return False
        if any(name in own for name in ("__new__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")):
            return False
    return kind.__dictoffset__ != 0


_classes: dict[str, type] = {}


def find_class(name: str) -> type | None:
    """A class that is loaded, by module and qualified name."""
    found = _classes.get(name)
    if found is not None:
        return found
    module, _, path = name.partition(":")
    value: Any = sys.modules.get(module)
    if "<locals>" in path:
        kinds = [k for k in _subclasses(object, set()) if k.__module__ == module and k.__qualname__ == path]
        value = kinds[0] if len(kinds) == 1 else None
    else:
        for part in path.split("."):
            value = getattr(value, part, None)
    if not isinstance(value, type):
        return None
    _classes[name] = value
    return value


def _subclasses(kind: type, seen: set[type]) -> Iterator[type]:
    children: list[type] = type.__subclasses__(kind)
    for child in children:
        if child not in seen:
            seen.add(child)
            yield child
            yield from _subclasses(child, seen)


def tensor_paths(described: Any) -> Iterator[str]:
    """Paths of all tensors in a description."""
    if isinstance(described, dict):
        if isinstance(described.get("t"), str):
            yield described["t"]
        else:
            for item in described.values():
                yield from tensor_paths(item)
    elif isinstance(described, list):
        for item in described:
            yield from tensor_paths(item)
