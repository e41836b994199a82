"""What the gradient log captures when: a part of the state in full at every iteration, in turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from moetion_lightning.core.policy import PolicyContext, SlotPlan, WindowPlan
from moetion_lightning.core.schedule import Schedule, make_schedule, order_operators, split_operators
from moetion_lightning.errors import ConfigurationError

__all__ = ["GradientLogPolicy"]

_DEFAULT_WINDOW = 8
_MAX_SHARE = 0.1  # of a slot that one operator may take, where it can be cut
_CHANGED_SIZE = 0.25


class GradientLogPolicy:
    """Full captures go round in ``window`` slots, and what every optimizer step consumed is logged.

    A longer window captures fewer bytes in each iteration, takes more host memory, and is rebuilt in more steps.

    Args:
        window: Iterations of a round; "auto" takes 8.

    Raises:
        ConfigurationError: It is no number of iterations.
    """

    name = "gradient_log"
    exact = True

    def __init__(self, window: int | Literal["auto"] = "auto") -> None:
        if window != "auto" and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
            raise ConfigurationError(f'window={window!r}: expected a number of iterations >= 1, or "auto"')
        self.window = _DEFAULT_WINDOW if window == "auto" else window
        #: Whether parameters may be captured at different iterations: not where a step couples them.
        self.apart = True
        self._plan: WindowPlan | None = None
        self._names: tuple[str, ...] = ()
        self._full_bytes = 0

    def begins(self, iteration: int) -> bool:
        """At every iteration."""
        return True

    def forget(self) -> None:
        """Plan anew: a rank was replaced, and has no plan."""
        self._plan = None

    def plan(self, context: PolicyContext) -> WindowPlan:
        """The slots of a round. The same object as before, but for ``changed``, as long as nothing has changed."""
        names = tuple(op.name for op in context.operators)
        full_bytes = sum(context.sizes.full.values())
        here = ""
        if self._plan is None:
            here = "first plan"
        elif names != self._names:
            here = "the operators changed"
        elif abs(full_bytes - self._full_bytes) > _CHANGED_SIZE * self._full_bytes:
            here = "the optimizer's state changed its size"
        reasons = [str(reason) for reason in context.agree("schedule", here) if reason]
        if reasons:
            self._names, self._full_bytes = names, full_bytes
            schedule = self._schedule(context)
            slots = tuple(SlotPlan(active=active) for active in schedule.slots)
            self._plan = WindowPlan(slots=slots, schedule=schedule, changed=reasons[0])
            return self._plan
        assert self._plan is not None
        return WindowPlan(slots=self._plan.slots, schedule=self._plan.schedule)

    def _schedule(self, context: PolicyContext) -> Schedule:
        sizes, window = context.sizes, self.window
        ordered = order_operators(context.operators, {})
        full = list(sizes.operator_bytes(ordered, sizes.full).values())
        if not self.apart or not ordered:
            schedule = Schedule(slots=(ordered,), slot_bytes=(sum(full),), dense_bytes=sum(full))
        else:
            cap = max(1, int(_MAX_SHARE * sum(full) / window))
            ordered = split_operators(
                ordered, full_bytes=sizes.full, rows=sizes.rows, sliceable=sizes.sliceable, max_bytes=cap
            )
            whole = sizes.operator_bytes(ordered, sizes.full)
            schedule = make_schedule(ordered, window, full_bytes=whole, compute_bytes=dict.fromkeys(whole, 0))
        logged = sizes.operator_bytes(ordered, sizes.compute)  # gradients are as the weights
        gradients = [sum(logged[op.name] for op in slot) for slot in schedule.slots]
        nbytes = tuple(full + sum(gradients) - own for full, own in zip(schedule.slot_bytes, gradients))
        return replace(schedule, slot_bytes=nbytes).padded(max(window, *context.agree("slots", schedule.window)))
