"""All model state of a rank, from a living rank that holds a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moetion_lightning.core.state import LiveState, read_slot, write_active
from moetion_lightning.distributed.live_copy import receive_state, send_state
from moetion_lightning.engine.static_state import whole_operators

__all__ = ["exchange_model_state"]


def exchange_model_state(live: LiveState, sources: Sequence[int | None], rank: int) -> None:
    """Send this rank's weights and optimizer state to the ranks that need them, or receive them. All ranks call it.

    Args:
        live: The live state; the ranks' parameter groups agree.
        sources: For each rank, the rank that sends to it, or None.
        rank: This rank.
    """
    device = next((weight.device for weight in map(live.weight, live.parameters)), torch.device("cpu"))
    operators = whole_operators(live, live.parameters)
    static = [name for name in live.parameters if name not in live.owner]
    for receiver, source in enumerate(sources):
        if source == rank:
            slot = read_slot(live, operators, (), {})
            tensors = [(item.name, item.source) for item in slot.items]
            send_state([*tensors, *((f"p:{n}", live.weight(n)) for n in static)], slot.scalars, receiver, device)
        elif receiver == rank and source is not None:
            received, scalars = receive_state(source, device)
            write_active(live, operators, received.__getitem__, scalars)
            with torch.no_grad():
                for name in static:
                    live.weight(name).copy_(received[f"p:{name}"])
