"""Stages of a pipeline that go back to a window alone, and repeat what their neighbours have logged since."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from moetion_lightning.core.generators import Generators
from moetion_lightning.core.policy import Policy
from moetion_lightning.core.reconstruct import Reconstruction
from moetion_lightning.engine.completeness import make_reconstruction
from moetion_lightning.engine.journal import LivePoint
from moetion_lightning.engine.parts import Attached
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.engine.run_state import EngineState
from moetion_lightning.engine.stage_link import StageLink, StageReplay
from moetion_lightning.errors import RankLostError
from moetion_lightning.events import EventBus, StageReplayFinished, StageReplayStarted
from moetion_lightning.storage.tier import Tier

__all__ = ["StageReplayError", "Stages"]

_log = logging.getLogger(__name__)
_SHOWN = 4  # problems of each rank


class StageReplayError(RankLostError):
    """A stage could not be replayed exactly from its neighbours' logs. Nothing has trained on that state.

    All ranks raise it at the same place, in a job of which nobody was lost: they find a common state again, without
    replays of single stages, and put the adapter's part of it in place. Process groups stay as they are.
    """

    @classmethod
    def of(cls, problems: Sequence[str]) -> StageReplayError:
        """The error for what showed that a replay was not exact."""
        listed = "; ".join(problems[:_SHOWN]) + (
            f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        )
        return cls(
            f"a stage could not be replayed exactly from its neighbours' logs ({listed}). All ranks go back to the "
            "newest common window and replay it together. The training is not deterministic: "
            "torch.use_deterministic_algorithms(True) names the kernels that are not."
        )


class Stages:
    """The stages of a pipeline as the engine sees them; does nothing without a pipeline.

    Args:
        ranks: The ranks of the job.
        bus: Gets the events.
    """

    def __init__(self, ranks: Ranks, bus: EventBus) -> None:
        self._ranks = ranks
        self._bus = bus
        #: Whether a replay of the recovery under way was not exact.
        self.failed = False

    def may_replay(self, policy: Policy) -> bool:
        """Whether stages may be replayed alone: not after one that was not exact, and not from lossy windows.

        With a gradient log every rank rebuilds its part alone: nothing is replayed.
        """
        return policy.exact and policy.name != "gradient_log" and not self.failed

    def begin(self, iteration: int) -> None:
        """What passes the stages' boundaries from now on belongs to this iteration."""
        link = self._ranks.link()
        if link is not None:
            link.iteration_begins(iteration)

    def free(self, newest: int, tier: Tier) -> None:
        """All ranks have a window, so that no stage goes back further than its beginning.

        Args:
            newest: The window's last iteration; -1 if there is none yet.
            tier: Where this rank has it.
        """
        link = self._ranks.link()
        if link is not None and newest >= 0:
            link.free(tier.read_manifest(newest).first_iteration + 1)

    def replay(
        self, point: LivePoint, attached: Attached, generators: Generators, *, skip: bool
    ) -> StageReplayError | None:
        """Lost stages restore and replay; the others serve. Afterwards all ranks hold the model state of one iteration.

        Buffers, settings of the parameter groups and random generators of a rank that replayed are not in place then.

        Args:
            point: Who replays.
            attached: The engine's parts; no optimizer hook works meanwhile.
            generators: Random number generators of user objects.
            skip: Whether frozen operators' weight gradients may be skipped.

        Returns:
            What to raise if a replay of any rank was not exact.

        Ranks:
            All ranks of the job, together.
        """
        link, started, target = self._ranks.link(), time.perf_counter(), point.boundary.iteration
        assert link is not None  # ranks without a stage are never chosen for this
        plan = StageReplay(replaying={rank: (window.first, target) for rank, window in point.replays.items()})
        if point.window is None:
            link.iteration_begins(target + 1)
            problems = link.replay(plan, None)
        else:
            first, _ = plan.replaying[self._ranks.control.rank]
            self._bus.emit(StageReplayStarted(stage=link.stage, first_iteration=first, last_iteration=target))
            world = self._ranks.control.world_size
            problems = _replay_mine(point.window, plan, link, attached, generators, target, world, skip=skip)
        answers = self._ranks.agree("stage replay", problems[:_SHOWN])
        found = [f"rank {rank}: {problem}" for rank, answer in enumerate(answers) for problem in answer]
        self.failed = bool(found)
        if point.window is not None:
            seconds = time.perf_counter() - started
            self._bus.emit(
                StageReplayFinished(
                    stage=link.stage,
                    first_iteration=first,
                    last_iteration=target,
                    seconds=seconds,
                    verified=not found,
                )
            )
            _log.info(
                "stage %d: %d iterations replayed from its neighbours' logs in %.1f s, up to iteration %d",
                link.stage, target - first, seconds, target,
            )  # fmt: skip
        return StageReplayError.of(found) if found else None


def _replay_mine(
    window: RestorePoint,
    plan: StageReplay,
    link: StageLink,
    attached: Attached,
    generators: Generators,
    target: int,
    world_size: int,
    *,
    skip: bool,
) -> list[str]:
    live, state = attached.live, EngineState.of(window)
    reconstruction = make_reconstruction(window, live, world_size, skip_gradients=skip)
    work = _Work(reconstruction, link, window.manifest.first_iteration, skip=skip)
    # The others neither vote nor step: hooks that would wait for them must not run.
    with attached.steps.inert():
        try:
            state.apply_structure(live)
            window.apply_static(live)
            reconstruction.begin()
            state.apply(live, generators)
            link.iteration_begins(work.iteration + 1)
            problems = link.replay(plan, work)
        finally:
            reconstruction.release()
    attached.steps.take()
    attached.routing.forget()
    if work.iteration != target:
        problems = [*problems, f"the replay ended after iteration {work.iteration} instead of {target}"]
    return problems


class _Work:
    """Follows the replay of this rank's stage; see :class:`~.stage_link.StageWork`."""

    def __init__(self, reconstruction: Reconstruction, link: StageLink, iteration: int, *, skip: bool) -> None:
        self._reconstruction = reconstruction
        self._link = link
        self._skip = skip
        self.iteration = iteration

    @property
    def skip_gradients(self) -> bool:
        return self._skip and not self._reconstruction.done

    def after_step(self, optimizer_index: int) -> None:
        self._reconstruction.after_step(optimizer_index)

    def end_iteration(self, iteration: int) -> None:
        if iteration != self.iteration + 1:
            raise AssertionError(f"iteration {iteration} was replayed after iteration {self.iteration}")
        if not self._reconstruction.done:  # beyond the window nothing is frozen, and there are no snapshots
            self._reconstruction.finish_iteration()
        self.iteration = iteration
        self._link.iteration_begins(iteration + 1)
