"""A running proof that the log leads to the state: a part of it is rebuilt beside training, and compared.

The operator's previous full capture and the gradients that were logged since must give its new full capture, bit for
bit. If they do not, something changed the weights or the optimizer's state that the log knows nothing of: user code, an
optimizer that keeps state elsewhere, or a fault of the hardware.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moetion_lightning.core.operators import Operator, Piece
from moetion_lightning.core.optimizer_parts import own_attributes
from moetion_lightning.core.slot_contents import describe_kept
from moetion_lightning.core.state import LiveState
from moetion_lightning.gradient_log.rebuild import Capture, LoggedCall, LoggedIteration, rebuild
from moetion_lightning.gradient_log.steps import Settings
from moetion_lightning.storage.format import tensor_bytes

__all__ = ["Finding", "audit"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is not as the log says.

    Args:
        operator: Name of the operator.
        iteration: The iteration of the new capture.
        quantity: ``"weight"``, or what an optimizer keeps.
        parameter: Of which parameter.
        element: Index of the first element that differs, in row-major order within the captured rows.
        rebuilt: Its value, as the log leads to it.
        captured: Its value in the capture.
    """

    operator: str
    iteration: int
    quantity: str
    parameter: str
    element: int
    rebuilt: str
    captured: str

    def __str__(self) -> str:
        return (
            f"{self.quantity} of {self.parameter!r} ({self.operator}), element {self.element}: {self.rebuilt} from the "
            f"log, {self.captured} in the capture of iteration {self.iteration}"
        )


def audit(
    live: LiveState, operator: Operator, before: Capture, log: Sequence[LoggedIteration], after: Capture
) -> Finding | None:
    """Rebuild one operator from a capture and the log, and compare it with the next capture.

    Args:
        live: The live state: only its form is used.
        operator: The operator; its optimizers update each parameter apart.
        before: Its capture.
        log: The iterations behind it, up to ``after``.
        after: Its next capture.

    Returns:
        The first difference; None if there is none.
    """
    found = _compare(live, operator, before, log, after, apart=True)
    if found is not None and any(piece.start is not None for piece in operator.pieces):
        # Kernels treat the last elements of a tensor in another way than the rest, with other roundings: rows on their
        # own need not give the bits of rows in their place.
        found = _compare(live, operator, before, log, after, apart=False)
    return found


def _compare(
    live: LiveState,
    operator: Operator,
    before: Capture,
    log: Sequence[LoggedIteration],
    after: Capture,
    *,
    apart: bool,
) -> Finding | None:
    twin = _Twin(live, operator, apart=apart)
    with twin.stream():
        rebuild(
            twin.live,
            [replace(before, operators=(twin.operator,), scalars=twin.scalars(before.scalars))],
            [twin.logged(iteration) for iteration in log],
            after.iteration,
        )
        return twin.difference(after)


