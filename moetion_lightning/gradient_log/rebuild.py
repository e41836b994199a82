"""A state rebuilt from captures of its parts, made at different iterations, and from what was consumed since.

The oldest captures are put in place; then, iteration by iteration, the optimizers' own ``step`` is given the logged
gradients and settings, and what was captured at that iteration is put over the result. What is not in place yet gets
zeros or nothing, and is overwritten. The real optimizers run on the real shapes: the bits are those of training.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetion_lightning.core.local import local
from moetion_lightning.core.operators import Operator, Piece
from moetion_lightning.core.slot_contents import TensorLoader, write_active
from moetion_lightning.core.state import LiveState
from moetion_lightning.gradient_log.steps import Settings

__all__ = ["Capture", "LoggedCall", "LoggedIteration", "rebuild", "step_again"]

_log = logging.getLogger(__name__)
_QUIET_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Operators captured in full.

    Args:
        iteration: The iteration after which.
        operators: The operators.
        scalars: What optimizers keep of them besides tensors.
        load: Gives a stored tensor by name.
    """

    iteration: int
    operators: tuple[Operator, ...]
    scalars: Mapping[str, Any]
    load: TensorLoader


@dataclass(frozen=True, kw_only=True)
class LoggedCall:
    """What one call of ``step`` consumed.

    Args:
        optimizer: Which of the live state's optimizers.
        settings: As of :class:`~.steps.Call`.
        closure: As of :class:`~.steps.Call`.
        scaling: As of :class:`~.steps.Call`.
        strides: As of :class:`~.steps.Consumed`.
        others: As of :class:`~.steps.Consumed`.
        pieces: Gives the pieces of dense gradients; None for one that is all zeros.
    """

    optimizer: int
    settings: Settings
    closure: tuple[Any, Settings] | None
    scaling: Sequence[Tensor | None] | None
    strides: Mapping[str, Sequence[int]]
    others: Mapping[str, Tensor]
    pieces: Callable[[], Iterator[tuple[Piece, Tensor | None]]]

    @classmethod
    def from_tree(
        cls, stored: Mapping[str, Any], pieces: Callable[[], Iterator[tuple[Piece, Tensor | None]]]
    ) -> LoggedCall:
        """What :func:`~.steps.calls_tree` gave of one call, with its dense gradients."""
        closure = stored["closure"]
        return cls(
            optimizer=stored["optimizer"],
            settings=Settings(**stored["settings"]),
            closure=None if closure is None else (closure[0], Settings(**closure[1])),
            scaling=stored["scaling"],
            strides=stored["strides"],
            others=stored["others"],
            pieces=pieces,
        )


@dataclass(frozen=True, kw_only=True)
class LoggedIteration:
    """All calls of one iteration, in order."""

    iteration: int
    calls: tuple[LoggedCall, ...]


def rebuild(
    live: LiveState,
    captures: Sequence[Capture],
    log: Sequence[LoggedIteration],
    target: int,
) -> int:
    """Put the state after iteration ``target`` in place: weights that train, and what their optimizers keep.

    Args:
        live: The live state, with the structure (what trains, in which groups) of that iteration.
        captures: Captures of all operators, each at or before ``target``.
        log: Every iteration behind the oldest capture, up to ``target``, in order.
        target: The iteration.

    Returns:
        Optimizer steps that were made.
    """
    by_iteration: dict[int, list[Capture]] = {}
    for capture in captures:
        by_iteration.setdefault(capture.iteration, []).append(capture)
    oldest = min(by_iteration, default=target)
    in_place = _InPlace(live)
    in_place.put(by_iteration.get(oldest, ()))
    steps = 0
    progress = _Progress(target - oldest, target)
    for logged in log:
        if not oldest < logged.iteration <= target:
            continue
        for call in logged.calls:
            in_place.give_gradients(call)
            step_again(live.optimizers[call.optimizer], call, live.parameters)
            steps += 1
        in_place.put(by_iteration.get(logged.iteration, ()))
        progress.done(logged.iteration - oldest)
    in_place.drop_gradients()
    return steps


