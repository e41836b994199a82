"""The control plane: small values that all ranks must agree on, outside the training's process groups.

It talks to a :class:`torch.distributed.Store` only, so that it still works while a process group is broken, and every
wait looks every few milliseconds whether a rank was lost meanwhile.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

from moetion_lightning.errors import RankLostError

__all__ = ["Control", "SingleRank", "StoreControl", "default_control", "default_world"]

_FIRST_PAUSE_SECONDS = 1e-4
_LONGEST_PAUSE_SECONDS = 2e-3
_SLOWER = 1.1
_GO, _STOP = "go", "stop"
_NOTICE_SECONDS = 60.0
_log = logging.getLogger(__name__)


class Control(Protocol):
    """What the engine needs of the other ranks."""

    @property
    def rank(self) -> int:
        """This process."""

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""

    def all_gather(self, topic: str, value: Any) -> list[Any]:
        """Every rank's value (JSON), by rank. All ranks call it in the same order with the same topic.

        Raises:
            RankLostError: A rank was lost, or did not answer in time.
        """

    def vote(self, topic: str) -> None:
        """Go on only if every rank has come this far; otherwise no rank does.

        Raises:
            RankLostError: A rank was lost before it arrived.
        """

    def remember(self, name: str, value: str) -> None:
        """Keep a value where every later process of this run finds it. One rank calls it."""

    def recall(self, name: str) -> str:
        """What :meth:`remember` kept last; "" for nothing."""


class SingleRank:
    """A job of one process."""

    rank = 0
    world_size = 1

    def vote(self, topic: str) -> None:
        """Goes on."""

    def all_gather(self, topic: str, value: Any) -> list[Any]:
        """The value itself, as the others would see it."""
        return [json.loads(json.dumps(value))]

    def remember(self, name: str, value: str) -> None:
        """Nobody comes later."""

    def recall(self, name: str) -> str:
        """Nothing."""
        return ""


class StoreControl:
    """Gathers through a store: each rank writes its value, rank 0 reads all and writes the list.

    A gather costs each rank two requests and rank 0 one for each rank, so that thousands of ranks are served.

    Args:
        store: A store of this object's own (another thread's waits would block this one's).
        rank: This rank.
        world_size: Number of ranks.
        scope: Prefix of all keys: differs for each membership (generation) of the job.
        check: Called while waiting; raises when waiting is useless.
        timeout_seconds: How long to wait for the slowest rank.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        scope: str,
        check: Callable[[], None] = lambda: None,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self.scope = scope
        self._check = check
        self._timeout = timeout_seconds
        self._serial = 0
        self._votes = 0

    def all_gather(self, topic: str, value: Any) -> list[Any]:
        """See :class:`Control`."""
        self._check()
        self._serial += 1
        prefix = f"{self.scope}/{self._serial}"
        mine = json.dumps([topic, value])
        if self.world_size == 1:
            return [json.loads(mine)[1]]
        if self.rank == 0:
            keys = [f"{prefix}/{rank}" for rank in range(1, self.world_size)]
            self._wait(keys, topic)
            answers = [mine, *(bytes(v).decode() for v in self._store.multi_get(keys))]
            self._store.set(f"{prefix}/all", json.dumps([json.loads(a) for a in answers]))
            self._forget(prefix)
        else:
            self._store.set(f"{prefix}/{self.rank}", mine)
            self._wait([f"{prefix}/all"], topic)
        gathered = json.loads(bytes(self._store.get(f"{prefix}/all")).decode())
        for rank, (theirs, _) in enumerate(gathered):
            if theirs != topic:
                raise RankLostError(
                    f"rank {rank} exchanges {theirs!r} while rank {self.rank} exchanges {topic!r}: the ranks run "
                    "different code, or one of them skipped a step. Start the same script with the same settings on "
                    "every rank."
                )
        return [answer for _, answer in gathered]

    def vote(self, topic: str) -> None:
        """Go on only if every rank has come this far; otherwise no rank does.

        Which of the two it is is decided once, by whoever writes first: the last rank to arrive, or one that hears of a
        loss while it waits.

        Raises:
            RankLostError: A rank was lost before it arrived.
        """
        if self.world_size == 1:
            return
        self._votes += 1
        prefix = f"{self.scope}/vote{self._votes}"
        if self._store.add(f"{prefix}/count", 1) == self.world_size:
            decision = self._store.compare_set(f"{prefix}/decision", "", _GO)
        else:
            try:
                self._wait([f"{prefix}/decision"], topic)
            except RankLostError:
                if bytes(self._store.compare_set(f"{prefix}/decision", "", _STOP)) != _GO.encode():
                    raise
            decision = self._store.get(f"{prefix}/decision")
        if bytes(decision) != _GO.encode():
            self._check()
            raise RankLostError(f"rank {self.rank}: a rank was lost before {topic!r}; no rank went on.")
        if self._votes > 2 and self._votes % self.world_size == self.rank:  # all have read those before
            old = f"{self.scope}/vote{self._votes - 2}"
            self._store.delete_key(f"{old}/count")
            self._store.delete_key(f"{old}/decision")

    def remember(self, name: str, value: str) -> None:
        """See :class:`Control`: kept over all generations."""
        self._store.set(f"moetion/remembered/{name}", value)

    def recall(self, name: str) -> str:
        """See :class:`Control`."""
        key = f"moetion/remembered/{name}"
        return bytes(self._store.get(key)).decode() if self._store.check([key]) else ""

    def _forget(self, prefix: str) -> None:
        """Rank 0 removes what everybody has read: the exchange before the last one."""
        serial = self._serial - 2
        if serial < 1:
            return
        old = f"{self.scope}/{serial}"
        for rank in range(1, self.world_size):
            self._store.delete_key(f"{old}/{rank}")
        self._store.delete_key(f"{old}/all")

    def _wait(self, keys: list[str], topic: str) -> None:
        # Asked again and again: a wait of the store's own could not be broken off, and logs when its time is up.
        deadline = time.monotonic() + self._timeout
        pause = _FIRST_PAUSE_SECONDS
        warned = False
        while not self._store.check(keys):
            self._check()
            if not warned and time.monotonic() > deadline - self._timeout + _NOTICE_SECONDS:
                warned = True
                _log.warning(
                    "rank %d has waited %.0f s for the others (%s). If this does not end, the ranks do not run the "
                    "same steps: with DDP and experts that get no tokens, find_unused_parameters=True is needed.",
                    self.rank, _NOTICE_SECONDS, topic,
                )  # fmt: skip
            if time.monotonic() > deadline:
                raise RankLostError(
                    f"rank {self.rank} waited {self._timeout:.0f} s for the others to exchange {topic!r}. One of them "
                    "hangs or died: see its log."
                )
            time.sleep(pause)
            pause = min(_SLOWER * pause, _LONGEST_PAUSE_SECONDS)


_runs = 0


def default_world() -> tuple[int, int]:
    """This process's rank in the default process group, and the group's size; ``(0, 1)`` without one."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def default_control() -> StoreControl:
    """A control plane for each training run of a job that something else has started; all ranks make as many.

    It is on the store of the default process group.
    """
    global _runs
    _runs += 1
    store: Any = _get_default_store()
    return StoreControl(store.clone(), *default_world(), scope=f"moetion/run{_runs}")
