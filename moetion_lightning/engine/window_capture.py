"""The windows of one rank, as the engine sees them: which one an iteration belongs to, and what becomes of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from moetion_lightning.core.policy import Policy, WindowPlan
from moetion_lightning.engine.density import why_dense
from moetion_lightning.engine.parts import Attached, RunState
from moetion_lightning.engine.precision_watch import PrecisionWatch
from moetion_lightning.engine.protection import Protection
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.engine.replay_record import BatchToCome
from moetion_lightning.engine.slot_files import WindowHeader
from moetion_lightning.engine.stage_recovery import Stages
from moetion_lightning.engine.tiers import Tiers
from moetion_lightning.engine.writer import BASELESS, TORN, OpenWindow
from moetion_lightning.errors import NonDeterminismError, RankLostError, UnsupportedStateError
from moetion_lightning.storage.tree import FlatTree

__all__ = ["WindowCapture"]

_UNSTEADY_WINDOWS = 3


class WindowCapture:
    """Captures a slot of a window behind every iteration.

    All methods on the training thread.

    Args:
        attached: What the engine is made of.
        tiers: Where windows go.
        ranks: The other ranks.
        stages: Stages of a pipeline that replay alone.
        protection: Follows what becomes of the windows.
        precision: Watches what is read in which precision while a window is open.
        header: Gives what a manifest says besides its slots.
        with_lineage: The same header, with the course of training as it is now.
        flatten: Copies the run state.
        fall_back: Makes windows dense from now on, and tells the reason. Returns the policy.
        say_once: Tells the user something, once.
    """

    def __init__(
        self,
        attached: Attached,
        *,
        tiers: Tiers,
        ranks: Ranks,
        stages: Stages,
        protection: Protection,
        precision: PrecisionWatch,
        header: Callable[[], WindowHeader],
        with_lineage: Callable[[WindowHeader], WindowHeader],
        flatten: Callable[[RunState], FlatTree],
        fall_back: Callable[[str], Policy],
        say_once: Callable[..., None],
    ) -> None:
        self._attached = attached
        self._tiers = tiers
        self._ranks = ranks
        self._stages = stages
        self._protection = protection
        self._precision = precision
        self._header = header
        self._with_lineage = with_lineage
        self._flatten = flatten
        self._fall_back = fall_back
        self._say_once = say_once
        self._open: OpenWindow | None = None
        self._finishing: deque[OpenWindow] = deque()  # whole, and on their way through the capture thread
        self._unsteady = 0  # windows in a row within which other parameters began to train
        self._slot: int | None = None
        self._iteration = 0  # that has ended last
        #: Whether captures are made at once, before the next batch: user code changes weights there.
        self.synchronous = False

    def take_slot(self) -> int | None:
        """The slot that was captured behind the iteration which has just ended; None if none was."""
        slot, self._slot = self._slot, None
        return slot

    def iteration(
        self,
        policy: Policy,
        iteration: int,
        run_state: RunState,
        steps: Sequence[int],
        record: Callable[[], dict[str, Any]],
    ) -> BatchToCome | None:
        """An iteration has ended.

        Args:
            policy: What to capture when.
            iteration: Its number.
            run_state: The adapter's part of the state.
            steps: How often each optimizer has stepped in it.
            record: Gives the iteration's record; called on the capture thread.

        Returns:
            What waits for the batch behind it; None if nothing does.
        """
        self._iteration = iteration
        self._settle()
        window = self._window_of(policy, run_state, steps)
        if window is None:
            return None
        self._slot = None if window.broken else window.next_slot
        if window.next_slot == len(window.plan.slots) - 1:
            window.header = self._with_lineage(window.header)
        self._attached.writer.capture(window, iteration, record)
        return window.to_come if window.complete else None

    def break_off(self, reason: str) -> None:
        """What is captured now is not to be restored."""
        if self._open is not None:
            self._open.broken = reason

    def abandon(self) -> None:
        """Another state is put in place: what is under way is given up."""
        window, self._open = self._open, None
        self._attached.thread.drain()
        self._settle()
        writer = self._attached.writer
        if window is not None and not (window.complete and writer.newest_is(window)):
            writer.abandon(window)

    def settle_last(self) -> None:
        """No boundary follows that would ask for the window which ended with the last iteration."""
        window, self._open = self._open, None
        if window is not None and window.complete:
            self._finishing.append(window)
        self._settle()

    # --- inside --------------------------------------------------------------------------------------------------

    def _window_of(self, policy: Policy, run_state: RunState, steps: Sequence[int]) -> OpenWindow | None:
        """The window that the iteration belongs to, beginning one if it is time."""
        attached, iteration = self._attached, self._iteration
        window, self._open = self._open, None
        signature = attached.live.signature()
        dense = why_dense(attached.live, attached.steps, steps) if policy.name == "sparse" else ""
        if policy.name == "sparse" and self._unsteady >= _UNSTEADY_WINDOWS:
            dense = dense or "what trains changes within every window"
        if window is not None and not window.complete and not window.broken:
            if dense:
                window.broken = dense
            elif window.signature != signature:
                window.broken = "parameters were frozen, unfrozen or added"
                self._unsteady += 1
        # Where other ranks capture on, a broken window is counted to its end: all begin the next one together.
        if window is not None and not window.complete and not (window.broken and self._ranks.alone):
            self._open = window
            return window
        behind = False
        if window is not None and window.broken:
            self._give_up(window)
        elif window is not None:
            self._unsteady = 0
            if self._ranks.alone:
                self._finishing.append(window)
                self._settle()
            elif window.last_iteration not in self._tiers.committed(attached.writer.newest):
                behind, self._open = True, window
            else:
                self._protection.committed(window.first_iteration)
        if not policy.begins(iteration):
            return None
        # Other ranks try on: a window of theirs may still be needed, and all ask each other at the same iterations.
        if self._ranks.alone and not self._protection.may_begin(iteration):
            return None
        agreed = attached.planner.agree(iteration, attached.writer.newest, signature, dense, behind=behind)
        if agreed.dense:
            policy = self._fall_back(agreed.dense)
        if not self._ranks.alone:
            if agreed.committed >= 0 and not agreed.behind and attached.writer.drop_later(agreed.committed):
                attached.planner.forget_static()
            attached.writer.drop_older(agreed.newest)
            self._stages.free(agreed.newest, self._tiers.host)
            self._tiers.agreed(agreed.newest, persist=agreed.persist, uncopied=agreed.uncopied)
        if agreed.behind:  # a rank still commits its last window, or copies another one's
            return None
        plan = attached.planner.plan(policy, iteration, attached.writer.newest, agreed)
        self._open = self._begin(plan, run_state, signature)
        return self._open

    def _begin(self, plan: WindowPlan, run_state: RunState, signature: tuple[int, ...]) -> OpenWindow | None:
        attached, iteration = self._attached, self._iteration
        window = OpenWindow(
            plan=plan,
            first_iteration=iteration,
            header=self._header(),
            rest=None,
            static=None,
            static_digest="",
            signature=signature,
        )
        try:
            if attached.live.problem:
                raise UnsupportedStateError(attached.live.problem)
            attached.planner.check_room(plan)
            window.rest = self._flatten(run_state)
            window.static_digest, window.static = attached.planner.static_part()
        except (RankLostError, NonDeterminismError):
            raise
        except Exception as error:
            # Everything was checked before the first step; what changed since, also in user code that is asked for its
            # state, must not end training.
            window.fail(error)
            window.broken = str(error)
            if not self._ranks.alone:
                return window
            self._give_up(window, f"no window begins at iteration {iteration}")
            return None
        self._precision.window_began()
        return window

    def _settle(self) -> None:
        """Learn what became of the windows that were whole when they went to the capture thread."""
        while self._finishing and self._finishing[0].done:
            window = self._finishing.popleft()
            if window.broken:
                self._give_up(window)
            else:
                self._protection.committed(window.first_iteration)

    def _give_up(self, window: OpenWindow, what: str = "") -> None:
        attached = self._attached
        attached.writer.abandon(window)
        attached.planner.forget_static()
        newest = attached.writer.newest
        held = "none" if newest is None else f"iterations {newest.first_iteration}..{newest.last_iteration}"
        if window.broken == BASELESS:  # of the one that it builds on it was said
            return
        what = what or f"the window that began with iteration {window.first_iteration}"
        self._protection.failed(self._iteration, what, window.broken, window.error, held)
        if window.broken == TORN and self._protection.given_up > 1 and not self.synchronous:
            self.synchronous = True
            self._say_once(f"{TORN}, again and again: captures are made at once now, before the next batch begins")
