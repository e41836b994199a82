"""Loaders that are followed wherever they are iterated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from moetion_lightning.data.attributes import Seen
from moetion_lightning.data.indices import Indices
from moetion_lightning.data.position import LoaderPosition

__all__ = ["make_resumable", "release", "unfollowed"]

_ATTRIBUTE = "_moetion_position"
_classes: dict[type, type] = {}


class _FollowedIterable:
    """Stands for an iterable whose class cannot be extended (a list, a generator function's object)."""

    def __init__(self, iterable: Any, seen: Seen | None) -> None:
        self._moetion_iterable = iterable
        self._moetion_position = LoaderPosition(iterable, seen)

    def __iter__(self) -> Iterator[Any]:
        return self._moetion_position.iterate(lambda: iter(self._moetion_iterable))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_moetion_iterable"], name)


class _FollowedSized(_FollowedIterable):
    def __len__(self) -> int:
        return len(self._moetion_iterable)


def release(loader: Any) -> None:
    """Undo :func:`make_resumable` on a loader that it changed."""
    if isinstance(loader, DataLoader) and _ATTRIBUTE in loader.__dict__:
        object.__setattr__(loader, "__class__", type(loader).__mro__[1])
        del loader.__dict__[_ATTRIBUTE]


def unfollowed(loader: Any) -> Iterator[Any]:
    """A pass over a loader, as it would be without :func:`make_resumable`."""
    kind: Any = type(loader)
    if isinstance(loader, DataLoader) and _ATTRIBUTE in loader.__dict__:
        kind = kind.__mro__[1]
    return kind.__iter__(loader)  # type: ignore[no-any-return]


def make_resumable(
    loader: Any, kind: type[LoaderPosition] = LoaderPosition, seen: Seen | None = None
) -> tuple[Any, LoaderPosition]:
    """Follow a loader from now on.

    A ``DataLoader`` stays the same object; its class becomes a subclass of its own that differs in ``__iter__``, and in
    noting what its sampler gives. Other iterables are wrapped.

    Args:
        loader: The loader.
        kind: What follows a ``DataLoader``.
        seen: What attributes were when training had not begun; None: as they are now.

    Returns:
        The loader to use from now on, and its position.
    """
    known = getattr(loader, _ATTRIBUTE, None)
    if isinstance(known, LoaderPosition):
        return loader, known
    if not isinstance(loader, DataLoader):
        wrapped = _FollowedSized(loader, seen) if hasattr(loader, "__len__") else _FollowedIterable(loader, seen)
        return wrapped, wrapped._moetion_position
    base = type(loader)
    position = kind(loader, seen)
    position.is_watched = _gives_indices(base)
    if position.is_watched and not isinstance(loader.dataset, IterableDataset):
        position.indices = Indices(loader._index_sampler)
    if base not in _classes:
        _classes[base] = _subclass(base)
    object.__setattr__(loader, _ATTRIBUTE, position)
    object.__setattr__(loader, "__class__", _classes[base])
    return loader, position


def _gives_indices(base: type) -> bool:
    """Whether its iterators are torch's own, which ask ``_index_sampler`` for the indices of each batch."""
    return all(getattr(base, name) is getattr(DataLoader, name) for name in ("_get_iterator", "_index_sampler"))


def _subclass(base: type) -> type:
    def __iter__(self: Any) -> Iterator[Any]:
        position: LoaderPosition = self.__dict__[_ATTRIBUTE]
        return position.iterate(lambda: base.__iter__(self))  # type: ignore[attr-defined]

    def _index_sampler(self: Any) -> Any:
        indices = self.__dict__[_ATTRIBUTE].indices
        return base._index_sampler.fget(self) if indices is None else indices  # type: ignore[attr-defined]

    namespace: dict[str, Any] = {"__iter__": __iter__, "__doc__": base.__doc__, "__module__": base.__module__}
    if _gives_indices(base):
        namespace["_index_sampler"] = property(_index_sampler)
    return type(base.__name__, (base,), namespace)
