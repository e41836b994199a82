"""What the wall time of a run went into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moetion_lightning.badput import Use
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.metrics.functional import badput
from moetion_lightning.metrics.sums import SumMetric

__all__ = ["Badput"]


class Badput(SumMetric):
    """Seconds of wall time by what they went into: ``productive``, and one cause of badput each for the others.

    The causes are ``start``, ``detection``, ``groups``, ``restore``, ``replay`` (or rebuild), ``redo``, ``stall``,
    ``validation`` and ``idle``; see :class:`~moetion_lightning.badput.Use`. Each second is given to one of them, so
    that all together are the wall time. Over ranks the values are means: the same second of several ranks is one.

    Args:
        **kwargs: See ``torchmetrics.Metric``.

    Example:
        >>> metric = Badput()
        >>> metric.update({"productive": 6.0, "start": 1.5})
        >>> metric.update({"productive": 2.0, "redo": 0.5})
        >>> values = metric.compute()
        >>> float(values["productive"]), float(values["start"]), float(values["wall"])
        (8.0, 1.5, 10.0)
    """

    higher_is_better = False
    plot_upper_bound: float | None = None

    seconds: Tensor
    num_ranks: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums("seconds", zeros=torch.zeros(len(Use), dtype=torch.float64))
        self.add_sums("num_ranks", zeros=torch.ones((), dtype=torch.int64))  # each brings itself

    def update(self, seconds: Mapping[str, float]) -> None:
        """Add time.

        Args:
            seconds: Seconds by use; those that are not named are 0.

        Raises:
            ConfigurationError: A name is none of the uses, or a value is negative.
        """
        names = [use.value for use in Use]
        if not set(seconds) <= set(names) or min(seconds.values(), default=0.0) < 0:
            raise ConfigurationError(
                f"Badput.update({dict(seconds)}): expected seconds >= 0 by some of {', '.join(names)}"
            )
        given = torch.tensor([seconds.get(name, 0.0) for name in names], dtype=torch.float64)
        self.seconds = self.seconds + given.to(self.seconds.device)

    def compute(self) -> dict[str, Tensor]:
        """Seconds by use, float64, and ``wall``: their sum."""
        return badput(self.seconds, self.num_ranks)
