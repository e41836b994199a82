"""What the engine is made of once the module and its optimizers exist, and what it asks of an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from moetion_lightning.capture.thread import CaptureThread
from moetion_lightning.core.generators import Generators
from moetion_lightning.core.state import LiveState
from moetion_lightning.engine.planner import WindowPlanner
from moetion_lightning.engine.shares import Shares
from moetion_lightning.engine.stage_link import StageLink, StageReplay, StageWork
from moetion_lightning.engine.steps import StepWatcher
from moetion_lightning.engine.writer import WindowWriter
from moetion_lightning.moe.routing import Routing

__all__ = ["Attached", "RunState", "StageLink", "StageReplay", "StageWork"]


class RunState(Protocol):
    """What an adapter adds to the training state."""

    def capture(self, *, weights: bool) -> Any:
        """Loop counters, schedulers, callbacks, data position ...: nested plain values and tensors (not copied).

        Args:
            weights: Whether the model's weights may be among them.
        """
        ...

    def generators(self) -> Generators:
        """Random number generators of user objects: the same object each time."""
        ...


@dataclass(frozen=True, kw_only=True)
class Attached:
    """Everything that exists once the module and its optimizers do."""

    live: LiveState
    routing: Routing
    planner: WindowPlanner
    shares: Shares
    steps: StepWatcher
    thread: CaptureThread
    writer: WindowWriter
