"""One training run of a loop: its parts and its position, onto a session."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moetion_lightning.engine import Engine, RestorePoint, build_values
from moetion_lightning.engine.replay_record import BatchDigest, describe_batch
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.integrations._parts import Parts
from moetion_lightning.integrations._ranks import make_ranks
from moetion_lightning.integrations._state import LoopPosition, LoopState
from moetion_lightning.session import SessionSettings, TrainingSession
from moetion_lightning.session.beginning import Beginning, of_loaders, of_module, of_schedulers

__all__ = ["Run"]


class Run:
    """From the search for a window to the end of training.

    Ranks: all of them make it, and call its methods, together.

    Args:
        settings: The user's.
        where: The user's call, for messages.
        parts: Gives what the run consists of; called when the loop begins.
        root_dir: Where the run writes its files: part of the derived job identity.
        module: What trains, with the weights with which training would begin.
        beginning: What else is known of how it begins.

    Raises:
        ConfigurationError: ``moetion launch`` started this process.
        ForeignWindowError, StoreError, HostMemoryError, JobBusyError, CorruptSnapshotError, VersionError: See the
            message.
    """

    def __init__(
        self,
        settings: SessionSettings,
        where: str,
        parts: Callable[[], Parts],
        root_dir: str | os.PathLike[str],
        module: nn.Module,
        beginning: Beginning,
    ) -> None:
        self._where = where
        self._parts_of = parts
        self._parts: Parts | None = None
        self._state: LoopState | None = None
        self._closed = False
        ranks = make_ranks(lambda: self._need_parts().parameters(), lambda: self._need_parts().replicated(), where)
        self._session = TrainingSession(settings, where, root_dir, ranks)
        try:
            self._session.open({**of_module(module), **beginning})
        except BaseException:
            self.close(completed=False)
            raise

    # --- before the first batch ----------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self._session.engine

    @property
    def metrics(self) -> Mapping[str, float]:
        """Newest numbers."""
        return self._session.reporter.metrics

    @property
    def saved(self) -> Mapping[str, Any] | None:
        """This adapter's part of the window that was found; None if none was, or another state was preferred."""
        saved: Mapping[str, Any] | None = self._session.saved
        return saved

    @property
    def captured_at(self) -> float | None:
        """When that window's first iteration was captured, seconds since the epoch."""
        point = self._session.point
        return None if point is None else point.captured_at

    @property
    def begun(self) -> bool:
        """Whether the first batch was asked for."""
        return self._state is not None

    def last_step(self, step: int) -> int:
        """Optimizer steps at the end of the window that was found, given those at its beginning."""
        point = self._session.point
        return step + (point.num_slots - 1 if isinstance(point, RestorePoint) else 0)

    def prefer(self, what: str, step: int | None = None) -> None:
        """See :meth:`TrainingSession.prefer`."""
        self._session.prefer(what, step)

    def begin(self, position: LoopPosition, *, autocast: bool = True, step: int = 0) -> None:
        """Put the state in place from which training continues, or begin afresh: right before the first batch.

        Args:
            position: Where the loop stands.
            autocast: Whether the forward may cast parameters to 16 bits.
            step: Optimizer steps that the loop has behind it, where it begins.

        Raises:
            OperatorError, ForeignWindowError, HostMemoryError, UnsupportedStateError: See the message.
        """
        if self._closed:
            raise ConfigurationError(f"{self._where} is closed: make another one for another course of training")
        parts = self._parts = self._parts_of()
        if not parts.optimizers:
            raise ConfigurationError(f"{self._where} knows no optimizer; expected at least one before the loop begins")
        session = self._session
        # An average of the weights may read them in full, and begin late.
        averaging = any(callable(getattr(thing, "named_parameters", None)) for thing in parts.stateful.values())
        session.set_precision(autocast=autocast, averaging=averaging, sharded=parts.compiled or parts.shards())
        if parts.scales:
            session.needs_all_gradients()
        schedulers = [thing for name, thing in parts.stateful.items() if name.startswith("scheduler")]
        session.learn({"settings": of_schedulers(schedulers)})
        sources = position.sources()
        if sources:  # a script's own loop shows only by its first step which loader trains
            session.learn(of_loaders(sources))
        session.attach(parts.module, parts.optimizers)
        state = LoopState(parts, position, session.engine.say_once)
        if session.point is not None:
            build_values(session.point, state.users_objects())
        session.check(state)
        self._state = state
        session.begin(state, state.restore, schedulers, step=step)

    # --- training ------------------------------------------------------------------------------------------------

    @property
    def replaying(self) -> bool:
        """Whether iterations are done again from a window: the live state is not whole yet."""
        return self._session.replaying

    def boundary(self) -> None:
        """A batch is done, with all that belongs to it."""
        self._session.boundary()

    def attempt_step(self) -> None:
        """An optimizer step is about to be tried."""
        self._session.attempt_step()

    def record_batch(self, batch: object, positions: Sequence[object] = ()) -> None:
        """A batch was drawn and is trained on next: restarts are compared by it.

        Args:
            batch: The batch, or its digest if it was taken before.
            positions: What follows the loaders that it comes from.
        """
        if not self._closed:
            self._session.record_batch(batch if isinstance(batch, BatchDigest) else describe_batch(batch, positions))

    def record_loss(self, loss: Tensor) -> None:
        """The loss of a batch: replays are verified by it."""
        self._session.record_loss(loss)

    def close(self, *, completed: bool) -> None:
        """End. Harmless if called again.

        Args:
            completed: Whether training is complete.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._session.close(completed=completed)
        finally:
            if self._state is not None:
                self._state.remove()

    def _need_parts(self) -> Parts:
        assert self._parts is not None  # the engine asks for the layout when it is attached
        return self._parts
