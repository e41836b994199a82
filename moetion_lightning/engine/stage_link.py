"""The seam to a pipeline: what the engine asks of the strategy that runs stages, and offers while one replays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

__all__ = ["StageLink", "StageReplay", "StageWork"]


@dataclass(frozen=True, kw_only=True)
class StageReplay:
    """Which ranks replay what; the same on all ranks.

    Args:
        replaying: By rank: the iteration whose state it has now, and the iteration to reach. Both are the same for all
            ranks of adjacent stages. The iterations after the first are to be repeated; none, if the two are equal.
    """

    replaying: Mapping[int, tuple[int, int]]


class StageWork(Protocol):
    """What the engine does on a rank that replays.

    When :meth:`StageLink.replay` begins, parameters, optimizer state, buffers, settings of the parameter groups and
    random generators are those of the window's first iteration, except that some operators hold compute weights only.
    The replay brings the settings that each iteration had (learning rates, the norm for clipping) from the log. What it
    leaves in buffers, settings and generators does not matter: the engine puts those of the target in place afterwards.
    """

    @property
    def skip_gradients(self) -> bool:
        """Whether parameters whose state is not whole yet get no gradient.

        The same parameters on all replicas of a stage, and others in each iteration. The sum of the gradients' norms is
        then not that of the iteration.
        """

    def after_step(self, optimizer_index: int) -> None:
        """An optimizer has stepped, in the order of the trainer's optimizers: once for each that stepped."""

    def end_iteration(self, iteration: int) -> None:
        """All optimizers have made this iteration; the next forward may only come after this call."""


class StageLink(Protocol):
    """A rank's stage, and its log of what passes the boundaries.

    Iterations count optimizer steps from 1. ``stage`` must be right from :meth:`Engine.open` on, also in a process that
    takes a lost one's place and has no groups yet; the log is empty there.
    """

    @property
    def stage(self) -> int:
        """Place of this rank in its pipeline."""

    def logged(self) -> tuple[int, int] | None:
        """First and last iteration of which this rank can serve all records, to both neighbours; None without any.

        The range has no gaps. An iteration in flight is not in it.
        """

    def free(self, before: int) -> None:
        """Records of iterations below ``before`` are not needed any more."""

    def iteration_begins(self, iteration: int) -> None:
        """Records that are made from now on belong to this iteration.

        Records of this and later iterations belong to a course that was given up, and are to be dropped. Called at the
        start, after a restore, after each iteration, again after a skipped step, and while a stage replays.
        """

    def replay(self, plan: StageReplay, mine: StageWork | None) -> list[str]:
        """Some stages repeat iterations with what their neighbours have logged; their own log is made again.

        Args:
            plan: Who replays what.
            mine: What this rank is to call while it replays; None: it keeps its state and serves.

        Returns:
            What shows that the replay was not exact, for messages; empty if it was.

        Raises:
            RankLostError: Another rank was lost; any error of a broken process group means the same.

        Ranks:
            All ranks of the job, together, in groups that are whole.
        """
