"""What an evaluation step returns, as JSON and tensors, for the ranks that do not have the last stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["decode", "encode"]


def encode(value: Any) -> tuple[Any, list[Tensor]]:
    """Tensors, numbers, strings, None, and lists, tuples and dicts of them; anything else becomes None."""
    tensors: list[Tensor] = []
    return _encode(value, tensors), tensors


def _encode(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return {"t": len(tensors) - 1}
    if isinstance(value, Mapping):
        return {"d": [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "l" if isinstance(value, list) else "u"
        return {kind: [_encode(item, tensors) for item in value]}
    return {"v": value if isinstance(value, (bool, int, float, str)) else None}


def decode(described: Any, tensors: list[Tensor]) -> Any:
    """What :func:`encode` described."""
    ((kind, content),) = described.items()
    if kind == "t":
        return tensors[content]
    if kind == "d":
        return {decode(key, tensors): decode(value, tensors) for key, value in content}
    if kind in ("l", "u"):
        values = [decode(item, tensors) for item in content]
        return values if kind == "l" else tuple(values)
    return content
