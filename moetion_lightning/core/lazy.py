"""Parameters and buffers of lazy modules, whose shapes are known only after the first forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["materialize"]


def materialize(module: nn.Module, shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, torch.dtype]) -> None:
    """Give lazy parameters and buffers the shapes that they had in an earlier run; their values follow.

    Args:
        module: The module; what is initialised stays as it is.
        shapes: Shapes by name.
        dtypes: Dtypes by name.
    """
    tensors: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in tensors.items():
        if is_lazy(tensor) and name in shapes:
            tensor.materialize(tuple(shapes[name]), dtype=dtypes[name])
