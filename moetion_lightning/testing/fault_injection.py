"""A callback that makes its process fail once, at a named point of a step: for drills of one's own."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from moetion_lightning.distributed.control import default_world
from moetion_lightning.errors import ConfigurationError, MoEtionError
from moetion_lightning.events import Event
from moetion_lightning.testing.fault_points import EVENT_POINTS, FaultPoints, check_point, event_point

__all__ = ["FaultInjection", "InjectedFaultError"]

_log = logging.getLogger(__name__)
_ACTIONS = ("kill", "raise", "hang")


class InjectedFaultError(MoEtionError, RuntimeError):
    """What :class:`FaultInjection` raises with ``action="raise"``."""


class FaultInjection(Callback):
    """Fail once, at a named point: by SIGKILL, an exception, or a hang. The restarted run passes.

    Beside ``SparseExpertCheckpoint`` and its like it also knows their points. In a loop of another adapter give it as
    one of the ``sinks``: then it knows theirs.

    Args:
        at: Optimizer step in which it happens, from 1; if the point does not come in it, the first time after it.
        point: ``data``, ``forward``, ``backward``, ``optimizer_step``, ``capture``, ``commit``, ``restore``,
            ``replay``, ``validation`` or ``save``, see :mod:`moetion_lightning.testing.fault_points`. ``restore`` and
            ``replay`` come in a start that continues: ``at`` is not asked there.
        action: ``"kill"`` sends SIGKILL to the own process, ``"raise"`` raises :class:`InjectedFaultError`, ``"hang"``
            stops the thread that came to the point for ever.
        rank: Global rank that fails; None: every rank does.
        marker: File that says that it has happened; None takes ``.moetion-fault-POINT-AT-RANK`` in the current
            directory. Remove it to let it happen again.

    Raises:
        ConfigurationError: An argument is none of these, or the engine's threads would swallow the exception.
    """

    def __init__(
        self,
        *,
        at: int,
        point: str = "forward",
        action: Literal["kill", "raise", "hang"] = "kill",
        rank: int | None = 0,
        marker: str | None = None,
    ) -> None:
        super().__init__()
        check_point(point)
        if action not in _ACTIONS:
            raise ConfigurationError(f"action={action!r}: expected one of {', '.join(_ACTIONS)}")
        if type(at) is not int or at < 1:
            raise ConfigurationError(f"at={at!r}: expected an integer; optimizer steps count from 1")
        if rank is not None and (type(rank) is not int or rank < 0):
            raise ConfigurationError(f"rank={rank!r}: expected a global rank from 0, or None for every rank")
        if marker is not None and (not isinstance(marker, str) or not marker):
            raise ConfigurationError(
                f"marker={marker!r}: expected the path of a file, or None for one that is named here"
            )
        if action == "raise" and point in EVENT_POINTS:
            raise ConfigurationError(
                f'action="raise" at point={point!r}: events are announced on the engine\'s threads, where an exception '
                'of a listener ends nothing; expected "kill" or "hang" there'
            )
        self.at, self.point, self.action, self.rank = at, point, action, rank
        self._named = marker
        self._made_in = Path.cwd()
        self._never = threading.Event()
        self._points = FaultPoints(lambda reached: self._fail())

    # --- hooks of Lightning --------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch from the first batch on."""
        self._watch(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Watch in the next step, if it is due there."""
        self._watch(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks away."""
        self._points.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks away."""
        self._points.close()

    def on_moetion_event(self, event: Event) -> None:
        """An event of the run beside it."""
        point = event_point(event)
        comes_late = point in ("restore", "replay") or getattr(event, "iteration", 0) >= self.at
        if point == self.point and comes_late:
            self._fail()

    __call__ = on_moetion_event

    # --- inside --------------------------------------------------------------------------------------------------

    def _watch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_due = trainer.global_step + 1 >= self.at and self.point not in EVENT_POINTS and not self._has_happened()
        self._points.watch({self.point} if is_due else (), pl_module.parameters() if is_due else ())

    @property
    def marker(self) -> Path:
        """The file that says that it has happened."""
        rank = default_world()[0]
        return self._made_in / (self._named or f".moetion-fault-{self.point}-{self.at}-{rank}")

    def _has_happened(self) -> bool:
        return self.rank not in (None, default_world()[0]) or self.marker.exists()

    def _fail(self) -> None:
        if self._has_happened():
            return
        self.marker.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:  # another thread came here at the same time
            return
        _log.warning("fault injected: %s at %s of step %d, once (%s)", self.action, self.point, self.at, self.marker)
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "hang":
            self._never.wait()
        else:
            self._points.close()
            raise InjectedFaultError(f"injected at {self.point} of step {self.at}")
