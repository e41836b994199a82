"""When to observe compute dtypes: at the start, ever more rarely later, and in every replay."""

from __future__ import annotations

import torch

from moetion_lightning.core.compute_dtype import ComputeDtypeObserver, runs_compiled
from moetion_lightning.core.state import LiveState

__all__ = ["PrecisionWatch"]

_FIRST_ITERATIONS = 3  # an expert that no token reached in the first iterations is captured in full precision


class PrecisionWatch:
    """Learns which parameters are only ever cast to 16 bits, and notices when that stops being true.

    Attributes:
        compute_dtype: What was learned, by parameter; missing means the parameter's own dtype.
        enabled: An adapter without autocast clears this: then there is nothing to learn.
    """

    def __init__(self) -> None:
        self.compute_dtype: dict[str, torch.dtype] = {}
        self.enabled = True
        self._live: LiveState | None = None
        self._observer: ComputeDtypeObserver | None = None
        self._windows = 0

    def start(self, live: LiveState) -> None:
        """A fresh run begins: observe its first iterations."""
        self._live = live
        self.enabled = self.enabled and not runs_compiled(live.module)
        self._observe()

    def start_replay(self, live: LiveState, compute_dtype: dict[str, torch.dtype]) -> None:
        """A replay begins, on weights that were kept in these dtypes: check that nothing reads them otherwise."""
        self._live = live
        self.compute_dtype.update(compute_dtype)
        self.enabled = bool(compute_dtype)
        self._observe()

    def window_began(self) -> None:
        """Observe again after the 1st, 2nd, 4th, 8th ... window: an average or a penalty may begin late."""
        self._windows += 1
        if self._windows & (self._windows - 1) == 0:
            self._observe()

    def pause(self) -> None:
        """What follows is the optimizer's update, or this package's own work."""
        if self._observer is not None:
            self._observer.pause()

    def resume(self) -> None:
        """The user's code goes on."""
        if self._observer is not None:
            self._observer.resume()

    def stop(self) -> None:
        """Stop observing (harmless if nothing is observed)."""
        if self._observer is not None:
            self._observer.stop()
            self._observer = None

    def end_iteration(self, iteration: int, *, replaying: bool) -> list[str]:
        """Learn from an observed iteration.

        Args:
            iteration: Completed iterations.
            replaying: Whether a replay is under way; it is observed to its end.

        Returns:
            Parameters that were read otherwise than assumed so far; from now on they are captured in full.
        """
        observer = self._observer
        if observer is None:
            return []
        misread = observer.violations(self.compute_dtype)
        for name in misread:
            del self.compute_dtype[name]
        if replaying:
            return misread
        if iteration <= _FIRST_ITERATIONS:
            self.compute_dtype.clear()
            self.compute_dtype.update(observer.result())
            if observer.unseen() and iteration < _FIRST_ITERATIONS:
                return misread
        self.stop()
        return misread

    def _observe(self) -> None:
        if self.enabled and self._observer is None and self._live is not None:
            live = self._live
            self._observer = ComputeDtypeObserver({n: live.parameters[n] for n in live.trainable()})
            self._observer.start()
