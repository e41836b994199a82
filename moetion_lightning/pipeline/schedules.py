"""torch's pipeline schedules by name, and which numbers of micro-batches each can run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.stage import BoundaryStage

__all__ = [
    "SCHEDULES",
    "SEVERAL_STAGES",
    "ScheduleKind",
    "make_schedule",
    "run_step",
    "schedule_kind",
    "usable_micro_batches",
]

#: Flags by which torch's schedules know that their stages need no negotiation any more; named by version.
_READY = (
    "_stage_initialized", "_stage_forward_initialized", "_stage_backward_initialized",
    "_stages_initialized", "_stages_forward_initialized", "_stages_backward_initialized",
)  # fmt: skip
#: A step need not put together what the last stage returns: it is one loss for each micro-batch.
_NO_OUTPUTS = {"return_outputs": False} if "return_outputs" in inspect.signature(ScheduleGPipe.step).parameters else {}

#: Whether torch's schedules can run several stages on a rank with stages of ours: from 2.10 on.
SEVERAL_STAGES = bool(_NO_OUTPUTS)


@dataclass(frozen=True, kw_only=True)
class ScheduleKind:
    """One of torch's schedules.

    Args:
        cls: Its class.
        name: What a user calls it.
        interleaved: Whether a rank runs several stages.
        v_shaped: Whether the stages lie over the ranks in the shape of a V.
        rounds: Whether the micro-batches must divide into rounds of the pipeline's size.
    """

    cls: Any
    name: str
    interleaved: bool = False
    v_shaped: bool = False
    rounds: bool = False

    def runs(self, num_micro_batches: int, pipeline_parallel_size: int) -> bool:
        """Whether the schedule exists for so many micro-batches."""
        if self.cls is Schedule1F1B:
            return num_micro_batches >= pipeline_parallel_size
        if not self.rounds:
            return num_micro_batches >= 1
        return num_micro_batches >= 1 and num_micro_batches % max(1, num_micro_batches // pipeline_parallel_size) == 0


SCHEDULES: dict[str, ScheduleKind] = {
    kind.name: kind
    for kind in (
        ScheduleKind(cls=ScheduleGPipe, name="gpipe"),
        ScheduleKind(cls=Schedule1F1B, name="1f1b"),
        ScheduleKind(cls=ScheduleInterleaved1F1B, name="interleaved_1f1b", interleaved=True, rounds=True),
        ScheduleKind(cls=ScheduleInterleavedZeroBubble, name="interleaved_zero_bubble", interleaved=True, rounds=True),
        ScheduleKind(cls=ScheduleZBVZeroBubble, name="zbv_zero_bubble", interleaved=True, v_shaped=True),
    )
}


def schedule_kind(name: str, chunks_per_rank: int, num_micro_batches: int, pipeline_parallel_size: int) -> ScheduleKind:
    """The schedule of a name, checked against the other settings.

    Raises:
        ConfigurationError: There is no such schedule, or it cannot run like this.
    """
    if name not in tuple(SCHEDULES):  # whatever the user wrote, also what cannot be a key
        raise ConfigurationError(
            f"MoEtionStrategy(schedule={name!r}): expected one of {', '.join(map(repr, SCHEDULES))}"
        )
    kind = SCHEDULES[name]
    if kind.interleaved != (chunks_per_rank > 1) or (kind.v_shaped and chunks_per_rank != 2):
        wanted = "2" if kind.v_shaped else ("2 or more" if kind.interleaved else "1")
        raise ConfigurationError(
            f"MoEtionStrategy(schedule={name!r}, chunks_per_rank={chunks_per_rank}): this schedule runs {wanted} "
            "stages on each rank. Change one of them"
        )
    if not kind.runs(num_micro_batches, pipeline_parallel_size):
        rule = f"a multiple of pipeline_parallel_size={pipeline_parallel_size}" if kind.rounds else "at least as many"
        raise ConfigurationError(
            f"MoEtionStrategy(schedule={name!r}, num_microbatches={num_micro_batches}) with pipeline_parallel_size="
            f"{pipeline_parallel_size}: this schedule needs {rule} micro-batches"
        )
    _check_torch(kind)
    return kind


def _check_torch(kind: ScheduleKind) -> None:
    if kind.interleaved and not SEVERAL_STAGES:
        raise ConfigurationError(
            f"MoEtionStrategy(schedule={kind.name!r}): several stages on a rank need torch 2.10 or newer, and this "
            f"is {torch.__version__}. Install a newer one, or take schedule='1f1b' with chunks_per_rank=1"
        )


def usable_micro_batches(kind: ScheduleKind, wanted: int, num_samples: int, pipeline_parallel_size: int) -> int:
    """Into how many micro-batches a batch is cut: as many as wanted, fewer if it is short."""
    for number in range(min(wanted, num_samples), 0, -1):
        if kind.cls is Schedule1F1B or kind.runs(number, pipeline_parallel_size):
            return number
    return 1


def run_step(schedule: Any, **given: Any) -> None:
    """Run a schedule over the micro-batches of a step.

    Args:
        schedule: From :func:`make_schedule`.
        given: Arguments of its ``step``.
    """
    schedule.step(**given, **_NO_OUTPUTS)


def make_schedule(
    kind: ScheduleKind,
    stages: Sequence[BoundaryStage],
    num_micro_batches: int,
    pipeline_parallel_size: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """A schedule object for so many micro-batches.

    Args:
        kind: Which one; a batch that is too short for 1F1B runs as GPipe, which sums in the same order.
        stages: The stages of this rank.
        num_micro_batches: See :func:`usable_micro_batches`.
        pipeline_parallel_size: Ranks of the pipeline.
        loss: Called on the last stage with its output and the micro-batch's index (a tensor ``[1]``).
    """
    _check_torch(kind)
    cls = kind.cls if kind.runs(num_micro_batches, pipeline_parallel_size) else ScheduleGPipe
    given: Any = list(stages) if kind.interleaved else stages[0]
    # Before 2.12 GPipe refuses fewer micro-batches than stages, though it runs them.
    least = 1 if kind.interleaved else pipeline_parallel_size
    schedule: Any = cls(given, max(num_micro_batches, least), loss_fn=loss, scale_grads=False)
    schedule._n_microbatches = num_micro_batches
    for name in _READY:
        if hasattr(schedule, name):
            setattr(schedule, name, True)
    if not _NO_OUTPUTS:  # torch before 2.10
        schedule._merge_outputs = lambda output_chunks: None
    return schedule
