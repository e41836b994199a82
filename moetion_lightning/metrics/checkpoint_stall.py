"""Time that training waits for its checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.metrics.functional import checkpoint_stall
from moetion_lightning.metrics.sums import SumMetric

__all__ = ["CheckpointStall"]


class CheckpointStall(SumMetric):
    """Seconds that an iteration waits for captures, and their share of its time.

    A capture copies the state while the next forward and backward run; the optimizer must wait for what is not copied
    yet. That wait is the stall. Over ranks the sums add up, so that values are means over all ranks' iterations.

    Args:
        **kwargs: See ``torchmetrics.Metric``.

    Source:
        MoC-System (ASPLOS'25), section 2: overhead of saving, ``max(0, T_snapshot - T_forward_backward)``.

    Example:
        >>> metric = CheckpointStall()
        >>> metric.update(stall_seconds=0.2, iteration_seconds=1.0)
        >>> metric.update(stall_seconds=0.0, iteration_seconds=3.0)
        >>> metric.compute()
        {'seconds_per_iteration': tensor(0.1000, dtype=torch.float64), 'share': tensor(0.0500, dtype=torch.float64)}
    """

    higher_is_better = False

    stall_seconds: Tensor
    iteration_seconds: Tensor
    num_iterations: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums("stall_seconds", "iteration_seconds")
        self.add_sums("num_iterations", zeros=torch.zeros((), dtype=torch.int64))

    def update(self, stall_seconds: float, iteration_seconds: float, num_iterations: int = 1) -> None:
        """Add iterations.

        Args:
            stall_seconds: Seconds that they waited for captures.
            iteration_seconds: Seconds that they took, waiting included.
            num_iterations: How many they were.

        Raises:
            ConfigurationError: A value is negative.
        """
        if min(stall_seconds, iteration_seconds, num_iterations) < 0:
            raise ConfigurationError(
                f"CheckpointStall.update(stall_seconds={stall_seconds}, iteration_seconds={iteration_seconds}, "
                f"num_iterations={num_iterations}): expected values >= 0"
            )
        self.stall_seconds += stall_seconds
        self.iteration_seconds += iteration_seconds
        self.num_iterations += num_iterations

    def compute(self) -> dict[str, Tensor]:
        """``seconds_per_iteration`` and ``share`` in [0, 1], float64; 0 before the first iteration."""
        return checkpoint_stall(self.stall_seconds, self.iteration_seconds, self.num_iterations)
