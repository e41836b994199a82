"""Proportion of lost tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.metrics.functional import proportion_of_lost_tokens
from moetion_lightning.metrics.sums import SumMetric

__all__ = ["ProportionOfLostTokens"]


class ProportionOfLostTokens(SumMetric):
    r"""Share of the tokens whose updates experts have lost in failures (PLT).

    .. math:: \text{PLT} = \frac{1}{N_\text{moe}} \sum_i \frac{\sum_j L_{ij}}{T_i \cdot \text{TopK}_i}

    Over MoE layers i and failures j; a token is lost where the expert that saw it comes back from a state that is older
    than the restored iteration. The denominator are all expert assignments of the training, before any capacity drop.
    Only lossy policies (:class:`~moetion_lightning.callbacks.PartialExpertsCheckpoint`) make it more than 0. In the
    source's experiments the validation loss stayed comparable up to 0.0375.

    Args:
        num_layers: MoE layers.
        **kwargs: See ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: ``num_layers`` is not positive.

    Source:
        MoC-System (ASPLOS'25), equation 7.

    Example:
        >>> metric = ProportionOfLostTokens(num_layers=2)
        >>> metric.update(total=torch.tensor([1000, 1000]))
        >>> metric.update(lost=torch.tensor([10, 30]))  # a failure
        >>> metric.compute()
        tensor(0.0200, dtype=torch.float64)
    """

    higher_is_better = False
    plot_upper_bound: float = 1.0

    lost: Tensor
    total: Tensor

    def __init__(self, num_layers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_layers < 1:
            raise ConfigurationError(f"ProportionOfLostTokens(num_layers={num_layers}): expected a number >= 1")
        self.add_sums("lost", "total", zeros=torch.zeros(num_layers, dtype=torch.int64))

    def update(self, lost: Tensor | None = None, total: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            lost: Integers ``[num_layers]``, tokens that a failure has lost.
            total: Integers ``[num_layers]``, expert assignments.

        Raises:
            ConfigurationError: They are no integers, or of another shape.
        """
        for name, value in (("lost", lost), ("total", total)):
            if value is None:
                continue
            if value.is_floating_point() or value.shape != self.lost.shape:
                raise ConfigurationError(
                    f"ProportionOfLostTokens.update({name} of {value.dtype} {tuple(value.shape)}): expected integers "
                    f"{tuple(self.lost.shape)}, one for each MoE layer"
                )
            setattr(self, name, getattr(self, name) + value.to(self.lost))

    def compute(self) -> Tensor:
        """The proportion, float64 in [0, 1]; 0 before the first token."""
        return proportion_of_lost_tokens(self.lost, self.total)
