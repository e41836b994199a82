"""When sparse windows could not be replayed exactly, so that every window must be dense."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from moetion_lightning.core.state import LiveState
from moetion_lightning.engine.steps import StepWatcher

__all__ = ["why_coupled", "why_dense"]


def why_coupled(live: LiveState) -> str:
    """Why what optimizers keep cannot be taken apart by parameter, or ""."""
    coupling = live.couples_parameters()
    if coupling:
        return f"{', '.join(coupling)} keeps state that belongs to no single parameter"
    across = live.couples_shards()
    if across:
        return f"{', '.join(across)} couples the shards that different ranks hold"
    return ""


def why_dense(live: LiveState, watcher: StepWatcher, steps: Sequence[int]) -> str:
    """The reason, or "".

    Args:
        live: The live state.
        watcher: What was seen of the optimizers so far.
        steps: Real steps of each optimizer in the last iteration.
    """
    coupled = why_coupled(live)
    if coupled:
        return coupled
    if watcher.closure_calls > 1:
        return "an optimizer evaluates its closure several times per step"
    stepped = [index for index, count in enumerate(steps) if count]
    for first, second in itertools.combinations(stepped, 2):
        if live.shares_parameters(first, second):
            both = f"{type(live.optimizers[first]).__name__} and {type(live.optimizers[second]).__name__}"
            return f"{both} step within one iteration and update the same parameters"
    if max(steps) > 1:
        return f"an optimizer stepped {max(steps)} times within one iteration"
    if watcher.self_tuning:
        names = sorted(type(live.optimizers[i]).__name__ for i in watcher.self_tuning)
        return f"{', '.join(names)} changes its own settings from the state of all parameters"
    return ""
