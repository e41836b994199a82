"""Exact sparse checkpointing and recovery of Mixture-of-Experts training for Lightning.

The public names are loaded when first used, so that ``import moetion_lightning`` sets nothing and imports neither torch
nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetion_lightning.callbacks import (
        DenseInMemoryCheckpoint,
        FaultToleranceMonitor,
        GradientLogCheckpoint,
        PartialExpertsCheckpoint,
        SparseExpertCheckpoint,
        StageBoundaryLogging,
    )
    from moetion_lightning.core.layouts import MoESpec
    from moetion_lightning.errors import MoEtionError
    from moetion_lightning.integrations import attach
    from moetion_lightning.integrations.hf_trainer import MoEtionTrainerCallback
    from moetion_lightning.strategies import MoEtionStrategy

__version__ = "0.1.0"

__all__ = [
    "DenseInMemoryCheckpoint",
    "FaultToleranceMonitor",
    "GradientLogCheckpoint",
    "MoESpec",
    "MoEtionError",
    "MoEtionStrategy",
    "MoEtionTrainerCallback",
    "PartialExpertsCheckpoint",
    "SparseExpertCheckpoint",
    "StageBoundaryLogging",
    "__version__",
    "attach",
]

_HOMES = {
    "DenseInMemoryCheckpoint": "moetion_lightning.callbacks",
    "FaultToleranceMonitor": "moetion_lightning.callbacks",
    "GradientLogCheckpoint": "moetion_lightning.callbacks",
    "MoESpec": "moetion_lightning.core.layouts",
    "MoEtionError": "moetion_lightning.errors",
    "MoEtionStrategy": "moetion_lightning.strategies",
    "MoEtionTrainerCallback": "moetion_lightning.integrations.hf_trainer",
    "PartialExpertsCheckpoint": "moetion_lightning.callbacks",
    "SparseExpertCheckpoint": "moetion_lightning.callbacks",
    "StageBoundaryLogging": "moetion_lightning.callbacks",
    "attach": "moetion_lightning.integrations",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its home module at first use."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
