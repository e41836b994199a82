"""The metrics as functions of sums that are known already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moetion_lightning.badput import Use

__all__ = [
    "badput",
    "checkpoint_stall",
    "effective_training_time_ratio",
    "expert_load",
    "expert_load_imbalance",
    "proportion_of_lost_tokens",
]


def effective_training_time_ratio(useful_seconds: Tensor | float, wall_seconds: Tensor | float) -> Tensor:
    """Useful time divided by wall time, see :class:`~moetion_lightning.metrics.EffectiveTrainingTimeRatio`.

    Args:
        useful_seconds: Seconds in which training went forward.
        wall_seconds: Seconds that passed from the first start on.

    Returns:
        float64 in [0, 1]; 0 where no time has passed.

    Example:
        >>> effective_training_time_ratio(90.0, 120.0)
        tensor(0.7500, dtype=torch.float64)
    """
    return _ratio(_double(useful_seconds), _double(wall_seconds))


def badput(seconds: Tensor, num_ranks: Tensor | int = 1) -> dict[str, Tensor]:
    """Wall time by what it went into, see :class:`~moetion_lightning.metrics.Badput`.

    Args:
        seconds: float64 ``[10]``, sums over ranks in the order of :class:`~moetion_lightning.badput.Use`.
        num_ranks: How many ranks these are the sums of.

    Returns:
        Means over ranks by use, and ``wall``: their sum, float64.

    Example:
        >>> badput(torch.tensor([6.0, 2.0, 0, 0, 0, 0, 0, 0, 0, 0], dtype=torch.float64), 2)["wall"]
        tensor(4., dtype=torch.float64)
    """
    mean = seconds.double() / num_ranks
    return {**{use.value: value for use, value in zip(Use, mean)}, "wall": mean.sum()}


def checkpoint_stall(
    stall_seconds: Tensor | float, iteration_seconds: Tensor | float, num_iterations: Tensor | int
) -> dict[str, Tensor]:
    """Stall of an iteration, see :class:`~moetion_lightning.metrics.CheckpointStall`.

    Args:
        stall_seconds: Seconds that training waited for captures.
        iteration_seconds: Seconds of the same iterations, waiting included.
        num_iterations: How many iterations these were.

    Returns:
        ``seconds_per_iteration`` and ``share`` of the iterations' time, float64; 0 where there was no iteration.

    Example:
        >>> checkpoint_stall(0.5, 10.0, 5)
        {'seconds_per_iteration': tensor(0.1000, dtype=torch.float64), 'share': tensor(0.0500, dtype=torch.float64)}
    """
    stall = _double(stall_seconds)
    return {
        "seconds_per_iteration": _ratio(stall, _double(num_iterations)),
        "share": _ratio(stall, _double(iteration_seconds)),
    }


def expert_load(tokens: Tensor) -> Tensor:
    """Each expert's share of its layer's tokens.

    Args:
        tokens: Integers ``[..., num_experts]``, expert assignments.

    Returns:
        float64 ``[..., num_experts]``; the shares of a layer add up to 1, or are 0 if it saw no tokens.

    Example:
        >>> expert_load(torch.tensor([2, 2, 4, 0]))
        tensor([0.2500, 0.2500, 0.5000, 0.0000], dtype=torch.float64)
    """
    counts = tokens.double()
    return _ratio(counts, counts.sum(dim=-1, keepdim=True))


def expert_load_imbalance(tokens: Tensor, num_experts: Sequence[int] | None = None) -> Tensor:
    """Tokens of a layer's busiest expert divided by the mean over its experts.

    Args:
        tokens: Integers ``[..., num_experts]``, expert assignments.
        num_experts: Experts of each layer, where layers with fewer ones are filled up with zeros.

    Returns:
        float64 ``[...]``: 1 is balanced, the number of experts is the worst; 0 where a layer saw no tokens.

    Example:
        >>> expert_load_imbalance(torch.tensor([2, 2, 4, 0]))
        tensor(2., dtype=torch.float64)
    """
    counts = tokens.double()
    own = counts.shape[-1] if num_experts is None else torch.tensor(num_experts, dtype=torch.float64).to(counts)
    return _ratio(counts.amax(dim=-1) * own, counts.sum(dim=-1))


def proportion_of_lost_tokens(lost: Tensor, total: Tensor) -> Tensor:
    """Mean over layers of lost / routed tokens, see :class:`~moetion_lightning.metrics.ProportionOfLostTokens`.

    Args:
        lost: Integers ``[num_layers]``, tokens lost by all failures.
        total: Integers ``[num_layers]``, expert assignments of the whole training.

    Returns:
        float64 in [0, 1]; layers without tokens do not count, and it is 0 if there is no other one.

    Example:
        >>> proportion_of_lost_tokens(torch.tensor([10, 30]), torch.tensor([1000, 1000]))
        tensor(0.0200, dtype=torch.float64)
    """
    seen = total > 0
    if not bool(seen.any()):
        return torch.zeros((), dtype=torch.float64, device=total.device)
    return (lost[seen].double() / total[seen].double()).mean()


def _double(value: Tensor | float) -> Tensor:
    return value.double() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
