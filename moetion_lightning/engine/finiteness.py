"""Whether a window holds a value that is not finite: a restart from it would only end the same way again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["TENSORS", "record_is_finite", "weights_are_finite"]

# A gradient that is not finite makes the norm, and through clipping every weight, not finite. So a few weights of a few
# operators, beside the losses and norms of every iteration, find what a look at all of them would.
TENSORS, _VALUES = 64, 1024


def record_is_finite(record: Mapping[str, Any]) -> bool:
    """Whether an iteration's losses and gradient norms are."""
    return all(math.isfinite(float.fromhex(x)) for key in ("losses", "norms") for x in record.get(key, ()))


def weights_are_finite(weights: Sequence[Tensor]) -> bool:
    """Whether a sample of some master weights is."""
    sample = [_some(weight) for weight in weights if weight.numel() and _can_be_checked(weight)]
    return not sample or bool(torch.isfinite(torch.cat(sample)).all())


def _can_be_checked(view: Tensor) -> bool:
    return view.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _some(view: Tensor) -> Tensor:
    flat = view.reshape(-1)
    return flat[:: max(1, flat.numel() // _VALUES)].float()
