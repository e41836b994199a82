"""What a rank sends over its stage boundaries, kept in its host memory, so that a lost neighbour can be replayed.

The sender keeps a record: it survives the loss of the receiver, and costs no traffic. Records belong to iterations;
an iteration is *sealed* when its optimizer step is done, with the facts that its replay needs (a :class:`Control`).
Records of an iteration that never got so far are dropped.

On the CPU a record is a reference: what was sent is not written to afterwards, and the version counter of its memory
tells if somebody did. On an accelerator it is a copy in pinned host memory, made on a stream of its own.

Source:
    MoEvement, upstream logging.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetion_lightning.pipeline.stage import Direction

__all__ = ["BoundaryLog", "Control", "Key", "Round"]

_log = logging.getLogger(__name__)


class Key(NamedTuple):
    """Which transfer of an iteration a record is of.

    Args:
        round: Pipeline run within the iteration (gradient accumulation).
        micro_batch: Index within the run.
        boundary: Before which stage.
        direction: ``"F"`` or ``"B"``.
    """

    round: int
    micro_batch: int
    boundary: int
    direction: Direction


@dataclass(frozen=True, kw_only=True)
class Round:
    """One run of the pipeline.

    Args:
        batch: Tensors of the batch, as all stages had it: the outer boundaries (inputs and targets).
        index: The batch's number in its epoch, as the user's step was told.
        seed: Of the random generators.
        losses: Of the micro-batches, as hexadecimal floats.
    """

    batch: tuple[Tensor, ...]
    index: int
    seed: int
    losses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Control:
    """What all stages of a pipeline knew of an iteration.

    Args:
        norms: Gradient norms that clipping used, in order (hexadecimal).
        stage_norms: Norm of the unclipped gradient of each rank of the pipeline, by place (hexadecimal).
        groups: Settings of the optimizer's parameter groups in this step.
        scale: Loss scale, or None.
        divisor: What each loss was divided by.
    """

    norms: tuple[str, ...]
    stage_norms: tuple[str, ...]
    groups: Sequence[Mapping[str, Any]]
    scale: str | None
    divisor: int


class _Record:
    """Tensors that were sent, in host memory."""

    def __init__(self, tensors: Sequence[Tensor], copy: Callable[[Tensor], Tensor] | None) -> None:
        self.tensors = [_compact(tensor) if copy is None else copy(tensor) for tensor in tensors]
        self._versions = [tensor._version for tensor in self.tensors]
        self.nbytes = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def unchanged(self) -> bool:
        return [tensor._version for tensor in self.tensors] == self._versions


def _compact(tensor: Tensor) -> Tensor:
    """The tensor itself, unless it would keep much more memory alive than it shows."""
    if tensor.is_inference():  # has no version counter
        return tensor.clone()
    whole = tensor.untyped_storage().nbytes()
    return tensor if whole <= tensor.numel() * tensor.element_size() else tensor.clone()


@dataclass
class _Iteration:
    records: dict[Key, _Record] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    control: Control | None = None
    nbytes: int = 0


class BoundaryLog:
    """The records of one rank.

    Args:
        max_bytes: Never hold more. When the newest iteration does not fit, the oldest go: what they were needed for is
            then recovered by a rollback of all stages.
        on_overflow: Told once, with a message for the user.
        device: Where the stage runs.
    """

    def __init__(self, max_bytes: int, on_overflow: Callable[[str], None], device: torch.device | None = None) -> None:
        self.max_bytes = max_bytes
        self._on_overflow = on_overflow
        self._overflowed = False
        self._iterations: dict[int, _Iteration] = {}
        self._current = 0
        self._copier = _PinnedCopier(device) if device is not None and device.type == "cuda" else None
        self.nbytes = 0
        #: Most bytes ever held.
        self.high_water_bytes = 0
        #: Bytes of the newest sealed iteration.
        self.iteration_bytes = 0

    # --- writing -------------------------------------------------------------------------------------------------

    def begin(self, iteration: int) -> None:
        """What is recorded from now on belongs to this iteration; what exists of it, or of later ones, is dropped."""
        for known in [i for i in self._iterations if i >= iteration]:
            self._drop(known)
        self._current = iteration
        self._iterations[iteration] = _Iteration()

    def record(self, boundary: int, direction: Direction, micro_batch: int, tensors: Sequence[Tensor]) -> None:
        """Keep what is being sent over a boundary in the run of the pipeline that is under way."""
        iteration = self._iterations.get(self._current)
        if iteration is None:  # it did not fit
            return
        key = Key(len(iteration.rounds), micro_batch, boundary, direction)
        self._add(iteration, key, _Record(tensors, self._copier.copy if self._copier else None))

    def end_round(self, done: Round) -> None:
        """A run of the pipeline is complete.

        Args:
            done: What it ran on.
        """
        iteration = self._iterations.get(self._current)
        if iteration is None:
            return
        for index, tensor in enumerate(done.batch):
            # Counted and watched like a record; boundary -1 is no boundary of a stage.
            key = Key(len(iteration.rounds), index, -1, "F")
            self._add(iteration, key, _Record([tensor], self._copier.copy if self._copier else None))
            if self._current not in self._iterations:
                return
        number = len(iteration.rounds)
        kept = tuple(iteration.records[Key(number, i, -1, "F")].tensors[0] for i in range(len(done.batch)))
        iteration.rounds.append(replace(done, batch=kept))  # what was given may be on a device, or a view of much more

    def seal(self, control: Control) -> None:
        """The optimizer has stepped: the iteration is complete, and the next one begins."""
        iteration = self._iterations.get(self._current)
        if iteration is not None:
            iteration.control = control
            self.iteration_bytes = iteration.nbytes
        if self._copier is not None:
            self._copier.wait()
        self.begin(self._current + 1)

    def skip(self) -> None:
        """The optimizer did not step (overflow under a loss scale): nothing of this is ever replayed."""
        self.begin(self._current)

    # --- reading -------------------------------------------------------------------------------------------------

    @property
    def current(self) -> int:
        """The iteration that is being recorded."""
        return self._current

    def holds(self, iteration: int) -> bool:
        """Whether anything is recorded of an iteration."""
        known = self._iterations.get(iteration)
        return known is not None and bool(known.records)

    def complete(self) -> tuple[int, int] | None:
        """First and last of the newest unbroken row of sealed iterations whose records are as they were sent."""
        last = self._current - 1
        first = last
        while self._is_whole(first):
            first -= 1
        return None if first == last else (first + 1, last)

    def _is_whole(self, iteration: int) -> bool:
        known = self._iterations.get(iteration)
        return known is not None and known.control is not None and all(r.unchanged for r in known.records.values())

    def control(self, iteration: int) -> Control:
        """The facts of a sealed iteration."""
        control = self._iterations[iteration].control
        assert control is not None
        return control

    def rounds(self, iteration: int) -> list[Round]:
        """The runs of a sealed iteration, with the batches in host memory."""
        return list(self._iterations[iteration].rounds)

    def sent(self, iteration: int, boundary: int, direction: Direction) -> list[tuple[Key, list[Tensor]]]:
        """Everything that went over a boundary in one direction, by run and micro-batch."""
        records = self._iterations[iteration].records
        keys = sorted(key for key in records if key.boundary == boundary and key.direction == direction)
        return [(key, records[key].tensors) for key in keys]

    # --- letting go ------------------------------------------------------------------------------------------------

    def free(self, before: int) -> None:
        """Iterations before this one are not needed any more."""
        for known in [i for i in self._iterations if i < before]:
            self._drop(known)

    def clear(self) -> None:
        """Drop everything."""
        for known in list(self._iterations):
            self._drop(known)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _add(self, iteration: _Iteration, key: Key, record: _Record) -> None:
        iteration.records[key] = record
        iteration.nbytes += record.nbytes
        self.nbytes += record.nbytes
        while self.nbytes > self.max_bytes and self._iterations:
            self._overflow(min(self._iterations))
        self.high_water_bytes = max(self.high_water_bytes, self.nbytes)

    def _overflow(self, oldest: int) -> None:
        self._drop(oldest)
        if not self._overflowed:
            self._overflowed = True
            self._on_overflow(
                f"the boundary log reached its bound of {self.max_bytes / 1e6:.1f} MB and gave up iteration {oldest}: "
                "a stage that is lost while its window needs such an iteration is recovered by a rollback of all "
                "stages. Raise StageBoundaryLogging(max_bytes=...), or use a smaller window"
            )

    def _drop(self, number: int) -> None:
        self.nbytes -= self._iterations.pop(number).nbytes


class _PinnedCopier:
    """Copies into pinned host memory on a side stream; the training stream never waits."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device=device)

    def copy(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        if not tensor.is_cuda:
            return host.copy_(tensor)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)
        return host

    def wait(self) -> None:
        self._stream.synchronize()
