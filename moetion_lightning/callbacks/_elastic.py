"""Training that goes on in this process when another rank is lost and replaced."""

from __future__ import annotations

import logging
from collections.abc import Callable

from lightning.pytorch import Trainer

from moetion_lightning.callbacks._ranks import leave_groups, wrap_again
from moetion_lightning.distributed.groups import Groups
from moetion_lightning.engine import Ranks, StageReplayError
from moetion_lightning.session import TrainingSession

__all__ = ["Elastic"]

_log = logging.getLogger(__name__)
_NOTICE_SECONDS = 5.0
_SHORT_NOTICE_SECONDS = 1.0


class _Elsewhere(Exception):
    """Training does not go on from where this process is: the loops are left, and entered again."""


class Elastic:
    """Guards the fit loop of one trainer.

    Args:
        trainer: The trainer.
        groups: Its process groups.
        ranks: The ranks as the engine sees them.
        find: All ranks: agree where to continue. Returns whether that is another place than the one where a process
            is that has only just begun: its first batch.
        place: Put the adapter's part of the state that was found in place.
        session: Is told of losses, and of groups.
    """

    def __init__(
        self,
        trainer: Trainer,
        groups: Groups,
        ranks: Ranks,
        find: Callable[[], bool],
        place: Callable[[], None],
        session: TrainingSession,
    ) -> None:
        self._trainer = trainer
        self._groups = groups
        self._ranks = ranks
        self._find = find
        self._place = place
        self._session = session

    def run(self, start: Callable[[], None], again: Callable[[], None]) -> None:
        """Train; when a rank is lost, go back with the others to a common state and go on.

        Args:
            start: The fit loop.
            again: The fit loop, from a restored position.
        """
        work = start
        while True:
            try:
                work()
                self._ranks.control.all_gather("end", None)  # nobody leaves while another may still need it
                self._groups.membership.finish()
                return
            except _Elsewhere:
                self._place()
            except StageReplayError as error:
                _log.warning("rank %d: %s", self._ranks.control.rank, _first_line(error))
                error.__traceback__ = error.__context__ = error.__cause__ = None
                self._restore_again()
            except Exception as error:
                if not self._is_loss(error):
                    raise
                _log.warning("rank %d: %s", self._ranks.control.rank, _first_line(error))
                # Frames of the failed iteration hold references to the broken groups.
                error.__traceback__ = error.__context__ = error.__cause__ = None
                self._go_back()
            work = again

    def meet(self) -> None:
        """Before the first batch, also after a loss: all ranks of the membership have their groups.

        A process that comes to its first batch, and loses ranks while it waits for them there, stays as it is if
        training begins there: what it has drawn from generators and loaders cannot be taken back.
        """
        while self._groups.alone:
            try:
                self._groups.join()
                wrap_again(self._trainer)
                self._session.groups_formed(self._groups.formed_seconds)
            except Exception as error:
                if not self._is_loss(error):
                    raise
                error.__traceback__ = error.__context__ = error.__cause__ = None
                if self._find_after_loss():
                    raise _Elsewhere from None
        self._groups.start_values.end()

    def attempt(self, work: Callable[[], object]) -> None:
        """Do what all ranks do together after a loss; begin anew as long as more are lost meanwhile."""
        while True:
            try:
                work()
                return
            except Exception as error:
                if not self._is_loss(error):
                    raise
                self._advance()

    def _restore_again(self) -> None:
        """Nobody was lost, and the groups are whole: only the state is not."""
        try:
            self._find()
        except Exception as error:
            if not self._is_loss(error):
                raise
            self._find_after_loss()
        self._place()

    def _go_back(self) -> None:
        self._find_after_loss()
        self._place()

    def _find_after_loss(self) -> bool:
        self._session.loss_noticed()
        leave_groups(self._trainer, self._groups)
        self._advance()
        found: list[bool] = []
        self.attempt(lambda: found.append(self._find()))
        return found[-1]

    def _advance(self) -> None:
        generation = self._groups.membership.advance()
        self._ranks.control = self._groups.control()
        _log.info("rank %d takes part in generation %d of the job", self._ranks.control.rank, generation)

    def _newer(self, seconds: float) -> bool:
        return bool(self._groups.membership.lost(seconds))

    def _is_loss(self, error: Exception) -> bool:
        """Whether this is how the loss of a rank shows here; the launcher's word may take a moment."""
        return self._newer(_NOTICE_SECONDS if isinstance(error, RuntimeError) else _SHORT_NOTICE_SECONDS)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
