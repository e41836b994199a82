"""Callbacks from a recipe or a YAML file, for runs that do not name them themselves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from moetion_lightning.callbacks import SparseExpertCheckpoint
from moetion_lightning.callbacks._base import EngineCallback
from moetion_lightning.callbacks._before_setup import EarlyCallback
from moetion_lightning.callbacks._fits import check_has_others, why_idle
from moetion_lightning.config import AUTOMATIC_VARIABLE, OF_THE_WINDOW
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.recipes import PREFIX, recipe_path

__all__ = ["Automatic", "OnlyAsOthersDo", "callbacks_of", "for_trainer", "loop_settings"]

_log = logging.getLogger(__name__)
_DEFAULT = ("1", "default", "true", "on", "yes")


def for_trainer(setting: str) -> list[Callback]:
    """What a ``Trainer`` gets by ``MOETION``: this package's callbacks behind one that places them, then the others.

    Args:
        setting: The variable's value.
    """
    callbacks = callbacks_of(setting)
    ours = [c for c in callbacks if type(c).__module__.startswith("moetion_lightning.")]
    others = [c for c in callbacks if c not in ours]
    return [Automatic(ours, setting), *others] if ours else others


def callbacks_of(setting: str, source: str = AUTOMATIC_VARIABLE) -> list[Callback]:
    """The callbacks that a setting names.

    Args:
        setting: ``1`` or ``default`` for ``SparseExpertCheckpoint()``; the name of a recipe; or the path of a YAML file
            with ``trainer.callbacks`` or ``callbacks``, written as for LightningCLI.
        source: What gives the setting, for messages.

    Raises:
        ConfigurationError: There is no such recipe or file, or it has no callbacks, or one of them cannot be made.
    """
    if setting.lower() in _DEFAULT:
        return [SparseExpertCheckpoint()]
    try:
        path = _path(setting)
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ConfigurationError) as error:
        raise ConfigurationError(f"{source}={setting!r}: {error}") from error
    content = content if isinstance(content, dict) else {}
    trainer = content.get("trainer")
    entries = content.get("callbacks") or (trainer.get("callbacks") if isinstance(trainer, dict) else None)
    if not entries:
        raise ConfigurationError(
            f"{source}={setting!r}: {path} has no callbacks; expected `trainer: callbacks: [...]` as for "
            "LightningCLI, or a list `callbacks:`"
        )
    return _instantiate(entries if isinstance(entries, list) else [entries], path)


def loop_settings(setting: str, source: str = AUTOMATIC_VARIABLE) -> dict[str, Any]:
    """The keyword settings of the adapters of other frameworks that say the same as the capturing callback.

    Args:
        setting: As for :func:`callbacks_of`.
        source: As for :func:`callbacks_of`.

    Raises:
        ConfigurationError: None of the callbacks captures, or as for :func:`callbacks_of`.
    """
    capturing = [c for c in callbacks_of(setting, source) if isinstance(c, EngineCallback) and c.captures()]
    if len(capturing) != 1:
        raise ConfigurationError(
            f"{source}={setting!r}: {len(capturing)} of its callbacks capture; expected one of "
            "SparseExpertCheckpoint, GradientLogCheckpoint, PartialExpertsCheckpoint, DenseInMemoryCheckpoint, "
            "TwoPhaseCheckpoint"
        )
    return {name: value for name, value in capturing[0].engine_settings().items() if name not in OF_THE_WINDOW}


class Automatic(EarlyCallback):
    """Puts callbacks into a ``Trainer`` that has none of their kind, when it begins to fit.

    Args:
        callbacks: The callbacks: they exist from the beginning, because process groups are set up for them.
        setting: Where they come from, for messages.
    """

    def __init__(self, callbacks: Sequence[Callback], setting: str) -> None:
        self._callbacks = list(callbacks)
        self._setting = setting
        self._placed = False

    def before_setup(self, trainer: Trainer) -> None:
        """Place them, and let them begin."""
        if trainer.state.fn != TrainerFn.FITTING or self._placed:
            return
        self._placed = True
        present: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        own = [c for c in present if isinstance(c, EngineCallback) and c.captures()]
        if own:
            _log.info(
                "%s=%s has no effect: Trainer(callbacks=...) has %s",
                AUTOMATIC_VARIABLE, self._setting, type(own[0]).__name__,
            )  # fmt: skip
            return
        trainer.callbacks = [*self._callbacks, *present]  # type: ignore[attr-defined]
        for callback in self._callbacks:
            if isinstance(callback, EarlyCallback):
                callback.before_setup(trainer)


class OnlyAsOthersDo(Callback):
    """In a process that replaces a lost one: no stage runs without the others, whose collectives would do nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what no callback here makes the others take part in.

        Raises:
            StrandedRankError: This process is alone.
        """
        present: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if stage != "fit" or why_idle(trainer) or not any(isinstance(c, EngineCallback) for c in present):
            check_has_others(trainer)


def _path(setting: str) -> Path:
    given = Path(setting)
    if setting.startswith(PREFIX) or not (given.suffix in (".yaml", ".yml") or given.exists()):
        return recipe_path(setting)
    return given


def _instantiate(entries: list[Any], path: Path) -> list[Callback]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the older name of the same
    try:
        made = instantiate(parser.parse_object({"callbacks": entries}))
    except ConfigurationError:
        raise
    except Exception as error:  # jsonargparse raises what the class raises, or its own error
        raise ConfigurationError(f"callbacks of {path}: {error}") from error
    return list(made.callbacks)
