"""Negative controls of hand-written loops: one part of a restore is left out. The comparison must notice each."""

from __future__ import annotations

from typing import Any

from tests.runs import sabotage


def apply(what: str) -> None:
    SABOTAGE.get(what, sabotage.SABOTAGE.get(what))()  # type: ignore[misc]


def _position() -> None:
    """The loop's counters come back, its place in the data does not."""
    from moetion_lightning.integrations import loop

    def restore(self: Any, state: Any) -> None:
        self.load(state)

    loop.Position.restore = restore  # type: ignore[method-assign]


def _draws() -> None:
    """Accelerate's loader draws again what it had drawn ahead, with other random numbers."""
    from moetion_lightning.integrations import _loaders

    original = _loaders._Draws.expect
    _loaders._Draws.expect = lambda self, generators: original(self, [])  # type: ignore[method-assign]


def _stateful() -> None:
    """Schedulers, scalers and the user's objects begin anew."""
    from moetion_lightning.integrations import _state

    original = _state.LoopState.restore

    def restore(self: Any, state: Any) -> None:
        kept, self._parts.stateful = self._parts.stateful, {}
        original(self, {**state, "stateful": {}})
        self._parts.stateful = kept

    _state.LoopState.restore = restore  # type: ignore[method-assign]


def _gradients() -> None:
    """Gradients that add up over iterations begin anew."""
    from moetion_lightning.integrations import _state

    original = _state.LoopState.restore

    def restore(self: Any, state: Any) -> None:
        state["gradients"].clear()
        original(self, state)

    _state.LoopState.restore = restore  # type: ignore[method-assign]


def _others() -> None:
    """Evaluation loaders begin anew."""
    from moetion_lightning.integrations import _other_loaders

    _other_loaders.OtherLoaders.restore = lambda self, saved: None  # type: ignore[method-assign]


SABOTAGE = {"others": _others, "position": _position, "draws": _draws, "stateful": _stateful, "gradients": _gradients}
