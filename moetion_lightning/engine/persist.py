"""Copies committed windows to the storage tier in the background, at its own pace."""

from __future__ import annotations

import logging
import threading
import time

from moetion_lightning.core.persist_selection import PersistedExperts
from moetion_lightning.engine.reduced_window import reduce_window
from moetion_lightning.errors import MoEtionError
from moetion_lightning.events import EventBus, Notice, WindowPersisted
from moetion_lightning.store.disk import DirectoryTier
from moetion_lightning.store.format import Manifest
from moetion_lightning.store.host_memory import HostMemoryTier

__all__ = ["Persister"]

_log = logging.getLogger(__name__)


class Persister:
    """Persists the newest committed window whenever it is idle; windows that are superseded meanwhile are skipped.

    A storage error does not stop training, whose windows in host memory are whole: it is reported, and the next window
    is tried again.

    Three windows exist at a time, a triple buffer: the one being captured, the committed one that a restart takes, and
    the one being persisted, which is pinned until it is on storage however many windows are committed meanwhile.

    Of a partial-experts window with a limit of its own for storage only that many experts of each layer are written;
    the manifest on storage names the files that hold the others. The first persist of a process, and the first one
    after :meth:`forget` or after a failure, writes all experts: what it builds on is always of the same course of
    training, and whole.

    Args:
        source: Host-memory tier; the window being copied is pinned there.
        target: Storage tier.
        bus: Gets the events.
        every_n_windows: Persist only every n-th committed window.
    """

    def __init__(self, source: HostMemoryTier, target: DirectoryTier, bus: EventBus, every_n_windows: int) -> None:
        self._source = source
        self._target = target
        self._bus = bus
        self._every = every_n_windows
        self._count = every_n_windows - 1  # the first one is persisted
        self._next: Manifest | None = None
        self._changed = threading.Condition()
        self._closing = self._working = False
        self._thread: threading.Thread | None = None
        #: The newest window on storage that the next one may build on, and what storage has of each expert.
        self._base: tuple[Manifest, PersistedExperts] | None = None
        self._course = 0

    def offer(self, manifest: Manifest) -> None:
        """A window was committed; this rank decides by itself."""
        self.count()
        if self.is_due:
            self.persist(manifest)

    def count(self) -> None:
        """A window was committed."""
        self._count += 1

    @property
    def is_due(self) -> bool:
        """Whether a window was committed that is to be persisted."""
        return self._count >= self._every

    @property
    def idle(self) -> bool:
        """Whether nothing is being persisted, or waits to be."""
        with self._changed:
            return self._next is None and not self._working

    @property
    def base_iteration(self) -> int:
        """The window that the next one builds on; -1: it will hold all experts."""
        with self._changed:
            return -1 if self._base is None else self._base[0].iteration

    def forget(self) -> None:
        """Training goes on from another state, or other ranks have persisted other windows: build on nothing."""
        with self._changed:
            self._course += 1
            self._base = None

    def persist(self, manifest: Manifest) -> None:
        """Persist this committed window, in the background."""
        self._count = 0
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="moetion-persist", daemon=True)
                self._thread.start()
            if self._next is not None:
                self._source.unpin(self._next.iteration)
            self._source.pin(manifest.iteration)
            self._next = manifest
            self._changed.notify()

    def close(self) -> None:
        """Finish what was offered last and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._next is None and not self._closing:
                    self._changed.wait()
                manifest, self._next = self._next, None
                self._working = manifest is not None
                base, course = self._base, self._course
            if manifest is None:
                return
            started = time.perf_counter()
            done = None
            try:
                nbytes, done = self._store(manifest, base)
            except (MoEtionError, OSError) as error:
                message = (
                    f"window {manifest.first_iteration}..{manifest.last_iteration} could not be persisted: {error}. "
                    "Training goes on; the window is whole in host memory, and the next one will be tried again."
                )
                _log.error(message)
                self._bus.emit(Notice(message=message))
            else:
                self._bus.emit(
                    WindowPersisted(
                        first_iteration=manifest.first_iteration,
                        last_iteration=manifest.last_iteration,
                        nbytes=nbytes,
                        seconds=time.perf_counter() - started,
                    )
                )
            finally:
                self._source.unpin(manifest.iteration)
                with self._changed:
                    self._working = False
                    if course == self._course:
                        self._base = done

    def _store(
        self, manifest: Manifest, base: tuple[Manifest, PersistedExperts] | None
    ) -> tuple[int, tuple[Manifest, PersistedExperts] | None]:
        """Write one window. Returns the bytes that storage did not have, and what the next window can build on."""
        policy, routing = manifest.extra.get("policy", {}), manifest.extra.get("routing", {})
        count = policy.get("num_persisted")
        if count is None:
            self._put(manifest)
            return manifest.nbytes, None
        if base is None or base[0].extra["routing"]["layers"] != routing["layers"]:
            before, experts = None, PersistedExperts.first(routing)
        else:
            before, experts = base[0], base[1].following(routing, count, policy["selection"])
        reduced = reduce_window(manifest, self._source, before, experts)
        try:
            self._put(reduced.manifest)
        finally:
            for record in reduced.written:
                self._source.discard(record)
        known = set(before.files if before is not None else ())
        return sum(r.nbytes for r in reduced.manifest.files if r not in known), (reduced.manifest, experts)

    def _put(self, manifest: Manifest) -> None:
        self._target.persist(manifest, self._source)
        if manifest.finite:
            self._target.forget_aside()
