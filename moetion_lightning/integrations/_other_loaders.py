"""Loaders beside those that a loop goes through :meth:`~.loop.GuidedLoop.steps` with: for evaluation.

A pass over them depends on the passes before it: samplers count, frameworks order a pass by its number, and workers
that live on are started in the first pass, with a seed from torch's generator that later passes do not draw.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from types import FrameType, FunctionType, ModuleType
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from moetion_lightning.core.generators import is_generator
from moetion_lightning.core.reachable import is_users_file, reach
from moetion_lightning.core.run_state import Rng, set_rng
from moetion_lightning.data import LoaderPosition, make_resumable, release, unfollowed

__all__ = ["OtherLoader", "OtherLoaders", "find_loaders", "script_variables"]

_log = logging.getLogger(__name__)


class OtherLoader:
    """One of them.

    Args:
        outer: What the script iterates.
        inner: The ``DataLoader`` that it draws from.
        counter: Attribute of ``outer`` that counts passes.
        under_way: Whether a pass was begun and has not come to its end, where that is known.
    """

    def __init__(
        self, outer: Any, inner: Any, *, counter: str = "", under_way: Callable[[], bool] | None = None
    ) -> None:
        self.outer, self.inner = outer, inner
        self._counter = counter
        self._under_way = under_way
        self._began_before = self._iterated_before = False
        self._seen: tuple[Any, int] = (None, 0)

    def follow(self) -> None:
        """Follow it from now on."""
        self._began_before = self._under_way is not None and self._under_way()
        self._iterated_before = _iterated(self.inner)
        _, self._position = make_resumable(self.inner)
        self._position.forget()

    def is_open(self) -> bool:
        """Whether a pass over it is under way where state is captured."""
        if self._under_way is not None:
            return not self._began_before and self._under_way()
        before, self._seen = self._seen, (self._position.present_pass, self._position.drawn)
        length = self._position.length()
        grown = before[0] is not None and self._seen[0] is before[0] and self._seen[1] > before[1] > 0
        return grown and (length is None or self._seen[1] < length)

    def snapshot(self) -> dict[str, Any]:
        """Between two passes."""
        return {
            "count": getattr(self.outer, self._counter) if self._counter else None,
            "iterated": _iterated(self.inner),
            "iterated_before": self._iterated_before,
            "position": self._position.snapshot_between(),
        }

    def restore(self, saved: Mapping[str, Any]) -> str:
        """Continue there.

        Returns:
            Why passes may differ all the same, and what to do; empty if they do not.
        """
        if self._counter:
            setattr(self.outer, self._counter, saved["count"])
        iterated = _iterated(self.inner)
        self._position.restore_between(saved["position"], functools.partial(unfollowed, self.inner))
        if iterated and not saved["iterated"]:
            return "it was iterated before the loop, but not so before the failure. Iterate it in the loop."
        if not iterated and saved["iterated"] and not _iterated(self.inner):  # in a pass that was not followed
            rng, generators = Rng(), self._position.generators()
            states = generators.states()
            unfollowed(self.inner)
            set_rng(rng.packed(states), generators)
        if self._position.keeps_workers and saved["iterated_before"] and not iterated:
            return (
                "its workers were started before the loop, and begin with new random numbers. Iterate it before the "
                "loop in this start, too."
            )
        return ""

    def release(self) -> None:
        """Leave it as it was."""
        release(self.inner)


class OtherLoaders:
    """All of them.

    Args:
        where: The user's call, for messages.
        find: Gives those that there are now, by a name that stays the same.
    """

    def __init__(self, where: str, find: Callable[[], Mapping[str, OtherLoader]]) -> None:
        self._where = where
        self._find = find
        self._loaders: dict[str, OtherLoader] = {}
        self._said: set[str] = set()
        self.look()

    def look(self) -> None:
        """Follow those that have come."""
        for name, loader in self._find().items():
            if name not in self._loaders:
                self._loaders[name] = loader
                loader.follow()

    def snapshot(self) -> dict[str, Any]:
        """Between two passes over each."""
        self.look()
        if under_way := [n for n, loader in self._loaders.items() if n not in self._said and loader.is_open()]:
            self._said.update(under_way)
            _log.warning(
                "%s: a pass over %s was begun and is not at its end where state is captured. After a restart such a "
                "pass begins anew. Give the loader to run.steps() too, or go through it to its end.",
                self._where, ", ".join(under_way),
            )  # fmt: skip
        return {name: loader.snapshot() for name, loader in self._loaders.items()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue there."""
        self.look()
        for name, state in saved.items():
            if name in self._loaders:
                problem = self._loaders[name].restore(state)
            else:
                problem = "it is not there yet. Make, and prepare, all loaders before the loop begins."
            if problem:
                _log.warning("%s: passes over %s may differ after this restart: %s", self._where, name, problem)

    def roots(self) -> dict[str, object]:
        """What may lead to generators, by name."""
        return {name: loader.inner for name, loader in self._loaders.items()}

    def release(self) -> None:
        """Leave them as they were."""
        for loader in self._loaders.values():
            loader.release()


def script_variables(frame: FrameType | None) -> dict[str, object]:
    """Variables of the user's functions that called, and of their files, that lead to generators or loaders.

    Args:
        frame: The innermost one.
    """
    found: dict[str, object] = {}
    while frame is not None and is_users_file(str(frame.f_globals.get("__name__", ""))):
        for variables in (dict(frame.f_locals), frame.f_globals):
            for name, value in variables.items():
                root = f"{frame.f_code.co_name}.{name}" if variables is not frame.f_globals else name
                if not name.startswith("__") and root not in found and _leads_somewhere(value):
                    found[root] = value
        frame = frame.f_back
    return found


def _leads_somewhere(value: object) -> bool:
    if is_generator(value) or isinstance(value, DataLoader):
        return True
    if isinstance(value, (type, nn.Module, FunctionType, ModuleType)):
        return False
    return bool(reach({"": value}, lambda v: is_generator(v) or _is_loader(v), code=False, limit=1000).slots)


def _is_loader(value: object) -> bool:
    return issubclass(type(value), DataLoader)


def find_loaders(variables: Mapping[str, object]) -> dict[str, OtherLoader]:
    """Loaders that a script has in its variables, and that nobody follows yet, by name.

    Args:
        variables: From :func:`script_variables`.
    """
    reached = reach(variables, _is_loader, code=False)
    seen: set[int] = set()
    found = {}
    for name, _, _, loader in reached.slots:
        if id(loader) in seen or isinstance(getattr(loader, "_moetion_position", None), LoaderPosition):
            continue
        seen.add(id(loader))
        owner = reached.owners.get(name.rpartition(".")[0])
        counts = "_num_iter_calls" if hasattr(owner, "_num_iter_calls") else ""  # Fabric's wrapper
        found[name] = OtherLoader(owner if counts else loader, loader, counter=counts)
    return found


def _iterated(inner: Any) -> bool:
    """Whether a loader that keeps its iterator was iterated; Accelerate makes that of a stateful one itself."""
    return inner._iterator is not None and not getattr(inner, "_initial_iter_for_state_dict", False)
