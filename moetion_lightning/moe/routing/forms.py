"""Read a routing decision in any of its forms, as tokens per expert."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moetion_lightning.core.layouts import MoELayer, Tap

__all__ = [
    "argument_reader",
    "in_recomputation",
    "item",
    "leading_rows",
    "repeated_forward",
    "site_name",
    "tokens_per_expert",
]

# Private, but the only exact sign that a forward runs inside a backward (reentrant and non-reentrant checkpointing).
# Without it, checkpointed layers count twice: all of them alike, so that the order of the experts stays right.
_graph_task_id: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)


_repeated = 0


@contextlib.contextmanager
def repeated_forward() -> Iterator[None]:
    """A forward in here repeats one whose tokens were counted."""
    global _repeated
    _repeated += 1
    try:
        yield
    finally:
        _repeated -= 1


def in_recomputation() -> bool:
    """Whether this forward is the repetition of one: by :func:`repeated_forward`, or by activation checkpointing.

    Always False while compiling: the traced graph holds one forward, and the private call would break it.
    """
    if torch.compiler.is_compiling() or _graph_task_id is None:
        return False
    return _repeated > 0 or _graph_task_id() != -1


def site_name(layer: MoELayer, tap: Tap) -> str | None:
    """Name of the module that a tap hooks, None if the layer has no such module."""
    return {"experts": layer.experts_module, "router": layer.router_module, "block": layer.block_module}[tap.site]


def item(value: Any, key: int | str | None) -> Any:
    """An item of a module's output: of a tuple or list by position, of a mapping by name, None for the whole."""
    if key is None:
        return value
    if isinstance(value, Mapping):
        return value.get(key)
    if isinstance(value, (tuple, list)) and isinstance(key, int) and -len(value) <= key < len(value):
        return value[key]
    return None


def argument_reader(module: nn.Module, key: int | str | None) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """A function that finds one argument of the module's forward, given by position or by name.

    Args:
        module: The module that is called.
        key: Position, not counting ``self``, or name.
    """
    try:
        # The class's forward: expert parallelism replaces the instance's by one that takes *args.
        names = list(inspect.signature(type(module).forward).parameters)[1:]
    except (TypeError, ValueError):
        names = []
    if isinstance(key, str):
        name, position = key, names.index(key) if key in names else -1
    else:
        position = key or 0
        name = names[position] if position < len(names) else ""

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if 0 <= position < len(args):
            return args[position]
        return kwargs.get(name)

    return read


def leading_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Tokens in a call: the product of all but the last dimension of its first floating-point tensor."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim():
            return math.prod(value.shape[:-1])
    return None


def tokens_per_expert(value: Any, tap: Tap, num_experts: int) -> torch.Tensor | None:
    """Tokens per expert from a mask, a load, a dispatch tensor or logits.

    Args:
        value: What passed at the tap.
        tap: Its form; ``index`` and ``rows`` are counted by the caller.
        num_experts: E; further columns (identity experts) are left out.

    Returns:
        int64 ``[E]`` on the device of ``value``, or None if the value has not the form that the tap says.
    """
    if tap.form == "load" and isinstance(value, (list, tuple)):
        value = torch.tensor([int(v) for v in value])
    if not isinstance(value, torch.Tensor):
        return None
    value = value.detach()
    if tap.form == "load":
        flat: torch.Tensor = value.reshape(-1)
        # Another length is a local or a global count under expert parallelism: not ours to guess.
        return flat.to(torch.int64) if flat.numel() == num_experts else None
    if tap.form == "dispatch":
        if value.dim() < 3 or value.shape[-2] < num_experts:
            return None
        used: torch.Tensor = (value != 0).reshape(-1, *value.shape[-2:])[:, :num_experts]
        return torch.sum(used, dim=(0, 2))
    if value.dim() < 1 or value.shape[-1] < num_experts:
        return None
    rows = value.reshape(-1, value.shape[-1])
    if tap.form == "logits":
        chosen = torch.zeros_like(rows, dtype=torch.int64)
        rows = chosen.scatter_(1, rows.topk(tap.top_k or 1, dim=-1).indices, 1)
    counts: torch.Tensor = (rows != 0).sum(dim=0)
    return counts[:num_experts]
