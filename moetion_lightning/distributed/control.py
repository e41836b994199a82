"""The control plane: small values that all ranks must agree on, outside the training's process groups.

It talks to a store only, so that it still works while a process group is broken. Nothing is asked again and again: a
rank waits for a key, and the thread that watches the job ends the wait when a rank is lost. Where a node has several
ranks they meet in a store of the node's own, and one of them talks to the run's store.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

from moetion_lightning.config import exchange_limit_seconds, launched_devices
from moetion_lightning.distributed.bounded_store import BoundedStore, ControlStore, PlainStore, bounded
from moetion_lightning.distributed.control_protocol import Merge
from moetion_lightning.distributed.node_store import NodePlace, NodeStore
from moetion_lightning.distributed.stable_store import STORE_ERRORS
from moetion_lightning.distributed.store_values import (
    STOP,
    arrival_keys,
    arrive,
    put_value,
    take_value,
    value_keys,
)
from moetion_lightning.distributed.waits import Waits
from moetion_lightning.errors import RankLostError

__all__ = ["StoreControl", "default_control", "default_world"]

_GO = "go"
#: In a node's store: the run's store knows the decision.
_ASK = "ask"
_CALL_SECONDS = 60.0


class StoreControl:
    """Exchanges through a store.

    The first rank of each node collects the values of its node, rank 0 those of the nodes, and the result goes back the
    same way. What is decided (a vote, the result of an exchange) is decided once, by compare-and-set in the run's
    store: the node's store holds copies only, and a rank that cannot read one there asks the run's.

    Keys, all below ``scope``; written in the run's store and, where there is one, in the node's:

    ==================== ============================== ================================ ==============================
    key                  writer                         reader                           lifetime
    ==================== ============================== ================================ ==============================
    ``{n}/{i}``          member ``i`` of exchange ``n``  the first member                until exchange ``n + 2``
    ``{n}/all``          the first member, or a watcher  all members                     until exchange ``n + 2``
    ``vote{n}/count{w}`` each member, its bit            the same request's answer       until vote ``n + 2``
    ``vote{n}/full{w}``  who fills a word of 60 bits     who fills another word          until vote ``n + 2``
    ``vote{n}/decision`` the last member, or a watcher   all members                     until vote ``n + 2``
    ``vote{n}/for``      (node) who speaks for the node  ranks of the node               until vote ``n + 2``
    ``node{k}``          first rank of node ``k``: port  ranks of the node               as long as the store
    ==================== ============================== ================================ ==============================

    Args:
        store: A store of this object's own (another thread's waits would block this one's).
        rank: This rank.
        world_size: Number of ranks.
        scope: Prefix of all keys: differs for each membership (generation) of the job.
        generation: That generation.
        check: Called before waiting, and when a wait was ended; raises when waiting is useless.
        local_size: Ranks of each node, which follow each other.
        timeout_seconds: How long to wait for the slowest rank.
    """

    def __init__(
        self,
        store: ControlStore | Store,
        rank: int,
        world_size: int,
        *,
        scope: str,
        generation: int = 0,
        check: Callable[[], None] = lambda: None,
        local_size: int = 1,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.scope, self.generation = scope, generation
        self._store = store if isinstance(store, BoundedStore | PlainStore) else PlainStore(store)
        self._check = check
        self._waits = Waits(rank, check, timeout_seconds)
        #: Ends the wait of this rank's main thread, from the thread that watches the job, after ``check`` raises.
        self.interrupt = self._waits.interrupt
        self._place = NodePlace.of(rank, world_size, local_size)
        self._node: NodeStore | None = None
        self._serial = 0
        self._votes = 0
        self._used: deque[tuple[ControlStore, list[str]]] = deque()  # keys of the last exchanges

    def close(self) -> None:
        """End this rank's connections; whoever waits gets an error."""
        self._store.close()
        if self._node is not None:
            self._node.client.close()

    # --- exchanges -----------------------------------------------------------------------------------------------

    def all_gather(self, topic: str, value: Any) -> list[Any]:
        """See :class:`.control_protocol.Control`."""
        return list(self._exchange(topic, value, lambda values: values))

    def all_reduce(self, topic: str, value: Any, merge: Merge) -> Any:
        """See :class:`.control_protocol.Control`."""
        return merge(self._exchange(topic, value, lambda values: [merge(values)]))

    def meet(self, topic: str, seconds: float) -> bool:
        """See :class:`.control_protocol.Control`."""
        limit, self._waits.seconds = self._waits.seconds, seconds
        try:
            self._exchange(topic, None, lambda values: [None])
        except (RankLostError, *STORE_ERRORS):
            return False
        finally:
            self._waits.seconds = limit
        return True

    def _exchange(self, topic: str, value: Any, join: Callable[[list[Any]], list[Any]]) -> list[Any]:
        self._check()
        self._serial += 1
        if self.world_size == 1:
            return list(json.loads(json.dumps([value])))
        try:
            result = self._meet_all(topic, json.dumps([{topic: self.rank}, join([value])]), join)
        except (_StoppedError, *STORE_ERRORS) as error:
            result = self._ask(error, topic)
        topics, values = json.loads(result)
        for theirs, rank in topics.items():
            if theirs != topic:
                raise RankLostError(
                    f"rank {rank} exchanges {theirs!r} while rank {self.rank} exchanges {topic!r}: the ranks run "
                    "different code, or one of them skipped a step. Start the same script with the same settings on "
                    "every rank."
                )
        return list(values)

    def _meet_all(self, topic: str, mine: str, join: Callable[[list[Any]], list[Any]]) -> str:
        node, place = self._join_node(topic), self._place
        if node is None or place is None:
            return self._meet(
                self._store, self.rank, self.world_size, topic, lambda texts: _join([mine, *texts], join), mine
            )

        def among_nodes(texts: list[str]) -> str:
            own = _join([mine, *texts], join)
            return self._meet(
                self._store, place.node, place.num_nodes, topic, lambda more: _join([own, *more], join), own
            )

        return self._meet(node.client, place.index, place.size, topic, among_nodes, mine)

    def _meet(
        self,
        store: ControlStore,
        index: int,
        size: int,
        topic: str,
        conclude: Callable[[list[str]], str],
        mine: str,
    ) -> str:
        """Exchange on one level.

        Args:
            store: Where its members meet.
            index: This member.
            size: Members.
            topic: What is exchanged.
            conclude: Makes the result of the other members' texts; called by the first member.
            mine: This member's text.
        """
        key = f"{self.scope}/{self._serial}"
        if index:
            put_value(store, f"{key}/{index}", mine)
            self._waits.wait(store, [f"{key}/all"], topic, STOP)
            return _read(store, f"{key}/all")
        try:
            keys = [f"{key}/{member}" for member in range(1, size)]
            self._waits.wait(store, keys, topic, STOP)
            found = dict(zip(keys, store.multi_get(keys)))
            if STOP.encode() in found.values():
                raise _StoppedError
            result = conclude([take_value(store, name, first) for name, first in found.items()])
            told = put_value(store, f"{key}/all", result)
            if not told:
                raise _StoppedError
        except BaseException:
            with contextlib.suppress(*STORE_ERRORS):  # the others shall not wait for it
                store.compare_set(f"{key}/all", "", STOP)
            raise
        self._used.append((store, [*(n for name, first in found.items() for n in value_keys(name, first)), *told]))
        if len(self._used) > 2 * (1 if self._place is None else 2):
            self._forget()
        return result

    def _ask(self, error: BaseException, topic: str) -> str:
        """This rank could not finish an exchange: what the run's store says of it; nothing, if nobody finished it."""
        key = f"{self.scope}/{self._serial}/all"
        place = self._place
        try:
            first = self._store.compare_set(key, "", STOP)
            if place is not None and place.index == 0 < place.node:  # rank 0 shall not wait for this node
                self._store.compare_set(f"{self.scope}/{self._serial}/{place.node}", "", STOP)
            if first != STOP.encode():
                return take_value(self._store, key, first)
        except STORE_ERRORS:  # of no help
            pass
        if isinstance(error, RankLostError):
            raise error
        self._check()
        said = f" ({error})" if str(error) else ""
        raise RankLostError(f"rank {self.rank}: a rank was lost before all had exchanged {topic!r}{said}.") from error

    def _join_node(self, topic: str) -> NodeStore | None:
        if self._place is None or self._node is not None:
            return self._node
        key = f"{self.scope}/node{self._place.node}"
        if self._place.index == 0:
            self._node = NodeStore(self._place, None)
            if not put_value(self._store, key, str(self._node.port)):
                raise _StoppedError
        else:
            self._waits.wait(self._store, [key], topic, STOP)
            self._node = NodeStore(self._place, int(_read(self._store, key)))
        return self._node

    def _forget(self) -> None:
        """Who collects removes what everybody has read: the exchange before the last one."""
        store, names = self._used.popleft()
        for name in names:
            store.delete_key(name)

    # --- votes ---------------------------------------------------------------------------------------------------

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
        key = f"{self.scope}/vote{self._votes}"
        try:
            go = self._arrive_and_wait(key, topic)
        except (_StoppedError, *STORE_ERRORS) as error:
            try:
                go = self._decide(key, STOP) == _GO
                if self._node is not None:  # the others of this node shall not wait for it
                    with contextlib.suppress(*STORE_ERRORS):
                        self._node.client.compare_set(f"{key}/decision", "", _ASK)
            except STORE_ERRORS as silent:
                self._check()
                raise RankLostError(f"rank {self.rank} cannot vote on {topic!r}: {silent}") from silent
            if not go and isinstance(error, RankLostError):
                raise
        if not go:
            self._check()
            raise RankLostError(f"rank {self.rank}: a rank was lost before {topic!r}; no rank went on.")
        if self._votes > 2:  # all have read the one before the last
            with contextlib.suppress(*STORE_ERRORS):  # what was decided stands
                self._forget_vote(f"{self.scope}/vote{self._votes - 2}")

    def _arrive_and_wait(self, key: str, topic: str) -> bool:
        """Arrive, and learn what was decided."""
        node = self._join_node(topic)
        if node is None:
            return self._vote_among(key, self.rank, self.world_size, topic)
        client, place = node.client, node.place
        speaks = arrive(client, key, place.index, place.size) and (
            client.compare_set(f"{key}/for", "", str(place.index)) == str(place.index).encode()
        )
        if not speaks:
            self._waits.wait(client, [f"{key}/decision"], topic, _ASK)
            told = client.compare_set(f"{key}/decision", "", _ASK).decode()
            return (self._decide(key, STOP) if told == _ASK else told) == _GO
        go = self._vote_among(key, place.node, place.num_nodes, topic)
        client.compare_set(f"{key}/decision", "", _GO if go else _ASK)
        return go

    def _vote_among(self, key: str, index: int, size: int, topic: str) -> bool:
        if arrive(self._store, key, index, size):
            return self._decide(key, _GO) == _GO
        self._waits.wait(self._store, [f"{key}/decision"], topic, STOP)
        return self._decide(key, STOP) == _GO

    def _decide(self, key: str, wanted: str) -> str:
        """What was decided, by this rank if by none before."""
        return self._store.compare_set(f"{key}/decision", "", wanted).decode()

    def _forget_vote(self, old: str) -> None:
        place = self._place
        if place is not None and self._node is not None and self._votes % place.size == place.index:
            for name in (*arrival_keys(old, place.size), f"{old}/for", f"{old}/decision"):
                self._node.client.delete_key(name)
        if self._votes % self.world_size == self.rank:
            size = self.world_size if place is None else place.num_nodes
            for name in (*arrival_keys(old, size), f"{old}/decision"):
                self._store.delete_key(name)

    # --- for later processes -------------------------------------------------------------------------------------

    def remember(self, name: str, value: str) -> None:
        """See :class:`.control_protocol.Control`: kept over all generations."""
        self._store.set(f"moetion/remembered/{name}", value)

    def recall(self, name: str) -> str:
        """See :class:`.control_protocol.Control`."""
        key = f"moetion/remembered/{name}"
        return self._store.get(key).decode() if self._store.check([key]) else ""


