"""Attributes that are replaced on single objects for the time of a run; what users have put there comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["InstancePatches"]

_ABSENT = object()


class InstancePatches:
    """Replaces attributes of instances, whose class stays as it is."""

    def __init__(self) -> None:
        self._made: list[Callable[[], None]] = []

    def put(self, owner: Any, name: str, replacement: Any) -> Callable[[], None]:
        """Let ``owner.name`` be ``replacement`` until :meth:`undo`.

        Returns:
            Takes this one back earlier.
        """
        before = vars(owner).get(name, _ABSENT)

        def undo() -> None:
            if undo not in self._made:
                return
            self._made.remove(undo)
            if vars(owner).get(name, _ABSENT) is not replacement:
                return  # somebody else has replaced it meanwhile
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        setattr(owner, name, replacement)
        self._made.append(undo)
        return undo

    def undo(self) -> None:
        """Take everything back that nobody else has replaced meanwhile, the newest first."""
        for undo in reversed(list(self._made)):
            undo()
