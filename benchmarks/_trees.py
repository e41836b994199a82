"""Tensors inside nested dicts, lists and tuples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["replace", "replace_tensors", "tensors_of"]


def replace(tree: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The tree with ``function(leaf)`` for each leaf of this kind."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, dict):
        return {key: replace(value, kind, function) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(replace(value, kind, function) for value in tree)
    return tree


def replace_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    return replace(tree, Tensor, function)


def tensors_of(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    replace_tensors(tree, found.append)
    return found
