"""Metrics of fault-tolerant Mixture-of-Experts training, by the conventions of torchmetrics.

Each keeps sums only: they add up over ranks, survive in ``state_dict`` and go on after a restart.
:class:`~moetion_lightning.callbacks.FaultToleranceMonitor` feeds them from the events of a run; they work without it.
"""

from moetion_lightning.metrics.badput import Badput
from moetion_lightning.metrics.checkpoint_stall import CheckpointStall
from moetion_lightning.metrics.effective_time import EffectiveTrainingTimeRatio
from moetion_lightning.metrics.expert_load import ExpertLoad, ExpertLoadImbalance
from moetion_lightning.metrics.lost_tokens import ProportionOfLostTokens

__all__ = [
    "Badput",
    "CheckpointStall",
    "EffectiveTrainingTimeRatio",
    "ExpertLoad",
    "ExpertLoadImbalance",
    "ProportionOfLostTokens",
]
