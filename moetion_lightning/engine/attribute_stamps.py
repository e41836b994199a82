"""Stamps of attributes: equal as long as the value is, and cheap to make."""

from __future__ import annotations

import datetime
import itertools
from collections import deque
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from moetion_lightning.core.containers import is_proxy, item, length, pairs, values
from moetion_lightning.core.kept_values import class_name
from moetion_lightning.engine.users_classes import NOT_FOLLOWED, UsersClasses

__all__ = ["FIXED_TYPES", "stamp"]

#: Values of these types cannot change in place.
FIXED_TYPES = frozenset(
    (
        *(type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size),
        *(datetime.date, datetime.datetime, datetime.timedelta),
    )
)
_WHOLE_BYTES = 1 << 20  # larger tensors and arrays are stamped by a sample
_SAMPLE = 4096
_LONG = 10_000  # longer containers are stamped by a sample
_MAX_DEPTH = 8


def stamp(value: Any, users: UsersClasses, depth: int = 0) -> Any:
    """Something small that is equal as long as the value is; it refers to nothing that a user may want to give up."""
    kind = type(value)
    if kind in FIXED_TYPES:
        return value
    if is_proxy(kind):
        return (kind, id(value))
    if isinstance(value, Tensor):
        return _stamp_tensor(value)
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype.str, _digest_array(value))
    if isinstance(value, (np.generic, PurePath, Enum)):
        return value
    if depth >= _MAX_DEPTH or isinstance(value, NOT_FOLLOWED):
        return (kind, id(value))
    if isinstance(value, dict):
        size = length(value)
        items = pairs(value) if size <= _LONG else _sampled_dict(value)
        return (kind, size, tuple(map(_key, items)), tuple(stamp(entry, users, depth + 1) for _, entry in items))
    if isinstance(value, (list, tuple, deque)):
        size = length(value)
        some = values(value) if size <= _LONG else _sampled(value)
        if set(map(type, some)) <= FIXED_TYPES:
            return (kind, size, tuple(some))
        return (kind, size, tuple(stamp(entry, users, depth + 1) for entry in some))
    if isinstance(value, (set, frozenset)):
        return (kind, len(value), frozenset(map(_stamp_item, value)) if len(value) <= _LONG else None)
    if users.is_object(value):
        own = vars(value)
        return (kind, tuple(own), tuple(stamp(entry, users, depth + 1) for entry in own.values()))
    attributes = getattr(value, "__dict__", None)
    if attributes is not None and class_name(kind) in ("argparse:Namespace", "types:SimpleNamespace"):
        return (kind, tuple(attributes), tuple(stamp(entry, users, depth + 1) for entry in attributes.values()))
    return (kind, id(value))


def _stamp_item(value: Any) -> Any:
    return value if type(value) in FIXED_TYPES else (type(value), repr(value))


def _key(pair: tuple[Any, Any]) -> Any:
    return _stamp_item(pair[0])


def _sampled(container: Any) -> list[Any]:
    size = length(container)
    if isinstance(container, deque):
        return [item(container, index) for index in (0, size // 2, -1)]
    return [*item(container, slice(None, None, max(1, size // _SAMPLE))), *item(container, slice(-16, None))]


def _sampled_dict(value: dict[Any, Any]) -> list[tuple[Any, Any]]:
    items = dict.items(value)
    return [*itertools.islice(items, _SAMPLE), next(reversed(items))]


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
    return xxhash.xxh3_64_intdigest(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _digest_array(value: np.ndarray[Any, Any]) -> Any:
    if value.dtype.hasobject:
        return id(value)
    if value.nbytes > _WHOLE_BYTES:
        flat = value.reshape(-1) if value.flags.c_contiguous else value[0].reshape(-1)
        value = flat[:: max(1, flat.size // _SAMPLE)]
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(value).tobytes())
