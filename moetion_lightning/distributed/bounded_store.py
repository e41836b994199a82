"""A client of a TCPStore whose every call ends in time.

torch's own client waits without a limit for a server that is silent (a partition, a host without power): its timeout
holds for keys that do not exist yet, not for a missing answer. Here each call runs on a thread of its connection. When
the answer is late the connection is given up, and the next call opens another one.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateError
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakSet

from torch.distributed import DistNetworkError, DistStoreError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from moetion_lightning.distributed.sockets import list_sockets, peer_port, shut_down, with_socket
from moetion_lightning.distributed.stable_store import connect_store, format_endpoint
from moetion_lightning.errors import MoEtionError

__all__ = ["BoundedStore", "ControlStore", "PlainStore", "StoreSilentError", "bounded"]

T = TypeVar("T")
_TRIES = 3
#: A silent peer is noticed by the kernel after about 5 + 3 * 3 seconds, also while a wait is under way.
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 15_000}
_connecting = threading.Lock()
_open: WeakSet[BoundedStore] = WeakSet()


class StoreSilentError(MoEtionError, RuntimeError):
    """The store did not answer within the deadline, or its connection broke and could not be opened again."""


class BoundedStore:
    """Requests to a store with a deadline each; may be used from several threads, which then take turns.

    A host that is silent is noticed within about 15 s also while :meth:`wait` is under way (TCP keep-alive, Linux); a
    server process that is stopped on a living host only by requests, which have their deadline.

    A request whose connection breaks is repeated over a new one as long as its deadline allows. That is safe for
    requests that may be done twice: ``get``, ``multi_get``, ``check``, ``wait``, ``set``, ``delete_key``, ``num_keys``,
    and for ``compare_set`` from "absent" or to a value that nobody else writes (it then answers with what is there).
    ``add`` is *not* repeated once it was sent, since it may have been counted: it raises, and the caller must find out.

    Args:
        host: Host of the server.
        port: Its port.
        seconds: Deadline of each call, connecting included.
        prefix: Put before all keys, with a "/", as ``PrefixStore`` does.

    Raises:
        StoreSilentError: No server answers within ``seconds``.
    """

    def __init__(self, host: str, port: int, seconds: float, *, prefix: str = "") -> None:
        self.host = host
        self.port = port
        self.seconds = seconds
        self.prefix = prefix
        self._lock = threading.Lock()
        self._connection: _Connection | None = None
        self._closed = self._waits = False
        with self._lock:
            self._connection = self._connect(time.monotonic() + seconds)
        _open.add(self)

    def clone(self, *, seconds: float | None = None, prefix: str | None = None) -> BoundedStore:
        """Another connection to the same server.

        Args:
            seconds: Its deadline; None for this one's.
            prefix: Its prefix; None for this one's.
        """
        return BoundedStore(
            self.host,
            self.port,
            self.seconds if seconds is None else seconds,
            prefix=self.prefix if prefix is None else prefix,
        )

    def torch_store(self, seconds: float) -> Store:
        """A connection of torch's own, under the same prefix, for its process groups: it has no deadlines."""
        own = connect_store(self.host, self.port, seconds)
        return PrefixStore(self.prefix, own) if self.prefix else own

    # --- requests ------------------------------------------------------------------------------------------------

    def set(self, key: str, value: str) -> None:
        """Write a value; it is there when this returns."""

        def call(store: TCPStore) -> None:
            store.set(self._full(key), value)  # has no answer, and is lost in silence where a connection breaks
            store.check([self._full(key)])

        self._call(call)

    def get(self, key: str) -> bytes:
        """The value of a key that exists.

        Raises:
            DistStoreError: There is none within the deadline.
        """
        return bytes(self._call(lambda store: store.get(self._full(key))))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """The values of keys that exist, in one request."""
        full = [self._full(key) for key in keys]
        return [bytes(value) for value in self._call(lambda store: store.multi_get(full))]

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys exist."""
        full = [self._full(key) for key in keys]
        return bool(self._call(lambda store: store.check(full)))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Write ``desired`` if the value is ``expected`` ("" for absent); the value that is there afterwards."""
        return bytes(self._call(lambda store: store.compare_set(self._full(key), expected, desired)))

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; its new value. Not repeated when the answer is lost."""
        return int(self._call(lambda store: store.add(self._full(key), amount), repeat=False))

    def delete_key(self, key: str) -> bool:
        """Remove a key; whether it existed (False if a broken connection made it a second request)."""
        return bool(self._call(lambda store: store.delete_key(self._full(key))))

    def num_keys(self) -> int:
        """Keys of the whole server."""
        return int(self._call(lambda store: store.num_keys()))

    def wait(self, keys: Sequence[str], seconds: float) -> bool:
        """Block until all keys exist, without asking again and again.

        Other threads that use this object wait meanwhile: give a waiting thread an object of its own.

        Args:
            keys: The keys.
            seconds: How long; the call itself may take the deadline of a call longer.

        Returns:
            Whether they exist.
        """
        full = [self._full(key) for key in keys]

        def call(store: TCPStore) -> bool:
            try:
                store.wait(full, timedelta(seconds=seconds))
            except DistNetworkError:
                raise
            except DistStoreError:  # the time is up
                return bool(store.check(full))
            return True

        self._waits = True
        try:
            return self._call(call, seconds=seconds + self.seconds)
        finally:
            self._waits = False

    # --- connection ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """From any thread, for good: a call that is under way, and every later one, raises at once."""
        self._closed = True
        connection = getattr(self, "_connection", None)
        if connection is not None:
            connection.abandon()

    def __del__(self) -> None:
        self.close()

    def _full(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _connect(self, deadline: float, *, again: bool = False) -> _Connection:
        left = deadline - time.monotonic()
        if left <= 0:
            raise StoreSilentError(self._describe("the deadline is over"))
        if again:  # torch's client would ask a port where nobody listens any more until the deadline
            try:
                socket.create_connection((self.host, self.port), timeout=left).close()
            except OSError as error:
                raise StoreSilentError(self._describe(error)) from error
        connection = _Connection()
        try:
            connection.run(lambda: connection.open(self.host, self.port, left), left)
        except (LateError, RuntimeError) as error:
            connection.abandon()
            raise StoreSilentError(self._describe(error)) from error
        return connection

    def _call(self, request: Callable[[Any], T], *, repeat: bool = True, seconds: float | None = None) -> T:
        deadline = time.monotonic() + (seconds or self.seconds)
        with self._lock:
            for attempt in range(_TRIES):
                if self._closed:
                    raise StoreSilentError(self._describe("this client was closed"))
                if self._connection is None:
                    self._connection = self._connect(min(deadline, time.monotonic() + self.seconds), again=True)
                connection = self._connection
                try:
                    return connection.ask(request, deadline - time.monotonic())
                except LateError as error:
                    self._drop()
                    raise StoreSilentError(self._describe("no answer in time")) from error
                except (DistNetworkError, ConnectionError) as error:
                    self._drop()
                    if not repeat or attempt == _TRIES - 1:
                        raise StoreSilentError(self._describe(error)) from error
        raise AssertionError  # the last attempt has raised

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abandon()

    def _describe(self, why: object) -> str:
        endpoint = format_endpoint(self.host, self.port)
        first = (str(why).splitlines() or [type(why).__name__])[0]
        return f"the store at {endpoint} did not answer within {self.seconds:g} s ({first})"


class PlainStore:
    """A store that is no TCPStore (``HashStore``, ``FileStore``), with the methods of :class:`BoundedStore`."""

    def __init__(self, store: Store) -> None:
        self._store: Any = store
        self.set = self._store.set
        self.add = self._store.add
        self.check = self._store.check
        self.delete_key = self._store.delete_key

    def get(self, key: str) -> bytes:
        """As of :class:`BoundedStore`."""
        return bytes(self._store.get(key))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """As of :class:`BoundedStore`."""
        return [bytes(self._store.get(key)) for key in keys]

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """As of :class:`BoundedStore`."""
        return bytes(self._store.compare_set(key, expected, desired))

    def wait(self, keys: Sequence[str], seconds: float) -> bool:
        """As of :class:`BoundedStore`."""
        try:
            self._store.wait(list(keys), timedelta(seconds=seconds))
        except DistStoreError:
            return bool(self._store.check(list(keys)))
        return True

    def clone(self, *, seconds: float | None = None) -> PlainStore:
        """The same store: it has no connection."""
        return self

    def close(self) -> None:
        """Nothing to end."""


ControlStore = BoundedStore | PlainStore


def bounded(store: Store, prefix: str, seconds: float) -> ControlStore:
    """A client of its own of the server behind a store of torch's process groups, where that is a TCPStore.

    Args:
        store: The store; what it puts before its keys is left out.
        prefix: Put before all keys instead.
        seconds: Deadline of each call.
    """
    inner: Any = store
    while isinstance(inner, PrefixStore):
        inner = inner.underlying_store
    if isinstance(inner, TCPStore):
        return BoundedStore(inner.host, inner.port, seconds, prefix=prefix)
    return PlainStore(PrefixStore(prefix, inner))


class _Connection:
    """One socket to the server, and the thread that talks over it."""

    def __init__(self) -> None:
        self.store: Any = None
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._descriptor: int | None = None
        self._abandoned = False
        self._guard = threading.Lock()
        self.thread = threading.Thread(target=self._serve, name="moetion-store", daemon=True)
        self.thread.start()

    def open(self, host: str, port: int, seconds: float) -> None:
        """On the thread: connect."""
        one_at_a_time = _connecting.acquire(timeout=seconds)
        try:
            before = list_sockets()
            self.store = TCPStore(
                host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds)
            )
            found = [d for d, name in list_sockets().items() if before.get(d) != name and peer_port(d) == port]
        finally:
            if one_at_a_time:
                _connecting.release()
        self.store.set_timeout(timedelta(seconds=max(seconds / 2, 0.1)))  # its own error for a missing key comes first
        with self._guard:
            if len(found) == 1 and one_at_a_time:
                self._descriptor = found[0]
                _keep_alive(found[0])
            if self._abandoned:
                self._shut_down()

    def run(self, work: Callable[[], T], seconds: float) -> T:
        """Do something on the thread. Raises ``TimeoutError`` when it takes longer."""
        done: Future[T] = Future()
        with self._guard:
            if self._abandoned:
                raise ConnectionError("the connection was given up")
            self._work.put((work, done))
        try:
            return done.result(max(seconds, 0.0))
        finally:
            del done  # an error refers to this frame

    def ask(self, request: Callable[[Any], T], seconds: float) -> T:
        """Do something with the store, on the thread; as :meth:`run`."""
        return self.run(lambda: request(self.store), seconds)

    def abandon(self) -> None:
        """End the connection; frees the thread where it waits for an answer."""
        with self._guard:
            if not self._abandoned:
                self._abandoned = True
                self._work.put(None)
            self._shut_down()

    def _shut_down(self) -> None:
        if self._descriptor is not None:
            shut_down(self._descriptor)

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            work, done = item
            try:
                result = work()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(result)
            del work, item, done
        with self._guard:
            self._descriptor = self.store = None  # the socket is closed here


def _keep_alive(descriptor: int) -> None:
    with contextlib.suppress(OSError), with_socket(descriptor) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                own.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@atexit.register
def _close_all() -> None:
    # A daemon thread that comes back from torch's C++ code when the interpreter goes away would abort the process. One
    # that waits for a key does not come back; ended, it would print a trace of C++ frames at the end of every job.
    for store in [store for store in _open if not store._waits]:
        connection = store._connection
        store.close()
        if connection is not None:
            connection.thread.join(timeout=1.0)
