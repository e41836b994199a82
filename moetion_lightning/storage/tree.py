"""Nested run state to bytes and back, without pickle.

The structure becomes JSON, tensors stay tensors; both go into one safetensors file. What cannot be stored is refused
with its path, never guessed at. Flattening (and copying) is apart from serialising, so that the first can run on the
training thread and the second behind it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moetion_lightning.core.kept_values import Fresh, Kept, LiveValues, Unchanging, describe
from moetion_lightning.core.packed_lists import pack
from moetion_lightning.errors import CorruptSnapshotError, UnsupportedStateError, VersionError
from moetion_lightning.storage import leaves
from moetion_lightning.storage.format import SnapshotLayout, TensorSpec, tensor_bytes
from moetion_lightning.storage.manifest import parse_json
from moetion_lightning.storage.posix import read_regular
from moetion_lightning.storage.tree_cache import Plain, TreeCache
from moetion_lightning.storage.tree_loader import Resolve, TreeLoader

__all__ = ["FlatTree", "Leaf", "dump_tree", "flatten_tree", "load_tree"]

Leaf = Callable[[object], Any]
"""Gives JSON to store in place of a value, or ``NotImplemented`` to store the value itself."""

_MAX_DEPTH = 100  # deeper JSON would meet Python's recursion limit on the way back
_MAX_FILE_BYTES = 1 << 40
_STRUCTURE = "tree"
_PACK_ITEMS = 32  # lists of at least so many numbers, or small tensors of one kind, are stored as one tensor
_VERSION = 3  # 1 knew neither shared containers nor values of users' classes, 2 no plain parts
_REMEDY = "Restore from another window or tier."


@dataclass(frozen=True, kw_only=True)
class FlatTree:
    """A tree taken apart.

    Args:
        structure: JSON-able; refers to tensors by index.
        tensors: the tensors, each view or shared storage once.
    """

    structure: Any
    tensors: list[torch.Tensor] = field(default_factory=list)

    @functools.cached_property
    def layout(self) -> SnapshotLayout:
        """Layout of the file that :meth:`write_into` fills."""
        specs = [TensorSpec(_STRUCTURE, torch.uint8, (len(self._structure_bytes),))]
        specs += [TensorSpec(f"t{i}", t.dtype, tuple(t.shape)) for i, t in enumerate(self.tensors)]
        return SnapshotLayout(specs)

    def write_into(self, buffer: torch.Tensor, layout: SnapshotLayout) -> None:
        """Write the file, header included.

        Args:
            buffer: 1-D uint8 CPU tensor of ``layout.nbytes``, e.g. a host buffer's.
            layout: :attr:`layout`.
        """
        targets = self.write_structure(buffer, layout)
        for name, tensor in self.named_tensors().items():
            # As bytes: copy_ is not implemented for every dtype.
            tensor_bytes(targets[name]).copy_(tensor_bytes(tensor))

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by their names in the file."""
        return {f"t{index}": tensor for index, tensor in enumerate(self.tensors)}

    def write_structure(self, buffer: torch.Tensor, layout: SnapshotLayout) -> dict[str, torch.Tensor]:
        """Write all but the tensors. Returns where those are to be written, by name; arguments as `write_into`."""
        views = layout.views(buffer)
        layout.write_header(buffer)
        views.pop(_STRUCTURE).copy_(torch.frombuffer(bytearray(self._structure_bytes), dtype=torch.uint8))
        return views

    def to_bytes(self) -> bytes:
        """The whole safetensors file."""
        layout = self.layout
        data = bytearray(layout.nbytes)
        self.write_into(torch.frombuffer(data, dtype=torch.uint8), layout)
        return bytes(data)

    @functools.cached_property
    def _structure_bytes(self) -> bytes:
        text = json.dumps(self.structure, separators=(",", ":"), ensure_ascii=False, default=_plain_node)
        return text.encode()


def _plain_node(part: Plain) -> dict[str, Any]:
    return part.node(lambda value: _Flattener(None, None, packs=False).encode(value, (), 0))


def flatten_tree(
    tree: object, *, clone: bool = False, leaf: Leaf | None = None, cache: TreeCache | None = None
) -> FlatTree:
    """Take a tree apart.

    Supported: None, bool, int, float, complex, str, bytes, bytearray; list, tuple, dict, OrderedDict, defaultdict
    (comes back as dict), Counter, deque, set, frozenset; tensors and parameters of any dtype (come back as plain CPU
    tensors without gradient; sparse COO ones as such), torch.dtype, device, Size; numpy arrays and scalars; paths,
    datetime, date, timedelta.

    Args:
        tree: the state; not changed.
        clone: copy tensors and arrays to new CPU memory, so that the caller may change them afterwards.
        leaf: asked first for every value that is neither None, bool, int, float, str nor a builtin container.
        cache: what earlier calls made of trees of the same form; parts that are as they were are not walked again.

    Returns:
        The parts. Without ``clone``, tensors alias the caller's.

    Raises:
        UnsupportedStateError: a value cannot be stored; the message has its path, its type and the remedy.
    """
    flattener = _Flattener(leaf, cache)
    root = flattener.encode(tree, (), 0)
    tensors = flattener.finish(clone=clone)
    return FlatTree(structure={"version": _VERSION, "root": root}, tensors=tensors)


