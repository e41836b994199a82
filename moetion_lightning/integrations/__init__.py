"""Adapters for training loops outside of the Lightning Trainer."""

from __future__ import annotations

from moetion_lightning.distributed.torchrun import separate_restarts
from moetion_lightning.integrations.accelerate import attach
from moetion_lightning.integrations.fabric import FabricCheckpointing
from moetion_lightning.integrations.loop import SparseCheckpointing

__all__ = ["FabricCheckpointing", "SparseCheckpointing", "attach", "separate_restarts"]
