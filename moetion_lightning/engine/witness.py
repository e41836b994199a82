"""What an iteration looked like: enough to notice that its replay was not the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from moetion_lightning.core.grad_norm import GradNormSeam
from moetion_lightning.core.run_state import rng_digest

__all__ = ["Witness", "WitnessRecorder"]


@dataclass(frozen=True, kw_only=True)
class Witness:
    """Losses of the micro-batches, gradient norms, learning rates and a digest of the random generators."""

    losses: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    lrs: tuple[Any, ...]
    rng: str

    def read(self) -> dict[str, Any]:
        """JSON; floats as hexadecimal text, so that they compare by bits. Waits for the device."""
        return {
            "losses": [_hex(x) for x in self.losses],
            "norms": [_hex(x) for x in self.norms],
            "lrs": [_hex(x) for x in self.lrs],
            "rng": self.rng,
        }


class WitnessRecorder:
    """Collects the witness of the current iteration.

    Args:
        norms: Where gradient norms are recorded.
    """

    def __init__(self, norms: GradNormSeam) -> None:
        self._norms = norms
        self.losses: list[Tensor] = []

    def take(self, optimizers: Sequence[Optimizer] = ()) -> Witness:
        """The iteration ends: its witness. The next one starts empty."""
        losses, self.losses = self.losses, []
        norms = [norm.clone() for norm in self._norms.take()]
        # Copies: a learning rate that is a tensor changes in place, and a witness is read on another thread.
        lrs = tuple(
            group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
            for optimizer in optimizers
            for group in optimizer.param_groups
            if "lr" in group
        )
        return Witness(losses=tuple(losses), norms=tuple(norms), lrs=lrs, rng=rng_digest())


def _hex(value: Any) -> str:
    return float(value.item() if isinstance(value, Tensor) else value).hex()
