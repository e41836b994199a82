"""How single values of run state are written as JSON and tensors, and read back."""

from __future__ import annotations

import base64
import datetime
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from moetion_lightning.core.kept_values import Fresh, Unchanging
from moetion_lightning.errors import UnsupportedStateError
from moetion_lightning.storage.format import is_storable, tensor_bytes

__all__ = [
    "CONTAINER_TAGS",
    "MAPPINGS",
    "SEQUENCES",
    "TensorCollector",
    "decode_leaf",
    "decode_tensor",
    "deque",
    "encode_leaf",
    "encode_scalar",
]

CONTAINER_TAGS: dict[type, str] = {
    list: "list",
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    deque: "deque",
    dict: "d",
    Fresh: "d",
    Unchanging: "d",
    defaultdict: "d",
    OrderedDict: "od",
    Counter: "counter",
}
SEQUENCES: dict[str, Callable[[Iterable[Any]], Any]] = {"tuple": tuple, "frozenset": frozenset}
MAPPINGS: dict[str, Callable[[], Any]] = {"m": dict, "od": OrderedDict, "counter": Counter}

_INLINE_BYTES = 8192  # longer byte strings are stored beside the JSON; states of generators are shorter
_PATHS = {"path": Path, "posix": PurePosixPath, "windows": PureWindowsPath}
_DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}


