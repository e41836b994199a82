"""The server of a node: strangers, senseless requests, many readers at once."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moetion_lightning.distributed import window_server, wire
from moetion_lightning.distributed.node_windows import NodeWindows
from moetion_lightning.distributed.window_server import WindowServer
from moetion_lightning.distributed.wire import RefusedError, connect, new_secret
from moetion_lightning.errors import ForeignWindowError, ReplicationError
from moetion_lightning.storage.host_memory import HostMemoryTier
from tests.command import until
from tests.replica_ranks import (
    HOLDER,
    KEY,
    OWNER,
    TIMEOUT,
    Proxy,
    Rank,
    assert_whole,
    commit,
    open_tier,
)

pytestmark = [pytest.mark.slow]


# --- strangers ----------------------------------------------------------------------------------------------------


def assert_hung_up(sock: socket.socket) -> None:
    sock.settimeout(TIMEOUT)
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(4096):
            pass


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 100,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x00",
        b"MOETREP1" + b"\xff" * 64,
        b"MOETREP1" + b"x" * 10_000,
        b"MOETREP9" + bytes(64),
        b"M",
    ],
)
def test_garbage_is_hung_up_on_and_the_server_goes_on(
    holder: Rank, owner: Rank, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            with socket.create_connection(owner.address) as sock:
                with contextlib.suppress(OSError):  # it may have hung up already
                    sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                assert_hung_up(sock)
        until(lambda: caplog.records, "a complaint")
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    commit(owner.tier, 1)
    holder.take(owner.address)
    assert_whole(holder.copies.tier(OWNER), 1)


def test_silent_connections_block_nobody_and_are_bounded(
    holder: Rank, owner: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_server, "_MAX_STRANGERS", 50)
    silent = [socket.create_connection(owner.address) for _ in range(100)]
    commit(owner.tier, 1)
    holder.take(owner.address)
    assert_whole(holder.copies.tier(OWNER), 1)
    assert_hung_up(silent[0])
    until(lambda: len(owner.server._strangers) <= 50, "the threads of those that were pushed out")
    for sock in silent:
        sock.close()


def test_connection_that_proves_nothing_in_time_is_closed(
    owner: Rank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wire, "HANDSHAKE_SECONDS", 0.05)
    with socket.create_connection(owner.address) as sock:
        sock.sendall(b"MOETREP1" + bytes(10))
        assert_hung_up(sock)
    until(lambda: "said nothing that proves the secret" in caplog.text, "a complaint")


def test_wrong_secret_is_reported_with_the_remedy_on_both_ends(
    base: Path, owner: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    commit(owner.tier, 1)
    intruder = Rank(base, HOLDER, secret=new_secret())
    with pytest.raises(ReplicationError, match="MOETION_SECRET"):
        intruder.copies._fetch(owner.address, OWNER, 1, intruder.copies.tier(OWNER))
    until(lambda: "does not know this job's secret" in caplog.text, "a complaint")
    assert intruder.copies.tier(OWNER).windows() == []
    intruder.close()


def test_replayed_session_is_refused(holder: Rank, owner: Rank) -> None:
    commit(owner.tier, 1)
    with Proxy(owner.address) as proxy:
        holder.take(proxy.address)
    with socket.create_connection(owner.address) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(proxy.asked)
        assert len(sock.recv(100, socket.MSG_WAITALL)) == 40, "its greeting and nothing more"


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"op": "shell"},
        {"op": ["get"]},
        {"op": "put", "owner": OWNER, "holder": HOLDER},
        {"op": "get", "owner": -1, "last": 1},
        {"op": "get", "owner": HOLDER, "last": 1},
        {"op": "get", "owner": OWNER, "last": "../../1"},
        {"op": "next", "owner": "../1", "have": None},
        {"op": "next", "owner": 1 << 40},
    ],
)
def test_senseless_request_of_a_rank_is_refused_with_a_reason(owner: Rank, request_: dict[str, Any]) -> None:
    connection = connect(owner.address, KEY, timeout_seconds=TIMEOUT)
    connection.send(request_)
    with pytest.raises(RefusedError, match="refused: ."):
        connection.receive_answer()


@pytest.mark.parametrize("need", [None, "0", [3], [-1], [True], [0.0], {}])
def test_request_for_files_that_are_not_in_the_window_is_refused(owner: Rank, need: Any) -> None:
    commit(owner.tier, 1)
    connection = connect(owner.address, KEY, timeout_seconds=TIMEOUT)
    connection.send({"op": "get", "owner": OWNER, "last": 1})
    connection.receive_blob(connection.receive_answer()["manifest_bytes"])
    connection.send({"ok": True, "need": need})
    with pytest.raises(RefusedError, match="no such files"):
        connection.receive_answer()


def test_interface_that_this_machine_lacks_is_named(base: Path) -> None:
    with pytest.raises(ReplicationError, match="cannot listen there"):
        WindowServer(NodeWindows(HostMemoryTier(base, "job"), ()), "192.0.2.1", timeout_seconds=1.0)


# --- reading ------------------------------------------------------------------------------------------------------


def test_window_is_read_from_whatever_directory_of_the_node_has_it(base: Path, holder: Rank, owner: Rank) -> None:
    """The owner's, a copy that another rank keeps, and what a dead rank of any number has left."""
    manifest = commit(owner.tier, 5)
    holder.take(owner.address)
    with open_tier(holder.base, 3) as dead:
        commit(dead, 6)
    for number, (rank, last, address) in enumerate(
        [(OWNER, 5, owner.address), (OWNER, 5, holder.address), (3, 6, holder.address)]
    ):
        with open_tier(base / f"{number}", rank) as into:
            assert holder.copies.fetch(address, rank, last, into).iteration == last
            assert_whole(into, last)
    with open_tier(base / "0", OWNER) as into:
        before = {p.name: p.stat().st_ino for p in (into.path / "files").iterdir()}
        assert holder.copies.fetch(owner.address, OWNER, 5, into) == manifest  # again: nothing is copied
        assert {p.name: p.stat().st_ino for p in (into.path / "files").iterdir()} == before


