"""Named points of a training at which a fault may happen, seen from outside: hooks of torch, and events.

| point | where |
|---|---|
| ``data`` | a batch is being drawn from a ``DataLoader`` |
| ``forward`` | the first submodule of the model has run |
| ``backward`` | the first gradient is there |
| ``optimizer_step`` | the update is done, and nothing that follows it |
| ``capture`` | a slot's copies begin (on the capture thread) |
| ``commit`` | a window's manifest is written, and not yet under its name |
| ``restore`` | a restore point was chosen; nothing of it is in place |
| ``replay`` | an iteration was replayed |
| ``validation`` | the first submodule has run in an evaluation |
| ``save`` | ``torch.save`` begins |
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import dataloader

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.events import Event

__all__ = ["EVENT_POINTS", "POINTS", "FaultPoints", "check_point", "event_point"]

POINTS = (
    *("data", "forward", "backward", "optimizer_step", "capture"),
    *("commit", "restore", "replay", "validation", "save"),
)
#: Points that events of the engine tell, on whatever thread it works.
EVENT_POINTS = ("capture", "commit", "restore", "replay")


def check_point(point: str) -> None:
    """Check a name. Raises ``ConfigurationError`` with all that there are."""
    if point not in POINTS:
        raise ConfigurationError(f"point={point!r}: expected one of {', '.join(POINTS)}")


def event_point(event: Event) -> str | None:
    """The point that an event stands for; None for none."""
    if event.kind == "ManifestWritten":
        return None if getattr(event, "committed", True) else "commit"
    return {"CaptureStarted": "capture", "RestoreStarted": "restore", "ReplayIteration": "replay"}.get(event.kind)


class FaultPoints:
    """Tells when this process comes to the points that are watched.

    Hooks are there only while their point is watched, so that a training without a due fault is what it would be.
    Points of :data:`EVENT_POINTS` are for who gets the events: see :func:`event_point`.

    Args:
        reached: Called with the point, on the thread that came to it.
    """

    def __init__(self, reached: Callable[[str], None]) -> None:
        self._reached = reached
        self._watched: frozenset[str] = frozenset()
        self._undo: list[Callable[[], None]] = []

    def watch(self, points: Collection[str], parameters: Iterable[Tensor] = ()) -> None:
        """Watch these points, and no others any more.

        Args:
            points: Their names.
            parameters: What gets gradients, for ``backward``.
        """
        wanted = frozenset(points)
        if wanted == self._watched and "backward" not in wanted:
            return
        self.close()
        self._watched = wanted
        if wanted & {"forward", "validation"}:
            self._undo.append(register_module_forward_hook(self._after_forward).remove)
        if "optimizer_step" in wanted:
            self._undo.append(register_optimizer_step_post_hook(self._after_step).remove)
        if "backward" in wanted:
            for parameter in parameters:
                if parameter.requires_grad and parameter.is_leaf:
                    handle = parameter.register_post_accumulate_grad_hook(lambda _: self._reached("backward"))
                    self._undo.append(handle.remove)
        if "data" in wanted:
            self._announce(dataloader._BaseDataLoaderIter, "__next__", "data")
        if "save" in wanted:
            self._announce(torch, "save", "save")

    def close(self) -> None:
        """Watch nothing."""
        self._watched = frozenset()
        while self._undo:
            self._undo.pop()()

    def _announce(self, owner: Any, name: str, point: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._reached(point)
            return original(*args, **kwargs)

        setattr(owner, name, call)
        self._undo.append(lambda: setattr(owner, name, original))

    def _after_forward(self, module: Any, args: Any, output: Any) -> None:
        point = "forward" if torch.is_grad_enabled() else "validation"
        if point in self._watched and (point == "forward" or not module.training):
            self._reached(point)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._reached("optimizer_step")
