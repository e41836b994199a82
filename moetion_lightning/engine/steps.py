"""Watches the optimizers: which of them really stepped since the last iteration boundary."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from moetion_lightning.core.optimizer_parts import own_attributes
from moetion_lightning.core.step_hooks import hook_steps

__all__ = ["StepWatcher"]

_CLOSURE = 1  # its position among the arguments of ``step``; the first one is the optimizer itself


class StepWatcher:
    """Hooks on the optimizers' ``step``.

    A step that a gradient scaler turns into nothing does not count: a non-fused optimizer is not called at all then, a
    fused one is called with ``found_inf`` set.

    Lightning hands the forward and backward to ``optimizer.step`` as its closure. Captures go on behind them, so the
    wait comes after the closure, before the update, for optimizers that are known to begin with it; others
    (sharpness-aware ones change weights first) wait before it.

    Optimizers inside others are watched as well: it may be they alone whose ``step`` is called.

    Args:
        optimizers: Raw optimizers, with those inside them.
        closure_first: For each, whether its ``step`` calls the closure before it changes anything.
        enter: Called with the optimizer's index when its ``step`` is entered, before anything else.
        before: Called before each update, with the optimizer's index: nothing may be copying from the state any more.
            None in its place: the gradients are not there yet, a closure will make them.
        ready: Called with the optimizer's index when the gradients of an update are complete, before they are used; and
            with what its closure gave, as a tuple of one, which is empty without a closure.
        done: Called with the optimizer's index after each update, also one that a scaler turned into nothing.
        after: Called with the optimizer's index after each real step.

    Raises:
        ConfigurationError: The steps of an optimizer cannot be seen.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        closure_first: Sequence[bool],
        enter: Callable[[int], None],
        before: Callable[[int | None], None],
        ready: Callable[[int, tuple[Any, ...]], None],
        done: Callable[[int], None],
        after: Callable[[int], None],
    ) -> None:
        self._closure_first = tuple(closure_first)
        self._enter = enter
        self._before = before
        self._ready = ready
        self._done = done
        self._after = after
        self.attempts = 0
        self.steps = [0] * len(optimizers)
        #: Optimizers that changed settings of their own in a step, counters apart.
        self.self_tuning: set[int] = set()
        #: Most calls of one step's closure so far: of optimizers that begin with it, and of all.
        self.closure_calls = self.most_closure_calls = 0
        self._settings: dict[int, dict[str, Any]] = {}
        self._counts = [0] * len(optimizers)
        self._optimizers = tuple(optimizers)
        self._handles: list[Any] = []
        self._inert = False
        for index, optimizer in enumerate(self._optimizers):
            self._handles += hook_steps(optimizer, self._pre_hook(index), self._post_hook(index))

    def take(self) -> tuple[int, ...]:
        """Real steps of each optimizer since the last call."""
        steps, self.steps, self.attempts = tuple(self.steps), [0] * len(self.steps), 0
        return steps

    def attempt(self) -> None:
        """A step is about to be tried; a gradient scaler may never call the optimizer."""
        self.attempts += 1

    @contextlib.contextmanager
    def inert(self) -> Iterator[None]:
        """Steps that are made meanwhile are no steps of the training: nothing is called or counted."""
        self._inert = True
        try:
            yield
        finally:
            self._inert = False

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _pre_hook(self, index: int) -> Callable[..., None]:
        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            if self._inert:
                return None
            count = self._counts[index] = self._counts[index] + 1
            if count & (count - 1) == 0:  # an optimizer that tunes itself does so in its first steps, or begins late
                self._settings[index] = _settings(optimizer)
            self._enter(index)
            closure = _closure_of(args, kwargs)
            if closure is None:
                self._before(index)
                self._ready(index, ())
                return None
            if not self._closure_first[index]:
                self._before(None)
            return self._with_holding_closure(index, closure, args, kwargs)

        return hook

    def _with_holding_closure(
        self, index: int, closure: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of ``step`` with a closure that tells when it ends."""
        calls = 0

        def holding() -> Any:
            nonlocal calls
            calls += 1
            self.most_closure_calls = max(self.most_closure_calls, calls)
            if self._closure_first[index]:
                self.closure_calls = max(self.closure_calls, calls)
            result = closure()
            if self._closure_first[index]:
                self._before(index)
            self._ready(index, (result,))
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": holding}
        return (*args[:_CLOSURE], holding, *args[_CLOSURE + 1 :]), kwargs

    def _post_hook(self, index: int) -> Callable[..., None]:
        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if self._inert:
                return
            self._done(index)
            found_inf = getattr(optimizer, "found_inf", None)
            if isinstance(found_inf, Tensor) and bool(found_inf.item()):
                return
            before = self._settings.pop(index, None)
            if before is not None and _tuned(before, _settings(optimizer)):
                self.self_tuning.add(index)
            self.steps[index] += 1
            self._after(index)

        return hook


def _closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    closure = kwargs.get("closure", args[_CLOSURE] if len(args) > _CLOSURE else None)
    return closure if callable(closure) else None


def _settings(optimizer: Any) -> dict[str, Any]:
    """The numbers in an optimizer's groups, tensors by value, and the fractions among its attributes."""
    settings: dict[str, Any] = {}
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if isinstance(value, Tensor) and value.numel() == 1:
                settings[f"{number}.{key}"] = value.item()
            elif isinstance(value, (bool, int, float, tuple)):
                settings[f"{number}.{key}"] = value
    return settings | {key: value for key, value in own_attributes(optimizer).items() if isinstance(value, float)}


def _tuned(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a setting changed that is no counter: whole numbers that grow count, whatever the state is."""
    for key, value in after.items():
        if key not in before:  # made in this step: whether it changes shows later
            continue
        old = before[key]
        counts = type(value) is int and type(old) is int and value > old
        if not counts and repr(old) != repr(value):  # as text: nan equals nan
            return True
    return False
