"""The global gradient norm that clipping uses: recorded in training, given back in replay.

Every caller of :func:`torch.nn.utils.clip_grad_norm_` (Lightning, Accelerate, the user's own code, however it was
imported) computes its norm through one function of :mod:`torch.nn.utils.clip_grad`. Replacing that one name, for the
time of a run, records the norm without computing it twice, and lets a replay that skips the frozen operators' gradients
clip with the norm of the whole.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

__all__ = ["GradNormSeam"]


class GradNormSeam:
    """Records the gradient norms of the current iteration, or gives recorded ones back.

    Attributes:
        norms: Norms of the current iteration, in the order of the calls (0-d tensors).
    """

    def __init__(self) -> None:
        self.norms: list[Tensor] = []
        self._given: list[float] | None = None
        self._original: Any = None
        self._replacement: Any = None

    def install(self) -> None:
        """Start listening. Harmless if already installed."""
        if self._original is not None:
            return
        original = clip_grad._get_total_norm

        @functools.wraps(original)
        def total_norm(tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
            if self._given is not None and len(self.norms) < len(self._given):
                tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
                device = tensors[0].device if tensors else torch.device("cpu")
                dtype = tensors[0].dtype if tensors else torch.float32
                norm = torch.tensor(self._given[len(self.norms)], device=device, dtype=dtype)
            else:
                norm = original(tensors, *args, **kwargs)
            self.norms.append(norm.detach().clone())  # the caller may change it, or its memory be used again
            return norm

        self._original, self._replacement = original, total_norm
        clip_grad._get_total_norm = total_norm

    def remove(self) -> None:
        """Stop listening and restore torch's function."""
        if self._original is not None and clip_grad._get_total_norm is self._replacement:
            clip_grad._get_total_norm = self._original
        self._original = self._replacement = None

    def take(self) -> list[Tensor]:
        """The norms of the iteration that ends now; the next one starts empty."""
        norms, self.norms = self.norms, []
        return norms

    def give(self, norms: list[float] | None) -> None:
        """Answer the next iteration's calls with these norms; None computes them again."""
        self._given = norms
