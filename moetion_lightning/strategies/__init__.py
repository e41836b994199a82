"""Strategies for Lightning's Trainer. Importing this registers them: ``Trainer(strategy="moetion")``."""

from __future__ import annotations

from lightning.pytorch.strategies import StrategyRegistry

from moetion_lightning.strategies.expert_layout import ExpertLayout
from moetion_lightning.strategies.moetion_strategy import MoEtionStrategy

__all__ = ["ExpertLayout", "MoEtionStrategy"]

if MoEtionStrategy.strategy_name not in StrategyRegistry:
    MoEtionStrategy.register_strategies(StrategyRegistry)
