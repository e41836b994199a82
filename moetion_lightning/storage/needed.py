"""Which files of host memory are needed, by name: manifests are long, and read only when a tier is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from moetion_lightning.errors import StoreError
from moetion_lightning.storage.manifest import Manifest

__all__ = ["NeededFiles"]


class NeededFiles:
    """Files that committed windows name, that lie aside, or that somebody reads. Its owner serialises calls."""

    def __init__(self) -> None:
        #: By iteration of a current window.
        self.current: dict[int, frozenset[str]] = {}
        self.aside: frozenset[str] = frozenset()
        self._pins: Counter[int] = Counter()
        self._pinned: dict[int, frozenset[str]] = {}

    def learn(self, current: Mapping[int, Manifest], aside: Iterable[Manifest]) -> None:
        """What is there now."""
        self.current = {iteration: _names(manifest) for iteration, manifest in current.items()}
        self.aside = frozenset().union(*map(_names, aside))

    def commit(self, manifest: Manifest) -> None:
        """A window is there now."""
        self.current[manifest.iteration] = _names(manifest)

    def unneeded(self, names: Collection[str]) -> set[str]:
        """Those of these files that nothing needs."""
        return set(names).difference(self.aside, *self.current.values(), *self._pinned.values())

    def only_aside(self) -> frozenset[str]:
        """Files that only windows aside need."""
        return self.aside.difference(*self.current.values(), *self._pinned.values())

    def pin(self, manifest: Manifest) -> None:
        """Keep a window's files until :meth:`unpin`."""
        self._pins[manifest.iteration] += 1
        self._pinned[manifest.iteration] = self._pinned.get(manifest.iteration, frozenset()) | _names(manifest)

    def unpin(self, iteration: int) -> frozenset[str]:
        """Undo one :meth:`pin`. Returns the files that it kept, if it was the last one."""
        if self._pins[iteration] <= 0:
            raise StoreError(f"window {iteration} is not pinned. Unpin once for each pin.")
        self._pins[iteration] -= 1
        if self._pins[iteration]:
            return frozenset()
        del self._pins[iteration]
        return self._pinned.pop(iteration)


def _names(manifest: Manifest) -> frozenset[str]:
    return frozenset(record.name for record in manifest.files)