def test_window_that_its_owner_drops_meanwhile_arrives_whole_or_not_at_all(holder: Rank, owner: Rank) -> None:
    """The owner captures into the same memory, in other sizes, while it is being sent."""
    commit(owner.tier, 1)
    with Proxy(owner.address, stop_after=100_000) as proxy:
        results: list[object] = []

        def take() -> None:
            try:
                results.append(holder.take(proxy.address))
            except Exception as error:
                results.append(error)

        thread = threading.Thread(target=take)
        thread.start()
        assert proxy.stopped.wait(TIMEOUT)
        for iteration in (2, 3, 4):
            commit(owner.tier, iteration)
        for nbytes in (200_000, 50_000):
            owner.tier.release(owner.tier.acquire(f"other-{nbytes}", nbytes))
        proxy.gate.set()
        thread.join()
    copies = holder.copies.tier(OWNER)
    assert isinstance(results[0], (int, ReplicationError)) or type(results[0]).__name__ == "CorruptSnapshotError"
    if copies.windows():
        assert_whole(copies, 1)
    holder.take(owner.address)
    assert_whole(copies, 4)


def test_damaged_window_is_refused_by_who_reads_it(base: Path, holder: Rank, owner: Rank) -> None:
    manifest = commit(owner.tier, 1)
    path = owner.tier.local_path(manifest.files[1])
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ReplicationError, match="Try another holder"):
        holder.copies._fetch(owner.address, OWNER, 1, holder.copies.tier(OWNER))
    assert holder.copies.tier(OWNER).windows() == []


def test_window_that_nobody_has_and_a_foreign_tier_are_refused(holder: Rank, owner: Rank) -> None:
    commit(owner.tier, 1)
    with pytest.raises(RefusedError, match="window 1 of rank 2 is missing on this node"):
        holder.copies.fetch(owner.address, 2, 1, holder.copies.tier(2))
    with pytest.raises(ForeignWindowError, match="rank 0"):
        holder.copies.fetch(owner.address, OWNER, 1, holder.tier)


def test_rank_that_waits_for_a_window_hears_that_there_is_none(owner: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_server, "NOTHING_SECONDS", 0.1)
    connection = connect(owner.address, KEY, timeout_seconds=TIMEOUT)
    for _ in range(2):
        connection.send({"op": "next", "owner": OWNER, "have": None})
        assert connection.receive_answer() == {"ok": True, "nothing": True}
    connection.close()


def test_four_hundred_readers_at_once_all_get_the_window(owner: Rank) -> None:
    """As many nodes restore at the same moment, and all need this one's window first."""
    manifest = commit(owner.tier, 1)
    start = threading.Event()

    def read(_: int) -> int:
        start.wait()
        for attempt in range(5):
            try:
                connection = connect(owner.address, KEY, timeout_seconds=TIMEOUT)
                with contextlib.closing(connection):
                    connection.send({"op": "get", "owner": OWNER, "last": 1})
                    data = connection.receive_blob(connection.receive_answer()["manifest_bytes"])
                    connection.send({"ok": True, "need": [0]})
                    connection.receive_stream(memoryview(bytearray(manifest.files[0].nbytes)))
                    return len(data)
            except ReplicationError:
                if attempt == 4:
                    raise
                time.sleep(0.2 + os.getpid() % 7 / 100)
        return 0

    with ThreadPoolExecutor(400) as pool:
        readers = [pool.submit(read, number) for number in range(400)]
        start.set()
        sizes = {reader.result() for reader in readers}
    assert sizes == {len(manifest.to_bytes())}
