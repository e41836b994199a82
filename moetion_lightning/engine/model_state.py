"""All model state of a rank, from a living rank that holds a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moetion_lightning.core.operators import Piece
from moetion_lightning.core.slot_contents import read_kept, write_kept
from moetion_lightning.core.state import LiveState
from moetion_lightning.distributed.messages import receive_state, send_state
from moetion_lightning.engine.static_state import weight_parts

__all__ = ["exchange_model_state"]


def exchange_model_state(live: LiveState, sources: Sequence[int | None], rank: int) -> None:
    """Send this rank's weights and optimizer state to the ranks that need them, or receive them. All ranks call it.

    Args:
        live: The live state; the ranks' parameter groups agree.
        sources: For each rank, the rank that sends to it, or None.
        rank: This rank.
    """
    device = next((weight.device for weight in map(live.weight, live.parameters)), torch.device("cpu"))
    parts = {f"p:{n}:{path}": part for n in live.parameters for path, part in weight_parts(live, n).items()}
    for receiver, source in enumerate(sources):
        if source == rank:
            tensors, scalars = read_kept(live, [name for name in live.owners if live.weight(name).numel()])
            send_state([*parts.items(), *tensors.items()], scalars, receiver, device)
        elif receiver == rank and source is not None:
            received, scalars = receive_state(source, device)
            with torch.no_grad():
                for key, part in parts.items():
                    part.copy_(received[key])
            for name, saved in scalars.items():
                write_kept(live, Piece(parameter=name), received.__getitem__, saved)
