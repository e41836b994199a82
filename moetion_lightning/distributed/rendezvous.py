"""The rendezvous ``moetion`` of torch elastic: nodes keep their places, held by leases in the stable store.

Registered as entry point ``torchrun.handlers``: ``moetion launch`` and ``torchrun --rdzv-backend moetion`` use it.

A job of N nodes has N places. When at least N launchers are there, :func:`~.places.assign` says who gets which. A
launcher renews its lease by writing a new number. One that sees the number stand still for the node timeout takes the
place over, by compare-and-set on the old claim, so that only one succeeds; nobody compares clocks. A launcher that
could not renew for half of that time ends its ranks.

Keys below ``{job}.{number of the run}/moetion/``; the number of the run is at ``moetion/run/{job}``, so that a store
that outlives a run gives the next one fresh keys:

==================== ============================================== =====================================
key                  value                                          written by
==================== ============================================== =====================================
layout               nodes and ranks per node                       the first launcher; others compare
arrivals, arrival/K  counter; claim, wishes (``gone``: it left)     each launcher
node/S               claim of place S                               who sees that enough have arrived
node/S/beat          number, standing of its ranks                  the holder, each interval (at first: the same)
node/S/done          1                                              the holder, at the end of its ranks
round, round/R/S     number of the round; S has joined it           each launcher (torchrun's restarts)
ended                ``finished``, ``failed: ...`` or ``all begin   the last holder; whoever gives up; whose rank cannot
                     again: ...`` (in the next run)                 be replaced alone
==================== ============================================== =====================================
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

from moetion_lightning.config import default_memory_dir, node_hint
from moetion_lightning.distributed.bounded_store import BoundedStore, StoreSilentError
from moetion_lightning.distributed.exits import JobEndedError
from moetion_lightning.distributed.generations import newest_generation
from moetion_lightning.distributed.interfaces import choose_address
from moetion_lightning.distributed.lease import (
    AGAIN,
    FINISHED,
    LONGEST_STEP_SECONDS,
    NO_BEAT,
    Lease,
    Place,
    check_claim,
    describe_claim,
)
from moetion_lightning.distributed.places import Arrival, assign, held_ranks
from moetion_lightning.distributed.stable_store import connect_store, find_store, host_store, parse_endpoint
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.storage.jobs import default_base_dir

__all__ = ["BACKEND", "NodeRendezvous"]

_log = logging.getLogger(__name__)

BACKEND = "moetion"
_POLL_SECONDS = 0.2
_LAST_CALL_SECONDS = 3.0
_FIRST = 3
_PATIENCE_SECONDS = 15.0


class NodeRendezvous(RendezvousHandler):
    """Places of nodes, by leases.

    Args:
        params: The endpoint may be "" for one node. ``run_id`` is the job. ``--rdzv-conf`` takes ``node_timeout``
            (seconds, 10), ``ranks_per_node``, ``node_rank`` (take only this place), ``interface`` (see
            :mod:`~.interfaces`), ``is_host`` and ``timeout`` (seconds to wait for all nodes, 900).
        in_place: Whether single ranks are started again (``moetion launch``), not all together (``torchrun``).
        pause: Called with seconds while waiting; raises to stop waiting.
    """

    def __init__(
        self, params: RendezvousParameters, *, in_place: bool = False, pause: Callable[[float], Any] = time.sleep
    ) -> None:
        self._params = params
        self._in_place = in_place
        self._pause = pause
        #: Places of the job, and whether more launchers may wait for one.
        self.nodes = params.min_nodes
        self.has_spares = params.max_nodes > params.min_nodes
        self.node_timeout = float(params.get("node_timeout", 10.0))
        self._ranks_per_node = params.get_as_int("ranks_per_node")
        self._wanted = params.get_as_int("node_rank")
        given = bool(params.endpoint)
        host, port = parse_endpoint(params.endpoint) if given else ("", 0)
        #: Of this node: where to listen, and what to tell others.
        self.address = choose_address(
            params.get("interface"), advertise=params.local_addr, towards=host or None, several_nodes=given
        )
        seconds = float(params.get("timeout", 900))
        if given:
            self.host, server = find_store(
                host, port, seconds, pause, bind=self.address.bind, is_host=params.get_as_bool("is_host")
            )
            self.port = port
        else:
            self.host, server = self.address.bind, host_store(self.address.bind)
            self.port = server.port
        self._server = server
        self._seconds = seconds
        self._raw = BoundedStore(self.host, self.port, max(self.node_timeout / 3, 1.0))
        self._round = 0
        self._ordinal = ""
        self.place: Place | None = None
        self.lease: Lease | None = None
        self._enter_run(int(self._raw.compare_set(f"moetion/run/{params.run_id}", "", "1")))
        while self.ended() is not None:  # the store has outlived a run
            self._begin_next_run()

    # --- runs ------------------------------------------------------------------------------------------------------

    def _enter_run(self, number: int) -> None:
        self._number = number
        self.run_id = f"{self._params.run_id}.{number}"
        #: The run's store; for the thread of the launcher's agent.
        self.store = self._raw.clone(prefix=self.run_id)
        self._beats: dict[
            int, tuple[tuple[bytes, bytes], float]
        ] = {}  # place -> beat, seconds for which it stood still
        self._looked_at = time.monotonic()
        mine = json.dumps({"nodes": self.nodes, "ranks_per_node": self._ranks_per_node})
        layout = self.store.compare_set("moetion/layout", "", mine).decode()
        if layout != mine:
            raise ConfigurationError(
                f"job {self._params.run_id!r} was started with {layout}, this launcher with {mine}: give all launchers "
                "of a job the same --nnodes minimum and --nproc-per-node."
            )
        newest_generation(self.store)
        self._arrived = False

    def _begin_next_run(self) -> None:
        key, number = f"moetion/run/{self._params.run_id}", str(self._number)
        self._enter_run(int(self._raw.compare_set(key, number, str(self._number + 1))))

    def ended(self) -> str | None:
        """How the run ended; None while it runs."""
        return self.store.get("moetion/ended").decode() if self.store.check(["moetion/ended"]) else None

    def agree(self, key: str, value: str) -> str:
        """What the first of this job's launchers gave, in whatever run."""
        return self._raw.compare_set(f"{key}/{self._params.run_id}", "", value).decode()

    def fail(self, text: str) -> None:
        """Tell all nodes that the job cannot be completed."""
        self.store.compare_set("moetion/ended", "", f"failed: {text}")

    def fail_if_ours(self, text: str) -> None:
        """The same, unless this node's place is another one's by now."""
        if self.place is not None and check_claim(self.store, self.place) is None:
            self.fail(f"on node {self.place.slot}: {text}")

    def begin_again(self, reason: str) -> bool:
        """Tell all nodes to stop their ranks and to meet in the next run; not if one of them has finished its part."""
        if any(self.store.check([f"moetion/node/{slot}/done"]) for slot in range(self.nodes)):
            return False
        return self.store.compare_set("moetion/ended", "", f"{AGAIN}{reason}").decode().startswith(AGAIN)

    def _begins_again(self) -> bool:
        return (self.ended() or "").startswith(AGAIN)

    def finish(self) -> None:
        """All ranks of this node are done; the last node ends the run.

        Raises:
            JobEndedError: Meanwhile another node has asked all to begin again.
        """
        assert self.place is not None
        self.store.set(f"moetion/node/{self.place.slot}/done", "1")
        if self._begins_again():
            raise JobEndedError(f"this node had finished when another one lost a rank, and {self.ended()}")
        if self.store.check([f"moetion/node/{slot}/done" for slot in range(self.nodes)]):
            self.store.compare_set("moetion/ended", "", FINISHED)

    # --- places ----------------------------------------------------------------------------------------------------

    def claim(self) -> Place:
        """Take a place, waiting for one as a spare if there may be more launchers than places.

        Raises:
            JobEndedError: All places are held, the job failed, or not all nodes came.
            RendezvousGracefulExitError: The job finished without this spare.
        """
        token = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        mine = json.dumps(token)
        started, announced = time.monotonic(), False
        try:
            while True:
                if not self._arrived:
                    self._arrive(mine)
                place = self._try(mine)
                if place is not None:
                    return place
                ended = self.ended()
                if ended == FINISHED:
                    raise RendezvousGracefulExitError("the job finished without this spare")
                if self._begins_again():
                    self._begin_next_run()
                    continue
                if ended is not None:
                    raise JobEndedError(f"the job {ended}")
                held = bool(self._beats)
                waited = time.monotonic() - started
                if not held and waited > self._seconds:
                    raise JobEndedError(
                        f"not all {self.nodes} nodes joined job {self._params.run_id!r} within {waited:.0f} s. Start "
                        "the same command on the others; if their directories or arguments differ, give --job-id."
                    )
                if held and not self.has_spares and waited > self.node_timeout + 5.0:
                    raise JobEndedError(
                        f"all {self.nodes} places of job {self._params.run_id!r} are held by live launchers. To wait "
                        f"as a spare, start with --nnodes {self.nodes}:{self.nodes + 1}; another job needs another "
                        "--job-id."
                    )
                if held and self.has_spares and not announced:
                    _log.info("all places are held: waiting as a spare")
                    announced = True
                self._pause(_POLL_SECONDS)
        except BaseException:
            if self._arrived and not self._beats:
                self._quietly(lambda: self.store.set(f"moetion/arrival/{self._ordinal}/gone", "1"))
            raise

    def _arrive(self, mine: str) -> None:
        base = default_memory_dir() or default_base_dir()
        ranks = held_ranks(base, self._params.run_id)
        size = self._ranks_per_node or max(1, sum(weight >= 100 for weight in ranks.values()))
        held: dict[int, int] = {}
        for rank, weight in ranks.items():
            held[rank // size] = held.get(rank // size, 0) + weight
        arrival = {"claim": mine, "wanted": self._wanted, "held": held, "hint": node_hint()}
        self._ordinal = str(self.store.add("moetion/arrivals", 1) - 1)
        self.store.set(f"moetion/arrival/{self._ordinal}", json.dumps(arrival))
        self._since = time.monotonic()
        self._arrived, self._latest = True, (0, self._since)

    def _arrivals(self) -> list[Arrival]:
        keys = [f"moetion/arrival/{number}" for number in range(self.store.add("moetion/arrivals", 0))]
        if len(keys) < self.nodes or not self.store.check(keys):
            return []
        here = [key for key in keys if not self.store.check([f"{key}/gone"])]
        found = [json.loads(value) for value in self.store.multi_get(here)] if here else []
        return [Arrival(**{**one, "held": {int(k): v for k, v in one["held"].items()}}) for one in found]

    def _try(self, mine: str) -> Place | None:
        holders = self._look()
        if not holders:
            return self._assign(mine)
        for slot, holder in holders.items():
            if holder == mine:
                return Place(slot=slot, claim=mine)
        expired = [slot for slot in holders if self._is_expired(slot)]
        if len(expired) == self.nodes:
            _log.warning(
                "all nodes of run %s gave no sign of life for %g s: another run begins, from windows that are found in "
                "memory or on storage; without any, training begins anew",
                self.run_id, self.node_timeout,
            )  # fmt: skip
            self._begin_next_run()  # nothing to take over
        for slot in expired if len(expired) < self.nodes else ():
            is_for_us = self._wanted in (None, slot)
            if is_for_us and self.store.compare_set(f"moetion/node/{slot}", holders[slot], mine).decode() == mine:
                return Place(slot=slot, claim=mine, taken_over=describe_claim(holders[slot]))
        return None

    def _assign(self, mine: str) -> Place | None:
        waited = time.monotonic() - self._since
        if int(self._ordinal) >= _FIRST and waited < _PATIENCE_SECONDS:
            return None  # the first to arrive decide, so that not all read what all have written
        arrivals = self._arrivals()
        if len(arrivals) != self._latest[0]:
            self._latest = len(arrivals), time.monotonic()
        late = time.monotonic() - self._latest[1] > _LAST_CALL_SECONDS
        taken = assign(arrivals, self.nodes)
        if len(taken) < self.nodes or not (late or len(arrivals) >= self._params.max_nodes):
            return None
        decided = json.loads(self.store.compare_set("moetion/assigned", "", json.dumps(taken)))
        for slot, claim in decided.items():
            self.store.compare_set(f"moetion/node/{slot}/beat", "", NO_BEAT)
            self.store.compare_set(f"moetion/node/{slot}", "", claim)
        return next((Place(slot=int(slot), claim=mine) for slot, claim in decided.items() if claim == mine), None)

    def _look(self) -> dict[int, str]:
        """The claims by place; counts for how long each lease stood still."""
        now = time.monotonic()
        # Of a pause of this process or of the store only a second counts: the others could not renew, or we not see it.
        step = min(now - self._looked_at, LONGEST_STEP_SECONDS)
        self._looked_at = now
        keys = [f"moetion/node/{slot}" for slot in range(self.nodes)]
        if not self.store.check(keys):
            return {}
        values = self.store.multi_get([*keys, *(f"{key}/beat" for key in keys)])
        holders = values[: self.nodes]
        for slot, beat in enumerate(zip(holders, values[self.nodes :])):
            before, still = self._beats.get(slot, (None, 0.0))
            self._beats[slot] = (beat, still + step if beat == before else 0.0)
        return {slot: claim.decode() for slot, claim in enumerate(holders)}

    def _is_expired(self, slot: int) -> bool:
        return self._beats[slot][1] > self.node_timeout and not self.store.check([f"moetion/node/{slot}/done"])

    def wait_for_end(self) -> None:
        """Serve the store until all other nodes are done.

        Raises:
            JobEndedError: The job failed there, or a node that was not done is gone.
        """
        if self._server is None or self.nodes == 1:
            return
        self._beats.clear()
        while (ended := self.ended()) is None:
            self._look()
            undone = [s for s in range(self.nodes) if not self.store.check([f"moetion/node/{s}/done"])]
            if undone and all(self._is_expired(slot) for slot in undone):
                self.fail(f"nodes {undone} were lost after others had finished")
            self._pause(_POLL_SECONDS)
        self._pause(2 * LONGEST_STEP_SECONDS)  # the others, and spares, read it
        if ended != FINISHED:
            raise JobEndedError(f"the job {ended}")

    # --- torch's interface -----------------------------------------------------------------------------------------

    def get_backend(self) -> str:
        """The name."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Whether process groups meet at the stable store: only where their generations keep them apart."""
        return self._in_place

    def next_rendezvous(self) -> RendezvousInfo:
        """Take a place, in the next run if this one is over; under torchrun also meet the other nodes, each time."""
        if self.place is not None and self._begins_again():
            if self.lease is not None:
                self.lease.close()
            self.place = self.lease = None
            self._begin_next_run()
        if self.place is None:
            self.place = self.claim()
            if self._params.endpoint:
                self.lease = Lease(self.store.clone(), self.place, self.node_timeout)
        slot, prefix = self.place.slot, self.run_id
        info = RendezvousStoreInfo(self.host, self.port)
        if not self._in_place:
            prefix = f"{self.run_id}/{self._next_round(slot)}"
        store = PrefixStore(prefix, connect_store(self.host, self.port))
        if not self._in_place:
            info = RendezvousStoreInfo.build(slot, store, self.address.advertise)
        return RendezvousInfo(store, slot, self.nodes, info)

    def _next_round(self, slot: int) -> int:
        newest = self._newest_round()
        if newest == self._round:
            newest = int(self.store.compare_set("moetion/round", str(newest), str(newest + 1)))
        while True:
            self._round = newest
            self.store.set(f"moetion/round/{newest}/{slot}", "1")
            keys = [f"moetion/round/{newest}/{other}" for other in range(self.nodes)]
            while not self.store.check(keys):
                self._check()
                if any(self.store.check([f"moetion/node/{other}/done"]) for other in range(self.nodes)):
                    raise RendezvousClosedError("another node has ended")
                self._pause(_POLL_SECONDS)
                if self._newest_round() != newest:
                    break
            else:
                return newest
            newest = self._newest_round()

    def _newest_round(self) -> int:
        return int(self.store.compare_set("moetion/round", "", "0"))

    def _check(self) -> None:
        reason = self.stop_reason()
        if reason is not None:
            raise RendezvousClosedError(reason)

    def stop_reason(self) -> str | None:
        """Why this node must end its ranks; None as long as it need not."""
        return None if self.lease is None else self.lease.stop_reason()

    def num_nodes_waiting(self) -> int:
        """Whether another node has begun a new round or run (torch's agent then restarts all ranks)."""
        if self._in_place:
            return int(self.lease is not None and self.lease.begins_again)
        self._check()
        return int(self._newest_round() > self._round)

    def is_closed(self) -> bool:
        """Whether the job has ended."""
        return self.ended() is not None

    def set_closed(self) -> None:
        """End the job."""
        self.fail("it was closed")

    def get_run_id(self) -> str:
        """The job and the number of its run; the same on all nodes."""
        return self.run_id

    def shutdown(self) -> bool:
        """This node leaves (torchrun: after its ranks have ended, well or not)."""
        if self.lease is not None:
            self.lease.close()
        if not self._in_place and self.place is not None:
            self._quietly(self.finish)
            self._quietly(self.wait_for_end)
        return True

    def _quietly(self, work: Callable[[], object]) -> None:
        try:
            work()
        except (StoreSilentError, JobEndedError) as error:
            _log.warning("%s", error)
