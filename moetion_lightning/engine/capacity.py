"""Whether the host memory of this rank can hold the windows that training needs."""

from __future__ import annotations

from collections.abc import Callable

from moetion_lightning.core.window_memory import held_windows
from moetion_lightning.engine.peers import Peers
from moetion_lightning.errors import HostMemoryError
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.room import reserve_bytes_at
from moetion_lightning.units import bytes_text

__all__ = ["Capacity"]


class Capacity:
    """What fits into host memory.

    Args:
        host: The memory.
        local_size: Ranks of this node, which share it.
        peers: Gives the ranks whose windows are copied here, if there are any.
        persist_every: Windows between two that are persisted; None: none is.
    """

    def __init__(
        self,
        host: HostMemoryTier,
        *,
        local_size: int,
        peers: Callable[[], Peers | None],
        persist_every: int | None,
    ) -> None:
        self._host = host
        self._local_size = local_size
        self._peers = peers
        self._persist_every = persist_every

    def window_bytes(self, shared_bytes: int = 0) -> int:
        """Bytes that one window may take, with as many windows as exist at the same time.

        Args:
            shared_bytes: Of what they have in common (parameters that do not train), stored once.
        """
        return (self._room() - shared_bytes) // self._num_windows

    def check_log(self, log_bytes: int) -> None:
        """Refuse a gradient log that does not fit, with the copies of those of other ranks.

        Raises:
            HostMemoryError: With the numbers and the remedy.
        """
        needed, room = (1 + self._num_held) * log_bytes, self._room()
        if needed > room:
            raise HostMemoryError(
                f"host memory at {self._host.base_dir} has {bytes_text(room)} for this job; a gradient log needs "
                f"{bytes_text(needed)} at most. Use a smaller window=, a larger /dev/shm (docker: --shm-size), another "
                "memory_dir=, or SparseExpertCheckpoint, which needs less."
                f"{self._reserve_text()}{self._host.who_holds_memory()}"
            )

    def check_windows(self, window_bytes: int, shared_bytes: int = 0) -> None:
        """Refuse windows that do not fit, as many as exist at the same time.

        Args:
            window_bytes: Of each of them.
            shared_bytes: As for :meth:`window_bytes`.

        Raises:
            HostMemoryError: With the numbers and the remedy.
        """
        needed, room = self._num_windows * window_bytes + shared_bytes, self._room()
        if needed > room:
            frozen = f" and {bytes_text(shared_bytes)} of frozen parameters" if shared_bytes else ""
            raise HostMemoryError(
                f"host memory at {self._host.base_dir} has {bytes_text(room)} for this job; "
                f"{self._num_windows} windows of {bytes_text(window_bytes)}{frozen} need {bytes_text(needed)}. "
                "Use a smaller window, a larger /dev/shm (docker: --shm-size), or another memory_dir=."
                f"{self._reserve_text()}{self._host.who_holds_memory()}"
            )

    def check_restore(self, window_bytes: int, num_shares: int) -> str:
        """What would not fit when another node takes the place of this one.

        It holds the windows of all ranks whose state its ranks restore, each once, until all have newer ones.

        Args:
            window_bytes: Of each window.
            num_shares: Ranks whose windows this rank restores.

        Returns:
            A warning, "" if it fits.
        """
        peers = self._peers()
        if peers is None or peers.num_nodes == 1:
            return ""
        local = self._local_size
        needed = window_bytes * (2 * local + max(0, num_shares - local))  # its own, those being captured, the others'
        room = local * self._room()
        if needed <= room:
            return ""
        return (
            f"the ranks of this node restore the windows of {num_shares} ranks together: a node with empty memory that "
            f"takes its place needs {bytes_text(needed)} at {self._host.base_dir} until all have captured again, and "
            f"there are {bytes_text(room)}. Give it more (/dev/shm, memory_dir=), or let persist_dir= be storage that "
            "all nodes read."
        )

    def _reserve_text(self) -> str:
        reserve = reserve_bytes_at(self._host.base_dir)
        return f" {bytes_text(reserve)} of /dev/shm are left to workers of data loaders." if reserve else ""

    @property
    def _num_windows(self) -> int:
        return held_windows(self._num_held, persist_every=self._persist_every)

    @property
    def _num_held(self) -> int:
        """Ranks whose windows are copied here."""
        peers = self._peers()
        return 0 if peers is None else len(peers.holds)

    def _room(self) -> int:
        # Free buffers of this process count as free there and as used here.
        free = self._host.free_bytes() // self._local_size
        return free + self._host.used_bytes() - self._host.pooled_bytes()
