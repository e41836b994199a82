"""Training state from a living rank to a new one, over the training's own process group; no pickle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moetion_lightning.distributed.messages import receive_message, send_message

__all__ = ["receive_state", "send_state"]


def send_state(tensors: Sequence[tuple[str, Tensor]], header: Mapping[str, Any], to: int, device: torch.device) -> None:
    """Send tensors by name, and plain values.

    Args:
        tensors: On any device; each is sent as its bytes.
        header: JSON.
        to: Global rank; it calls :func:`receive_state` at the same time.
        device: What the process group communicates from.
    """
    send_message([[name for name, _ in tensors], dict(header)], [t for _, t in tensors], to, device)


def receive_state(source: int, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Receive what ``source`` sends. Returns the tensors by name, on ``device``, and the header."""
    (names, header), tensors = receive_message(source, device)
    return dict(zip(names, tensors)), header
