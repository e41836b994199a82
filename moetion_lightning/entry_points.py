"""What other packages call without being told: Lightning's ``*.callbacks_factory``, torch's ``torchrun.handlers``.

Every ``Trainer`` and every import of torch's rendezvous calls it, in every environment in which this package is
installed: nothing is imported here but what reads environment variables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moetion_lightning.config import AUTOMATIC_VARIABLE, OTHER_LIGHTNING, automatic_setting, launched_run
from moetion_lightning.errors import ConfigurationError

__all__ = ["lightning_callbacks", "pytorch_lightning_callbacks", "torchrun_rendezvous"]


def lightning_callbacks() -> list[Any]:
    """Callbacks for a ``Trainer`` that is being made: those that ``MOETION`` names, none if it is not set.

    A process that ``moetion launch`` has started in a lost one's place gets one more, which keeps it from evaluating or
    training without the others.

    Raises:
        ConfigurationError: The variable names nothing that is known, or the configuration has no callbacks.
    """
    setting = automatic_setting()
    replaces = launched_run()[1] > 0
    if setting is None and not replaces:
        return []
    from moetion_lightning.commands.automatic import OnlyAsOthersDo, for_trainer

    return [*([OnlyAsOthersDo()] if replaces else []), *(for_trainer(setting) if setting is not None else [])]


def pytorch_lightning_callbacks() -> list[Any]:
    """None for a ``Trainer`` of the package's other name, of which nothing can be captured.

    Raises:
        ConfigurationError: ``MOETION`` asks for callbacks.
    """
    setting = automatic_setting()
    if setting is not None:
        raise ConfigurationError(f"{AUTOMATIC_VARIABLE}={setting}: {OTHER_LIGHTNING}")
    return []


def torchrun_rendezvous() -> Callable[[Any], Any]:
    """How ``--rdzv-backend moetion`` is made, of torch's ``RendezvousParameters``.

    Torch asks while it is imported, which may be in the middle of an import of ours.
    """

    def create(parameters: Any) -> Any:
        from moetion_lightning.distributed.rendezvous import NodeRendezvous

        return NodeRendezvous(parameters)

    return create
