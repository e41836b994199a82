from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moetion_lightning.distributed import replica_server, wire
from moetion_lightning.distributed.replicate import ReplicaService
from moetion_lightning.distributed.wire import RefusedError, connect, new_secret
from moetion_lightning.errors import ConfigurationError, ForeignWindowError, ReplicationError
from moetion_lightning.events import EventBus, ReplicationFailed
from tests.replica_ranks import (
    HOLDER,
    KEY,
    OWNER,
    SECRET,
    TIMEOUT,
    Proxy,
    Rank,
    assert_whole,
    commit,
    open_tier,
    push,
)

pytestmark = [pytest.mark.slow]


@pytest.fixture
def base(memory_dir) -> Path:
    return memory_dir / "base"


@pytest.fixture
def holder(base) -> Iterator[Rank]:
    rank = Rank(base, HOLDER)
    yield rank
    rank.close()


@pytest.fixture
def owner(base) -> Iterator[Rank]:
    rank = Rank(base, OWNER)
    yield rank
    rank.close()


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
        bytes(4096),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"MOETREP1" + b"\xff" * 64,
        b"MOETREP1" + b"x" * 10_000,
        b"MOETREP9" + bytes(64),
        b"M",
    ],
)
def test_garbage_is_hung_up_on_and_the_server_goes_on(base, holder, data, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            with socket.create_connection(holder.address) as sock:
                with contextlib.suppress(OSError):  # it may have hung up already
                    sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                assert_hung_up(sock)
    assert holder.replicas() == {}
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    with open_tier(base, OWNER) as tier:
        commit(tier, 1)
        push(holder.address, tier, 1)
    assert_whole(holder.replica_of(OWNER), 1)


def test_silent_connections_block_nobody_and_are_bounded(base, holder, caplog):
    silent = [socket.create_connection(holder.address) for _ in range(100)]
    with open_tier(base, OWNER) as tier:
        commit(tier, 1)
        push(holder.address, tier, 1)
    assert_whole(holder.replica_of(OWNER), 1)
    assert_hung_up(silent[0])
    assert "pushed out" in caplog.text
    for sock in silent:
        sock.close()


def test_connection_that_proves_nothing_in_time_is_closed(holder, monkeypatch, caplog):
    monkeypatch.setattr(replica_server, "HANDSHAKE_SECONDS", 0.05)
    with socket.create_connection(holder.address) as sock:
        sock.sendall(b"MOETREP1" + bytes(10))
        assert_hung_up(sock)
    assert "said nothing that proves the secret" in caplog.text


def test_wrong_secret_is_reported_with_the_remedy_and_nothing_is_accepted(base, holder, caplog):
    intruder = Rank(base, OWNER, secret=new_secret())
    intruder.replicator.set_targets({HOLDER: holder.address})
    intruder.replicator.offer(commit(intruder.tier, 1))
    assert not intruder.flush(0.2)
    assert "MOETION_SECRET" in intruder.of(ReplicationFailed)[0].reason
    assert "does not know this job's secret" in caplog.text
    with pytest.raises(ReplicationError, match="MOETION_SECRET"):
        intruder.service.fetch(holder.address, HOLDER, 1, intruder.tier)
    assert holder.replicas() == {}
    intruder.close()


def test_replayed_session_is_refused(base, holder):
    with open_tier(base, OWNER) as tier:
        commit(tier, 1)
        with Proxy(holder.address) as proxy:
            push(proxy.address, tier, 1)
    holder.store.forget()
    with socket.create_connection(holder.address) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(proxy.recorded)
        assert_hung_up(sock)
    assert holder.replicas() == {}


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"op": "shell"},
        {"op": ["put"]},
        {"op": "put", "owner": OWNER, "holder": HOLDER},
        {"op": "put", "owner": -1, "holder": HOLDER, "manifest_bytes": 10},
        {"op": "put", "owner": HOLDER, "holder": HOLDER, "manifest_bytes": 10},
        {"op": "put", "owner": OWNER, "holder": HOLDER, "manifest_bytes": 1 << 40},
        {"op": "get", "owner": OWNER, "last": 1},
        {"op": "get", "owner": HOLDER, "last": "../../1"},
        {"op": "list"},
    ],
)
def test_senseless_request_of_a_rank_is_refused_with_a_reason(holder, request_):
    connection = connect(holder.address, KEY, timeout_seconds=TIMEOUT)
    connection.send(request_)
    with pytest.raises(RefusedError, match="refused: ."):
        connection.receive_answer()
    assert holder.replicas() == {}


