"""What other packages call without being told: Lightning's entry point ``lightning.pytorch.callbacks_factory``.

Every ``Trainer`` calls it, in every environment in which this package is installed: nothing is imported here but what
reads one environment variable.
"""

from __future__ import annotations

from typing import Any

from moetion_lightning.config import automatic_setting

__all__ = ["lightning_callbacks"]


def lightning_callbacks() -> list[Any]:
    """Callbacks for a ``Trainer`` that is being made: those that ``MOETION`` names, none if it is not set.

    Raises:
        ConfigurationError: The variable names nothing that is known, or the configuration has no callbacks.
    """
    setting = automatic_setting()
    if setting is None:
        return []
    from moetion_lightning.commands.automatic import for_trainer

    return for_trainer(setting)
