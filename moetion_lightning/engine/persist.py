"""Copies committed windows to the storage tier in the background, at its own pace."""

from __future__ import annotations

import logging
import threading
import time

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
            if manifest is None:
                return
            started = time.perf_counter()
            try:
                self._target.persist(manifest, self._source)
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
                        nbytes=manifest.nbytes,
                        seconds=time.perf_counter() - started,
                    )
                )
            finally:
                self._source.unpin(manifest.iteration)
                with self._changed:
                    self._working = False
