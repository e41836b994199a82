"""Effective training time ratio."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.metrics.functional import effective_training_time_ratio
from moetion_lightning.metrics.sums import SumMetric

__all__ = ["EffectiveTrainingTimeRatio"]


class EffectiveTrainingTimeRatio(SumMetric):
    r"""Share of the wall time in which training went forward (ETTR).

    .. math:: \text{ETTR} = \frac{\sum \text{useful seconds}}{\sum \text{wall seconds}}

    Wall time passes from the first start of the job to now, through failures, restarts and the time in between. Useful
    are the seconds of iterations without the stalls for their checkpoints, each iteration once: an iteration that was
    lost and done again counts as it was done last, and all that was spent on it before does not.

    States are sums, so ranks add up: the value of a job is the mean over its ranks, weighted by wall time. They are in
    ``state_dict``, because the ratio of one process's lifetime is not that of the job.

    Args:
        **kwargs: See ``torchmetrics.Metric``.

    Source:
        MoEtion (NSDI'26, published as MoEvement), evaluation; ``arXiv:2410.21680`` for the expectation.

    Example:
        >>> metric = EffectiveTrainingTimeRatio()
        >>> metric.update(useful_seconds=60.0, wall_seconds=60.0)
        >>> metric.update(useful_seconds=30.0, wall_seconds=60.0)  # a failure: half of it was done again
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better = True
    plot_upper_bound: float = 1.0

    useful_seconds: Tensor
    wall_seconds: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums("useful_seconds", "wall_seconds")

    def update(self, useful_seconds: float | Tensor = 0.0, wall_seconds: float | Tensor = 0.0) -> None:
        """Add time.

        Args:
            useful_seconds: Seconds in which training went forward.
            wall_seconds: Seconds that have passed; useful ones are part of them, but may be told at another time.

        Raises:
            ConfigurationError: A value is negative.
        """
        for name, value in (("useful_seconds", useful_seconds), ("wall_seconds", wall_seconds)):
            if float(value) < 0:
                raise ConfigurationError(f"EffectiveTrainingTimeRatio.update({name}={float(value)}): expected >= 0")
        self.useful_seconds += useful_seconds
        self.wall_seconds += wall_seconds

    def compute(self) -> Tensor:
        """The ratio, float64 in [0, 1]; 0 before any time has passed."""
        return effective_training_time_ratio(self.useful_seconds, self.wall_seconds)
