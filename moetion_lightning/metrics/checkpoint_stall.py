"""Time that training waits for its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.metrics.functional import checkpoint_stall

__all__ = ["CheckpointStall"]


class CheckpointStall(Metric):
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

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound: float = 0.0

    stall_seconds: Tensor
    iteration_seconds: Tensor
    num_iterations: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("stall_seconds", "iteration_seconds"):
            zero = torch.zeros((), dtype=torch.float64)
            self.add_state(name, default=zero, dist_reduce_fx="sum", persistent=True)
        none = torch.zeros((), dtype=torch.int64)
        self.add_state("num_iterations", default=none, dist_reduce_fx="sum", persistent=True)

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

    def plot(
        self, val: dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None, ax: _AX_TYPE | None = None
    ) -> _PLOT_OUT_TYPE:
        """Draw values, or several ones as a course; needs matplotlib.

        Args:
            val: Results of ``compute`` or ``forward``; None takes the present one.
            ax: Where to draw; None makes a figure.
        """
        return self._plot(val, ax)
