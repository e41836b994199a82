"""Who takes part: a rank learns here that others were lost, outside all process groups."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

from moetion_lightning.config import LaunchedProcess
from moetion_lightning.distributed.bounded_store import BoundedStore
from moetion_lightning.distributed.generations import (
    GENERATION_KEY,
    GenerationRecord,
    announce_over,
    merge_records,
    newest_generation,
    read_records,
)
from moetion_lightning.distributed.stable_store import STORE_ERRORS, format_endpoint
from moetion_lightning.errors import RankLostError

__all__ = ["Membership", "StoreMembership"]

_log = logging.getLogger(__name__)

_CALL_SECONDS = 20.0
_FOREVER_SECONDS = 1e6
_RECONNECTS = 3
_PAUSE_SECONDS = 1.0


class Membership(Protocol):
    """Knows the memberships (generations) of a job, whatever counts them.

    A rank takes part in one generation. When ranks are lost, the next one begins; a rank adopts it with
    :meth:`advance`, after it has given up everything that belongs to the old one.
    """

    rank: int
    world_size: int

    @property
    def generation(self) -> int:
        """The generation that this process takes part in."""

    @property
    def newest(self) -> int:
        """The newest generation that this process knows of."""

    @property
    def is_replacement(self) -> bool:
        """Whether this process was started in place of a lost one."""

    def lost(self, seconds: float = 0.0) -> tuple[int, ...]:
        """The ranks lost since :attr:`generation`; waits for the first loss at most so long.

        Raises:
            RankLostError: This process cannot learn of losses any more: it must end.
        """

    def check(self) -> None:
        """Return at once if all ranks are there.

        Raises:
            RankLostError: Ranks were lost since :attr:`generation`, or this process must end.
        """

    def advance(self) -> int:
        """Adopt the newest known generation, and return its number.

        Raises:
            RankLostError: This process itself was declared lost, so another one has its rank.
        """

    def finish(self) -> None:
        """Leave training with all others, which have come to its end as well; none can be replaced alone any more.

        Raises:
            RankLostError: A rank was lost before that, and all others get this error, too.
        """

    def store(self) -> BoundedStore:
        """A new client of the run's store, for the caller's own thread.

        Raises:
            RankLostError: The store does not answer.
        """

    def watch(self, act: Callable[[int], None]) -> None:
        """Have something done on the watching thread whenever ranks are lost.

        Args:
            act: Frees threads that wait for a lost rank, in what belongs to generations before the one that it is
                given. Called before anybody else learns of the loss (so :attr:`newest` is older), and once more when
                :meth:`check` raises, for what was begun in between.
        """


class StoreMembership:
    """Watches the generations of a job that ``moetion launch`` started.

    A daemon thread waits, over a connection of its own, for the record of the next generation: it costs the store
    nothing until a rank is lost. Nothing here is collective. A broken connection is opened again; when the store is
    gone for good, or this rank cannot reach it, every later :meth:`check` says so and the process must end.

    Args:
        process: What the launcher told this process.
    """

    def __init__(self, process: LaunchedProcess) -> None:
        self._process = process
        self.rank = process.rank
        self.world_size = process.world_size
        self._generation = process.generation
        self._newest = self._seen = process.generation
        self._records: list[GenerationRecord] = []  # newer than the generation, in order
        self._gone: str | None = None
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._acts: list[Callable[[int], None]] = []
        self._watch_store: Any = self._connect()
        self._look()  # what happened before this process came is known from the start
        self._thread = threading.Thread(target=self._watch, name="moetion-membership", daemon=True)
        self._thread.start()

    @property
    def generation(self) -> int:
        """See :class:`Membership`."""
        return self._generation

    @property
    def newest(self) -> int:
        """See :class:`Membership`."""
        return self._newest

    @property
    def is_replacement(self) -> bool:
        """See :class:`Membership`."""
        return self._process.generation > 0

    def store(self) -> BoundedStore:
        """See :class:`Membership`."""
        try:
            return self._connect()
        except STORE_ERRORS as error:
            raise RankLostError(self._store_gone(error)) from error

    def finish(self) -> None:
        """See :class:`Membership`."""
        with contextlib.closing(self.store()) as store:
            is_over = announce_over(store, self._generation)
        if not is_over:
            self.lost(_CALL_SECONDS)
            self.check()

    def watch(self, act: Callable[[int], None]) -> None:
        """See :class:`Membership`."""
        self._acts.append(act)

    def check(self) -> None:
        """See :class:`Membership`."""
        with self._changed:
            lost = self._lost()
        if lost is None:
            return
        self._refuse_if_replaced(lost)
        raise RankLostError(
            f"lost ranks {', '.join(map(str, lost.lost))} ({lost.reason}): generation {lost.generation} begins, rank "
            f"{self.rank} is in generation {self._generation}. Rebuild the process groups and call advance()."
        )

    def lost(self, seconds: float = 0.0) -> tuple[int, ...]:
        """See :class:`Membership`; the wait is longer by the time after which the loss of a node is announced."""
        limit = seconds + self._process.node_timeout if seconds else 0.0
        with self._changed:
            self._changed.wait_for(lambda: bool(self._records) or self._gone is not None, limit)
            lost = self._lost()
        return () if lost is None else lost.lost

    def advance(self) -> int:
        """See :class:`Membership`."""
        with self._changed:
            for record in self._records:
                self._refuse_if_replaced(record)
            self._records.clear()
            self._generation = self._newest
            return self._generation

    def close(self) -> None:
        """End the watch."""
        self._closing.set()
        self._watch_store.close()
        self._thread.join(timeout=_CALL_SECONDS)

    def _lost(self) -> GenerationRecord | None:
        if self._gone is not None:
            raise RankLostError(self._gone)
        return merge_records(self._records)

    def _refuse_if_replaced(self, lost: GenerationRecord) -> None:
        if self.rank in lost.lost:
            raise RankLostError(
                f"rank {self.rank} itself was declared lost in generation {lost.generation} ({lost.reason}) and "
                "another process has taken its place: this one must end."
            )

    def _connect(self) -> BoundedStore:
        process = self._process
        return BoundedStore(process.store_host, process.store_port, _CALL_SECONDS, prefix=process.run_id)

    def _watch(self) -> None:
        failures = 0
        while not self._closing.is_set():
            try:
                self._watch_store.wait([f"{GENERATION_KEY}/{self._seen + 1}"], _FOREVER_SECONDS)
                self._look()
                failures = 0
            except STORE_ERRORS as error:
                failures += 1
                if failures <= _RECONNECTS:
                    self._closing.wait(_PAUSE_SECONDS)
                    continue
                if not self._closing.is_set():
                    _log.warning("rank %d lost the connection to the store: %s", self.rank, error)
                    self._tell([], self._newest, gone=self._store_gone(error))
                return

    def _look(self) -> None:
        newest = newest_generation(self._watch_store)
        while self._watch_store.check([f"{GENERATION_KEY}/{newest + 1}"]):  # who wrote it has not told yet
            newest += 1
        records = read_records(self._watch_store, self._seen, newest)
        self._seen = newest
        if records:
            self._tell(records, records[-1].generation)

    def _tell(self, records: list[GenerationRecord], newest: int, *, gone: str | None = None) -> None:
        ended = newest if gone is None else newest + 1  # without the store no membership can go on
        for act in list(self._acts):
            act(ended)
        with self._changed:
            self._newest = newest
            self._records += records
            self._gone = gone
            self._changed.notify_all()
        for act in list(self._acts):
            act(ended)

    def _store_gone(self, error: Exception) -> str:
        endpoint = format_endpoint(self._process.store_host, self._process.store_port)
        return (
            f"the store at {endpoint} does not answer rank {self.rank} any more: the launcher or the rendezvous that "
            f"served it died, or the network is broken ({str(error).splitlines()[0]}). Start the job again."
        )
