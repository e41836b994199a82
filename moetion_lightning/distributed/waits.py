"""A rank waits for keys of a store without asking again and again; another thread of it can end the wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from moetion_lightning.distributed import progress
from moetion_lightning.distributed.bounded_store import ControlStore
from moetion_lightning.distributed.stable_store import STORE_ERRORS
from moetion_lightning.errors import RankLostError

__all__ = ["Waits"]

_NOTICE_SECONDS = 60.0
_INTERRUPT_SECONDS = 10.0
_log = logging.getLogger(__name__)


class Waits:
    """The one wait of a rank's main thread.

    Args:
        rank: This rank, for messages.
        check: Raises when waiting is useless.
        seconds: How long to wait for the slowest rank.
    """

    def __init__(self, rank: int, check: Callable[[], None], seconds: float) -> None:
        self._rank = rank
        self._check = check
        self.seconds = seconds
        self._guard = threading.Lock()
        self._present: tuple[ControlStore, Sequence[str], str] | None = None

    def wait(self, store: ControlStore, keys: Sequence[str], topic: str, mark: str) -> None:
        """Block until all keys exist.

        Args:
            store: Where they are.
            keys: Those keys.
            topic: What is exchanged, for messages.
            mark: What :meth:`interrupt` writes in their place.

        Raises:
            RankLostError: Waiting is useless, or it took too long.
        """
        with self._guard:
            self._present = (store, keys, mark)
        try:
            self._check()  # whoever learns of a loss from now on finds this wait and ends it
            with progress.waiting():
                if self._is_there(store, keys, topic):
                    return
            self._check()
        except STORE_ERRORS as error:
            if isinstance(error, RankLostError):
                raise
            self._check()
            raise RankLostError(
                f"rank {self._rank} cannot wait for the others to exchange {topic!r}: {error}"
            ) from error
        finally:
            with self._guard:
                self._present = None
        raise RankLostError(
            f"rank {self._rank} waited {self.seconds:.0f} s for the others to exchange {topic!r}. One of them hangs or "
            "died: see its log. A start that takes longer needs a larger MOETION_EXCHANGE_TIMEOUT (seconds)."
        )

    def _is_there(self, store: ControlStore, keys: Sequence[str], topic: str) -> bool:
        notice = min(_NOTICE_SECONDS, self.seconds)
        if store.wait(keys, notice):
            return True
        if self.seconds <= notice:
            return False
        _log.warning(
            "rank %d has waited %.0f s for the others (%s). If this does not end, the ranks do not run the same steps: "
            "with DDP and experts that get no tokens, find_unused_parameters=True is needed.",
            self._rank, notice, topic,
        )  # fmt: skip
        return store.wait(keys, self.seconds - notice)

    def interrupt(self) -> None:
        """From another thread, after ``check`` raises: end the wait that is under way."""
        with self._guard:
            present = self._present
        if present is None:
            return
        store, keys, mark = present
        try:
            other = store.clone(seconds=_INTERRUPT_SECONDS)
            for key in keys:
                other.compare_set(key, "", mark)
            other.close()
        except STORE_ERRORS:  # it is gone as well
            store.close()
