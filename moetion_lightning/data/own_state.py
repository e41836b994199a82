"""Loaders and iterable datasets that save their own position: whether it is whole, and for one pass only."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch.utils.data import IterableDataset

from moetion_lightning.core.reachable import attributes_of, reach

__all__ = ["Loaded", "holder_of_position", "is_stateful", "keeps_a_buffer"]

_ABSENT = object()
_MAX_OWNERS = 500
_MAX_ITERATORS = 200
_LIST_ITERATOR: type = type(iter([]))
_ORDINARY = ("torch.utils.data", "torchdata.")


def is_stateful(obj: object) -> bool:
    """Whether it can save and load its state."""
    return callable(getattr(obj, "state_dict", None)) and callable(getattr(obj, "load_state_dict", None))


def holder_of_position(loader: object) -> Any:
    """The loader, or its iterable dataset, if its own state may be trusted to be the position; else None."""
    dataset = getattr(loader, "dataset", None)
    iterable, in_process = isinstance(dataset, IterableDataset), getattr(loader, "num_workers", 0) == 0
    holder: object = None
    if is_stateful(loader):
        # A loader that loads its state asks the sampler for its order several times; only torch's own samplers give the
        # same one then. With workers, which begin with new generators, re-iterating is exact, and this is not; but it
        # is what the user of an iterable dataset with its own position wants.
        samplers = [getattr(loader, role, None) for role in ("sampler", "batch_sampler")]
        inner = getattr(samplers[1], "sampler", None)
        known = all(s is None or type(s).__module__.startswith(_ORDINARY) for s in (*samplers, inner))
        holder = loader if iterable or (in_process and known) else None
    elif iterable and is_stateful(dataset) and in_process:
        holder = dataset
    return None if holder is None or _says_buffer(dataset) else holder


def _says_buffer(dataset: object) -> bool:
    """Whether a dataset is made of parts that are called buffers: a shuffled stream."""
    owners = reach({"dataset": dataset}, code=False, limit=_MAX_OWNERS).owners.values()
    for owner in owners:
        if "buffer" in type(owner).__name__.lower():
            return True
        if any("buffer" in key.lower() and _holds_something(value) for key, value in attributes_of(owner).items()):
            return True
    return False


def _holds_something(value: object) -> bool:
    if isinstance(value, bool) or value is None:
        return bool(value)
    if isinstance(value, (int, float)):
        return value > 1
    return True


def keeps_a_buffer(iterator: object, dataset: object) -> bool:
    """Whether an iterator in this process keeps samples in a list or queue that is no attribute of the dataset.

    Such samples are in nobody's ``state_dict``, or cannot be told from those that are.

    Args:
        iterator: The loader's iterator, under way.
        dataset: The loader's dataset.
    """
    start = getattr(getattr(iterator, "_dataset_fetcher", None), "dataset_iter", None)
    if start is None or start is dataset:
        return False
    seen = {id(start), id(dataset), *(id(value) for value in attributes_of(dataset).values())}
    waiting = deque([start])
    while waiting and len(seen) < _MAX_ITERATORS:
        iterator = waiting.popleft()
        for found in (*gc.get_referents(iterator), *attributes_of(iterator).values()):  # a generator's local variables
            if id(found) in seen:
                continue
            seen.add(id(found))
            if type(found) in (list, deque) and found:
                return True
            if hasattr(type(found), "__next__") and type(found) is not _LIST_ITERATOR:
                waiting.append(found)
    return False


class Loaded:
    """A state that was loaded for one pass; :meth:`undo` makes later ones begin as if it never had been.

    Args:
        holder: What loads it.
        state: The state.
    """

    def __init__(self, holder: Any, state: Mapping[str, Any]) -> None:
        table = attributes_of(holder)
        before = dict(table)
        holder.load_state_dict(state)
        self._holder = holder
        self._changed = {
            key: (before.get(key, _ABSENT), value)
            for key, value in table.items()
            if before.get(key, _ABSENT) is not value
        }

    def undo(self) -> None:
        """Take back what loading has set and the pass has left as it was."""
        table = attributes_of(self._holder)
        for key, (before, after) in self._changed.items():
            if table.get(key, _ABSENT) is not after:
                continue
            if before is _ABSENT:
                del table[key]
            else:
                table[key] = before