class _StoppedError(Exception):
    """Something was decided against this rank's exchange."""


def _read(store: ControlStore, key: str) -> str:
    first = store.multi_get([key])[0]
    if first == STOP.encode():
        raise _StoppedError
    return take_value(store, key, first)


def _join(texts: Sequence[str], join: Callable[[list[Any]], list[Any]]) -> str:
    payloads = [json.loads(text) for text in texts]
    topics: dict[str, int] = {}
    for theirs, _ in payloads:
        for topic, rank in theirs.items():
            topics.setdefault(topic, rank)
    if len(topics) > 1:  # values of different things do not merge
        return json.dumps([topics, []])
    return json.dumps([topics, join([value for _, values in payloads for value in values])])


_runs = 0


def default_world() -> tuple[int, int]:
    """This process's rank in the default process group, and the group's size; ``(0, 1)`` without one."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def default_control() -> StoreControl:
    """A control plane for each training run of a job that something else has started; all ranks make as many.

    It is on the store of the default process group, under a name that its first rank gives it there.
    """
    global _runs
    _runs += 1
    store: Any = _get_default_store()
    rank, world_size = default_world()
    key = f"moetion/run{_runs}"
    name = bytes(store.compare_set(key, "", uuid.uuid4().hex) if rank == 0 else store.get(key)).decode()
    devices = launched_devices()
    return StoreControl(
        bounded(store, f"moetion/{name}", _CALL_SECONDS),
        rank,
        world_size,
        scope="control",
        local_size=1 if devices is None else devices[0],
        timeout_seconds=exchange_limit_seconds(),
    )
