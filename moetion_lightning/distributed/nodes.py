"""Places of nodes: which launcher runs which ranks, held by leases in the stable store.

A job of N nodes has N places. A launcher claims one by compare-and-set and renews its lease by counting up a number.
One that sees the number stand still for the node timeout takes the place over, by compare-and-set on the old claim, so
that only one succeeds; nobody compares clocks. A launcher whose claim was replaced ends its ranks.

Keys below the prefix of the run, ``{job}.{number of the run}``: ``moetion/layout``, ``moetion/node/{slot}`` (the
claim), ``moetion/node/{slot}/beat``, ``moetion/node/{slot}/done``, ``moetion/ended`` (``finished`` or ``failed: ...``).
The number of the run is at ``moetion/run/{job}``: a store that outlives a run gives the next one fresh keys.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch.distributed.distributed_c10d import PrefixStore, Store

from moetion_lightning.distributed.generations import newest_generation
from moetion_lightning.distributed.stable_store import STORE_ERRORS
from moetion_lightning.errors import ConfigurationError, LaunchError

__all__ = ["NodeLease", "Place", "Roster"]

_log = logging.getLogger(__name__)

_ENDED = "moetion/ended"
_FINISHED = "finished"
_POLL_SECONDS = 0.2
_LONGEST_STEP_SECONDS = 1.0
_JOIN_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """A claimed place.

    Args:
        slot: Number of the place: the node's rank.
        claim: What was written into the store for it.
        taken_over: The claim that it replaced, in words; None for a place that was free.
    """

    slot: int
    claim: str
    taken_over: str | None


class Roster:
    """The places of one job.

    Args:
        store: A store of this object's own, without the run's prefix.
        job_id: Identity of the job.
        num_nodes: Number of places.
        ranks_per_node: Ranks that each node runs.
        node_timeout: Seconds without a renewal after which a place is free again.
        pause: Called with seconds while waiting; raises to stop waiting.
    """

    def __init__(
        self,
        store: Store,
        job_id: str,
        *,
        num_nodes: int,
        ranks_per_node: int,
        node_timeout: float,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._raw = store
        self._job_id = job_id
        self._num_nodes = num_nodes
        self._layout = json.dumps({"nodes": num_nodes, "ranks_per_node": ranks_per_node})
        self._node_timeout = node_timeout
        self._pause = pause
        self._enter_run(int(store.compare_set(f"moetion/run/{job_id}", "", "1")))
        while self.ended() is not None:  # the store has outlived a run
            self._begin_next_run()

    def _enter_run(self, number: int) -> None:
        self._number = number
        self.run_id = f"{self._job_id}.{number}"
        self.store: Store = PrefixStore(self.run_id, self._raw)
        self._seen: dict[int, tuple[int, float]] = {}  # slot -> beat, seconds for which it stood still
        self._looked_at = time.monotonic()
        layout = self.store.compare_set("moetion/layout", "", self._layout).decode()
        if layout != self._layout:
            raise ConfigurationError(
                f"job {self._job_id!r} was started with {layout}, this launcher with {self._layout}: give all "
                "launchers of a job the same --nnodes minimum and --nproc-per-node."
            )
        newest_generation(self.store)

    def _begin_next_run(self) -> None:
        key, number = f"moetion/run/{self._job_id}", str(self._number)
        self._enter_run(int(self._raw.compare_set(key, number, str(self._number + 1))))

    def ended(self) -> str | None:
        """How the run ended; None while it runs."""
        return bytes(self.store.get(_ENDED)).decode() if self.store.check([_ENDED]) else None

    def claim(self, wanted: int | None, *, may_wait: bool) -> Place | None:
        """Take a place, waiting for one if there is none.

        Args:
            wanted: The only place to take; None for any.
            may_wait: Whether to wait as a spare; else only as long as it takes to see that all places are held.

        Returns:
            The place; None if the job finished meanwhile.

        Raises:
            LaunchError: All places are held, or the job failed.
        """
        mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)})
        slots = range(self._num_nodes) if wanted is None else [wanted]
        started = time.monotonic()
        announced = False
        while True:
            place = self._try(slots, mine)
            if place is not None:
                return place
            ended = self.ended()
            if ended == _FINISHED:
                return None
            if ended is not None:
                raise LaunchError(f"the job {ended}")
            if not may_wait and time.monotonic() - started > self._node_timeout + 5.0:
                raise LaunchError(
                    f"all {self._num_nodes} places of job {self._job_id!r} are held by live launchers. To wait as a "
                    f"spare, start with --nnodes {self._num_nodes}:{self._num_nodes + 1}. Another job needs another "
                    "--job-id."
                )
            if may_wait and not announced:
                _log.info("all places are held: waiting as a spare")
                announced = True
            self._pause(_POLL_SECONDS)

    def _try(self, slots: range | list[int], mine: str) -> Place | None:
        holders = self._look()
        for slot in slots:
            if slot not in holders and self._swap(slot, "", mine):
                return Place(slot=slot, claim=mine, taken_over=None)
        expired = [slot for slot in holders if self._is_expired(slot)]
        if len(expired) == self._num_nodes:
            self._begin_next_run()  # nobody is left of this one: nothing to take over
            return None
        for slot in slots:
            if slot in expired and self._swap(slot, holders[slot], mine):
                return Place(slot=slot, claim=mine, taken_over=_describe(holders[slot]))
        return None

    def _swap(self, slot: int, old: str, new: str) -> bool:
        if self.store.compare_set(f"moetion/node/{slot}", old, new).decode() != new:
            return False
        self.store.add(f"moetion/node/{slot}/beat", 1)
        return True

    def _look(self) -> dict[int, str]:
        """The claims by place; counts for how long each lease stood still."""
        now = time.monotonic()
        # Of a pause of this process or of the store only a second counts: the others could not renew, or we not see it.
        step = min(now - self._looked_at, _LONGEST_STEP_SECONDS)
        self._looked_at = now
        holders = {}
        for slot in range(self._num_nodes):
            key = f"moetion/node/{slot}"
            if not self.store.check([key]):
                continue
            holders[slot] = bytes(self.store.get(key)).decode()
            beat, still = self._seen.get(slot, (-1, 0.0))
            latest = int(self.store.add(f"{key}/beat", 0))
            self._seen[slot] = (latest, still + step if latest == beat else 0.0)
        return holders

    def _is_expired(self, slot: int) -> bool:
        return self._seen[slot][1] > self._node_timeout and not self._is_done(slot)

    def _is_done(self, slot: int) -> bool:
        return bool(self.store.check([f"moetion/node/{slot}/done"]))

    def wait_for_all(self) -> None:
        """Wait until every place was claimed.

        Raises:
            LaunchError: Not all nodes came in time.
        """
        keys = [f"moetion/node/{slot}" for slot in range(self._num_nodes)]
        deadline = time.monotonic() + _JOIN_SECONDS
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                here = sum(self.store.check([key]) for key in keys)
                raise LaunchError(
                    f"only {here} of {self._num_nodes} nodes joined job {self._job_id!r} within {_JOIN_SECONDS:.0f} s. "
                    "Start the same command on the others; if their directories or arguments differ, give --job-id."
                )
            self._pause(_POLL_SECONDS)

    def finish(self, slot: int) -> None:
        """All ranks of this place are done; the last one ends the run."""
        self.store.set(f"moetion/node/{slot}/done", "1")
        if self.store.add("moetion/nodes_done", 1) == self._num_nodes:
            self.store.compare_set(_ENDED, "", _FINISHED)

    def fail(self, text: str) -> None:
        """Tell all nodes that the job cannot be completed."""
        self.store.compare_set(_ENDED, "", f"failed: {text}")

    def wait_for_end(self) -> None:
        """Serve the store until all other nodes are done.

        Raises:
            LaunchError: The job failed there, or a node that was not done is gone.
        """
        self._seen.clear()
        while (ended := self.ended()) is None:
            self._look()
            undone = [slot for slot in range(self._num_nodes) if not self._is_done(slot)]
            if undone and all(self._is_expired(slot) for slot in undone):
                self.fail(f"nodes {undone} were lost after others had finished")
            self._pause(_POLL_SECONDS)
        self._pause(2 * _LONGEST_STEP_SECONDS)  # the others, and spares, read it
        if ended != _FINISHED:
            raise LaunchError(f"the job {ended}")


class NodeLease:
    """Renews the claim of a place in a thread of its own.

    Args:
        store: The run's store, by a connection of this object's own whose timeout is below the node timeout.
        place: The place.
        node_timeout: Seconds without a renewal after which others take the place.
    """

    def __init__(self, store: Store, place: Place, node_timeout: float) -> None:
        self._store = store
        self._place = place
        self._interval = min(1.0, node_timeout / 5)
        self._closing = threading.Event()
        self._stop_reason: str | None = None
        self._thread = threading.Thread(target=self._renew, name="moetion-lease", daemon=True)
        self._thread.start()

    @property
    def stop_reason(self) -> str | None:
        """Why this node must end its ranks; None as long as it need not."""
        return self._stop_reason

    def close(self) -> None:
        """End renewing."""
        self._closing.set()
        self._thread.join(timeout=30.0)

    def _renew(self) -> None:
        while self._stop_reason is None and not self._closing.wait(self._interval):
            try:
                self._stop_reason = check_claim(self._store, self._place)
                self._store.add(f"moetion/node/{self._place.slot}/beat", 1)
                if self._store.check([_ENDED]):
                    ended = bytes(self._store.get(_ENDED)).decode()
                    self._stop_reason = self._stop_reason or (None if ended == _FINISHED else f"the job {ended}")
            except STORE_ERRORS as error:
                self._stop_reason = f"the rendezvous does not answer any more ({str(error).splitlines()[0]})"


def check_claim(store: Store, place: Place) -> str | None:
    """Why this place is not the claimant's any more; None if it is."""
    holder = bytes(store.get(f"moetion/node/{place.slot}")).decode()
    if holder == place.claim:
        return None
    return (
        f"this launcher did not renew its lease in time (it was stopped or cut off), and {_describe(holder)} has taken "
        f"node {place.slot}"
    )


def _describe(claim: str) -> str:
    holder = json.loads(claim)
    return f"launcher {holder['pid']} on {holder['host']}"
