"""Long lists of small tensors as one tensor each, without reading again what was read before."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["PackedLists", "pack"]

_MAX_ELEMENTS = 64  # of one tensor
_version = operator.attrgetter("_version")
_kind = operator.attrgetter("dtype", "device", "layout")


def pack(values: list[Any]) -> Tensor | None:
    """The tensors of a list as one tensor; None if they are large, or of several kinds, or one of them occurs twice."""
    first = values[0]
    if type(first) is not Tensor or first.numel() > _MAX_ELEMENTS or first.layout is not torch.strided:
        return None
    if set(map(type, values)) != {Tensor} or len(set(map(id, values))) < len(values):
        return None
    if len(set(map(_kind, values))) > 1:
        return None
    try:
        with torch.no_grad():
            return torch.stack(values)
    except RuntimeError:  # shapes differ
        return None


@dataclass
class _Packed:
    values: list[Tensor]
    versions: int
    buffer: Tensor


class PackedLists:
    """Remembers the lists that it has packed: of a list that has only grown, the new tensors are read.

    It refers to the tensors until the next time; lists of tensors with a graph behind them are not remembered.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Packed] = {}
        self._used: set[int] = set()

    def begin(self) -> None:
        """Forget lists that were not asked for since the last call."""
        self._known = {key: packed for key, packed in self._known.items() if key in self._used}
        self._used = set()

    def pack(self, values: list[Any]) -> Tensor | None:
        """As the function :func:`pack`; what is returned does not change, and nothing of it may be changed."""
        known = self._known.get(id(values))
        if known is not None:
            count = len(known.values)
            same = len(values) >= count and all(map(operator.is_, known.values, values))
            if same and sum(map(_version, known.values)) == known.versions:
                return self._grown(known, values, count)
            del self._known[id(values)]
        packed = pack(values)
        if packed is not None and not any(t.requires_grad or t.is_inference() for t in values):
            self._used.add(id(values))
            self._known[id(values)] = _Packed(list(values), sum(map(_version, values)), packed)
        return packed

    def _grown(self, known: _Packed, values: list[Any], count: int) -> Tensor | None:
        self._used.add(id(values))
        new = values[count:]
        if new:
            more = pack(new)
            head = known.buffer
            if (
                more is None
                or more.shape[1:] != head.shape[1:]
                or more.dtype != head.dtype
                or more.device != head.device
            ):
                del self._known[id(values)]
                return pack(values)
            if any(t.requires_grad for t in new):
                del self._known[id(values)]
                return torch.cat([head[:count], more])
            if len(values) > head.shape[0]:
                grown = head.new_empty((2 * len(values), *head.shape[1:]))
                grown[:count] = head[:count]
                known.buffer = head = grown
            head[count : len(values)] = more
            known.values += new
            known.versions += sum(map(_version, new))
        return known.buffer[: len(values)]
