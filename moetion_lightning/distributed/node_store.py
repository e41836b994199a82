"""A store for the ranks of one node, served by the first: one rank of each node talks to the run's store."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from moetion_lightning.distributed.bounded_store import BoundedStore
from moetion_lightning.distributed.stable_store import host_store

__all__ = ["NodePlace", "NodeStore"]

_HOST = "127.0.0.1"
_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class NodePlace:
    """Where a rank is among the nodes of a job, all of which have as many ranks.

    Args:
        node: Number of the node.
        num_nodes: Nodes of the job.
        index: Number of the rank on its node; 0 is the node's first.
        size: Ranks of a node.
    """

    node: int
    num_nodes: int
    index: int
    size: int

    @classmethod
    def of(cls, rank: int, world_size: int, local_size: int) -> NodePlace | None:
        """The place of a rank; None where a store of the node's own is of no use.

        Args:
            rank: Global rank; those of a node follow each other.
            world_size: Ranks of the job.
            local_size: Ranks of a node.
        """
        if not 1 < local_size <= 60 or world_size % local_size or world_size == local_size:
            return None
        node, index = divmod(rank, local_size)
        return cls(node=node, num_nodes=world_size // local_size, index=index, size=local_size)


class NodeStore:
    """The node's store, as one of its ranks sees it.

    Args:
        place: Where this rank is.
        port: Port of the server; None for the node's first rank, which serves it on the loopback interface.
    """

    def __init__(self, place: NodePlace, port: int | None) -> None:
        self.place = place
        self._server: TCPStore | None = host_store(_HOST) if port is None else None
        self.port = self._server.port if self._server is not None else int(port or 0)
        self.client = BoundedStore(_HOST, self.port, _SECONDS)
