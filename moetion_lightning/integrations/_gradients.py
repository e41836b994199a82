"""Gradients between two iterations: part of the state only if the next backward adds to them.

A loop may set gradients to None right after the step, or only before the next backward. In the second case they exist
when a window begins, as large as the weights, and mean nothing. What the loop does is seen in the iteration after a
capture, at the moment at which a new gradient arrives; until it was seen once, gradients are captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from moetion_lightning.core.local import local
from moetion_lightning.core.optimizer_parts import inner_optimizers
from moetion_lightning.core.step_hooks import hook_steps

__all__ = ["LastingGradients"]


class LastingGradients:
    """Learns whether gradients last.

    Args:
        parameters: By name.
        optimizers: Raw torch optimizers.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizers: Sequence[Optimizer]) -> None:
        self._parameters = parameters
        #: Whether gradients last; None: not seen yet.
        self.lasts: bool | None = None
        self._watched: dict[str, int] = {}
        self._handles: dict[str, Any] = {}
        # It may be the optimizer inside another one alone whose step is called.
        everyone = inner_optimizers(optimizers)
        self._on_step = [handle for optimizer in everyone for handle in hook_steps(optimizer, self._before_step)]

    def capture(self) -> dict[str, Tensor]:
        """The gradients that are part of the state, by parameter; watches what becomes of them."""
        present = {name: p for name, p in self._parameters.items() if p.grad is not None and p.requires_grad}
        found = {name: local(p.grad) for name, p in present.items()} if self.lasts is not False else {}  # type: ignore[arg-type]
        self._settle()
        self._watched = {name: id(p.grad) for name, p in present.items()}
        self._handles = {name: p.register_hook(self._arrival(name)) for name, p in present.items()}
        return found

    def remove(self) -> None:
        """Stop watching."""
        self._settle()
        for handle in self._on_step:
            handle.remove()

    def _arrival(self, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if name in self._watched:
                del self._watched[name]
                self._handles.pop(name).remove()
                self._saw(lasts=self._parameters[name].grad is not None)

        return hook

    def _before_step(self, optimizer: Optimizer, *args: Any) -> None:
        """Those to which no new gradient came: experts without tokens, and shards, whose hooks never run."""
        if not self._watched:
            return
        stepping = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name in [name for name in self._watched if id(self._parameters[name]) in stepping]:
            gradient, identity = self._parameters[name].grad, self._watched.pop(name)
            self._saw(lasts=gradient is not None and id(gradient) == identity)
            self._handles.pop(name).remove()

    def _saw(self, *, lasts: bool) -> None:
        self.lasts = bool(self.lasts) or lasts

    def _settle(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles, self._watched = {}, {}
