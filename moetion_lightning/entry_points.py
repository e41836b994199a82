"""What other packages call without being told: Lightning's entry points ``*.callbacks_factory``.

Every ``Trainer`` calls it, in every environment in which this package is installed: nothing is imported here but what
reads one environment variable.
"""

from __future__ import annotations

from typing import Any

from moetion_lightning.config import AUTOMATIC_VARIABLE, OTHER_LIGHTNING, automatic_setting
from moetion_lightning.errors import ConfigurationError

__all__ = ["lightning_callbacks", "pytorch_lightning_callbacks"]


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


def pytorch_lightning_callbacks() -> list[Any]:
    """None for a ``Trainer`` of the package's other name, of which nothing can be captured.

    Raises:
        ConfigurationError: ``MOETION`` asks for callbacks.
    """
    setting = automatic_setting()
    if setting is not None:
        raise ConfigurationError(f"{AUTOMATIC_VARIABLE}={setting}: {OTHER_LIGHTNING}")
    return []
