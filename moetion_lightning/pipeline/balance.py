"""Where to cut: contiguous stages whose heaviest one is as light as possible. Pure, but for reading sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from torch import nn

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.layer_list import LayerList

__all__ = ["balance", "check_bounds", "layer_weights"]


def balance(weights: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Cut layers into contiguous stages so that the heaviest stage is as light as possible.

    Among the cuts with the lightest heaviest stage it takes the most even one (least sum of squares), and of those
    the one that cuts earliest, so that every rank comes to the same result.

    Args:
        weights: Cost of each layer, in any unit; not negative.
        num_stages: Number of stages, at most the number of layers.

    Returns:
        The first layer of each stage; the first one is 0.

    Raises:
        ConfigurationError: There are fewer layers than stages, or a weight is negative or not finite.
    """
    num_layers = len(weights)
    if not 1 <= num_stages <= num_layers:
        raise ConfigurationError(
            f"balance: {num_stages} stages of {num_layers} layers; expected at least one stage, and a layer for each. "
            "Use fewer stages, or finer layers (layers=...)"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ConfigurationError(f"balance: weights {list(weights)} are not all finite and non-negative")
    sums = [0.0, *accumulate(float(weight) for weight in weights)]
    limit = _lightest_heaviest(sums, num_stages)
    best: list[list[tuple[float, int]]] = [[(math.inf, 0)] * (num_layers + 1) for _ in range(num_stages + 1)]
    best[0][num_layers] = (0.0, num_layers)
    # best[k][i]: layers i.. in k stages, as (sum of squares, first layer of the next stage).
    for stages in range(1, num_stages + 1):
        for first in range(num_layers - stages + 1):
            for end in range(first + 1, num_layers - stages + 2):
                weight = sums[end] - sums[first]
                if weight > limit:
                    break
                cost = weight * weight + best[stages - 1][end][0]
                if cost < best[stages][first][0]:
                    best[stages][first] = (cost, end)
    bounds = [0]
    for stages in range(num_stages, 1, -1):
        bounds.append(best[stages][bounds[-1]][1])
    return tuple(bounds)


def _lightest_heaviest(sums: Sequence[float], num_stages: int) -> float:
    num_layers = len(sums) - 1
    heaviest = [math.inf] * num_layers + [0.0]
    for stages in range(1, num_stages + 1):
        heaviest = [
            min(
                (max(sums[end] - sums[first], heaviest[end]) for end in range(first + 1, num_layers - stages + 2)),
                default=math.inf,
            )
            for first in range(num_layers + 1)
        ]
    return heaviest[0]


def check_bounds(bounds: Sequence[int], num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Check the first layers of all stages and return them as a tuple.

    Raises:
        ConfigurationError: Not one bound a stage, not starting at 0, not ascending, or beyond the last layer.
    """
    found = tuple(int(bound) for bound in bounds)
    ascending = all(a < b for a, b in zip(found, found[1:]))
    if len(found) != num_stages or found[:1] != (0,) or not ascending or found[-1] >= num_layers:
        raise ConfigurationError(
            f"bounds={list(bounds)}: expected the first layer of each of {num_stages} stages, ascending from 0 and "
            f"below {num_layers} (the number of layers), for example "
            f"{[stage * num_layers // max(num_stages, 1) for stage in range(num_stages)]}"
        )
    return found


def layer_weights(module: nn.Module, layers: LayerList) -> list[float]:
    """Parameters of each layer, as its weight in :func:`balance`.

    Parameters outside of the layers count for the first layer if they are registered before it, else for the last:
    embeddings and heads are usually registered in the order in which they are used. A shared parameter counts once.
    """
    owner = {
        id(parameter): index
        for index, layer in reversed(list(enumerate(layers.modules)))
        for parameter in layer.parameters()
    }
    weights = [0.0] * len(layers)
    index = 0  # before the first layer
    for parameter in module.parameters():
        if id(parameter) in owner:
            weights[owner[id(parameter)]] += parameter.numel()
            index = len(layers) - 1
        else:
            weights[index] += parameter.numel()
    return weights
