"""One training run of a loop: a session that knows the loop's parts and its position."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from torch import nn

from moetion_lightning.engine import build_values
from moetion_lightning.engine.replay_record import describe_batch
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.integrations._parts import Parts
from moetion_lightning.integrations._ranks import make_ranks
from moetion_lightning.integrations._state import LoopPosition, LoopState
from moetion_lightning.session import SessionSettings, TrainingSession
from moetion_lightning.session.beginning import Beginning, of_loaders, of_module, of_schedulers

__all__ = ["Run"]


class Run(TrainingSession):
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
        self._parts_of = parts
        self._parts: Parts | None = None
        self._state: LoopState | None = None
        ranks = make_ranks(lambda: self._need_parts().parameters(), lambda: self._need_parts().replicated(), where)
        super().__init__(settings, where, root_dir, ranks)
        try:
            self.open({**of_module(module), **beginning})
        except BaseException:
            self.close(completed=False)
            raise

    def begin_loop(self, position: LoopPosition, *, autocast: bool = True, step: int = 0) -> None:
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
        # An average of the weights may read them in full, and begin late.
        averaging = any(callable(getattr(thing, "named_parameters", None)) for thing in parts.stateful.values())
        self.set_precision(autocast=autocast, averaging=averaging, sharded=parts.compiled or parts.shards())
        if parts.scales:
            self.needs_all_gradients()
        schedulers = parts.schedulers()
        self.learn({"settings": of_schedulers(schedulers)})
        sources = position.sources()
        if sources:  # a script's own loop shows only by its first step which loader trains
            self.learn(of_loaders(sources))
        self.attach(parts.module, parts.optimizers)
        state = LoopState(parts, position, self.engine.say_once)
        if self.point is not None:
            build_values(self.point, state.users_objects())
        self.check(state)
        self._state = state
        self.begin(state, state.restore, schedulers, step=step)

    def drew(self, batch: object, positions: Sequence[object]) -> None:
        """A batch was drawn and is trained on next: restarts are compared by it.

        Args:
            batch: The batch.
            positions: What follows the loaders that it comes from.
        """
        if not self._closed:
            self.record_batch(describe_batch(batch, positions))

    def close(self, *, completed: bool) -> None:
        """See :meth:`TrainingSession.close`."""
        try:
            super().close(completed=completed)
        finally:
            state, self._state = self._state, None
            if state is not None:
                state.remove()

    def _need_parts(self) -> Parts:
        assert self._parts is not None  # the engine asks for the layout when it is attached
        return self._parts
