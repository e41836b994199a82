"""Whether a loader's worker processes draw random numbers, or change what they hold.

If they do not, a pass can begin in its middle without reading what comes before. What they do is seen in them: the
collate function and the worker's init function are wrapped while an iterator is made, and the loader keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from moetion_lightning.core.generators import Generators
from moetion_lightning.core.run_state import Rng
from moetion_lightning.data.attributes import Attributes, Seen, equal

__all__ = ["WorkerWatch"]


class WorkerWatch:
    """Watches the workers of one loader, from the first pass on that is made inside of :meth:`making`."""

    def __init__(self) -> None:
        self._moved: torch.Tensor | None = None

    @property
    def quiet(self) -> bool:
        """Whether they were watched, and have drawn nothing and changed nothing."""
        return self._moved is not None and not bool(self._moved[0])

    def making(self, loader: DataLoader[Any], make: Callable[[], Any]) -> Any:
        """Make an iterator with workers that are watched.

        Args:
            loader: The loader.
            make: Makes the iterator, and starts the workers.
        """
        self._moved = torch.zeros(1, dtype=torch.uint8).share_memory_()
        collate, init = loader.collate_fn, loader.worker_init_fn
        watched = _Watched(collate, init, self._moved)
        loader.collate_fn, loader.worker_init_fn = watched, watched.begin
        try:
            return make()
        finally:
            loader.collate_fn, loader.worker_init_fn = collate, init


class _Watched:
    """In a worker: collates as usual, and looks whether anything has moved.

    Args:
        collate: The loader's function.
        init: The loader's function for a worker that starts, or None.
        moved: One number in memory that all processes share.
    """

    def __init__(self, collate: Any, init: Any, moved: torch.Tensor) -> None:
        self._collate, self._init, self._moved = collate, init, moved
        self._rng: dict[str, Any] = {}
        self._attributes: Attributes | None = None
        self._generators: Generators | None = None
        self._states: dict[str, Any] = {}

    def begin(self, worker_id: int) -> None:
        """The worker starts."""
        if self._init is not None:
            self._init(worker_id)
        info = get_worker_info()
        self._dataset = None if info is None else info.dataset
        self._attributes = Attributes(_Parts(self._dataset, self._collate), Seen())
        self._generators = Generators(lambda: {"dataset": self._dataset, "collate_fn": self._collate})
        self._states = self._generators.states()
        self._rng = Rng().parts

    def __call__(self, samples: Any) -> Any:
        batch = self._collate(samples)
        if not self._moved[0] and self._has_moved():
            self._moved[0] = 1
        return batch

    def _has_moved(self) -> bool:
        if self._attributes is None or self._generators is None:
            return True
        now = Rng().parts
        if now["python"] != self._rng["python"] or not equal(now["torch"], self._rng["torch"]):
            return True
        if not equal(now["numpy"], self._rng["numpy"]) or self._attributes.now()["others"]:
            return True
        return not equal(self._generators.states(), self._states)


class _Parts:
    """What a worker has of a loader."""

    def __init__(self, dataset: Any, collate_fn: Any) -> None:
        self.dataset, self.collate_fn = dataset, collate_fn
