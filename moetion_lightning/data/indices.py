"""What a loader's sampler gives: seen on its way to the dataset."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import xxhash

__all__ = ["Indices", "digest_of"]


class Indices:
    """Stands for a loader's index sampler: notes what it gives, and may begin behind the first ones.

    Args:
        sampler: The loader's sampler, or batch sampler.
    """

    def __init__(self, sampler: Iterable[Any]) -> None:
        self._sampler = sampler
        self._given: deque[Any] = deque()
        #: What was given for the batch that was drawn last.
        self.drawn: Any = None
        #: How many the next pass leaves out at its beginning.
        self.skip = 0
        #: Whether the next pass gives nothing at all.
        self.none = False
        #: Whether a pass that begins now is none of those that are followed.
        self.aside = False

    def begin(self) -> None:
        """A pass begins."""
        self._given = deque()
        self.drawn = None

    def next(self, count: int = 1) -> None:
        """Batches were drawn."""
        for _ in range(count):
            self.drawn = self._given.popleft() if self._given else None

    def __iter__(self) -> Iterator[Any]:
        if self.aside:
            return iter(self._sampler)
        # At once, as torch does: some samplers draw their order here.
        return _Given(iter(self._sampler), self._given, self.skip, none=self.none)

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_sampler"], name)


class _Given(Iterator[Any]):
    def __init__(self, indices: Iterator[Any], given: deque[Any], skip: int, *, none: bool) -> None:
        self._indices, self._given, self._skip, self._none = indices, given, skip, none

    def __next__(self) -> Any:
        if self._none:
            raise StopIteration
        while self._skip:
            self._skip -= 1
            next(self._indices)
        index = next(self._indices)
        self._given.append(index)
        return index


def digest_of(indices: Any) -> str | None:
    """A digest of indices that is the same in all processes; None of none."""
    if indices is None:
        return None
    if isinstance(indices, list) and indices and type(indices[0]) is int:
        return format(hash(tuple(indices)) & 0xFFFFFFFFFFFFFFFF, "016x")  # of integers, it does not vary
    return xxhash.xxh3_64_hexdigest(repr(indices).encode())
