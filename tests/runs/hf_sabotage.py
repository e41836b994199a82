"""Negative controls of the Trainer callback: one part of a restore is left out. The comparison must notice each."""

from __future__ import annotations

from tests.runs import sabotage


def apply(what: str) -> None:
    SABOTAGE.get(what, sabotage.SABOTAGE.get(what))()  # type: ignore[misc]


def _data() -> None:
    """The Trainer's counters come back, the loader begins anew."""
    from moetion_lightning.integrations import _loaders

    _loaders._Wrapped.restore = lambda self, state: None  # type: ignore[method-assign]


def _counters() -> None:
    """The loop's sums begin anew."""
    from moetion_lightning.integrations import _trainer_loop

    original = _trainer_loop.TrainerLoop.restore
    _trainer_loop.TrainerLoop.restore = lambda self, state: original(  # type: ignore[method-assign]
        self, {**state, "counters": {}}
    )


SABOTAGE = {"data": _data, "counters": _counters}
