"""Nested run state to bytes and back, without pickle.

The structure becomes JSON, tensors stay tensors; both go into one safetensors file. What cannot be stored is refused
with its path, never guessed at. Flattening (and copying) is apart from serialising, so that the first can run on the
training thread and the second behind it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moetion_lightning.errors import CorruptSnapshotError, UnsupportedStateError, VersionError
from moetion_lightning.store import leaves
from moetion_lightning.store.format import SnapshotLayout, TensorSpec, tensor_bytes
from moetion_lightning.store.local import read_regular
from moetion_lightning.store.manifest import parse_json

__all__ = ["FlatTree", "Leaf", "Resolve", "dump_tree", "flatten_tree", "load_tree"]

Leaf = Callable[[object], Any]
"""Gives JSON to store in place of a value, or ``NotImplemented`` to store the value itself."""
Resolve = Callable[[Any], object]
"""Gives back the value for what a :data:`Leaf` stored."""

_MAX_DEPTH = 100  # deeper JSON would meet Python's recursion limit on the way back
_MAX_FILE_BYTES = 1 << 40
_STRUCTURE = "tree"
_VERSION = 1
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

    @property
    def layout(self) -> SnapshotLayout:
        """Layout of the file that :meth:`write_into` fills."""
        return self._layout(self._structure_bytes())

    def write_into(self, buffer: torch.Tensor, layout: SnapshotLayout) -> None:
        """Write the file, header included.

        Args:
            buffer: 1-D uint8 CPU tensor of ``layout.nbytes``, e.g. a host buffer's.
            layout: :attr:`layout`.
        """
        views = layout.views(buffer)
        layout.write_header(buffer)
        views[_STRUCTURE].copy_(torch.frombuffer(bytearray(self._structure_bytes()), dtype=torch.uint8))
        for index, tensor in enumerate(self.tensors):
            # As bytes: copy_ is not implemented for every dtype.
            tensor_bytes(views[f"t{index}"]).copy_(tensor_bytes(tensor))

    def to_bytes(self) -> bytes:
        """The whole safetensors file."""
        layout = self.layout
        data = bytearray(layout.nbytes)
        self.write_into(torch.frombuffer(data, dtype=torch.uint8), layout)
        return bytes(data)

    def _structure_bytes(self) -> bytes:
        return json.dumps(self.structure, separators=(",", ":"), ensure_ascii=False).encode()

    def _layout(self, structure: bytes) -> SnapshotLayout:
        specs = [TensorSpec(_STRUCTURE, torch.uint8, (len(structure),))]
        specs += [TensorSpec(f"t{i}", t.dtype, tuple(t.shape)) for i, t in enumerate(self.tensors)]
        return SnapshotLayout(specs)


def flatten_tree(tree: object, *, clone: bool = False, leaf: Leaf | None = None) -> FlatTree:
    """Take a tree apart.

    Supported: None, bool, int, float, complex, str, bytes, bytearray; list, tuple, dict, OrderedDict, defaultdict
    (comes back as dict), Counter, deque, set, frozenset; tensors and parameters of any dtype (come back as plain CPU
    tensors without gradient), torch.dtype, device, Size; numpy arrays and scalars; paths, datetime, date, timedelta.

    Args:
        tree: the state; not changed.
        clone: copy tensors and arrays to new CPU memory, so that the caller may change them afterwards.
        leaf: asked first for every value that is neither None, bool, int, float, str nor a builtin container.

    Returns:
        The parts. Without ``clone``, tensors alias the caller's.

    Raises:
        UnsupportedStateError: a value cannot be stored; the message has its path, its type and the remedy.
    """
    flattener = _Flattener(leaf)
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
        return _Loader(views, resolve).decode(structure["root"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        if isinstance(error, (UnsupportedStateError, CorruptSnapshotError)):
            raise
        raise CorruptSnapshotError(f"{where}: broken tree ({type(error).__name__}: {error}). {_REMEDY}") from error


class _Flattener:
    def __init__(self, leaf: Leaf | None) -> None:
        self._leaf = leaf
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
        if self._leaf is not None:
            replaced = self._leaf(value)
            if replaced is not NotImplemented:
                return {"x": replaced}
        try:
            encoded = leaves.encode_leaf(value, self._store)
        except UnsupportedStateError as error:
            raise UnsupportedStateError(f"{_show(path)}: {error}") from None
        if encoded is NotImplemented:
            raise UnsupportedStateError(
                f"{_show(path)}: a {kind.__module__}.{kind.__qualname__} cannot be stored without pickle. Return plain "
                "values and tensors from state_dict(), and rebuild the object in load_state_dict()."
            )
        return encoded

    def _encode_container(self, value: Any, path: tuple[str, ...], depth: int) -> Any:
        if id(value) in self._open:
            raise UnsupportedStateError(f"{_show(path)}: contains itself. Return a tree from state_dict().")
        if depth >= _MAX_DEPTH:
            raise UnsupportedStateError(f"{_show(path)}: nested deeper than {_MAX_DEPTH}. Flatten the state.")
        self._open.add(id(value))
        try:
            tag = leaves.CONTAINER_TAGS[type(value)]
            if isinstance(value, dict):
                return self._encode_dict(value, tag, path, depth)
            items = [self.encode(item, (*path, str(i)), depth + 1) for i, item in enumerate(value)]
            if tag in ("set", "frozenset"):
                items.sort(key=json.dumps)  # iteration order varies from process to process; equal sets, equal bytes
            if tag == "list":
                return items
            return {tag: [value.maxlen, items] if tag == "deque" else items}
        finally:
            self._open.discard(id(value))

    def _encode_dict(self, value: dict[Any, Any], tag: str, path: tuple[str, ...], depth: int) -> Any:
        if tag == "d" and all(type(leaves.encode_scalar(key)) is str for key in value):
            return {"d": {key: self.encode(item, (*path, key), depth + 1) for key, item in value.items()}}
        pairs = [
            [self.encode(key, (*path, f"key {key!r}"), depth + 1), self.encode(item, (*path, str(key)), depth + 1)]
            for key, item in value.items()
        ]
        return {"m" if tag == "d" else tag: pairs}


class _Loader:
    def __init__(self, views: dict[str, torch.Tensor], resolve: Resolve | None) -> None:
        self._views = views
        self._resolve = resolve
        self._tensors: dict[str, torch.Tensor] = {}

    def decode(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self.decode(item) for item in node]
        if not isinstance(node, dict):
            return node
        ((tag, body),) = node.items()
        if tag == "d":
            return {key: self.decode(item) for key, item in body.items()}
        if tag in leaves.MAPPINGS:
            return leaves.MAPPINGS[tag]((self.decode(key), self.decode(item)) for key, item in body)
        if tag in leaves.SEQUENCES:
            return leaves.SEQUENCES[tag](self.decode(item) for item in body)
        if tag == "deque":
            return leaves.deque((self.decode(item) for item in body[1]), maxlen=body[0])
        if tag == "x":
            if self._resolve is None:
                raise UnsupportedStateError(f"The tree refers to {str(body)[:200]}; give load_tree a resolve function.")
            return self._resolve(body)
        return leaves.decode_leaf(tag, body, self._tensor)

    def _tensor(self, body: Any) -> torch.Tensor:
        key = json.dumps(body)
        if key not in self._tensors:
            self._tensors[key] = leaves.decode_tensor(body, self._stored)
        return self._tensors[key]

    def _stored(self, index: int) -> torch.Tensor:
        # Clones: the views share one allocation with the file, which must not stay alive for one small tensor.
        key = f"stored {index}"
        if key not in self._tensors:
            source = self._views[f"t{index}"]
            self._tensors[key] = tensor_bytes(source).clone().view(source.dtype).view(source.shape)
        return self._tensors[key]


def _show(path: tuple[str, ...]) -> str:
    return "/".join(path) or "the state itself"
