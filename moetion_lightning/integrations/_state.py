"""The part of the training state that a loop adds to modules and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from moetion_lightning.core.generators import Generators
from moetion_lightning.core.run_state import with_extra_state
from moetion_lightning.distributed.ddp import bucket_order, set_bucket_order
from moetion_lightning.engine import PlainAttributes
from moetion_lightning.engine.users_classes import is_framework
from moetion_lightning.errors import ForeignWindowError
from moetion_lightning.integrations._gradients import LastingGradients
from moetion_lightning.integrations._parts import Parts

__all__ = ["LoopPosition", "LoopState"]


class LoopPosition(Protocol):
    """Where the loop stands: counters and data."""

    def snapshot(self) -> dict[str, Any]:
        """Between two batches, before the next one is asked for."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue there."""
        ...

    def parts(self) -> dict[str, object]:
        """Objects that may hold generators, by name."""
        ...

    def sources(self) -> list[Any]:
        """The training loaders."""
        ...


class LoopState:
    """Captures and restores it; a :class:`~moetion_lightning.engine.RunState`.

    Args:
        parts: What the run consists of.
        position: Where the loop stands.
        say_once: Tells the user something, once.
    """

    def __init__(self, parts: Parts, position: LoopPosition, say_once: Callable[[str], None]) -> None:
        self._parts = parts
        self._position = position
        self._attributes = PlainAttributes(self._users_objects, say_once)
        self._attributes.begin()
        self._gradients = LastingGradients(parts.parameters(), parts.optimizers)
        self._generators = Generators(self._roots)

    def capture(self, *, weights: bool) -> dict[str, Any]:
        """The state between two batches, as nested plain values and live tensors.

        Args:
            weights: Whether the weights may be among them.
        """
        parts = self._parts
        return {
            "position": self._position.snapshot(),
            "stateful": {name: thing.state_dict() for name, thing in parts.stateful.items()},
            "extra_states": {name: module.get_extra_state() for name, module in with_extra_state(parts.module)},
            "buckets": {prefix: bucket_order(ddp) for prefix, ddp in parts.wrappers.items()},
            # Whether the next forward takes over rank 0's buffers.
            "sync_buffers": {prefix: ddp.require_forward_param_sync for prefix, ddp in parts.wrappers.items()},
            "gradients": self._gradients.capture(),
            "gradients_last": self._gradients.lasts,
            "attributes": self._attributes.capture(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Before the engine restores, and before the first forward.

        Args:
            state: What :meth:`capture` gave.

        Raises:
            ForeignWindowError: Other objects were captured than there are now.
        """
        parts = self._parts
        there, here = set(state["stateful"]), set(parts.stateful)
        if there != here:
            only, where = (there - here, "in the window") if there - here else (here - there, "in this run")
            raise ForeignWindowError(
                f"the state of {sorted(only)} is only {where}. Give and register the same schedulers, scalers and "
                "objects as before, or start afresh with resume='never' or another job_id."
            )
        for name, thing in parts.stateful.items():
            thing.load_state_dict(state["stateful"][name])
        for name, module in with_extra_state(parts.module):
            if name in state["extra_states"]:
                module.set_extra_state(state["extra_states"][name])
        for prefix, ddp in parts.wrappers.items():
            set_bucket_order(ddp, state["buckets"][prefix])
            ddp.require_forward_param_sync = state["sync_buffers"][prefix]
        self._gradients.lasts = state["gradients_last"]
        self._position.restore(state["position"])
        tensors = {**dict(parts.module.named_buffers()), **dict(parts.module.named_parameters())}
        self._attributes.restore(state["attributes"], tensors)
        self._attributes.begin()

    def generators(self) -> Generators:
        """Random number generators of user objects."""
        return self._generators

    def _roots(self) -> dict[str, object]:
        parts = self._parts
        optimizers = {f"optimizer{i}": o for i, o in enumerate(parts.optimizers) if not is_framework(type(o))}
        return {"module": parts.module, **optimizers, **parts.generators, **parts.stateful, **self._position.parts()}

    def users_objects(self) -> list[object]:
        """Objects that reach the classes of what was captured."""
        return [*self._users_objects().values(), *self._parts.stateful.values()]

    def _users_objects(self) -> dict[str, object]:
        """Objects whose plain attributes are state: the modules, and callbacks of a Trainer that are the user's."""
        return {
            "module": self._parts.module,
            **{
                name: part
                for name, part in self._position.parts().items()
                if name.startswith("callback") and not is_framework(type(part))
            },
        }

    def remove(self) -> None:
        """Take hooks back."""
        self._gradients.remove()
