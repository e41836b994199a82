"""The lease of a node's place: renewed in a thread, and given up before another node may take the place."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass

from moetion_lightning.distributed.bounded_store import BoundedStore, StoreSilentError
from moetion_lightning.distributed.watchdog import Standing

__all__ = ["AGAIN", "FINISHED", "LONGEST_STEP_SECONDS", "NO_BEAT", "Lease", "Place", "check_claim", "describe_claim"]

FINISHED = "finished"
#: Begins how a run ended after which all nodes meet in the next one.
AGAIN = "all begin again: "
#: Of a place that was assigned and whose holder has not written yet.
NO_BEAT = "[0, []]"
#: What a pause counts at most: a process that was stopped, or a store, could not do or see anything meanwhile.
LONGEST_STEP_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """A claimed place.

    Args:
        slot: Number of the place: the node's rank.
        claim: What stands in the store for it.
        taken_over: The claim that it replaced, in words; None for a place that was free.
    """

    slot: int
    claim: str
    taken_over: str | None = None


class Lease:
    """Renews the claim of a place in a thread of its own.

    Args:
        store: The run's store, for this object alone; the deadline of its calls is well below the node timeout.
        place: The place.
        node_timeout: Seconds without a renewal after which others take the place.
    """

    def __init__(self, store: BoundedStore, place: Place, node_timeout: float) -> None:
        self._store = store
        self._place = place
        self._limit = node_timeout / 2
        self._interval = min(1.0, node_timeout / 5)
        self._closing = threading.Event()
        self._reason: str | None = None
        self._trouble = ""
        self._renewed, self._noticed, self._overdue = 0, 0, 0.0
        self._looked_at = time.monotonic()
        #: Of this node's ranks, for the other nodes.
        self.standings: list[Standing] = []
        #: Whether all nodes begin again.
        self.begins_again = False
        self._thread = threading.Thread(target=self._renew, name="moetion-lease", daemon=True)
        self._thread.start()

    def stop_reason(self) -> str | None:
        """Why this node must end its ranks; None as long as it need not. Ask often."""
        now, renewed = time.monotonic(), self._renewed
        # Of a pause of this process only a second counts: the thread that renews was stopped, too.
        self._overdue += min(now - self._looked_at, LONGEST_STEP_SECONDS)
        self._looked_at = now
        if renewed != self._noticed:
            self._noticed, self._overdue = renewed, 0.0
        if self._reason is None and self._overdue > self._limit:
            return f"the rendezvous does not answer any more ({self._trouble or 'no answer'})"
        return self._reason

    def others(self) -> list[Standing]:
        """Of the ranks of all other nodes, as they were told last."""
        slots = range(int(json.loads(self._store.get("moetion/layout"))["nodes"]))
        keys = [f"moetion/node/{slot}/beat" for slot in slots if slot != self._place.slot]
        beats = self._store.multi_get(keys) if keys else []
        return [tuple(standing) for beat in beats for standing in json.loads(beat)[1]]

    def close(self) -> None:
        """End renewing."""
        self._closing.set()
        self._thread.join(timeout=self._limit)
        self._store.close()

    def _renew(self) -> None:
        number = 0
        while self._reason is None and not self._closing.is_set():
            try:
                number += 1
                self._reason = check_claim(self._store, self._place)
                self._store.set(f"moetion/node/{self._place.slot}/beat", json.dumps([number, self.standings]))
                if self._store.check(["moetion/ended"]):
                    ended = self._store.get("moetion/ended").decode()
                    self.begins_again = ended.startswith(AGAIN)
                    is_failure = ended != FINISHED and not self.begins_again
                    self._reason = self._reason or (f"the job {ended}" if is_failure else None)
                self._renewed, self._trouble = number, ""
            except StoreSilentError as error:
                self._trouble = str(error)
            self._closing.wait(self._interval)


def check_claim(store: BoundedStore, place: Place) -> str | None:
    """Why this place is not the claimant's any more; None if it is."""
    holder = store.get(f"moetion/node/{place.slot}").decode()
    if holder == place.claim:
        return None
    return (
        f"this launcher did not renew its lease in time (it was stopped or cut off), and {describe_claim(holder)} has "
        f"taken node {place.slot}"
    )


def describe_claim(claim: str) -> str:
    """Whose it is, in words."""
    holder = json.loads(claim)
    return f"launcher {holder['pid']} on {holder['host']}"
