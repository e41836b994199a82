"""A slot captured into a file, as the engine does it, for tests that look at one slot alone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetion_lightning.capture.fence import DeviceFence
from moetion_lightning.capture.plan import CompiledSlot
from moetion_lightning.core.operators import Operator
from moetion_lightning.core.slot_contents import StoredTensors
from moetion_lightning.core.state import LiveState
from moetion_lightning.storage.host_memory import HostBuffer

__all__ = ["capture", "file_of"]


def file_of(compiled: CompiledSlot, sources: Any = None) -> dict[str, Tensor]:
    """The tensors of the file that a compiled slot fills now, by name."""
    with tempfile.TemporaryDirectory() as folder:
        buffer = HostBuffer(Path(folder) / "slot.safetensors", compiled.layout.nbytes)
        compiled.copy(sources or compiled.sources(), buffer)
        return {name: view.clone() for name, view in compiled.layout.views(buffer.tensor).items()}


def capture(
    live: LiveState,
    active: Sequence[Operator],
    frozen: Sequence[Operator],
    compute_dtype: Mapping[str, torch.dtype] | None = None,
) -> tuple[StoredTensors, Mapping[str, Any]]:
    """What a slot holds, and its scalars."""
    compiled = CompiledSlot(live, active, frozen, compute_dtype or {}, DeviceFence())
    return StoredTensors(file_of(compiled)), compiled.sources().scalars
