"""How the tokens spread over the experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.metrics.functional import expert_load, expert_load_imbalance
from moetion_lightning.metrics.sums import SumMetric

__all__ = ["ExpertLoad", "ExpertLoadImbalance"]


class ExpertLoad(SumMetric):
    r"""Each expert's share of the tokens of its layer.

    .. math:: \text{load}_e = \frac{\text{tokens}_e}{\sum_i \text{tokens}_i}

    Tokens are expert assignments: with top-k routing each token counts k times. Counts are 64-bit integers and add up
    over ranks: give each rank its own tokens, or construct with ``sync_on_compute=False`` where they are summed before.

    Args:
        num_experts: Experts of one layer, for values ``[num_experts]``; or of each of several layers, for values
            ``[num_layers, max(num_experts)]`` that are 0 behind a layer's last expert.
        **kwargs: See ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: A number of experts is not positive.

    Source:
        MoEtion (NSDI'26, published as MoEvement), section 3: popularity of experts orders their capture.

    Example:
        >>> metric = ExpertLoad(num_experts=4)
        >>> metric.update(torch.tensor([1, 1, 2, 0]))
        >>> metric.update(torch.tensor([1, 1, 2, 0]))
        >>> metric.compute()
        tensor([0.2500, 0.2500, 0.5000, 0.0000], dtype=torch.float64)
    """

    higher_is_better: bool | None = None
    plot_upper_bound: float | None = 1.0
    plot_legend_name = "Expert"

    tokens: Tensor

    def __init__(self, num_experts: int | Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        numbers = [num_experts] if isinstance(num_experts, int) else list(num_experts)
        if not numbers or min(numbers) < 1:
            raise ConfigurationError(
                f"{type(self).__name__}(num_experts={num_experts!r}): expected a number >= 1, or one for each layer"
            )
        self.num_experts = numbers[0] if isinstance(num_experts, int) else tuple(numbers)
        shape = (numbers[0],) if isinstance(num_experts, int) else (len(numbers), max(numbers))
        self.add_sums("tokens", zeros=torch.zeros(shape, dtype=torch.int64))

    def update(self, tokens: Tensor) -> None:
        """Add tokens.

        Args:
            tokens: Integers of the shape of the values, expert assignments.

        Raises:
            ConfigurationError: They are no integers, or of another shape.
        """
        if tokens.is_floating_point() or tokens.shape != self.tokens.shape:
            raise ConfigurationError(
                f"{type(self).__name__}.update(tokens of {tokens.dtype} {tuple(tokens.shape)}): expected integers "
                f"{tuple(self.tokens.shape)}, one for each expert"
            )
        self.tokens += tokens.to(self.tokens)

    def compute(self) -> Tensor:
        """The shares, float64; 0 for layers without tokens."""
        return expert_load(self.tokens)

    def plot(self, val: Any = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Draw the values: points, courses, or with several layers a map of layers and experts; needs matplotlib.

        Args:
            val: Results of ``compute`` or ``forward``; None takes the present one.
            ax: Where to draw; None makes a figure.
        """
        value = self.compute() if val is None else val
        if not isinstance(value, Tensor) or value.dim() < 2:
            return self._plot(value, ax)
        import matplotlib.pyplot as plt  # type: ignore[import-not-found,unused-ignore]

        figure, axis = plt.subplots() if ax is None else (None, ax)
        image = axis.imshow(value.cpu().numpy(), vmin=0.0, aspect="auto")
        axis.set_xlabel("Expert")
        axis.set_ylabel("Layer")
        axis.figure.colorbar(image, ax=axis, label="Share of the layer's tokens")
        return figure, axis


class ExpertLoadImbalance(ExpertLoad):
    r"""Tokens of a layer's busiest expert divided by the mean over its experts.

    .. math:: \text{imbalance} = \frac{\max_e \text{tokens}_e}{\text{mean}_e\, \text{tokens}_e}

    1 is balanced; the number of experts means that one of them gets everything. Arguments are those of
    :class:`ExpertLoad`; there is one value, or one for each layer.

    Example:
        >>> metric = ExpertLoadImbalance(num_experts=[4, 2])
        >>> metric.update(torch.tensor([[1, 1, 2, 0], [3, 3, 0, 0]]))
        >>> metric.compute()
        tensor([2., 1.], dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = 1.0
    plot_upper_bound = None
    plot_legend_name = "Layer"

    def compute(self) -> Tensor:
        """The imbalance, float64; 0 for layers without tokens."""
        several = None if isinstance(self.num_experts, int) else self.num_experts
        return expert_load_imbalance(self.tokens, several)
