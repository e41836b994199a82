"""Tensors inside nested dicts, lists and tuples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["replace_tensors", "tensors_of"]


def replace_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: replace_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(replace_tensors(value, function) for value in tree)
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    replace_tensors(tree, found.append)
    return found