class _Twin:
    """One operator with optimizers of its own.

    Args:
        live: The live state.
        operator: The operator.
        apart: Whether rows are parameters of their own; else they have their place in parameters of the same shape.
    """

    def __init__(self, live: LiveState, operator: Operator, *, apart: bool) -> None:
        self._pieces = {piece.key: piece for piece in operator.pieces}
        self._name = {key: key if apart else piece.parameter for key, piece in self._pieces.items()}
        pieces = tuple(Piece(parameter=key) for key in self._pieces) if apart else operator.pieces
        self.operator = replace(operator, pieces=pieces)
        module = nn.Module()
        members: dict[int, list[nn.Parameter]] = defaultdict(list)
        self._device = torch.device("cpu")
        for key, piece in self._pieces.items():
            weight = live.weight(piece.parameter)
            shape = piece.of(weight).shape if apart else weight.shape
            self._device = weight.device
            parameter = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
            if self._name[key] not in module._parameters:
                module._parameters[self._name[key]] = parameter
                members[id(live.parameters[piece.parameter])].append(parameter)
        self._groups: list[list[int]] = []  # of each optimizer: the groups that have a part of the operator
        optimizers = [
            self._without_others(optimizer, tables, members)
            for optimizer, tables in zip(live.optimizers, live.table_names())
        ]
        self.live = LiveState(module, optimizers, live.declared)

    def _without_others(self, optimizer: Any, tables: Sequence[str], members: Mapping[int, list[nn.Parameter]]) -> Any:
        """An optimizer of the same class and settings, for these parameters alone."""
        twin = copy.copy(optimizer)
        groups: list[dict[str, Any]] = []
        kept: list[int] = []
        for number, group in enumerate(optimizer.param_groups):
            mine = [parameter for p in group["params"] for parameter in members.get(id(p), ())]
            if mine:
                kept.append(number)
                settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
                groups.append({**copy.deepcopy(settings), "params": mine})
        self._groups.append(kept)
        # Nothing that a step may change is shared with the optimizer that trains.
        own = {name: copy.deepcopy(value) for name, value in own_attributes(optimizer).items() if name not in tables}
        vars(twin).update(own, **{name: {} for name in tables}, param_groups=groups, state=defaultdict(dict))
        return twin

    def stream(self) -> AbstractContextManager[Any]:
        """On an accelerator: behind everything else."""
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self._device, priority=0))

    def scalars(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """What optimizers keep besides tensors, by the twin's names."""
        return {self._name[key]: stored[piece.parameter] for key, piece in self._pieces.items()}

    def logged(self, iteration: LoggedIteration) -> LoggedIteration:
        """The part of an iteration that concerns the operator."""
        calls = []
        for call in iteration.calls:
            kept = self._groups[call.optimizer]
            if not kept:
                continue
            closure = call.closure
            calls.append(
                replace(
                    call,
                    settings=_of_groups(call.settings, kept),
                    closure=None if closure is None else (closure[0], _of_groups(closure[1], kept)),
                    pieces=functools.partial(self._own, call),
                    others={
                        self._name[key]: call.others[piece.parameter]
                        for key, piece in self._pieces.items()
                        if piece.parameter in call.others and piece.start is None
                    },
                )
            )
        return LoggedIteration(iteration=iteration.iteration, calls=tuple(calls))

    def _own(self, call: LoggedCall) -> Iterator[tuple[Piece, Tensor | None]]:
        for piece, gradient in call.pieces():
            if piece.key in self._pieces:
                name = self._name[piece.key]
                yield (Piece(parameter=name) if name == piece.key else piece), gradient

    def difference(self, after: Capture) -> Finding | None:
        """Where the twin is not as the capture."""
        scalars = self.scalars(after.scalars)
        for key, piece in self._pieces.items():
            name = self._name[key]
            weight = self.live.weight(name)
            described, kept = describe_kept(self.live, name, weight)
            if described != scalars[name]:
                return Finding(
                    operator=self.operator.name,
                    iteration=after.iteration,
                    quantity="what the optimizer keeps besides tensors",
                    parameter=piece.parameter,
                    element=0,
                    rebuilt=str(described)[:200],
                    captured=str(scalars[name])[:200],
                )
            tensors = [("weight", f"w:{key}", weight, True)]
            tensors += [(f"optimizer state {path!r}", f"s:{key}:{path}", tensor, rows) for path, tensor, rows in kept]
            for quantity, stored, tensor, rows in tensors:
                mine = piece.of(tensor) if rows and name != key else tensor
                found = self._first_difference(quantity, piece, mine, after.load(stored), after.iteration)
                if found is not None:
                    return found
        return None

    def _first_difference(
        self, quantity: str, piece: Piece, rebuilt: Tensor, captured: Tensor, iteration: int
    ) -> Finding | None:
        rebuilt = rebuilt.detach().cpu()
        mine, theirs = tensor_bytes(rebuilt), tensor_bytes(captured)
        if torch.equal(mine, theirs):
            return None
        element = int((mine != theirs).nonzero()[0]) // rebuilt.element_size()
        return Finding(
            operator=self.operator.name,
            iteration=iteration,
            quantity=quantity,
            parameter=piece.parameter,
            element=element,
            rebuilt=_shown(rebuilt, element),
            captured=_shown(captured, element),
        )


def _of_groups(settings: Settings, kept: Sequence[int]) -> Settings:
    return replace(settings, groups=[settings.groups[number] for number in kept])


def _shown(tensor: Tensor, element: int) -> str:
    return f"{tensor.reshape(-1)[element].item():.9g}"
