"""Methods that are replaced on single objects, for the time of a run."""

from __future__ import annotations

from typing import Any

__all__ = ["InstancePatches"]


class InstancePatches:
    """Replaces methods of instances, whose class stays as it is."""

    def __init__(self) -> None:
        self._made: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, replacement: Any) -> None:
        """Let ``owner.name`` be ``replacement`` until :meth:`undo`."""
        setattr(owner, name, replacement)
        self._made.append((owner, name, replacement))

    def undo(self) -> None:
        """Take everything back that nobody else has replaced meanwhile."""
        while self._made:
            owner, name, replacement = self._made.pop()
            if vars(owner).get(name) is replacement:
                delattr(owner, name)
