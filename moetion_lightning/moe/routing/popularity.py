"""How often each expert is used: a rolling window of counts, compared for the reorder rule."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from moetion_lightning.errors import ConfigurationError

__all__ = ["Popularity"]


class Popularity:
    """How often each expert was used over the last iterations, and whether that changed.

    Args:
        num_iterations: Length of the rolling window.
        num_experts: Experts of each layer where they differ; default: all columns of the counts.

    Raises:
        ConfigurationError: ``num_iterations`` is below one.

    Source:
        The reorder rule of MoEvement: experts are reordered when the frequency of at least 25 % of them changed by
        more than 10 %.
    """

    def __init__(self, num_iterations: int = 100, *, num_experts: Sequence[int] | None = None) -> None:
        if num_iterations < 1:
            raise ConfigurationError(f"Popularity(num_iterations={num_iterations}): expected at least 1")
        self.num_iterations = num_iterations
        self._num_experts = None if num_experts is None else tuple(num_experts)
        self._window: deque[torch.Tensor] = deque()
        self._sum: torch.Tensor | None = None

    def __len__(self) -> int:
        """Iterations in the window so far."""
        return len(self._window)

    def update(self, counts: torch.Tensor) -> None:
        """Add one iteration.

        Args:
            counts: int64 ``[num_layers, max_experts]``, any device; copied to the host.

        Raises:
            ConfigurationError: The shape differs from the iterations before.
        """
        counts = counts.detach().to(device="cpu", dtype=torch.int64, copy=True)
        if self._sum is None:
            self._sum = torch.zeros_like(counts)
        if counts.shape != self._sum.shape:
            raise ConfigurationError(
                f"counts of shape {tuple(counts.shape)} after {tuple(self._sum.shape)}; expected the layers of one "
                "TokenCounter. Start a new Popularity when the layers change"
            )
        self._window.append(counts)
        self._sum += counts
        if len(self._window) > self.num_iterations:
            self._sum -= self._window.popleft()

    def tokens(self) -> torch.Tensor:
        """Tokens in the window: int64 ``[num_layers, max_experts]``, ``[0, 0]`` before the first update."""
        return torch.zeros(0, 0, dtype=torch.int64) if self._sum is None else self._sum.clone()

    def frequencies(self) -> torch.Tensor:
        """Share of its layer's tokens that each expert received: float64 ``[num_layers, max_experts]``."""
        if self._sum is None:
            return torch.zeros(0, 0, dtype=torch.float64)
        total = self._sum.sum(dim=1, keepdim=True).clamp(min=1)
        return self._sum.to(torch.float64) / total

    def changed(self, reference: torch.Tensor, *, relative_change: float = 0.10, fraction: float = 0.25) -> bool:
        """Whether the order of the experts should be made anew.

        Args:
            reference: Frequencies at the time of the present order, float64 ``[num_layers, max_experts]``.
            relative_change: An expert changed if its frequency differs from the reference by more than this part.
            fraction: The answer is yes if at least this part of all experts changed.

        Returns:
            True also if the reference has another shape, that is, if there was no order yet.
        """
        now = self.frequencies()
        if now.shape != reference.shape:
            return True
        valid = torch.ones_like(now, dtype=torch.bool)
        if self._num_experts is not None:
            valid = torch.arange(now.shape[1]) < torch.tensor(self._num_experts).reshape(-1, 1)
        reference = reference.to(device="cpu", dtype=torch.float64)
        moved = ((now - reference).abs() > relative_change * reference) & valid
        return bool(valid.any()) and int(moved.sum()) >= fraction * int(valid.sum())
