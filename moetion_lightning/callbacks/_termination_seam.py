"""SIGTERM, and SLURM's requeue signal: all ranks learn of them at the same batch, and end or requeue together.

Lightning answers SIGTERM on a rank with a broadcast inside the signal handler, wherever that rank then is. The other
ranks are in another collective: both wait for ever (tried: gloo, SIGTERM to one rank of two). Its requeue handler saves
a checkpoint of all ranks there. Here a handler only notes the signal. Before each batch, where Lightning broadcasts its
flag, one small all-reduce tells all ranks what any of them was told.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from moetion_lightning.config import TERMINATED_EXIT_CODE
from moetion_lightning.core.instance_patches import InstancePatches
from moetion_lightning.distributed.flags import largest
from moetion_lightning.session.process_end import note_exit_code

__all__ = ["TerminationSeam", "give_exit_code"]

_log = logging.getLogger(__name__)
_NOTHING, _REQUEUE, _TERMINATE = 0, 1, 2


class TerminationSeam:
    """Lets the ranks of one trainer agree before each batch whether a signal has come to any of them.

    Args:
        trainer: The trainer.
        patches: Take everything back when training is over.
    """

    def __init__(self, trainer: Trainer, patches: InstancePatches) -> None:
        self._trainer = trainer
        self._patches = patches
        self._told = _NOTHING
        self._drain: Callable[[], None] = lambda: None
        self._requeue: Callable[[Any, Any], None] | None = None

    def agree_before_batches(self, drain: Callable[[], None]) -> None:
        """Begin. With one rank nothing is changed: Lightning ends it at the end of the batch.

        Args:
            drain: Called on every rank when training is about to end by SIGTERM.
        """
        trainer, put = self._trainer, self._patches.put
        self._drain = drain
        if trainer.world_size == 1:
            return
        connector = trainer._signal_connector
        self._requeue = connector._slurm_sigusr_handler_fn
        put(connector, "_sigterm_notifier_fn", self._note_sigterm)
        put(connector, "_slurm_sigusr_handler_fn", self._note_requeue)
        epoch_loop = trainer.fit_loop.epoch_loop
        advance = epoch_loop.advance

        def agree_and_advance(*args: Any, **kwargs: Any) -> None:
            self._agree()
            advance(*args, **kwargs)

        put(epoch_loop, "advance", agree_and_advance)
        put(epoch_loop, "_broadcast_sigterm_tensor", lambda: None)  # since Lightning 2.6

    # --- inside --------------------------------------------------------------------------------------------------

    def _note_sigterm(self, number: int, frame: FrameType | None) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None and self._told != _TERMINATE:
            launcher.kill(number)
        self._told = _TERMINATE

    def _note_requeue(self, number: int, frame: FrameType | None) -> None:
        self._told = max(self._told, _REQUEUE)

    def _agree(self) -> None:
        trainer = self._trainer
        told = largest(self._told, trainer.strategy.root_device)
        if told == _REQUEUE and self._requeue is not None:
            self._told = _NOTHING
            self._requeue(signal.SIGUSR1, None)
        elif told == _TERMINATE:
            whose = "this rank" if self._told == _TERMINATE else "another rank"
            _log.warning(
                "SIGTERM to %s: all ranks end after step %d; start the same command to continue",
                whose, trainer.global_step,
            )  # fmt: skip
            trainer._signal_connector.received_sigterm = True
            self._drain()
            raise SIGTERMException(TERMINATED_EXIT_CODE)


def give_exit_code(error: BaseException) -> None:
    """Let the process end with a code that schedulers take for a failure: Lightning's would be 0, as if all were done.

    Args:
        error: What ends training.
    """
    if isinstance(error, SIGTERMException):
        error.code = error.code or TERMINATED_EXIT_CODE
        note_exit_code(TERMINATED_EXIT_CODE)  # fits of this script that were complete are not over
