"""The nodes of the job and their memory: who is where, who serves, what is copied where."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from moetion_lightning.config import EngineConfig, address_from_environment, job_secret_from_environment
from moetion_lightning.distributed.interfaces import choose_address
from moetion_lightning.distributed.node_windows import NodeWindows
from moetion_lightning.distributed.replicate import WindowCopies
from moetion_lightning.distributed.topology import holders_of, replica_targets
from moetion_lightning.distributed.window_server import WindowServer
from moetion_lightning.distributed.wire import Address, job_key, new_secret
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.errors import StrandedRankError
from moetion_lightning.events import EventBus
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.owner import boot_id

__all__ = ["Peers"]

_log = logging.getLogger(__name__)
_TIMEOUT_SECONDS = 30.0


class Peers:
    """Serves the windows of this node, keeps copies of other failure domains' ones, copies what is elsewhere.

    Args:
        config: Settings.
        ranks: The ranks of the job, more than one.
        tier: This rank's windows.
        bus: Gets the events.
    """

    def __init__(self, config: EngineConfig, ranks: Ranks, tier: HostMemoryTier, bus: EventBus) -> None:
        self._config = config
        self._ranks = ranks
        self._tier = tier
        self._bus = bus
        self._server: WindowServer | None = None
        self._servers: dict[int, Address] = {}  # by the rank that stands for a node
        self._nodes: list[int] = []  # the same, by rank
        self._opened: WindowCopies | None = None
        #: What is in this node's memory.
        self.windows = NodeWindows(tier, ())
        #: Ranks whose copies this rank holds.
        self.holds: tuple[int, ...] = ()

    def open(self) -> None:
        """Learn who is where, and serve. All ranks call this together, again after a rank was replaced.

        Raises:
            ConfigurationError: There are too few failure domains for the replicas that were asked for, or no address
                at which other nodes reach this one.
        """
        if self._opened is not None:
            self._opened.stop()  # before any rank can know what the others have
        if self._server is not None:
            self._server.close()
            self._server = None
        answers = self._ranks.agree("domains", self._hello())
        jobs = sorted({str(answer["job"]) for answer in answers})
        if len(jobs) > 1:
            raise StrandedRankError(
                f"the ranks are in different runs ({', '.join(jobs)}): a rank that was lost in a later trainer.fit of "
                "a script cannot join it; all ranks have to begin again."
            )
        rank = self._ranks.control.rank
        places = [answer["place"] for answer in answers]
        self._nodes = [places.index(place) for place in places]
        self.windows = NodeWindows(self._tier, [r for r, node in enumerate(self._nodes) if node == self.node])
        self._ranks.local_size = sum(answer["memory"] == answers[rank]["memory"] for answer in answers)
        domains = [str(answer["domain"]) for answer in answers]
        replicas = self._config.replicas
        if replicas == "auto":
            replicas = 1 if len(set(domains)) > 1 else 0
        self.holds = holders_of(replica_targets(domains, replicas))[rank]
        if self.num_nodes == 1 and not replicas:
            key = b""  # nothing goes over a wire
        else:
            key = self._serve(several_machines=len({str(answer["machine"]) for answer in answers}) > 1)
        if self._opened is None:
            self._opened = WindowCopies(self._tier, self._bus, timeout_seconds=_TIMEOUT_SECONDS)
        self._opened.key = key

    def _hello(self) -> dict[str, Any]:
        """Who this rank is, for the others."""
        status = os.stat(self._tier.path.parent)
        machine = f"{boot_id() or socket.gethostname()}:{_network_namespace()}"
        return {
            "job": self._tier.job,
            "domain": self._config.failure_domain or self._ranks.domain or socket.gethostname(),
            "machine": machine,
            "memory": f"{boot_id() or socket.gethostname()}:{status.st_dev}",
            "place": f"{boot_id() or socket.gethostname()}:{status.st_dev}:{status.st_ino}",
        }

    def _serve(self, *, several_machines: bool) -> bytes:
        """Serve if this rank stands for its node; learn where the other nodes serve. Returns the key."""
        given, told = job_secret_from_environment(), None
        if self.stands_for_node:
            interface = self._config.interface
            address = choose_address(
                interface,
                advertise=address_from_environment() or (None if interface else self._ranks.address or None),
                several_nodes=several_machines,
            )
            self._server = WindowServer(self.windows, address.bind, timeout_seconds=_TIMEOUT_SECONDS)
            told = [address.advertise, self._server.port]
        makes_secret = self._ranks.control.rank == 0 and given is None
        answers = self._ranks.agree("addresses", [told, new_secret() if makes_secret else ""])
        key = job_key(given if given is not None else str(answers[0][1]), self._tier.job)
        if makes_secret and several_machines:
            _log.info(
                "the secret of the window servers goes through the job's store, which any process that reaches the "
                "store can read. To keep it from the network, set MOETION_SECRET on every node."
            )
        self._servers = {rank: (str(a[0]), int(a[1])) for rank, (a, _) in enumerate(answers) if a is not None}
        if self._server is not None:
            self._server.start(key)
        return key

    @property
    def node(self) -> int:
        """The rank that stands for this node: it serves for all of its ranks, and tells what its memory has."""
        return self._nodes[self._ranks.control.rank]

    @property
    def stands_for_node(self) -> bool:
        """Whether this rank does; nobody does before the ranks have met."""
        return bool(self._nodes) and self.node == self._ranks.control.rank

    def is_here(self, rank: int) -> bool:
        """Whether a rank is on this node."""
        return self._nodes[rank] == self.node

    @property
    def num_nodes(self) -> int:
        """Nodes of the job."""
        return len(set(self._nodes))

    @property
    def copies(self) -> WindowCopies:
        """What this rank keeps of others; open."""
        assert self._opened is not None
        return self._opened

    def fetch(self, node: int, owner: int, last: int) -> None:
        """Copy a window from another node's memory into this rank's, verified.

        Raises:
            ReplicationError, HostMemoryError, ForeignWindowError, StoreError: See the message.
        """
        into = self._tier if owner == self._tier.rank else self.copies.tier(owner)
        self.copies.fetch(self._servers[node], owner, last, into)

    def follow(self) -> None:
        """Where all continue is settled: keep copies of what the others commit from now on."""
        self.copies.stop()
        self.copies.follow({owner: self._servers[self._nodes[owner]] for owner in self.holds})

    def settle(self) -> None:
        """All ranks have committed a newer window, and it is copied: what only a restore needed goes."""
        self.copies.drop(keep=self.holds)
        if self.stands_for_node:
            self.windows.remove_others()

    def drop_later(self, last: int) -> None:
        """All ranks go back to the window that ends with this iteration: later ones must not look common one day."""
        self.copies.drop_later(last)
        if self.stands_for_node:
            self.windows.drop_later(last)

    def begin_anew(self) -> None:
        """A fresh course of training begins: copies of an earlier one's windows go, dead processes' ones lie aside."""
        self.copies.stop()
        self.copies.drop()
        if self.stands_for_node:
            self.windows.set_others_aside()

    def close(self) -> None:
        """Stop serving; everything stays."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None
        if self._server is not None:
            self._server.close()
            self._server = None


def _network_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/net")
    except OSError:
        return ""
