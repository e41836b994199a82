"""Lightning callbacks: hooks handed to the engine, nothing else."""

from moetion_lightning.callbacks.dense_in_memory_checkpoint import DenseInMemoryCheckpoint
from moetion_lightning.callbacks.dense_reconstruction import DenseReconstruction
from moetion_lightning.callbacks.partial_experts_checkpoint import PartialExpertsCheckpoint
from moetion_lightning.callbacks.sparse_expert_checkpoint import SparseExpertCheckpoint

__all__ = ["DenseInMemoryCheckpoint", "DenseReconstruction", "PartialExpertsCheckpoint", "SparseExpertCheckpoint"]
