"""What the metrics have in common: states that are sums, and a figure of their values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

__all__ = ["SumMetric"]


class SumMetric(Metric):
    """A metric whose states add up over ranks and survive in ``state_dict``.

    Args:
        **kwargs: See ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound: float | None = 0.0

    def add_sums(self, *names: str, zeros: Tensor | None = None) -> None:
        """Add states.

        Args:
            *names: Their names.
            zeros: What each begins with; None: a float64.
        """
        for name in names:
            begin = torch.zeros((), dtype=torch.float64) if zeros is None else zeros.clone()
            self.add_state(name, default=begin, dist_reduce_fx="sum", persistent=True)

    def plot(self, val: Any = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Draw a value, or several ones as a course; needs matplotlib.

        Args:
            val: Results of ``compute`` or ``forward``, one or several; None takes the present one.
            ax: Where to draw; None makes a figure.
        """
        return self._plot(val, ax)