def dump_tree(tree: object, *, leaf: Leaf | None = None) -> bytes:
    """Serialise a tree; see :func:`flatten_tree` for what it may hold."""
    return flatten_tree(tree, leaf=leaf).to_bytes()


def load_tree(data: bytes | Path | str, *, resolve: Resolve | None = None) -> Any:
    """Rebuild a tree.

    Args:
        data: the file's content, or its path.
        resolve: gives back what the writer's ``leaf`` replaced.

    Returns:
        The tree; tensors are new CPU tensors, and a tensor that was referred to twice is one object again.

    Raises:
        CorruptSnapshotError: not a file that :func:`dump_tree` writes.
        UnsupportedStateError: it has replaced leaves and ``resolve`` is None.
        VersionError: a newer version of the package wrote it.
    """
    where: object = "tree"
    if not isinstance(data, bytes):
        where = data
        data = read_regular(Path(data), max_bytes=_MAX_FILE_BYTES)
    layout = SnapshotLayout.parse(data, nbytes=len(data), path=where)
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    views = layout.views(buffer)
    if _STRUCTURE not in views:
        raise CorruptSnapshotError(f"{where}: holds no tree. {_REMEDY}")
    structure = parse_json(views.pop(_STRUCTURE).numpy().tobytes(), path=where)
    version = structure.get("version")
    if type(version) is int and version > _VERSION:
        raise VersionError(f"{where}: tree version {version}, up to {_VERSION} is read. Upgrade moetion_lightning.")
    try:
        return TreeLoader(views, resolve).decode(structure["root"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        if isinstance(error, (UnsupportedStateError, CorruptSnapshotError)):
            raise
        raise CorruptSnapshotError(f"{where}: broken tree ({type(error).__name__}: {error}). {_REMEDY}") from error


class _Flattener:
    def __init__(self, leaf: Leaf | None, cache: TreeCache | None, *, packs: bool = True) -> None:
        self._leaf = leaf
        self._packs = packs  # long lists into tensors
        self._cache = cache
        self._live: LiveValues | None = None
        self._numbers: dict[int, int] = {}  # of containers that may be referred to again, in the order of their begin
        self._count = 0  # of them
        self._referred = 0  # how often one was
        self._open: set[int] = set()  # containers on the way from the root, to notice cycles
        self._store = leaves.TensorCollector()

    def finish(self, *, clone: bool) -> list[torch.Tensor]:
        return self._store.finish(clone=clone)

    def encode(self, value: Any, path: tuple[str, ...], depth: int) -> Any:
        scalar = leaves.encode_scalar(value)
        if scalar is not NotImplemented:
            return scalar
        kind = type(value)
        if kind in leaves.CONTAINER_TAGS:
            return self._encode_container(value, path, depth)
        if kind is LiveValues:
            return self._encode_live(value, path, depth)
        if self._leaf is not None:
            replaced = self._leaf(value)
            if replaced is not NotImplemented:
                return {"x": replaced} if self._live is None else {"kept": ["reference", "", replaced, None]}
        try:
            encoded = leaves.encode_leaf(value, self._store)
        except UnsupportedStateError as error:
            raise UnsupportedStateError(f"{_show(path)}: {error}") from None
        if encoded is NotImplemented:
            return self._encode_kept(value, path, depth)
        if self._live is not None and isinstance(value, torch.Tensor) and value.device.type != "cpu":
            return {"kept": ["tensor", str(value.device), encoded, None]}
        return encoded

    def _encode_live(self, live: LiveValues, path: tuple[str, ...], depth: int) -> Any:
        self._live = live
        owners: dict[Any, Any] = {}
        for owner, values in live.values.items():
            found = owners[owner] = {}
            for name, value in values.items():
                known = dict(self._numbers), self._count
                try:
                    found[name] = self.encode(value, (*path, owner, name), depth + 2)
                except UnsupportedStateError as error:
                    (self._numbers, self._count), self._open = known, set()
                    live.on_refused(owner, name, str(error))
        self._live = None
        return {"live": owners}

    def _encode_kept(self, value: Any, path: tuple[str, ...], depth: int) -> Any:
        kept = describe(value, None if self._live is None else self._live.is_object)
        if kept is None:
            kind = type(value)
            raise UnsupportedStateError(
                f"{_show(path)}: a {kind.__module__}.{kind.__qualname__} cannot be stored without pickle. Return plain "
                "values and tensors from state_dict(), and rebuild the object in load_state_dict()."
            )
        if kept.kind in ("enum", "flag"):
            return {"kept": [kept.kind, kept.name, self.encode(kept.items, path, depth), None]}
        if kept.kind == "namedtuple":
            items = [self.encode(item, (*path, str(i)), depth + 1) for i, item in enumerate(kept.items)]
            return {"kept": ["namedtuple", kept.name, items, None]}
        if id(value) in self._numbers and id(value) not in self._open:
            return self._same(value)
        self._enter(value, path, depth)
        try:
            body: Any = None
            if kept.kind == "dict":
                body = self._pairs(kept.items, path, depth)
            elif kept.items is not None:
                body = [self.encode(item, (*path, str(i)), depth + 1) for i, item in enumerate(kept.items)]
            attributes = None
            if kept.attributes is not None:
                attributes = self._attributes(kept, path, depth)
            return {"kept": [kept.kind, kept.name, body, attributes]}
        finally:
            self._open.discard(id(value))

    def _attributes(self, kept: Kept, path: tuple[str, ...], depth: int) -> dict[str, Any]:
        found = {}
        for name, value in (kept.attributes or {}).items():
            known, are_open = (dict(self._numbers), self._count), set(self._open)
            try:
                found[name] = self.encode(value, (*path, name), depth + 1)
            except UnsupportedStateError:
                if kept.kind != "object":
                    raise
                (self._numbers, self._count), self._open = (
                    known,
                    are_open,
                )  # restored into an object that has one of its own
        return found

    def _enter(self, value: object, path: tuple[str, ...], depth: int) -> None:
        if id(value) in self._open:
            raise UnsupportedStateError(f"{_show(path)}: contains itself. Return a tree from state_dict().")
        if depth >= _MAX_DEPTH:
            raise UnsupportedStateError(f"{_show(path)}: nested deeper than {_MAX_DEPTH}. Flatten the state.")
        self._open.add(id(value))
        self._number(value, 1)

    def _number(self, value: object, count: int) -> None:
        """A container begins which, with those in it, is so many."""
        self._numbers[id(value)] = self._count
        self._count += count

    def _same(self, value: object) -> dict[str, int]:
        self._referred += 1
        return {"same": self._numbers[id(value)]}

    def _encode_container(self, value: Any, path: tuple[str, ...], depth: int) -> Any:
        tag = leaves.CONTAINER_TAGS[type(value)]
        is_shared = tag not in ("tuple", "frozenset")
        if is_shared and id(value) in self._numbers and id(value) not in self._open:
            return self._same(value)
        if self._cache is None or self._live is not None or type(value) not in (Fresh, Unchanging):
            return self._walk(value, tag, path, depth)
        known, count = self._cache.find(path, value)
        if known is not None:
            self._number(value, count)
            return known
        before, outside = self._count, self._referred + self._store.added
        node = self._walk(value, tag, path, depth)
        # Numbers of other containers and of tensors are not those of the next tree.
        if type(value) is Unchanging and self._referred + self._store.added == outside:
            self._cache.keep(path, value, node, self._count - before)
        return node

    def _walk(self, value: Any, tag: str, path: tuple[str, ...], depth: int) -> Any:
        is_shared = tag not in ("tuple", "frozenset")
        numbered = self._count
        self._enter(value, path, depth)
        if not is_shared:
            del self._numbers[id(value)]
            self._count -= 1
        try:
            if isinstance(value, dict):
                return self._encode_dict(value, tag, path, depth)
            if tag == "list" and self._packs and len(value) >= _PACK_ITEMS:
                packed = self._pack(value)
                if packed is not None:
                    return packed
            items = [self.encode(item, (*path, str(i)), depth + 1) for i, item in enumerate(value)]
            if tag in ("set", "frozenset"):
                if self._count > numbered + is_shared:
                    raise UnsupportedStateError(f"{_show(path)}: a set of objects has no order. Keep them in a list.")
                items.sort(key=json.dumps)  # iteration order varies from process to process; equal sets, equal bytes
            if tag == "list":
                return items
            return {tag: [value.maxlen, items] if tag == "deque" else items}
        finally:
            self._open.discard(id(value))

    def _pack(self, value: list[Any]) -> Any:
        """Long lists of numbers or of small tensors as one tensor."""
        if set(map(type, value)) == {float}:
            return {"floats": self._store.add(torch.tensor(value, dtype=torch.float64))}
        tensor = pack(value) if self._live is None else self._live.packed.pack(value)
        if tensor is None:
            return None
        packed = {"tensors": self._store.add(tensor)}
        on_device = self._live is not None and tensor.device.type != "cpu"
        return {"kept": ["tensor", str(tensor.device), packed, None]} if on_device else packed

    def _encode_dict(self, value: dict[Any, Any], tag: str, path: tuple[str, ...], depth: int) -> Any:
        if tag == "d" and all(type(leaves.encode_scalar(key)) is str for key in value):
            return {"d": {key: self.encode(item, (*path, key), depth + 1) for key, item in value.items()}}
        return {"m" if tag == "d" else tag: self._pairs(value.items(), path, depth)}

    def _pairs(self, pairs: Iterable[tuple[Any, Any]], path: tuple[str, ...], depth: int) -> list[Any]:
        return [
            [self.encode(key, (*path, f"key {key!r}"), depth + 1), self.encode(item, (*path, str(key)), depth + 1)]
            for key, item in pairs
        ]


def _show(path: tuple[str, ...]) -> str:
    return "/".join(path) or "the state itself"
