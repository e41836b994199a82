"""Requests to a store that is silent, gone, or that ends a connection."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore

from moetion_lightning.distributed.bounded_store import BoundedStore, StoreSilentError
from moetion_lightning.distributed.stable_store import STORE_ERRORS, host_store

ROOT = Path(__file__).resolve().parents[2]
SERVE = """
import sys
from moetion_lightning.distributed.stable_store import host_store
store = host_store("127.0.0.1")
print(store.port, flush=True)
sys.stdin.read()
"""
REQUESTS: dict[str, Callable[[BoundedStore], Any]] = {
    "set": lambda store: store.set("a", "1"),
    "get": lambda store: store.get("k"),
    "multi_get": lambda store: store.multi_get(["k"]),
    "check": lambda store: store.check(["k"]),
    "compare_set": lambda store: store.compare_set("g", "", "0"),
    "add": lambda store: store.add("n", 1),
    "delete_key": lambda store: store.delete_key("k"),
    "wait": lambda store: store.wait(["never"], 0.1),
}


@pytest.fixture
def server() -> TCPStore:
    return host_store("127.0.0.1")


@pytest.fixture(scope="module")
def process() -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its pid and port."""
    with subprocess.Popen([sys.executable, "-c", SERVE], cwd=ROOT, stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout is not None
        yield child.pid, int(child.stdout.readline())
        os.kill(child.pid, signal.SIGCONT)
        child.kill()


def test_requests_are_those_of_torch_under_a_prefix(server: TCPStore) -> None:
    store = BoundedStore("127.0.0.1", server.port, 30.0, prefix="run")
    store.set("a", "1")
    assert server.get("run/a") == b"1"
    assert (store.add("n", 2), store.add("n", 3)) == (2, 5)
    assert (store.compare_set("c", "", "x"), store.compare_set("c", "", "y")) == (b"x", b"x")
    assert store.multi_get(["a", "c"]) == [b"1", b"x"]
    assert (store.check(["a"]), store.check(["a", "b"])) == (True, False)
    assert store.wait(["a"], 30.0)
    assert not store.wait(["b"], 0.05)
    assert store.delete_key("a")
    assert not store.clone(prefix="other").check(["c"])


@pytest.mark.parametrize("name", REQUESTS)
def test_a_silent_store_is_an_error_within_the_deadline(process: tuple[int, int], name: str) -> None:
    pid, port = process
    store = BoundedStore("127.0.0.1", port, 20.0)
    store.set("k", "v")
    store.seconds = 0.5
    os.kill(pid, signal.SIGSTOP)
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    try:
        begin = time.monotonic()
        with pytest.raises(StoreSilentError, match="did not answer within 0.5 s") as caught:
            REQUESTS[name](store)
        assert time.monotonic() - begin < 15.0  # torch's own client is still blocked then
        assert isinstance(caught.value, STORE_ERRORS)
    finally:
        os.kill(pid, signal.SIGCONT)
    store.seconds = 20.0
    store.set("k", "again")  # over a new connection
    assert store.get("k") == b"again"
    store.close()


def reset(store: BoundedStore) -> None:
    """As a firewall that has forgotten the connection, or a descriptor that was closed, does."""
    assert store._connection is not None
    descriptor = store._connection._descriptor
    assert descriptor is not None
    with socket.socket(fileno=os.dup(descriptor)) as own:
        own.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("name", [name for name in REQUESTS if name != "add"])
def test_a_request_is_repeated_over_a_new_connection(server: TCPStore, name: str) -> None:
    store = BoundedStore("127.0.0.1", server.port, 30.0)
    store.set("k", "v")
    reset(store)
    REQUESTS[name](store)


def test_an_addition_is_not_repeated(server: TCPStore) -> None:
    store = BoundedStore("127.0.0.1", server.port, 30.0)
    reset(store)
    with pytest.raises(StoreSilentError):
        store.add("n", 1)
    assert store.add("n", 0) in (0, 1)


def test_a_store_that_is_gone_is_an_error() -> None:
    server = host_store("127.0.0.1")
    store = BoundedStore("127.0.0.1", server.port, 1.0)
    del server
    with pytest.raises(StoreSilentError):
        store.get("k")
    with pytest.raises(StoreSilentError):
        store.clone()


def test_closing_frees_a_thread_that_waits(server: TCPStore) -> None:
    store = BoundedStore("127.0.0.1", server.port, 30.0)
    errors: list[BaseException] = []
    asked = threading.Event()

    def wait() -> None:
        asked.set()
        try:
            store.wait(["never"], 600.0)
        except StoreSilentError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert asked.wait(20.0)
    store.close()
    thread.join(timeout=60.0)
    assert not thread.is_alive()
    assert len(errors) == 1
    with pytest.raises(StoreSilentError, match="was closed"):
        store.get("k")


def test_a_wait_ends_with_the_key(server: TCPStore) -> None:
    store = BoundedStore("127.0.0.1", server.port, 30.0)
    timer = threading.Timer(0.1, lambda: server.set("later", "1"))
    timer.start()
    assert store.wait(["later"], 600.0)


def test_the_interpreter_ends_while_a_thread_waits(server: TCPStore) -> None:
    code = f"""
import threading, time
from moetion_lightning.distributed.bounded_store import BoundedStore
store = BoundedStore("127.0.0.1", {server.port}, 30.0)
threading.Thread(target=store.wait, args=(["never"], 600.0), daemon=True).start()
time.sleep(0.2)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
