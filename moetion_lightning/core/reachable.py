"""What user objects lead to: a bounded walk over attributes, containers, closures and the user's own files."""

from __future__ import annotations

import functools
import site
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data.dataloader import _BaseDataLoaderIter

from moetion_lightning.core.containers import CONTAINERS, is_proxy, length, pairs, values

__all__ = ["Reached", "attributes_of", "has_attributes", "is_users_file", "reach"]

_MAX_ITEMS = 1000  # a long container holds data
_MAX_OBJECTS = 20_000
_LOOKED_AT = 16  # items of a list that are plain data: so are the others
_OF_MODULES = frozenset(vars(nn.Module()))  # hooks, most often none
_TABLES = frozenset({"_parameters", "_buffers"})
_PLAIN: tuple[type, ...] = (type(None), bool, int, float, complex, str, bytes, bytearray, range, slice)
_PLAIN += (torch.dtype, torch.device, torch.Size, np.dtype)
_PLAIN_TYPES = frozenset(_PLAIN)
#: Packages whose objects hold nothing of the user's, and much else.
_OPAQUE = frozenset({
    *("torch", "numpy", "lightning", "pytorch_lightning", "lightning_fabric", "accelerate", "moetion_lightning"),
    *("pandas", "pyarrow", "PIL", "tokenizers", "jax", "tensorboard", "wandb", "rich", "tqdm"),
    *(sys.stdlib_module_names - {"functools", "collections", "types"}),
})  # fmt: skip
_CLOSED = frozenset({"transformers.trainer", "transformers.training_args", "transformers.trainer_callback"})
#: Parts of them that do hold what the user gave them.
_OPEN = (
    *("torch.nn.", "torch.utils.data.", "lightning.fabric.utilities.distributed"),
    *("lightning.pytorch.overrides.", "accelerate.data_loader"),
    "lightning.fabric.wrappers",
)


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What a walk found.

    Args:
        slots: Where wanted values are: name, the mapping or list that holds the value, its key, the value.
        owners: The objects that were looked at, by name.
        links: How each wanted value was reached: the holder, key and value of every step.
        tables: Attribute tables and dicts that were looked at.
    """

    slots: list[tuple[str, Any, Any, Any]] = field(default_factory=list)
    owners: dict[str, object] = field(default_factory=dict)
    links: list[tuple[Any, Any, Any]] = field(default_factory=list)
    tables: list[dict[Any, Any]] = field(default_factory=list)


_Edge = tuple[str, Any, Any, Any]  # what the name gets, holder, key, value


def reach(
    roots: Mapping[str, object],
    wanted: Callable[[object], bool] = lambda value: False,
    *,
    code: bool = True,
    stop: Callable[[object], bool] = lambda value: False,
    limit: int = _MAX_OBJECTS,
) -> Reached:
    """Walk breadth first, so that names are short and stay the same when something is added elsewhere.

    Args:
        roots: Where to begin, by name. They are looked into whatever they are.
        wanted: What to find; it is not looked into.
        code: Whether functions, classes and modules of the user's files are looked into, too.
        stop: Objects that are not looked into.
        limit: Objects to look at, at most, besides modules of torch.
    """
    found = Reached()
    seen: set[int] = set()
    came: dict[int, tuple[int, tuple[Any, Any, Any]]] = {}  # by which step an object was reached, and from where
    linked: set[int] = set()
    queue: deque[tuple[str, object]] = deque()
    for name, root in roots.items():
        if wanted(root):
            found.slots.append((name, roots, name, root))
        elif id(root) not in seen:
            seen.add(id(root))
            queue.append((name, root))
    while queue and limit > 0:
        name, owner = queue.popleft()
        found.owners[name] = owner
        limit -= not isinstance(owner, nn.Module)  # of these there may be very many, each with little in it
        for suffix, holder, key, value in _edges(owner, found.tables, code=code):
            if _is_data(value) or is_proxy(type(value)):
                continue
            if wanted(value):
                found.slots.append((name + suffix, holder, key, value))
                if holder is not None:
                    found.links.append((holder, key, value))
                _link(id(owner), came, linked, found.links)
            elif id(value) not in seen and _may_enter(value, code=code) and not stop(value):
                seen.add(id(value))
                came[id(value)] = (id(owner), (holder, key, value))
                queue.append((_name(name, suffix, value), value))
    return found


def _link(
    owner: int,
    came: Mapping[int, tuple[int, tuple[Any, Any, Any]]],
    linked: set[int],
    links: list[tuple[Any, Any, Any]],
) -> None:
    while owner in came and owner not in linked:
        linked.add(owner)
        owner, step = came[owner]
        if step[0] is not None:
            links.append(step)


def _name(name: str, suffix: str, value: object) -> str:
    """Of a module, the same wherever it was reached from."""
    return f"module:{value.__name__}" if isinstance(value, types.ModuleType) else name + suffix


def attributes_of(owner: object) -> dict[str, Any]:
    """The attribute table of an object, itself; empty if it has none."""
    try:
        table = object.__getattribute__(owner, "__dict__")
    except AttributeError:
        return {}
    return table if type(table) is dict else {}


def has_attributes(owner: object) -> bool:
    """Whether it has an attribute table, which may be empty, and is none of those things that only look so."""
    if isinstance(owner, (type, types.ModuleType, dict, list, tuple)):
        return False
    try:
        return type(object.__getattribute__(owner, "__dict__")) is dict
    except AttributeError:
        return False


def _is_data(value: object) -> bool:
    kind = type(value)
    return kind in _PLAIN_TYPES or issubclass(kind, (Tensor, np.ndarray, np.generic))


def _may_enter(value: object, *, code: bool) -> bool:
    kind = type(value)
    if issubclass(kind, CONTAINERS):
        return (kind is dict or length(value) > 0) and length(value) <= _MAX_ITEMS
    if issubclass(kind, (types.FunctionType, types.MethodType, types.ModuleType, type)):
        return code and (isinstance(value, types.MethodType) or is_users_file(_module_name(value)))
    if issubclass(kind, functools.partial):
        return True
    if issubclass(kind, _BaseDataLoaderIter):
        return False
    module = kind.__module__ or ""
    if module in _CLOSED:
        return False
    if module.partition(".")[0] in _OPAQUE:
        return module.startswith(_OPEN)
    return has_attributes(value) or hasattr(kind, "__slots__")


def _module_name(value: Any) -> str:
    return str(value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", "") or "")


def _edges(owner: Any, tables: list[dict[Any, Any]], *, code: bool) -> Iterator[_Edge]:
    kind = type(owner)
    if issubclass(kind, dict):
        tables.append(owner)
        for number, (key, value) in enumerate(pairs(owner)):
            # An optimizer's state is by parameter, whose text takes long, and is another one after each step.
            yield f"[#{number}]" if isinstance(key, Tensor) else f"[{key!r}]", owner, key, value
    elif issubclass(kind, (list, tuple, deque)):
        items = values(owner)
        if not all(map(_is_data, items[:_LOOKED_AT])):
            for index, value in enumerate(items):
                yield f"[{index}]", owner, index, value
    if issubclass(kind, functools.partial):
        yield from _steps(func=owner.func, args=owner.args, keywords=owner.keywords)
    elif issubclass(kind, types.FunctionType):
        yield from _of_function(owner)
    elif issubclass(kind, types.MethodType):
        yield from _steps(__self__=owner.__self__, __func__=owner.__func__)
    elif issubclass(kind, types.ModuleType):
        yield from ((f".{key}", vars(owner), key, value) for key, value in list(vars(owner).items()) if key[:2] != "__")
    elif issubclass(kind, type):
        yield from _of_class(owner)
    else:
        yield from _of_instance(owner, tables)
        if code:
            for base in kind.__mro__:
                if is_users_file(base.__module__):
                    yield f"<{base.__qualname__}>", None, None, base


def _steps(**values: object) -> Iterator[_Edge]:
    """To what cannot be replaced."""
    return ((f".{name}", None, None, value) for name, value in values.items())


def _of_function(function: types.FunctionType) -> Iterator[_Edge]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            yield f".<{name}>", cell, "cell_contents", cell.cell_contents
        except ValueError:  # empty
            continue
    yield from _steps(__defaults__=function.__defaults__, __kwdefaults__=function.__kwdefaults__)
    yield from ((f".{k}", function.__dict__, k, v) for k, v in function.__dict__.items())
    yield ".__module__", None, None, sys.modules.get(function.__module__)


def _of_class(owner: type) -> Iterator[_Edge]:
    for key, value in list(vars(owner).items()):
        if key[:2] != "__" and not isinstance(value, (types.FunctionType, property, staticmethod, classmethod)):
            yield f".{key}", None, None, value
    yield ".__module__", None, None, sys.modules.get(owner.__module__)


def _of_instance(owner: object, tables: list[dict[Any, Any]]) -> Iterator[_Edge]:
    table = attributes_of(owner)
    if has_attributes(owner):
        module = isinstance(owner, nn.Module)
        if not module or is_users_file(type(owner).__module__):
            tables.append(table)
        for key, value in list(table.items()):
            if module and key == "_modules":
                yield from ((f".{name}", value, name, child) for name, child in value.items() if child is not None)
            elif not module or (key not in _TABLES and (key not in _OF_MODULES or value)):
                yield f".{key}", table, key, value
    for base in type(owner).__mro__:
        for name in _slots_of(base):
            try:
                yield f".{name}", None, None, object.__getattribute__(owner, name)
            except AttributeError:
                continue


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(s for s in slots if s not in ("__dict__", "__weakref__"))


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    known = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    known |= {*site.getsitepackages(), site.getusersitepackages()}
    return tuple(path.rstrip("/") + "/" for path in known)


@functools.lru_cache(maxsize=4096)
def is_users_file(module: str) -> bool:
    """Whether a module is neither installed nor part of Python or of this package.

    Args:
        module: Its name, as in ``sys.modules``.
    """
    if module == "__main__":
        return True
    if not module or module.partition(".")[0] in _OPAQUE | {"builtins", "functools", "collections", "types"}:
        return False
    path = getattr(sys.modules.get(module), "__file__", None)
    if not isinstance(path, str):
        return False
    return not path.startswith(_installed()) and "site-packages" not in path and "dist-packages" not in path
