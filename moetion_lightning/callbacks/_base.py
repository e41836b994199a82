"""Base of the callbacks that capture: Lightning's hooks, handed to a session."""

from __future__ import annotations

import dataclasses
import functools
import logging
import mmap
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from moetion_lightning.callbacks._before_setup import EarlyCallback
from moetion_lightning.callbacks._fits import check_has_others, check_trainer, why_idle
from moetion_lightning.callbacks._session import LightningSession
from moetion_lightning.callbacks._termination_seam import give_exit_code
from moetion_lightning.callbacks.stage_boundary_logging import StageBoundaryLogging
from moetion_lightning.config import EngineConfig
from moetion_lightning.core.layouts import MoESpec
from moetion_lightning.core.policy import Policy
from moetion_lightning.distributed import progress
from moetion_lightning.distributed.groups import current_groups
from moetion_lightning.distributed.progress import Section
from moetion_lightning.distributed.torchrun import separate_restarts
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.events import Sink
from moetion_lightning.session import SessionSettings

__all__ = ["EngineCallback"]

_log = logging.getLogger(__name__)

_RESTORE_SETTINGS = ("resume", "on_mismatch", "on_changed_settings", "skip_frozen_gradients")


def _handed_on(hook: str, *positions: int) -> Any:
    """A hook of Lightning that the session has under the same name, with those of its arguments that it looks at."""

    @functools.wraps(getattr(Callback, hook))
    def call(self: EngineCallback, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._session is not None:
            getattr(self._session, hook)(*(args[position] for position in positions))

    return call


class EngineCallback(EarlyCallback):
    """Runs one session per ``fit``. Subclasses choose the policy.

    Args:
        specs: Descriptions of MoE blocks that are not detected automatically, see `moetion explain`.
        sinks: Callables that get every event.
        events_path: JSONL file for the events of the run; None for none.
        log_metrics: Log window, stall and bytes, and show the newest committed step in the progress bar.
        **settings: Of the engine.

    Raises:
        ConfigurationError: A setting is unknown or out of range.
    """

    def __init__(
        self,
        *,
        specs: list[MoESpec] | None = None,
        sinks: Sequence[Sink] = (),
        events_path: str | None = None,
        log_metrics: bool = True,
        **settings: Any,
    ) -> None:
        try:
            self.config = EngineConfig(**settings)  # by this call LightningCLI knows the settings
        except TypeError as error:  # no setting of this name
            known = ", ".join(field.name for field in dataclasses.fields(EngineConfig))
            raise ConfigurationError(f"{type(self).__name__}: {error}; the settings are {known}") from error
        self._specs = tuple(specs or ())
        self._sinks = tuple(sinks)
        self._events_path = events_path
        self._log_metrics = log_metrics
        separate_restarts()
        groups = current_groups()
        if groups is not None:
            groups.joins = True
        self._session: LightningSession | None = None

    def _policy(self) -> Policy:
        raise NotImplementedError

    def _make_first(self, trainer: Trainer) -> None:
        """Come before all other callbacks: a capture must precede what their next hooks change."""
        callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, EngineCallback) and c is not self and c.captures()]
        if others and self.captures():
            raise ConfigurationError(
                f"{type(self).__name__} and {type(others[0]).__name__} are both in Trainer(callbacks=...): "
                "one run has one checkpoint policy. Remove one of them."
            )
        trainer.callbacks = [self, *(c for c in callbacks if c is not self)]  # type: ignore[attr-defined]

    def captures(self) -> bool:
        """Whether this callback saves state (or only restores it)."""
        return True

    def _effective_config(self, trainer: Trainer) -> EngineConfig:
        """Settings of restoring come from a :class:`DenseReconstruction` beside this callback, if there is one."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EngineCallback) and callback is not self and not callback.captures():
                theirs = {name: getattr(callback.config, name) for name in _RESTORE_SETTINGS}
                return dataclasses.replace(self.config, **theirs)
        return self.config

    def engine_settings(self) -> dict[str, Any]:
        """This callback as keyword arguments of another adapter of the engine: its non-default settings only."""
        changed = {
            field.name: getattr(self.config, field.name)
            for field in dataclasses.fields(EngineConfig)
            if getattr(self.config, field.name) != field.default
        }
        more = {"specs": self._specs, "sinks": self._sinks, "events_path": self._events_path}
        return {**changed, "policy": self._policy(), **{name: value for name, value in more.items() if value}}

    def open_note(self, name: str, nbytes: int) -> mmap.mmap | None:
        """Memory of this rank that outlives the process, as long as its windows do; None where nothing is captured."""
        return None if self._session is None else self._session.engine.tiers.host.open_note(name, nbytes)

    # --- hooks of Lightning --------------------------------------------------------------------------------------

    def before_setup(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._session is None and not why_idle(trainer):
            self._begin(trainer)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        progress.begin_stage()
        if stage != "fit":
            check_has_others(trainer)
            return
        check_trainer(trainer, type(self).__name__)
        self.before_setup(trainer)
        if self._session is not None:
            self._session.on_setup()
        else:
            _log.info("%s: %s is idle in it", why_idle(trainer), type(self).__name__)

    def _begin(self, trainer: Trainer) -> None:
        self._make_first(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StageBoundaryLogging):
                callback.make_link(trainer)  # before ranks report what they have
        settings = SessionSettings(
            config=self._effective_config(trainer),
            policy=self._policy(),
            specs=self._specs,
            sinks=(*self._sinks, *_listeners(trainer)),
            events_path=self._events_path,
            counts_tokens=any(getattr(c, "counts_tokens", False) for c in trainer.callbacks),  # type: ignore[attr-defined]
        )
        self._session = LightningSession(
            trainer,
            trainer.lightning_module,
            settings,
            type(self).__name__,
            log_metrics=self._log_metrics and self.captures(),
        )

    on_fit_start = _handed_on("on_fit_start")
    on_train_start = _handed_on("on_train_start")
    on_before_backward = _handed_on("on_before_backward", 0)
    on_train_batch_end = _handed_on("on_train_batch_end", 0)
    on_before_optimizer_step = _handed_on("on_before_optimizer_step")
    on_train_end = _handed_on("on_train_end")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        progress.enter(Section.STEP)
        if self._session is not None:
            self._session.on_train_batch_start(batch)
        progress.enter(Section.STEP, trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        progress.enter(Section.STEP if trainer.state.fn == TrainerFn.FITTING else Section.SAVE)
        if self._session is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._session.on_validation_end()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        progress.enter(Section.VALIDATION)
        if self._session is not None and trainer.state.fn == TrainerFn.FITTING:
            self._session.on_validation_start()

    def on_validation_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            progress.count_evaluated()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        progress.enter(Section.SAVE)
        if self._session is not None:
            self._session.on_save_checkpoint(checkpoint)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._session is not None:
            give_exit_code(exception)
        self._close(completed=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        progress.enter(Section.SAVE)  # whatever the script does between two stages
        # Lightning calls this after a whole fit, and also after an interrupted one that it ends cleanly.
        if stage == "fit":
            self._close(completed=trainer.state.status != TrainerStatus.INTERRUPTED and not trainer.received_sigterm)

    def _close(self, *, completed: bool) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close(completed=completed)


def _listeners(trainer: Trainer) -> list[Sink]:
    """Callbacks beside the capturing one that want the events of its run: those with ``on_moetion_event(event)``.

    Tokens of each expert are counted for them if one has ``counts_tokens = True``.
    """
    return [c.on_moetion_event for c in trainer.callbacks if hasattr(c, "on_moetion_event")]  # type: ignore[attr-defined]
