"""Parameters that do not train now, and what an optimizer keeps of those that trained before or may train later."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import xxhash

from moetion_lightning.core.operators import Operator, OperatorKind, Piece
from moetion_lightning.core.state import LiveState, read_slot, write_active

__all__ = ["read_static", "static_digest", "whole_operators", "write_static"]

_SAMPLE_ELEMENTS = 4096
#: In the tree beside the parameters; no parameter has a name that begins with a dot.
_OPTIMIZER = ".optimizer"


def whole_operators(live: LiveState, names: Iterable[str]) -> list[Operator]:
    """An operator for each of these parameters that an optimizer has and that is not empty in this process."""
    return [
        Operator(name=name, kind=OperatorKind.SHARED, pieces=(Piece(parameter=name),))
        for name in names
        if name in live.owner and live.weight(name).numel()
    ]


def static_digest(tree: Mapping[str, Any]) -> str:
    """Digest of a sample of what :func:`read_static` gave.

    In-place updates through ``.data`` (moving-average teachers) leave no trace in version counters, so a few thousand
    elements of each tensor are looked at: an update of the whole tensor changes them.
    """
    weights = {name: value for name, value in tree.items() if name != _OPTIMIZER}
    states = tree[_OPTIMIZER]
    digest = xxhash.xxh3_64(json.dumps([list(weights), states["scalars"]], sort_keys=True).encode())
    for tensor in [*weights.values(), *states["tensors"].values()]:
        flat = tensor.reshape(-1)
        step = max(1, flat.numel() // _SAMPLE_ELEMENTS)
        digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_static(live: LiveState, names: Sequence[str]) -> dict[str, Any]:
    """The parameters' values by name, and their optimizer state; copies nothing."""
    slot = read_slot(live, whole_operators(live, names), (), {})
    states = {item.name: item.source for item in slot.items if item.name.startswith("s:")}
    return {**{n: live.weight(n) for n in names}, _OPTIMIZER: {"tensors": states, "scalars": slot.scalars}}


@torch.no_grad()
def write_static(live: LiveState, tree: Mapping[str, Any]) -> None:
    """Put back what :func:`read_static` gave."""
    weights = {name: value for name, value in tree.items() if name != _OPTIMIZER}
    for name, value in weights.items():
        if name not in live.owner:
            live.weight(name).copy_(value)
    stored = {**{f"w:{name}": value for name, value in weights.items()}, **tree[_OPTIMIZER]["tensors"]}
    write_active(live, whole_operators(live, weights), stored.__getitem__, tree[_OPTIMIZER]["scalars"])
