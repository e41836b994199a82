from __future__ import annotations

import json
import os
import socket
import threading

import pytest

from moetion_lightning.config import job_secret_from_environment
from moetion_lightning.distributed import wire
from moetion_lightning.distributed.wire import Connection, RefusedError, accept, connect, job_key, new_secret
from moetion_lightning.errors import ConfigurationError, ReplicationError

KEY = job_key("secret", "job")
FRAME_OVERHEAD = 4 + 32


def connection_pair(timeout: float = 5.0) -> tuple[Connection, Connection]:
    left, right = socket.socketpair()
    key = os.urandom(32)
    return (
        Connection(left, key, is_client=True, timeout_seconds=timeout, peer="server"),
        Connection(right, key, is_client=False, timeout_seconds=timeout, peer="client"),
    )


@pytest.fixture
def pair():
    client, server = connection_pair()
    yield client, server
    client.close()
    server.close()


@pytest.fixture
def tapped():
    """A client, a server, and the two raw ends between them, so that the test is the network."""
    client_end, tap_left = socket.socketpair()
    tap_right, server_end = socket.socketpair()
    key = os.urandom(32)
    client = Connection(client_end, key, is_client=True, timeout_seconds=5.0, peer="server")
    server = Connection(server_end, key, is_client=False, timeout_seconds=5.0, peer="client")
    yield client, tap_left, tap_right, server
    for end in (client, server, tap_left, tap_right):
        end.close()


def recorded_frame(client: Connection, tap: socket.socket, header: dict) -> bytes:
    client.send(header)
    return tap.recv(FRAME_OVERHEAD + len(json.dumps(header, separators=(",", ":"))), socket.MSG_WAITALL)


class OneShotServer:
    """Listens on loopback and handles one connection by a function of the socket."""

    def __init__(self, handle) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self._handle = handle
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._listener, self._listener.accept()[0] as sock:
            self._handle(sock)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info) -> None:
        self._thread.join()


def serve_handshake(key: bytes):
    def handle(sock: socket.socket) -> None:
        try:
            connection = accept(sock, key, timeout_seconds=5.0, peer="client")
        except ReplicationError:
            return
        connection.send({"echo": connection.receive()})

    return handle


def test_headers_blobs_and_files_arrive_as_sent(pair, tmp_path):
    client, server = pair
    client.send({"op": "put", "n": 2**53 + 1})
    client.send_blob(b"manifest")
    (tmp_path / "file").write_bytes(b"payload and more")
    client.send_file(tmp_path / "file", 7)
    server.send({"ok": True})
    assert server.receive() == {"op": "put", "n": 2**53 + 1}
    assert server.receive_blob(100) == b"manifest"
    into = bytearray(7)
    server.receive_stream(memoryview(into))
    assert into == b"payload"
    assert client.receive_answer() == {"ok": True}
    assert server.bytes_received == len(b'{"op":"put","n":9007199254740993}') + 2 * FRAME_OVERHEAD + 8 + 7


def test_handshake_authenticates_both_ends():
    with OneShotServer(serve_handshake(KEY)) as server:
        connection = connect(server.address, KEY, timeout_seconds=5.0)
        connection.send({"hello": 1})
        assert connection.receive() == {"echo": {"hello": 1}}
        connection.close()


@pytest.mark.parametrize("other", [job_key("another", "job"), job_key("secret", "another job")])
def test_client_of_another_secret_or_job_is_told_so(other):
    with OneShotServer(serve_handshake(KEY)) as server:
        with pytest.raises(ReplicationError, match="MOETION_SECRET"):
            connect(server.address, other, timeout_seconds=5.0)


def test_server_that_does_not_know_the_secret_is_refused():
    def impostor(sock: socket.socket) -> None:
        sock.sendall(b"MOETREP1" + bytes(32))
        sock.recv(wire.PROOF_BYTES, socket.MSG_WAITALL)
        sock.sendall(bytes(32))

    with OneShotServer(impostor) as server:
        with pytest.raises(ReplicationError, match="could not prove"):
            connect(server.address, KEY, timeout_seconds=5.0)


