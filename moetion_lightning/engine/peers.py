"""The other ranks' memory: copies of this rank's windows there, copies of theirs here."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from moetion_lightning.config import EngineConfig, job_secret_from_environment
from moetion_lightning.distributed.replicate import ReplicaService
from moetion_lightning.distributed.topology import holders_of, replica_targets
from moetion_lightning.distributed.wire import new_secret
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.errors import RankLostError
from moetion_lightning.events import EventBus
from moetion_lightning.storage.format import Manifest
from moetion_lightning.storage.host_memory import HostMemoryTier

__all__ = ["Peers"]


class Peers:
    """Serves this rank's windows, keeps copies on other failure domains, fetches what is elsewhere.

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
        self._service: ReplicaService | None = None
        self._address = ("", 0)
        self._addresses: list[tuple[str, int]] = []
        #: Ranks that hold copies of this rank's windows, and ranks whose copies this rank holds.
        self.targets: tuple[int, ...] = ()
        self.holds: tuple[int, ...] = ()

    def open(self) -> None:
        """Serve, and learn where the others do. All ranks call this together, again after a rank was replaced.

        Raises:
            ConfigurationError: There are too few failure domains for the replicas that were asked for.
        """
        if self._service is not None:
            self._service.replicator.forget()  # before any rank can know what the others have
        domain = self._config.failure_domain or self._ranks.domain or socket.gethostname()
        control = self._ranks.control
        given = job_secret_from_environment()
        hello = {
            "job": self._tier.job,
            "domain": domain,
            "secret": new_secret() if control.rank == 0 and given is None else "",
        }
        answers = self._ranks.agree("domains", hello)
        jobs = sorted({str(answer["job"]) for answer in answers})
        if len(jobs) > 1:
            raise RankLostError(
                f"the ranks are in different runs ({', '.join(jobs)}): a rank that was lost in a later trainer.fit of "
                "a script cannot join it. Give each fit a script of its own, or start the job again."
            )
        domains = [str(answer["domain"]) for answer in answers]
        replicas = self._config.replicas
        if replicas == "auto":
            replicas = 1 if len(set(domains)) > 1 else 0
        targets = replica_targets(domains, replicas)
        self.targets, self.holds = targets[control.rank], holders_of(targets)[control.rank]
        host = self._config.interface or self._ranks.address or _default_host(several_nodes=len(set(domains)) > 1)
        if self._service is not None:
            self._service.store.next_course()  # no rank sends any more
        else:
            secret = given if given is not None else str(answers[0]["secret"])
            self._service = ReplicaService(self._tier, secret=secret, bus=self._bus, host=host)
            self._address = self._service.start()
        addresses = self._ranks.agree("addresses", list(self._address))
        self._addresses = [(str(host), int(port)) for host, port in addresses]
        self._service.replicator.set_targets({rank: self._addresses[rank] for rank in self.targets})

    @property
    def service(self) -> ReplicaService:
        """The service; open."""
        assert self._service is not None
        return self._service

    def held(self) -> Mapping[int, HostMemoryTier]:
        """Copies of other ranks' windows here, by owner."""
        return self.service.store.tiers()

    def fetch(self, peer: int, owner: int, last: int) -> HostMemoryTier:
        """Copy a window from another rank's memory into this rank's, verified. Returns where it is now.

        Raises:
            ReplicationError, CorruptSnapshotError, HostMemoryError: See the message.
        """
        into = self._tier if owner == self._tier.rank else self.service.store.tier_for(owner)
        self.service.fetch(self._addresses[peer], owner, last, into)
        return into

    def offer(self, manifest: Manifest) -> None:
        """A window was committed: copy it to the peers, in the background."""
        if self.targets:
            self.service.replicator.offer(manifest)

    def holding(self, iteration: int) -> bool:
        """Whether every peer that can be reached holds the window of this iteration."""
        return not self.targets or self.service.replicator.holding(iteration)

    def drop_others(self) -> None:
        """Training goes on: what was fetched for a restore only is not needed any more."""
        self.service.store.drop(keep=frozenset(self.holds))

    def close(self, *, completed: bool) -> None:
        """Stop serving."""
        if self._service is not None:
            self._service.close(completed=completed)
            self._service = None


def _default_host(*, several_nodes: bool) -> str:
    return socket.gethostbyname(socket.gethostname()) if several_nodes else "127.0.0.1"
