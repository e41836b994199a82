"""One training run of any loop: the engine, and what every adapter does with it."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from moetion_lightning.distributed.default_store import default_world
from moetion_lightning.engine import Engine, RestorePoint, derive_job_id
from moetion_lightning.engine.replay_record import BatchDigest, describe_batch
from moetion_lightning.engine.reporting import Reporter, show_log_lines
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.events import EventBus, JsonlSink
from moetion_lightning.integrations._parts import Parts
from moetion_lightning.integrations._ranks import make_ranks
from moetion_lightning.integrations._settings import RunSettings
from moetion_lightning.integrations._state import LoopPosition, LoopState

__all__ = ["Run"]

_log = logging.getLogger(__name__)
_NOT_REACHED = (
    "training ended before it came to where the window begins that was found: nothing was trained, and the windows are "
    "kept. Start it with as many epochs as before, or begin afresh with another job_id (MOETION_JOB_ID)."
)


class Run:
    """From the search for a window to the end of training.

    Ranks: all of them make it, and call its methods, together.

    Args:
        settings: The user's.
        where: The user's call, for messages.
        parts: Gives what the run consists of; called when the loop begins.
        root_dir: Where the run writes its files: part of the derived job identity.

    Raises:
        ConfigurationError: ``moetion launch`` started this process.
        StoreError, HostMemoryError, JobBusyError, CorruptSnapshotError, VersionError: See the message.
    """

    def __init__(
        self, settings: RunSettings, where: str, parts: Callable[[], Parts], root_dir: str | os.PathLike[str]
    ) -> None:
        self._where = where
        self._parts_of = parts
        self._parts: Parts | None = None
        self._state: LoopState | None = None
        self._specs = settings.specs
        self._closed = False
        rank, world_size = default_world()
        show_log_lines(rank)
        ranks = make_ranks(lambda: self._need_parts().parameters(), lambda: self._need_parts().replicated(), where)
        jsonl_rank = rank if world_size > 1 else None
        path = settings.events_path
        self._jsonl = None if path is None else JsonlSink(path, rank=jsonl_rank)
        self.reporter = Reporter()
        bus = EventBus((self.reporter, *([self._jsonl] if self._jsonl else []), *settings.sinks))
        job = derive_job_id(settings.config.job_id, root_dir)
        self.engine = Engine(settings.config, settings.policy, bus=bus, job=job, ranks=ranks)
        self._point: RestorePoint | None = None
        # A script may end, or fail, without close(): a copy that is under way then would abort the interpreter's end.
        atexit.register(self._close_at_exit)
        try:
            point = self.engine.open()
            assert point is None or isinstance(point, RestorePoint)  # living state is only in elastic jobs
            self._point = point
        except BaseException:
            self.close(completed=False)
            raise

    # --- before the first batch ----------------------------------------------------------------------------------

    @property
    def saved(self) -> Mapping[str, Any] | None:
        """This adapter's part of the window that was found; None if none was, or another state was preferred."""
        if self._point is None:
            return None
        state: Mapping[str, Any] = self._point.run_state()["adapter"]
        return state

    @property
    def captured_at(self) -> float | None:
        """When that window's first iteration was captured, seconds since the epoch."""
        return None if self._point is None else self._point.captured_at

    @property
    def begun(self) -> bool:
        """Whether the first batch was asked for."""
        return self._state is not None

    def prefer(self, what: str) -> None:
        """The user has put another state in place: it wins over the window that was found.

        Args:
            what: The user's call.

        Raises:
            ConfigurationError: Training is under way: windows of two courses would mix.
        """
        if self.begun and not self._closed:
            raise ConfigurationError(
                f"{what} while {self._where} captures: the state would change in the middle of a window. Load before "
                "the loop begins, or call close() first."
            )
        if self._point is not None:
            self.engine.say_once(f"{what} was called: it wins over {self._point.name}")
        self._point = None
        self.engine.tiers.release_point()

    def begin(self, position: LoopPosition, *, autocast: bool = True) -> None:
        """Put the state in place from which training continues, or begin afresh: right before the first batch.

        Args:
            position: Where the loop stands.
            autocast: Whether the forward may cast parameters to 16 bits.

        Raises:
            OperatorError, ForeignWindowError, HostMemoryError, UnsupportedStateError: See the message.
        """
        if self._closed:
            raise ConfigurationError(f"{self._where} is closed: make another one for another course of training")
        parts = self._parts = self._parts_of()
        if not parts.optimizers:
            raise ConfigurationError(f"{self._where} knows no optimizer; expected at least one before the loop begins")
        engine = self.engine
        # An average of the weights may read them in full, and begin late; shards are gathered before they are used.
        averaging = any(callable(getattr(thing, "named_parameters", None)) for thing in parts.stateful.values())
        engine.precision.enabled = autocast and not (averaging or parts.compiled or parts.shards())
        if parts.scales:
            engine.may_skip_gradients = False
            if engine.config.skip_frozen_gradients:
                engine.say_once(
                    "skip_frozen_gradients=True has no effect with a gradient scaler: whether a step is skipped "
                    "depends on all gradients. Replays compute them all."
                )
        engine.attach(parts.module, parts.optimizers, self._specs)
        state = LoopState(parts, position)
        engine.check_run_state(state)
        saved = self.saved
        self._state, self._point = state, None
        if saved is None:
            engine.start(state)
        else:
            state.restore(saved)
            engine.restore(state)

    # --- training ------------------------------------------------------------------------------------------------

    @property
    def replaying(self) -> bool:
        """Whether iterations are done again from a window: the live state is not whole yet."""
        return self.engine.converting

    def boundary(self) -> None:
        """A batch is done, with all that belongs to it."""
        if self._state is not None and not self._closed:
            self.engine.boundary(self._state)

    def record_batch(self, batch: object, positions: Sequence[object] = ()) -> None:
        """A batch was drawn and is trained on next: restarts are compared by it.

        Args:
            batch: The batch, or its digest if it was taken before.
            positions: What follows the loaders that it comes from.
        """
        if self._state is not None and not self._closed:
            known = batch if isinstance(batch, BatchDigest) else describe_batch(batch, positions)
            self.engine.record_batch(known)

    def record_loss(self, loss: Tensor) -> None:
        """The loss of a batch: replays are verified by it."""
        if not self._closed and loss.numel() == 1:
            self.engine.record_loss(loss)

    def close(self, *, completed: bool) -> None:
        """End. Harmless if called again.

        Args:
            completed: Whether training is complete, so that its windows are removed. A window that was found and never
                put in place is kept all the same.
        """
        if self._closed:
            return
        if completed and self._point is not None:
            completed = False
            _log.warning(_NOT_REACHED)
        self._closed = True
        atexit.unregister(self._close_at_exit)
        try:
            self.engine.close(completed=completed)
        finally:
            if self._state is not None:
                self._state.remove()
            if self._jsonl is not None:
                self._jsonl.close()

    def _close_at_exit(self) -> None:
        self.close(completed=False)

    def _need_parts(self) -> Parts:
        assert self._parts is not None  # the engine asks for the layout when it is attached
        return self._parts
