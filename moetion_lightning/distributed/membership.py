"""Who takes part: a rank learns here that others were lost, outside all process groups."""

from __future__ import annotations

import atexit
import logging
import threading

from torch.distributed.distributed_c10d import PrefixStore, Store

from moetion_lightning.config import LaunchedProcess
from moetion_lightning.distributed.generations import (
    GenerationRecord,
    merge_records,
    newest_generation,
    read_records,
)
from moetion_lightning.distributed.stable_store import STORE_ERRORS, connect_store, format_endpoint
from moetion_lightning.errors import RankLostError

__all__ = ["Membership"]

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_WATCH_TIMEOUT_SECONDS = 10.0
_STORE_TIMEOUT_SECONDS = 300.0


class Membership:
    """Watches the generations of a job that ``moetion launch`` started.

    A daemon thread with a connection of its own reads the newest generation every 0.1 s. Nothing here is collective.

    Args:
        process: What the launcher told this process.
    """

    def __init__(self, process: LaunchedProcess) -> None:
        self._process = process
        self.rank = process.rank
        self.world_size = process.world_size
        self._generation = process.generation
        self._newest = process.generation
        self._records: list[GenerationRecord] = []  # newer than the generation, in order
        self._gone: str | None = None
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._watch_store = self._connect(_WATCH_TIMEOUT_SECONDS)
        self._look()  # what happened before this process came is known from the start
        self._thread = threading.Thread(target=self._watch, name="moetion-membership", daemon=True)
        self._thread.start()
        # A daemon thread inside torch's C++ code when the interpreter goes away would abort the process.
        atexit.register(self.close)

    @property
    def generation(self) -> int:
        """The generation that this process currently takes part in."""
        return self._generation

    @property
    def is_replacement(self) -> bool:
        """Whether this process was started in place of a lost one."""
        return self._process.generation > 0

    def store(self) -> Store:
        """A new client connection to the run's store, for the caller's own thread.

        Raises:
            RankLostError: The store does not answer.
        """
        try:
            return self._connect(_STORE_TIMEOUT_SECONDS)
        except STORE_ERRORS as error:
            raise RankLostError(self._store_gone(error)) from error

    def check(self) -> None:
        """Return at once if all ranks are there.

        Raises:
            RankLostError: Ranks were lost since :attr:`generation`, this process itself was replaced, or the store is
                gone.
        """
        with self._changed:
            gone, lost = self._gone, merge_records(self._records)
        if gone is not None:
            raise RankLostError(gone)
        if lost is None:
            return
        self._refuse_if_replaced(lost)
        raise RankLostError(
            f"lost ranks {', '.join(map(str, lost.lost))} ({lost.reason}): generation {lost.generation} begins, rank "
            f"{self.rank} is in generation {self._generation}. Rebuild the process groups and call advance()."
        )

    def wait_for_loss(self, timeout: float) -> bool:
        """Wait until ranks are lost or the store is gone.

        Args:
            timeout: Seconds to wait at most, beyond those after which the loss of a whole node is announced.

        Returns:
            Whether :meth:`check` would raise.
        """
        timeout += self._process.node_timeout
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._records) or self._gone is not None, timeout)

    def advance(self) -> int:
        """Adopt the newest generation that this process knows of.

        Returns:
            Its number.

        Raises:
            RankLostError: This process itself was declared lost, so another one has its rank.
        """
        with self._changed:
            for record in self._records:
                self._refuse_if_replaced(record)
            self._records.clear()
            self._generation = self._newest
            return self._generation

    def close(self) -> None:
        """End the watch."""
        self._closing.set()
        self._thread.join(timeout=_WATCH_TIMEOUT_SECONDS)
        atexit.unregister(self.close)

    def _refuse_if_replaced(self, lost: GenerationRecord) -> None:
        if self.rank in lost.lost:
            raise RankLostError(
                f"rank {self.rank} itself was declared lost in generation {lost.generation} ({lost.reason}) and "
                "another process has taken its place: this one must end."
            )

    def _connect(self, timeout_seconds: float) -> Store:
        client = connect_store(self._process.store_host, self._process.store_port, timeout_seconds)
        return PrefixStore(self._process.run_id, client)

    def _watch(self) -> None:
        while not self._closing.wait(_POLL_SECONDS):
            try:
                self._look()
            except STORE_ERRORS as error:
                if not self._closing.is_set():
                    _log.warning("rank %d lost the connection to the store: %s", self.rank, error)
                with self._changed:
                    self._gone = self._store_gone(error)
                    self._changed.notify_all()
                return

    def _look(self) -> None:
        newest = newest_generation(self._watch_store)
        if newest == self._newest:
            return
        records = read_records(self._watch_store, self._newest, newest)
        with self._changed:
            self._newest = newest
            self._records += records
            self._changed.notify_all()

    def _store_gone(self, error: Exception) -> str:
        endpoint = format_endpoint(self._process.store_host, self._process.store_port)
        return (
            f"the store at {endpoint} does not answer rank {self.rank} any more: the launcher or the rendezvous that "
            f"served it died, or the network is broken ({str(error).splitlines()[0]}). Start the job again."
        )
