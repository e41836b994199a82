"""Lightning callbacks: hooks handed to the engine, nothing else."""

import moetion_lightning.strategies  # noqa: F401  so that Trainer(strategy="moetion") is known where a callback is
from moetion_lightning.callbacks.dense_in_memory_checkpoint import DenseInMemoryCheckpoint
from moetion_lightning.callbacks.dense_reconstruction import DenseReconstruction
from moetion_lightning.callbacks.fault_tolerance_monitor import FaultToleranceMonitor
from moetion_lightning.callbacks.gradient_log_checkpoint import GradientLogCheckpoint
from moetion_lightning.callbacks.partial_experts_checkpoint import PartialExpertsCheckpoint
from moetion_lightning.callbacks.sparse_expert_checkpoint import SparseExpertCheckpoint
from moetion_lightning.callbacks.stage_boundary_logging import StageBoundaryLogging
from moetion_lightning.callbacks.two_phase_checkpoint import TwoPhaseCheckpoint

__all__ = [
    "DenseInMemoryCheckpoint",
    "DenseReconstruction",
    "FaultToleranceMonitor",
    "GradientLogCheckpoint",
    "PartialExpertsCheckpoint",
    "SparseExpertCheckpoint",
    "StageBoundaryLogging",
    "TwoPhaseCheckpoint",
]
