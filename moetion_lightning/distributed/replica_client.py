"""What a rank asks of another rank's replica server."""

from __future__ import annotations

from moetion_lightning.distributed.replica_store import (
    MAX_NOTE_BYTES,
    Windows,
    receive_window,
    send_files,
)
from moetion_lightning.distributed.wire import MAX_BLOB_BYTES, MAX_HEADER_BYTES, Connection, number
from moetion_lightning.errors import CorruptSnapshotError, ReplicationError, StoreError, VersionError
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.manifest import Manifest

__all__ = ["fetch_window", "get_note", "list_peer", "push_window", "put_note"]


def push_window(connection: Connection, tier: HostMemoryTier, manifest: Manifest, holder: int) -> None:
    """Copy a window to another rank; files that are there already are not sent.

    Args:
        connection: To the holder's server.
        tier: Where the window is, pinned.
        manifest: The window.
        holder: The rank that must be there.

    Raises:
        ReplicationError: The connection broke off.
        RefusedError: The holder cannot or will not take it; what it held before is still there.
        CorruptSnapshotError: A file is missing here.
    """
    data = manifest.to_bytes()
    if len(data) > MAX_BLOB_BYTES:
        raise ReplicationError(
            f"window {manifest.iteration}: its manifest has {len(data)} bytes, at most {MAX_BLOB_BYTES} are sent. Use "
            "a smaller window."
        )
    connection.send({"op": "put", "owner": manifest.rank, "holder": holder, "manifest_bytes": len(data)})
    connection.send_blob(data)
    answer = connection.receive_answer(MAX_HEADER_BYTES + 16 * len(manifest.files))
    send_files(connection, tier, manifest, answer)
    connection.receive_answer()


def fetch_window(connection: Connection, owner: int, last: int, into: HostMemoryTier) -> Manifest:
    """Copy a window of a rank, its own or a replica, into a tier; files that are there already are not sent.

    Args:
        connection: To the server of a rank that has it.
        owner: The rank that captured it.
        last: Its last iteration, the window's name.
        into: Tier of that owner. Windows of later iterations go, as with every commit.

    Returns:
        The manifest, committed on ``into``, whose files were verified.

    Raises:
        ReplicationError: The connection broke off, what came is damaged, or the window is not there.
        HostMemoryError: There is no room.
        ForeignWindowError: ``into`` is of another job or rank.
        StoreError: ``into`` cannot be written.
    """
    try:
        connection.send({"op": "get", "owner": owner, "last": last})
        size = number(connection.receive_answer(), "manifest_bytes", MAX_BLOB_BYTES + 1)
        manifest = Manifest.from_bytes(connection.receive_blob(size), path=f"manifest from {connection.peer}")
        if (manifest.rank, manifest.iteration) != (owner, last):
            raise ReplicationError(
                f"{connection.peer} sent window {manifest.iteration} of rank {manifest.rank}, asked for window {last} "
                f"of rank {owner}. Install one version everywhere."
            )
        receive_window(connection, manifest, into)
    except (CorruptSnapshotError, VersionError) as error:
        raise ReplicationError(f"window {last} of rank {owner} is not usable: {error} Try another holder.") from error
    return manifest


def list_peer(connection: Connection) -> tuple[Windows, dict[int, Windows]]:
    """Windows that a rank has: its own, and replicas by owner. Raises ``ReplicationError``."""
    connection.send({"op": "list"})
    answer = connection.receive_answer(MAX_BLOB_BYTES)
    try:
        return _windows(answer["own"]), {int(owner): _windows(found) for owner, found in answer["replicas"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReplicationError(f"{connection.peer} sent a list that cannot be read. Install one version.") from error


def put_note(connection: Connection, owner: int, name: str, data: bytes) -> None:
    """Have another rank keep a small file; it replaces an older one of that name. Raises ``ReplicationError``."""
    if len(data) > MAX_NOTE_BYTES:
        raise StoreError(f"note {name!r} of rank {owner}: {len(data)} bytes, at most {MAX_NOTE_BYTES} are kept.")
    connection.send({"op": "put_note", "owner": owner, "name": name, "nbytes": len(data)})
    connection.send_blob(data)
    connection.receive_answer()


def get_note(connection: Connection, owner: int, name: str) -> bytes | None:
    """A note of a rank that is kept there, None when there is none. Raises ``ReplicationError``."""
    connection.send({"op": "get_note", "owner": owner, "name": name})
    answer = connection.receive_answer()
    if answer.get("nbytes") is None:
        return None
    return connection.receive_blob(number(answer, "nbytes", MAX_NOTE_BYTES + 1))


def _windows(found: list[list[int]]) -> Windows:
    return [(int(first), int(last)) for first, last in found]
