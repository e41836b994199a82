"""A hook before all ``setup`` hooks, which Lightning's callbacks do not have.

A trainer makes its loggers' experiments before it calls ``setup``: a new version directory, a new remote run, a CSV
file that is emptied. A run that continues must say so earlier.
"""

from __future__ import annotations

import functools
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer import call

__all__ = ["EarlyCallback"]


class EarlyCallback(Callback):
    """A callback that is called before loggers begin and ``setup`` hooks run. Making one puts the hook in place."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        _install()
        return super().__new__(cls)

    def before_setup(self, trainer: Trainer) -> None:
        """The strategy's environment and the process groups exist; nothing of this stage has begun."""


def _install() -> None:
    original = call._call_setup_hook
    if hasattr(original, "_calls_early_callbacks"):
        return

    @functools.wraps(original)
    def call_setup_hook(trainer: Trainer) -> None:
        for callback in list(trainer.callbacks):  # type: ignore[attr-defined]
            if isinstance(callback, EarlyCallback):
                callback.before_setup(trainer)
        original(trainer)

    call_setup_hook._calls_early_callbacks = True  # type: ignore[attr-defined]
    call._call_setup_hook = call_setup_hook