class TensorCollector:
    """Gathers tensors while a tree is walked; decides at the end how each is stored.

    Views of one storage that together have at least its bytes are stored as that storage, once.
    """

    def __init__(self) -> None:
        # The tensors are kept until the end: a freed storage's address could be given to another tensor.
        self._views: dict[tuple[object, ...], tuple[torch.Tensor, dict[str, Any]]] = {}
        self._storages: dict[tuple[object, ...], list[tuple[object, ...]]] = {}
        #: How often a tensor was added.
        self.added = 0

    def add(self, tensor: torch.Tensor) -> dict[str, Any]:
        """A JSON reference to a tensor; complete only after :meth:`finish`."""
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise UnsupportedStateError(
                f"a tensor of type {type(tensor).__qualname__} keeps values outside its own bytes. Return a plain "
                "tensor from state_dict() (for a DTensor: to_local())."
            )
        if tensor.layout is not torch.strided or not is_storable(tensor.dtype) or tensor.device.type == "meta":
            raise UnsupportedStateError(
                f"a tensor of layout {tensor.layout}, dtype {tensor.dtype} on {tensor.device} has no plain bytes. "
                "Return a dense tensor from state_dict()."
            )
        self.added += 1
        tensor = tensor.detach().resolve_conj().resolve_neg()
        storage = tensor.untyped_storage()
        # Storages without memory all have address 0.
        place = (str(tensor.device), storage.data_ptr() or f"empty {len(self._views)}")
        key = (*place, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in self._views:
            self._views[key] = (tensor, {"t": []})
            self._storages.setdefault(place, []).append(key)
        return self._views[key][1]

    def finish(self, *, clone: bool) -> list[torch.Tensor]:
        """Fill the references in; returns the tensors to store, contiguous, copied to the CPU if ``clone``."""
        tensors: list[torch.Tensor] = []
        for keys in self._storages.values():
            views = [self._views[key] for key in keys]
            storage = views[0][0].untyped_storage()
            is_shared = len(views) > 1 and sum(v.numel() * v.itemsize for v, _ in views) >= storage.nbytes() > 0
            if is_shared:
                whole = torch.empty(0, dtype=torch.uint8, device=views[0][0].device).set_(storage)
                tensors.append(_stored(whole, clone=clone))
            for view, reference in views:
                if is_shared:
                    dtype = str(view.dtype).removeprefix("torch.")
                    placing = [dtype, list(view.shape), list(view.stride()), view.storage_offset()]
                    reference["t"] = [len(tensors) - 1, placing]
                else:
                    reference["t"] = [len(tensors)]
                    tensors.append(_stored(view, clone=clone))
        return tensors


def _stored(tensor: torch.Tensor, *, clone: bool) -> torch.Tensor:
    if not clone:
        return tensor.contiguous()
    if tensor.device.type != "cpu":
        return tensor.to("cpu").contiguous()
    if not tensor.is_contiguous():
        return tensor.contiguous()
    return tensor_bytes(tensor).clone().view(tensor.dtype).view(tensor.shape)


def decode_tensor(body: Any, stored: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The tensor behind a reference, given the stored ones by index."""
    base = stored(body[0])
    if len(body) == 1:
        return base
    name, shape, stride, offset = body[1]
    dtype = _DTYPES[name]
    whole = base[: base.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
    return whole.as_strided(shape, stride, offset)  # raises RuntimeError past the end


def encode_scalar(value: Any) -> Any:
    """JSON of a plain scalar, ``NotImplemented`` for anything else. Exact types only: subclasses may mean more."""
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else {"i": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"f": struct.pack(">d", value).hex()}
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:  # lone surrogates, as in undecodable file names
            return {"s": value.encode("utf-8", "surrogatepass").hex()}
        return value
    return NotImplemented


def encode_leaf(value: Any, store: TensorCollector) -> Any:
    """JSON of any other supported value, ``NotImplemented`` for the rest."""
    kind = type(value)
    if isinstance(value, torch.Tensor) and value.layout is torch.sparse_coo:
        parts = [store.add(value.detach()._indices()), store.add(value.detach()._values())]
        return {"coo": [*parts, list(value.shape), value.is_coalesced()]}
    if isinstance(value, torch.Tensor):
        return store.add(value)
    if kind in (bytes, bytearray):
        tag = "b" if kind is bytes else "ba"
        if len(value) <= _INLINE_BYTES:
            return {tag: base64.b64encode(value).decode()}
        return {f"{tag}t": store.add(torch.frombuffer(bytearray(value), dtype=torch.uint8))}
    if kind is np.ndarray or isinstance(value, np.generic):
        return _encode_numpy(value, store)
    if isinstance(value, PurePath):
        is_windows = isinstance(value, PureWindowsPath)
        name = "path" if isinstance(value, Path) else "windows" if is_windows else "posix"
        return {"p": [name, encode_scalar(str(value))]}
    if kind is datetime.datetime and value.tzinfo is not None and type(value.tzinfo) is not datetime.timezone:
        raise UnsupportedStateError(
            f"a datetime with the time zone {value.tzinfo!r} is not supported. Convert it to UTC in state_dict()."
        )
    if kind in _ENCODERS:
        tag, encode = _ENCODERS[kind]
        return {tag: encode(value)}
    return NotImplemented


def _encode_numpy(value: Any, store: TensorCollector) -> Any:
    name = value.dtype.str
    if value.dtype.hasobject or value.dtype.names is not None or np.dtype(name) != value.dtype:
        raise UnsupportedStateError(
            f"a numpy value of dtype {value.dtype} is not supported. Return arrays of plain numbers from state_dict()."
        )
    data = value.tobytes()
    if isinstance(value, np.generic):
        return {"ns": [name, data.hex()]}
    if len(data) <= _INLINE_BYTES:
        return {"n": [name, list(value.shape), base64.b64encode(data).decode()]}
    # tobytes() has copied already: the array may change afterwards.
    return {"nt": [name, list(value.shape), store.add(torch.frombuffer(bytearray(data), dtype=torch.uint8))]}


def _numpy_array(name: str, shape: list[int], data: bytes) -> np.ndarray[Any, Any]:
    dtype = np.dtype(name)
    if dtype.hasobject:
        raise ValueError(f"numpy dtype {name!r}")
    if dtype.itemsize == 0 or not data:
        return np.zeros(shape, dtype)
    array: np.ndarray[Any, Any] = np.frombuffer(data, dtype).reshape(shape).copy()
    return array


def _decode_scalar(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((tag, body),) = value.items()
    return _DECODERS[tag](body)


_ENCODERS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    complex: ("c", lambda value: [encode_scalar(value.real), encode_scalar(value.imag)]),
    torch.dtype: ("dtype", lambda value: str(value).removeprefix("torch.")),
    torch.device: ("device", str),
    torch.Size: ("size", list),
    datetime.timedelta: ("td", lambda value: [value.days, value.seconds, value.microseconds]),
    datetime.datetime: ("dt", lambda value: [value.isoformat(), value.fold]),
    datetime.date: ("date", datetime.date.isoformat),
}
_DECODERS: dict[str, Callable[[Any], Any]] = {
    "i": lambda body: int(body, 16),
    "f": lambda body: struct.unpack(">d", bytes.fromhex(body))[0],
    "s": lambda body: bytes.fromhex(body).decode("utf-8", "surrogatepass"),
    "b": lambda body: base64.b64decode(body, validate=True),
    "ba": lambda body: bytearray(base64.b64decode(body, validate=True)),
    "c": lambda body: complex(_decode_scalar(body[0]), _decode_scalar(body[1])),
    "dtype": lambda body: _DTYPES[body],
    "device": torch.device,
    "size": torch.Size,
    "ns": lambda body: _numpy_array(body[0], [], bytes.fromhex(body[1]))[()],
    "n": lambda body: _numpy_array(body[0], body[1], base64.b64decode(body[2], validate=True)),
    "p": lambda body: _PATHS[body[0]](_decode_scalar(body[1])),
    "td": lambda body: datetime.timedelta(days=body[0], seconds=body[1], microseconds=body[2]),
    "dt": lambda body: datetime.datetime.fromisoformat(body[0]).replace(fold=body[1]),
    "date": datetime.date.fromisoformat,
}


def decode_leaf(tag: str, body: Any, tensor: Callable[[Any], torch.Tensor]) -> Any:
    """The value behind a tag. Raises the builtin errors of malformed input."""
    if tag == "t":
        return tensor(body)
    if tag == "coo":
        indices, values, size, coalesced = body
        made = torch.sparse_coo_tensor(tensor(indices["t"]), tensor(values["t"]), size, check_invariants=True)
        return made._coalesced_(coalesced)
    if tag == "bt":
        return tensor(body["t"]).numpy().tobytes()
    if tag == "bat":
        return bytearray(tensor(body["t"]).numpy().tobytes())
    if tag == "nt":
        return _numpy_array(body[0], body[1], tensor(body[2]["t"]).numpy().tobytes())
    return _DECODERS[tag](body)
