"""The control plane of a job that something else has started: on the store of its default process group."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from moetion_lightning.distributed.control import StoreControl

__all__ = ["default_control", "default_world"]

_runs = 0


def default_world() -> tuple[int, int]:
    """This process's rank in the default process group, and the group's size; ``(0, 1)`` without one."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def default_control(timeout_seconds: float = 1800.0) -> StoreControl:
    """A control plane of its own for each training run of this process; all ranks make as many."""
    global _runs
    _runs += 1
    store: Any = _get_default_store()
    return StoreControl(
        store.clone(),
        dist.get_rank(),
        dist.get_world_size(),
        scope=f"moetion/run{_runs}",
        timeout_seconds=timeout_seconds,
    )