def test_server_never_listens_on_every_interface(base):
    with open_tier(base, OWNER) as tier:
        for host in ("", "0.0.0.0", "::"):
            with pytest.raises(ConfigurationError, match="every interface"):
                ReplicaService(tier, secret=SECRET, bus=EventBus(), host=host).start()
        with pytest.raises(ReplicationError, match="cannot listen"):
            ReplicaService(tier, secret=SECRET, bus=EventBus(), host="192.0.2.1").start()


# --- fetching -----------------------------------------------------------------------------------------------------


def test_window_is_fetched_from_its_owner_and_from_a_holder(base, holder, owner):
    manifest = commit(owner.tier, 5)
    owner.replicator.set_targets({HOLDER: holder.address})
    owner.replicator.offer(manifest)
    assert owner.flush()
    other = Rank(base, 2)
    for name, address in (("from-owner", owner.address), ("from-holder", holder.address)):
        with open_tier(base / name, OWNER) as into:
            assert other.service.fetch(address, OWNER, 5, into) == manifest
            assert_whole(into, 5)
            before = {p.name: p.stat().st_ino for p in (into.path / "files").iterdir()}
            assert other.service.fetch(address, OWNER, 5, into) == manifest  # again: nothing is copied
            assert {p.name: p.stat().st_ino for p in (into.path / "files").iterdir()} == before
    other.close()


def test_window_that_its_owner_drops_meanwhile_is_fetched_whole(base, owner, holder):
    commit(owner.tier, 1)
    # The client's part of a fetch ends with its list of files; nothing is sent before that is there.
    with Proxy(owner.address, stop_after=wire.PROOF_BYTES + 4 + 32 + len('{"op":"get","owner":1,"last":1}')) as proxy:
        with open_tier(base / "fetched", OWNER) as into:
            thread = threading.Thread(target=lambda: holder.service.fetch(proxy.address, OWNER, 1, into))
            thread.start()
            assert proxy.stopped.wait(TIMEOUT)
            for iteration in (2, 3, 4):
                commit(owner.tier, iteration)
            assert owner.tier.windows() == [4]
            proxy.gate.set()
            thread.join()
            assert into.windows() == [1]
            assert_whole(into, 1)


def test_damaged_replica_is_refused_by_who_fetches_it(base, holder, owner):
    manifest = commit(owner.tier, 1)
    push(holder.address, owner.tier, 1)
    path = holder.replica_of(OWNER).local_path(manifest.files[1])
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with open_tier(base / "fetched", OWNER) as into:
        with pytest.raises(ReplicationError, match="Try another holder"):
            owner.service.fetch(holder.address, OWNER, 1, into)
        assert into.windows() == []


def test_window_that_nobody_has_and_foreign_targets_are_refused(base, holder, owner):
    commit(owner.tier, 1)
    with pytest.raises(RefusedError, match="no replica of rank 2"):
        owner.service.fetch(holder.address, 2, 1, owner.tier)
    with pytest.raises(RefusedError, match="missing"):
        holder.service.fetch(owner.address, OWNER, 99, holder.tier)
    with pytest.raises(ForeignWindowError, match="rank 0"):
        holder.service.fetch(owner.address, OWNER, 1, holder.tier)


def test_more_requests_than_threads_are_served_in_turn(holder, owner, monkeypatch):
    server = holder.service._server
    monkeypatch.setattr(server, "_free", asyncio.Semaphore(1))
    commit(owner.tier, 1)
    with Proxy(holder.address, stop_after=1000) as proxy:
        first = threading.Thread(target=push, args=(proxy.address, owner.tier, 1))
        first.start()
        assert proxy.stopped.wait(TIMEOUT)
        second = connect(holder.address, KEY, timeout_seconds=TIMEOUT)
        second.send({"op": "get", "owner": HOLDER, "last": 9})
        deadline = time.monotonic() + TIMEOUT
        while (len(server._tasks) < 2 or server._resting or server._handshakes) and time.monotonic() < deadline:
            threading.Event().wait(0.005)
        assert len(server._working) == 1
        assert len(server._tasks) == 2
        proxy.gate.set()
        with pytest.raises(RefusedError, match="missing"):
            second.receive_answer()
        second.close()
        first.join()
    resting = [connect(holder.address, KEY, timeout_seconds=TIMEOUT) for _ in range(40)]
    for connection in resting:
        connection.send({"op": "get", "owner": HOLDER, "last": 9})
    for connection in resting:
        with pytest.raises(RefusedError, match="missing"):
            connection.receive_answer()
        connection.close()
