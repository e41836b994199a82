"""Copies committed windows to the storage tier in the background; a slow copy skips windows."""

from __future__ import annotations

import logging
import threading
import time

from moetion_lightning.core.persist_selection import PersistedExperts
from moetion_lightning.engine.reduced_window import reduce_window
from moetion_lightning.errors import MoEtionError, OwnerLostError
from moetion_lightning.events import EventBus, Notice, WindowPersisted
from moetion_lightning.storage.disk import DirectoryTier
from moetion_lightning.storage.format import Manifest
from moetion_lightning.storage.host_memory import HostMemoryTier
from moetion_lightning.storage.owner import RENEW_SECONDS

__all__ = ["Persister"]

_log = logging.getLogger(__name__)
#: How often to look for windows that are not dropped while they are looked at; captures go on meanwhile.
_LOOKS = 20


class Persister:
    """Persists the newest committed window whenever it is idle; windows that are superseded meanwhile are skipped.

    A storage error does not stop training, whose windows in host memory are whole: it is reported, and the next window
    is tried again. When another process has taken the place on storage over, that is said once, and nothing is written
    there any more.

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
        self._waiting: list[Manifest] = []  # pinned
        self._changed = threading.Condition()
        self._closing = self._working = False
        self._thread: threading.Thread | None = None
        #: The newest window on storage that the next one may build on, and what storage has of each expert.
        self._base: tuple[Manifest, PersistedExperts] | None = None
        self._course = 0
        #: Whether another process owns the place on storage now.
        self.is_lost = False
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name="moetion-owner", daemon=True)
        self._renewal.start()

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
            return not self._waiting and not self._working

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
            # One that is finite is not given up for one that is not.
            kept = [] if manifest.finite else [waiting for waiting in self._waiting if waiting.finite]
            for superseded in self._waiting:
                if superseded not in kept:
                    self._source.unpin(superseded.iteration)
            self._waiting = kept
            self._add(manifest)

    def persist_all(self) -> None:
        """Persist every committed window that is not on storage yet, in the background: the process is being ended.

        All of them, the oldest first: other ranks may not have committed the newest one.
        """
        self.forget()
        try:
            there = set(self._target.windows())
        except MoEtionError:  # tried all the same
            there = set()
        for _ in range(_LOOKS):
            held = self._source.windows()
            newest = max(there.intersection(held), default=-1)
            if all([self._add_again(iteration, newest) for iteration in reversed(held)]):
                return  # else one was dropped meanwhile: a newer one is committed

    def _add_again(self, iteration: int, newest: int) -> bool:
        """Persist this window, unless it is on its way or older than storage's newest. Returns whether it exists."""
        with self._changed:
            if iteration <= newest or any(m.iteration == iteration for m in self._waiting) or self.is_lost:
                return True
            try:
                self._add(self._source.read_manifest(iteration))
            except MoEtionError:
                return False
        return True

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until nothing is being persisted, or waits to be. Returns whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._working, timeout_seconds)

    def close(self, timeout_seconds: float | None = None) -> None:
        """Finish what was offered last and end the threads.

        Args:
            timeout_seconds: Give up what is not on storage by then: the process ends, and its thread with it.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            self._thread = None
        self._ended.set()
        self._renewal.join(timeout_seconds)

    def _add(self, manifest: Manifest) -> None:
        """With the condition held."""
        if self.is_lost:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="moetion-persist", daemon=True)
            self._thread.start()
        self._waiting.append(self._source.pin(manifest.iteration))
        self._changed.notify_all()

    def _renew(self) -> None:
        """Thread: the record of the owner says that this process lives."""
        while not self._ended.wait(RENEW_SECONDS) and not self.is_lost:
            try:
                self._target.renew()
            except OwnerLostError as error:
                self._lose(error)
            except Exception as error:
                _log.warning("the owner record on storage could not be renewed, it is tried again: %s", error)

    def _lose(self, error: OwnerLostError) -> None:
        with self._changed:
            if self.is_lost:
                return
            self.is_lost = True
        message = f"persisting has ended: {error} Training goes on; its windows are in host memory only."
        _log.error(message)
        self._bus.emit(Notice(message=message))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._working = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closing)
                manifest = self._waiting.pop(0) if self._waiting else None
                self._working = manifest is not None
                base, course = self._base, self._course
            if manifest is None:
                return
            started = time.perf_counter()
            done = None
            try:
                if self.is_lost:
                    continue
                nbytes, done = self._store(manifest, base)
            except OwnerLostError as error:
                self._lose(error)
            except Exception as error:
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
