"""Sparse window -> dense state, one iteration at a time, inside the adapter's own training loop.

After :meth:`Reconstruction.begin` the live state is that of the window's first iteration, except that frozen operators
hold compute weights and no optimizer state of their own. Training then runs as usual; after each optimizer step the
frozen operators are overwritten from that iteration's snapshot, and those whose turn it is become active: weights and
optimizer state in full. After the last slot the state is dense and exact.

What a frozen operator's optimizer state holds meanwhile is meaningless; it is overwritten at activation. The gradients
are those of the original run, so gradient clipping is exact by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetion_lightning.core.operators import Operator, OperatorKind
from moetion_lightning.core.skipped_gradients import SkippedGradients
from moetion_lightning.core.slot_contents import TensorLoader, write_active, write_compute
from moetion_lightning.core.state import LiveState

__all__ = ["CarriedSlot", "Reconstruction", "SavedSlot"]


@dataclass(frozen=True, kw_only=True)
class SavedSlot:
    """One slot of a committed window.

    Args:
        iteration: The iteration after which it was captured.
        active: Operators saved in full.
        frozen: Operators of which compute weights were saved.
        scalars: Non-tensor optimizer state.
        record: What the iteration looked like, to check the replay.
        load: Gives a stored tensor by name.
    """

    iteration: int
    active: tuple[Operator, ...]
    frozen: tuple[Operator, ...]
    scalars: Mapping[str, Any]
    record: Mapping[str, Any]
    load: TensorLoader


@dataclass(frozen=True, kw_only=True)
class CarriedSlot:
    """Operators of which only an older capture exists (lossy policies)."""

    iteration: int
    operators: tuple[Operator, ...]
    scalars: Mapping[str, Any]
    load: TensorLoader


class Reconstruction:
    """Drives the conversion of one window.

    Args:
        live: The live state.
        slots: The window's slots in order.
        carried: Older captures to apply with the first slot.
        skip_gradients: Whether frozen operators' weight gradients are skipped.
    """

    def __init__(
        self,
        live: LiveState,
        slots: Sequence[SavedSlot],
        carried: Sequence[CarriedSlot] = (),
        *,
        skip_gradients: bool = False,
    ) -> None:
        self.live = live
        self.slots = tuple(slots)
        self.carried = tuple(carried)
        self.position = 0
        self._skipped = SkippedGradients() if skip_gradients else None

    @property
    def done(self) -> bool:
        """Whether the state is dense."""
        return self.position == len(self.slots) - 1

    @property
    def next_slot(self) -> SavedSlot:
        """The slot that belongs to the iteration being replayed."""
        return self.slots[self.position + 1]

    def begin(self) -> None:
        """Put the state of the window's first iteration in place."""
        first = self.slots[0]
        # Before the newest captures: experts may share entries that have no rows (Adam's step of a stacked parameter).
        for carried in self.carried:
            for op in carried.operators:
                write_active(self.live, [op], carried.load, carried.scalars)
        for op in first.active:
            write_active(self.live, [op], first.load, first.scalars)
        for op in first.frozen:
            write_compute(self.live, [op], first.load)
        self._skip_gradients()

    def after_step(self, optimizer_index: int) -> None:
        """An optimizer has stepped: give its parameters the values that they had after this iteration.

        Args:
            optimizer_index: Which of the live state's optimizers.
        """
        if not self.done:
            self._apply(self.next_slot, lambda name: optimizer_index in self.live.owners.get(name, ()))

    def finish_iteration(self) -> SavedSlot:
        """The iteration is complete, hooks included: apply its snapshot once more and move on. Returns its slot."""
        slot = self.next_slot
        self._apply(slot, lambda name: True)
        self.position += 1
        self._skip_gradients()
        return slot

    def _apply(self, slot: SavedSlot, wanted: Callable[[str], bool]) -> None:
        def belongs(operators: Iterable[Operator]) -> list[Operator]:
            return [op for op in operators if all(wanted(piece.parameter) for piece in op.pieces)]

        write_active(self.live, belongs(slot.active), slot.load, slot.scalars)
        write_compute(self.live, belongs(slot.frozen), slot.load)

    def release(self) -> None:
        """The replay is over: all gradients are computed again."""
        if self._skipped is not None:
            self._skipped.choose(())

    def _skip_gradients(self) -> None:
        """Skip the weight gradients of parameters that are frozen as a whole.

        Matrices of experts and shared operators only: gates, norms and biases cost nothing.
        """
        if self._skipped is None:
            return
        if self.done:
            self.release()
            return
        frozen = self.next_slot.frozen + self.next_slot.active  # neither has seen its activation yet
        rows: dict[str, int] = {}
        for op in frozen:
            if op.kind is OperatorKind.GATE:
                continue
            for piece in op.pieces:
                start, stop = piece.start or 0, self.live.rows(piece.parameter)
                stop = stop if piece.stop is None else piece.stop
                rows[piece.parameter] = rows.get(piece.parameter, 0) + stop - start
        parameters = [
            parameter
            for name, count in rows.items()
            if (parameter := self.live.parameters[name]).dim() >= 2 and count == self.live.rows(name)
        ]
        for parameter in parameters:
            parameter.grad = None
        self._skipped.choose(parameters)