def step_again(optimizer: Any, call: LoggedCall, parameters: Mapping[str, Tensor]) -> None:
    """Make a logged call: the optimizer's own ``step``, without the hooks and wrappers around it.

    Args:
        optimizer: The optimizer; the gradients are in place.
        call: The call.
        parameters: The module's parameters by name.
    """
    step = type(optimizer).step
    step = step.__wrapped__ if getattr(step, "hooked", False) else step
    call.settings.apply(optimizer, parameters)
    if call.scaling is not None:
        optimizer.grad_scale, optimizer.found_inf = call.scaling
    try:
        if call.closure is None:
            step(optimizer)
        else:
            result, settings = call.closure

            def closure() -> Any:
                settings.apply(optimizer, parameters)
                return result

            step(optimizer, closure)
    finally:
        if call.scaling is not None:
            del optimizer.grad_scale, optimizer.found_inf


class _InPlace:
    """What is in place already, while a state is rebuilt."""

    def __init__(self, live: LiveState) -> None:
        self._live = live
        self._whole: set[str] = set()  # parameters that are captured as wholes
        self._rows: dict[str, list[tuple[int, int]]] = {}

    def put(self, captures: Sequence[Capture]) -> None:
        """Put captures in place."""
        for capture in captures:
            write_active(self._live, capture.operators, capture.load, capture.scalars)
            for op in capture.operators:
                for piece in op.pieces:
                    if piece.start is None or piece.stop is None:
                        self._whole.add(piece.parameter)
                    else:
                        self._rows.setdefault(piece.parameter, []).append((piece.start, piece.stop))

    def _has(self, piece: Piece) -> bool:
        if piece.parameter in self._whole:
            return True
        start, stop = piece.start or 0, piece.stop
        rows = self._rows.get(piece.parameter, ())
        return stop is not None and any(a <= start and stop <= b for a, b in rows)

    def _any_of(self, name: str) -> bool:
        return name in self._whole or name in self._rows

    @torch.no_grad()
    def give_gradients(self, call: LoggedCall) -> None:
        """The gradients of one call: rows that are not in place get zeros, parameters of which nothing is get none."""
        live = self._live
        self._set_none(live.optimizers[call.optimizer])
        targets: dict[str, Tensor] = {}
        for piece, values in call.pieces():
            if not self._has(piece) or piece.parameter not in live.parameters:
                continue
            target = targets.get(piece.parameter)
            if target is None:
                target = targets[piece.parameter] = self._empty(piece.parameter, call.strides.get(piece.parameter))
            if values is not None:
                piece.of(target).copy_(values)
        for name, gradient in call.others.items():
            if self._any_of(name) and name in live.parameters:
                live.parameters[name].grad = gradient.to(live.parameters[name].device)

    def _empty(self, name: str, strides: Sequence[int] | None) -> Tensor:
        """A gradient of zeros, in its parameter's place. Returns the part of it that is in this process."""
        parameter = self._live.parameters[name]
        gradient = torch.zeros_like(parameter.detach(), memory_format=torch.contiguous_format)
        if strides is not None and type(gradient) is Tensor:
            gradient = torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device)
            gradient.zero_()
        parameter.grad = gradient
        return local(gradient)

    @staticmethod
    def _set_none(optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def drop_gradients(self) -> None:
        """None of them is of the iteration that follows."""
        for parameter in self._live.parameters.values():
            parameter.grad = None


class _Progress:
    """Says how far it is, where it takes long."""

    def __init__(self, total: int, target: int) -> None:
        self._total = total
        self._target = target
        self._next = time.monotonic() + _QUIET_SECONDS

    def done(self, count: int) -> None:
        """So many iterations are rebuilt."""
        now = time.monotonic()
        if now >= self._next and count < self._total:
            self._next = now + _QUIET_SECONDS
            _log.info(
                "rebuilding the state after iteration %d: %d of %d iterations are done",
                self._target, count, self._total,
            )  # fmt: skip
