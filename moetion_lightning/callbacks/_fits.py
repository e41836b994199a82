"""Which fits are captured at all: those of Lightning's own Trainer that are a run, not a trial of one."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging

from moetion_lightning.config import OTHER_LIGHTNING
from moetion_lightning.distributed.groups import current_groups
from moetion_lightning.errors import ConfigurationError, StrandedRankError

__all__ = ["check_callbacks", "check_has_others", "check_trainer", "why_idle"]

_TUNER = "Use lightning.pytorch.tuner.Tuner before trainer.fit, which is left alone."
#: Callbacks of Lightning with which a restart in mid-epoch cannot be exact, and what to do.
_UNSUPPORTED: dict[type, str] = {
    StochasticWeightAveraging: (
        "it replaces the schedulers when an epoch starts, which a restart in mid-epoch cannot repeat. "
        "Use WeightAveraging or EMAWeightAveraging, where there is no pipeline."
    ),
    LearningRateFinder: f"it trains and rolls back within every start. {_TUNER}",
    BatchSizeFinder: f"it trains and rolls back within every start. {_TUNER}",
}


def check_trainer(trainer: Any, where: str) -> None:
    """Refuse a trainer of the other package of the same name.

    Args:
        trainer: What has called.
        where: The callback, for messages.

    Raises:
        ConfigurationError: It is not ``lightning.pytorch``'s.
    """
    if not isinstance(trainer, Trainer):
        raise ConfigurationError(f"{where}: {OTHER_LIGHTNING}")


def check_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks with which a restart cannot be exact.

    Raises:
        ConfigurationError: Names the callback and the remedy.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, remedy in _UNSUPPORTED.items():
            if isinstance(callback, kind):
                raise ConfigurationError(f"{type(callback).__name__} in Trainer(callbacks=...): {remedy}")


def check_has_others(trainer: Trainer) -> None:
    """Refuse what a process that replaces a lost one would do alone: its collectives have no effect.

    Raises:
        StrandedRankError: It is alone, and nothing in this stage can bring it to the others.
    """
    groups = current_groups()
    if groups is not None and groups.alone:
        raise StrandedRankError(
            f"rank {trainer.global_rank} was lost outside of fit, or in a Trainer without callbacks of this package, "
            "where a rank cannot be replaced; all ranks have to begin again."
        )


def why_idle(trainer: Trainer) -> str:
    """Why this fit is none that is to be continued; empty if it is one."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return "fast_dev_run tries a few batches"
    finders = (BatchSizeFinder, LearningRateFinder)
    if any(isinstance(c, finders) and c._early_exit for c in trainer.callbacks):  # type: ignore[attr-defined]
        return "a Tuner trains for a trial"
    return ""
