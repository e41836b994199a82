"""Names of the checkpointers, and what each needs. Imports nothing heavy."""

from __future__ import annotations

import importlib.util

__all__ = ["LABELS", "NOT_PEERS", "OURS", "missing_package"]

LABELS = {
    "none": "none (against itself: the noise)",
    "torch-save": "blocking torch.save",
    "lightning": "Lightning ModelCheckpoint",
    "lightning-async": "Lightning AsyncCheckpointIO, one in flight",
    "dcp": "torch.distributed.checkpoint.async_save",
    "accelerate": "accelerate save_state",
    "dlrover": "DLRover flash checkpoint, memory",
    "nvrx": "NVRx local checkpoint, /dev/shm",
    "dense": "dense in memory (ours)",
    "sparse-auto": "ours, W = auto",
    "sparse-w4": "ours, W = 4",
    "sparse-w8": "ours, W = 8",
    "log-w8": "ours, gradient log, W = 8",
    "log-w16": "ours, gradient log, W = 16",
}
OURS = ("sparse-auto", "sparse-w4", "sparse-w8", "log-w8", "log-w16")
NOT_PEERS = ("none", "dense", *OURS)
_OPTIONAL = {"dlrover": "dlrover", "nvrx": "nvidia_resiliency_ext", "accelerate": "accelerate"}


def missing_package(name: str) -> str | None:
    """The module that a checkpointer needs and that cannot be imported here."""
    module = _OPTIONAL.get(name)
    return module if module is not None and importlib.util.find_spec(module) is None else None