def test_server_of_another_protocol_is_refused():
    with OneShotServer(lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n" + bytes(100))) as server:
        with pytest.raises(ReplicationError, match="does not speak this protocol"):
            connect(server.address, KEY, timeout_seconds=5.0)


def test_nobody_listening_is_said_with_the_address():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(ReplicationError, match=f"127.0.0.1:{address[1]} cannot be reached"):
        connect(address, KEY, timeout_seconds=5.0)


def test_proof_of_one_connection_proves_nothing_on_another():
    proofs = []

    def record(sock: socket.socket) -> None:
        sock.sendall(b"MOETREP1" + bytes(32))
        proofs.append(sock.recv(wire.PROOF_BYTES, socket.MSG_WAITALL))

    with OneShotServer(record) as server, pytest.raises(ReplicationError):
        connect(server.address, KEY, timeout_seconds=5.0)
    ours, theirs = socket.socketpair()
    theirs.sendall(proofs[0])
    with pytest.raises(ReplicationError, match="does not know this job's secret"):
        accept(ours, KEY, timeout_seconds=5.0, peer="client")
    theirs.close()


def test_every_altered_byte_of_a_header_is_noticed(tapped):
    client, tap_left, _, _ = tapped
    frame = recorded_frame(client, tap_left, {"op": "list"})
    for position in range(len(frame)):
        left, right = socket.socketpair()
        server = Connection(right, client._key, is_client=False, timeout_seconds=0.05, peer="client")
        altered = bytearray(frame)
        altered[position] ^= 1
        left.sendall(altered)
        with pytest.raises(ReplicationError):
            server.receive()
        assert not server.is_open
        left.close()


def test_replayed_left_out_and_reflected_headers_are_refused(tapped):
    client, tap_left, tap_right, server = tapped
    first = recorded_frame(client, tap_left, {"op": "list"})
    second = recorded_frame(client, tap_left, {"op": "get"})
    tap_right.sendall(first)
    assert server.receive() == {"op": "list"}
    tap_right.sendall(first)
    with pytest.raises(ReplicationError, match="authentication code"):
        server.receive()
    tap_left.sendall(first)  # back to where it came from
    with pytest.raises(ReplicationError, match="authentication code"):
        client.receive()
    left, right = socket.socketpair()
    fresh = Connection(right, client._key, is_client=False, timeout_seconds=5.0, peer="client")
    left.sendall(second)  # without the first
    with pytest.raises(ReplicationError, match="authentication code"):
        fresh.receive()
    left.close()


def test_announced_length_is_bounded_before_anything_is_read(tapped):
    _, _, tap_right, server = tapped
    tap_right.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(ReplicationError, match="4294967295 bytes where at most 65536"):
        server.receive()
    assert not server.is_open


@pytest.mark.parametrize("cut", [0, 1, 4, 10, 40])
def test_cut_off_header_is_an_error(tapped, cut):
    client, tap_left, tap_right, server = tapped
    frame = recorded_frame(client, tap_left, {"op": "list"})
    tap_right.sendall(frame[:cut])
    tap_right.close()
    with pytest.raises(ReplicationError, match="closed the connection"):
        server.receive()


def test_cut_off_stream_is_an_error(tapped):
    _, _, tap_right, server = tapped
    tap_right.sendall(b"123")
    tap_right.close()
    with pytest.raises(ReplicationError, match="client failed"):
        server.receive_stream(memoryview(bytearray(4)))


def test_silent_peer_is_given_up():
    client, server = connection_pair(timeout=0.05)
    with pytest.raises(ReplicationError, match="timed out"):
        client.receive()
    server.close()


def test_peer_that_takes_nothing_is_given_up(tmp_path):
    client, server = connection_pair(timeout=0.05)
    with open(tmp_path / "file", "wb") as file:
        file.truncate(64 << 20)
    with pytest.raises(ReplicationError, match="timed out"):
        client.send_file(tmp_path / "file", 64 << 20)
    server.close()


def test_file_that_is_cut_meanwhile_breaks_the_connection_off(pair, tmp_path):
    client, server = pair
    (tmp_path / "file").write_bytes(b"short")
    with pytest.raises(ReplicationError, match="given up while it was sent"):
        client.send_file(tmp_path / "file", 1000)
    assert not client.is_open
    with pytest.raises(ReplicationError, match="closed the connection"):
        server.receive_stream(memoryview(bytearray(1000)))


def test_abort_from_another_thread_ends_a_wait(pair):
    client, _ = pair
    errors = []

    def wait() -> None:
        try:
            client.receive()
        except ReplicationError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    client.abort()
    thread.join()
    assert errors


def test_refusal_carries_the_reason(pair):
    client, server = pair
    server.send({"ok": False, "error": "no room"})
    with pytest.raises(RefusedError, match="no room"):
        client.receive_answer()


@pytest.mark.parametrize("value", [None, -1, 10, True, 1.0, "1"])
def test_numbers_in_headers_are_checked(value):
    with pytest.raises(ReplicationError, match="'owner'"):
        wire.number({"owner": value}, "owner", 10)


def test_secrets(monkeypatch):
    assert new_secret() != new_secret()
    assert len(new_secret()) == 64
    with pytest.raises(ConfigurationError, match="MOETION_SECRET"):
        job_key("", "job")
    assert job_secret_from_environment() is None
    monkeypatch.setenv("MOETION_SECRET", "given")
    assert job_secret_from_environment() == "given"
    monkeypatch.undo()
