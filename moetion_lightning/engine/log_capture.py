"""The gradient log of one rank, as the engine sees it: a restore point at every iteration."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from moetion_lightning.core.local import is_wrapper
from moetion_lightning.core.log_policy import GradientLogPolicy
from moetion_lightning.core.operators import Operator
from moetion_lightning.core.policy import SlotPlan
from moetion_lightning.core.state import LiveState
from moetion_lightning.engine.density import why_coupled
from moetion_lightning.engine.log_items import CallInFlight, IterationState, LoggedIteration
from moetion_lightning.engine.log_writer import TORN, LogWriter
from moetion_lightning.engine.parts import Attached
from moetion_lightning.engine.protection import Protection
from moetion_lightning.engine.ranks import Ranks
from moetion_lightning.engine.replay_record import BatchToCome
from moetion_lightning.engine.slot_files import StaticPart, WindowHeader
from moetion_lightning.engine.steps import StepWatcher
from moetion_lightning.engine.tiers import Tiers
from moetion_lightning.engine.weight_check import OperatorSamples, choose_whole
from moetion_lightning.errors import AuditError, NonDeterminismError, RankLostError, UnsupportedStateError
from moetion_lightning.events import EventBus, OperatorAudited
from moetion_lightning.gradient_log.audit import Finding
from moetion_lightning.gradient_log.steps import Call, Settings, read_settings, take_call
from moetion_lightning.gradient_log.watch import DrawWatch, GradientWatch, WaitFor, WeightWatch
from moetion_lightning.storage.tree import FlatTree

__all__ = ["GradientLog", "why_no_log"]


_APART = 3  # iterations by which the newest restore points of ranks differ at most, the one being written included
_COMPARED_REPLICAS = 8  # operators in each round
_FAILED_AUDITS = 3  # of so many operators: the log is not to be trusted
_PATIENCE_SECONDS = 10.0  # with a peer that gives copies, but slowly


class GradientLog:
    """Logs what every optimizer step consumes, and captures a part of the state in full behind every iteration.

    All methods on the training thread.

    Args:
        attached: What the engine is made of.
        writer: Writes the log.
        policy: Plans the rounds.
        tiers: Where restore points go.
        ranks: The other ranks.
        protection: Follows what becomes of the restore points.
        header: Gives what a manifest says besides its slots.
        say_once: Tells the user something, once.
        bus: Gets the events.
        audit: What to do when an audit fails; "off": there is none.
    """

    def __init__(
        self,
        attached: Attached,
        writer: LogWriter,
        policy: GradientLogPolicy,
        *,
        tiers: Tiers,
        ranks: Ranks,
        protection: Protection,
        header: Callable[[], WindowHeader],
        say_once: Callable[..., None],
        bus: EventBus,
        audit: Literal["warn", "raise", "off"],
    ) -> None:
        self._audit = audit
        self._bus = bus
        self._failed_audits: set[str] = set()  # operators
        self._attached = attached
        self.writer = writer
        self._policy = policy
        self._tiers = tiers
        self._ranks = ranks
        self._protection = protection
        self._header = header
        self._say_once = say_once
        self._live: LiveState = attached.live
        self._gradients = GradientWatch()
        self._draws = DrawWatch(attached.live)
        self._weights = WeightWatch(attached.live)
        self._frozen = _FrozenWatch(attached.live)
        self._volatile: set[str] = set()  # parameters that also change outside of the steps
        self._planned_slots: tuple[SlotPlan, ...] = ()  # of the policy
        self._slots: tuple[SlotPlan, ...] = ()  # with the volatile ones apart, as the last of them
        self._planned_at = self._base = -1
        self._open: LoggedIteration | None = None  # what is logged now; None: nothing
        self._committing: LoggedIteration | None = None
        self._in_step: dict[int, tuple[CallInFlight, WaitFor, Call]] = {}
        self._entered: dict[int, Settings] = {}
        self._signature: tuple[int, ...] = ()
        self._needs_base = ""  # why all slots must be captured together
        self._needs_plan = False  # whether the slots may be others
        self._changed_at: dict[str, int] = {}  # parameters, and when they changed last outside of the steps
        self._said_now_and_then = False
        #: Whether captures are made at once, before the next batch: user code changes weights there.
        self.synchronous = False
        #: Why this rank can log no more, else "".
        self.impossible = ""
        #: The same, as soon as all ranks know it.
        self.given_up = ""

    # --- optimizer steps -----------------------------------------------------------------------------------------

    def enter_step(self, index: int) -> None:
        """An optimizer's ``step`` is entered; a closure may make the gradients yet."""
        if self._open is not None:
            self._entered[index] = read_settings(self._live, index)

    def before_step(self, index: int, result: tuple[Any, ...]) -> None:
        """An optimizer is about to update weights: its gradients are complete.

        Args:
            index: Its number.
            result: What its closure gave; empty without one.
        """
        if self._open is None:
            return
        if self._committing is not None:
            self._committing.done.wait()  # else a kill behind this step would cost two iterations
        self._look_at_weights(self._open.iteration, behind_boundary=True)
        entered = self._entered.pop(index, None)
        if entered is None:  # its closure is called again: that is found out when it has stepped
            return
        call = take_call(self._live, index, entered, result)
        wait = self._gradients.begin(call)
        logged = CallInFlight(call, None if wait is WaitFor.BEFORE_STEP else call.versions())
        self._open.calls.append(logged)
        self._in_step[index] = (logged, wait, call)
        self.writer.log(self._open, logged)
        if wait is WaitFor.BEFORE_STEP:
            self._attached.thread.wait_for(logged.copied)
        self._draws.begin(index)

    def after_step(self, index: int) -> None:
        """It has stepped, or a gradient scaler made nothing of it."""
        found = self._in_step.pop(index, None)
        if self._open is None or found is None:
            return
        logged, wait, call = found
        self._gradients.end(call)
        self._draws.end(index)
        if wait is WaitFor.AFTER_STEP:
            self._attached.thread.wait_for(logged.copied)
        self._weights.note(self._open.iteration)

    def _look_at_weights(self, iteration: int, *, behind_boundary: bool) -> None:
        """Weights that no step has changed: all is captured anew, and what changes all the time whole from then on.

        Args:
            iteration: The present one, or the one that has just ended.
            behind_boundary: Whether it happened while captures may be made.
        """
        changed = [name for name in self._weights.changed() if name not in self._volatile]
        if not changed:
            return
        self._needs_base = "weights change outside of the optimizers' steps"
        self.synchronous = self.synchronous or behind_boundary  # the next capture must be over by then
        known = self._changed_at
        new = [name for name in changed if 0 < iteration - known.get(name, iteration) <= self._weights.often]
        self._changed_at.update(dict.fromkeys(changed, iteration))
        named = new or changed
        shown = ", ".join(sorted(named)[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
        if not new:
            self._say_now_and_then(shown)
            return
        self._volatile.update(new)
        self._say_once(
            f"weights change outside of the optimizers' steps ({shown}): they are captured whole at every iteration",
            warning=True,
        )

    def _say_now_and_then(self, shown: str) -> None:
        if not self._said_now_and_then:
            self._said_now_and_then = True
            self._say_once(f"weights were changed outside of the optimizers' steps ({shown}): all is captured anew")

    # --- iterations ----------------------------------------------------------------------------------------------

    def begin(
        self, iteration: int, state: Callable[[], FlatTree], captured_at: float | None = None
    ) -> BatchToCome | None:
        """Training begins, or continues, with the state after this iteration: all of it is captured.

        Args:
            iteration: Completed iterations.
            state: Gives the run state.
            captured_at: When the state was captured that was restored, seconds since the epoch: what was written since
                is written again, however often training begins there. None: now.

        Returns:
            As :meth:`iteration`.
        """
        self.abandon()
        self._attached.planner.forget_static()
        self._signature = self._live.signature()
        self._needs_base = "training begins"
        self.impossible = self.impossible or why_no_log(self._live, self._attached.steps, self._draws)
        self._plan(iteration)
        return None if self.impossible else self._capture(iteration, state, dict, captured_at)

    def iteration(
        self, iteration: int, state: Callable[[], FlatTree], record: Callable[[], dict[str, Any]]
    ) -> BatchToCome | None:
        """An iteration has ended.

        Args:
            iteration: Its number.
            state: Gives the run state.
            record: Gives the iteration's record; called on the capture thread.

        Returns:
            What waits for the batch behind it; None if nothing does.
        """
        self.settle()
        self._look_at_weights(iteration, behind_boundary=False)
        signature = self._live.signature()
        if signature != self._signature or self._live.outdated():
            self._signature = signature
            self._needs_base, self._needs_plan = self._needs_base or "what trains has changed", True
        self.impossible = self.impossible or why_no_log(self._live, self._attached.steps, self._draws)
        must_plan = self._needs_plan or bool(self.impossible) or not self._slots
        is_due = not self._slots or (iteration - self._planned_at) % len(self._planned_slots) == 0
        if is_due or (self._ranks.alone and must_plan):
            self._plan(iteration)
        elif must_plan:  # all ranks plan together
            self._stop()
            return None
        if self.impossible or not self._protection.may_begin(iteration):
            self._stop()
            return None
        return self._capture(iteration, state, record)

    def settle(self) -> None:
        """Wait until what the iteration before consumed is committed, and learn what became of it."""
        behind, self._committing = self._committing, None
        if behind is None:
            return
        behind.done.wait()
        for index in behind.torn:
            self._gradients.torn(index)
        if behind.finding is not None:
            self._audit_failed(behind.finding)
        if not behind.broken:
            self._protection.committed(behind.iteration)
            self._hear_of_trouble()
            if self._tiers.peers is not None and self.writer.oldest_needed is None:
                # Copies may be one iteration behind, and no more.
                self._tiers.peers.copies.wait_held(behind.iteration - 1, _PATIENCE_SECONDS)
            return
        self._tell_others_of_trouble()
        if behind.broken == TORN:
            self.synchronous = True
        self._needs_base = self._needs_base or behind.broken
        self._attached.planner.forget_static()
        newest = self.writer.newest
        self._protection.failed(
            behind.iteration,
            f"the restore point of iteration {behind.iteration}",
            behind.broken,
            behind.error,
            "none" if newest is None else f"that of iteration {newest.iteration}",
        )

    def _audit_failed(self, finding: Finding) -> None:
        """What the log leads to is not what was captured."""
        message = (
            f"an audit failed: {finding}. Something changed it that no optimizer step did, or that the optimizer keeps "
            "where it is not seen, or the hardware is at fault."
        )
        if self._audit == "raise":
            raise AuditError(f"{message} Training stops; the newest restore point is the one before (audit='raise').")
        self._failed_audits.add(finding.operator)
        if len(self._failed_audits) >= _FAILED_AUDITS:
            self.impossible = self.impossible or f"audits of {len(self._failed_audits)} operators failed"
        self._volatile.add(finding.parameter)
        self._needs_base = "an audit failed"
        then = f"{finding.parameter!r} is captured whole at every iteration from now on."
        self._say_once(f"{message} {then}", warning=True)

    def abandon(self) -> None:
        """Another state is put in place, or training ends: what is under way is given up. The thread is idle then."""
        self._attached.thread.drain()
        self.settle()
        self._stop()

    def _stop(self) -> None:
        """Log nothing until all slots are captured together again."""
        opened, self._open = self._open, None
        self._in_step.clear()
        self._entered.clear()
        self._weights.forget()
        self._needs_base = self._needs_base or "the log was interrupted"
        if opened is not None:
            self._attached.thread.drain()
            self.writer.abandon(opened)

    # --- inside --------------------------------------------------------------------------------------------------

    def _plan(self, iteration: int) -> None:
        attached, policy = self._attached, self._policy
        policy.apart = self._live.updates_apart()
        newest = self.writer.newest
        agreed = attached.planner.agree(iteration, newest, self._signature, self.impossible, behind=False)
        self._planned_at, self._needs_plan = iteration, False
        if agreed.dense:
            self.impossible = self.given_up = agreed.dense
            return
        if not self._ranks.alone:
            self._tiers.agreed(agreed.newest, persist=agreed.persist, uncopied=agreed.uncopied)
            self._settle_trouble(iteration, agreed.newest)
            self._compare_replicas(iteration)
        plan = attached.planner.plan(policy, iteration, newest, agreed)
        if plan.changed:
            self._needs_base = self._needs_base or plan.changed
        self._planned_slots = plan.slots

    @property
    def _trouble(self) -> str:
        """Where ranks tell each other that one of them has no restore point of an iteration."""
        return f"log/{self._tiers.host.job}"

    def _tell_others_of_trouble(self) -> None:
        """This rank makes no restore points for a while: what all ranks have in common must stay."""
        if not self._ranks.alone:
            self._ranks.control.remember(self._trouble, "yes")

    def _hear_of_trouble(self) -> None:
        """A rank that fails says so before another one can be two iterations further: nothing is dropped then."""
        if not self._ranks.alone and self.writer.oldest_needed is None and self._ranks.control.recall(self._trouble):
            self.writer.oldest_needed = 0

    def _settle_trouble(self, iteration: int, common: int) -> None:
        """All ranks: the newest iteration that all have is known.

        Args:
            iteration: The present one.
            common: That one; -1 if there is none.
        """
        if common < iteration - _APART:
            self.writer.oldest_needed = max(0, common)
        elif self.writer.oldest_needed is not None:
            self.writer.oldest_needed = None
            if self._ranks.control.rank == 0:
                self._ranks.control.remember(self._trouble, "")

    def _compare_replicas(self, iteration: int) -> None:
        """All ranks: state of which several hold a copy must be the same on all of them.

        Raises:
            AuditError: It is not, and ``audit="raise"``.
        """
        if self._audit == "off":
            return
        attached, rank = self._attached, self._ranks.control.rank
        shared = [op for op in attached.planner.operators.operators if attached.shares.is_shared(op)]
        chosen = [shared[(iteration + turn) % len(shared)] for turn in range(min(_COMPARED_REPLICAS, len(shared)))]
        mine = OperatorSamples(self._live, chosen, 0, attached.thread.fence).read()
        answers = self._ranks.agree("replicas", mine)
        for op in chosen:
            name, holders = op.name, attached.shares.with_copies(op)
            same = {other: answers[other].get(name) for other in holders}
            theirs = [other for other, digest in sorted(same.items()) if digest and digest != mine.get(name)]
            if theirs:
                difference = f"the copies of the ranks {rank} and {theirs} differ"
                self._bus.emit(OperatorAudited(iteration=iteration, operator=name, difference=difference))
                message = (
                    f"after iteration {iteration} the copies of {name!r} on rank {rank} and on "
                    f"rank{'s' if len(theirs) > 1 else ''} {', '.join(map(str, theirs))} differ: their gradients were "
                    "not the same, code changes weights on one of them, or the hardware is at fault"
                )
                if self._audit == "raise":
                    raise AuditError(f"{message}. Training stops (audit='raise').")
                self._say_once(message, warning=True)

    def _capture(
        self,
        iteration: int,
        state: Callable[[], FlatTree],
        record: Callable[[], dict[str, Any]],
        captured_at: float | None = None,
    ) -> BatchToCome | None:
        attached, behind = self._attached, self._open
        try:
            if self._live.problem:
                raise UnsupportedStateError(self._live.problem)
            if self._needs_base:
                behind = self._base_at(iteration)
            assert behind is not None
            digest, static = self._frozen.look(attached.planner.static_part, anew=bool(self._needs_base))
            given = IterationState(
                header=self._header(),
                rest=state(),
                static=static,
                static_digest=digest,
                record=record,
                looked_at=choose_whole(self._live, self._slots, len(self._slots), turn=iteration),
                stops_at_findings=self._audit == "raise",
                round_begins=(iteration - self._base) % len(self._planned_slots) == 0,
                captured_at=time.time() if captured_at is None else captured_at,
            )
        except (RankLostError, NonDeterminismError):
            raise
        except Exception as error:
            # Everything was checked before the first step; what changed since, also in user code that is asked for its
            # state, must not end training.
            self._stop()
            self._tell_others_of_trouble()
            attached.planner.forget_static()
            newest = self.writer.newest
            held = "none" if newest is None else f"that of iteration {newest.iteration}"
            what = f"iteration {iteration} is no restore point"
            self._protection.failed(iteration, what, f"{type(error).__name__}: {error}", error, held)
            return None
        if self._needs_base:  # else they are as they were behind the step
            self._weights.note(iteration)
        self._needs_base = ""
        self._hear_of_trouble()
        self.writer.capture(behind, given)
        self._committing = behind
        turn = self._turn(iteration + 1)
        self._open = LoggedIteration(iteration + 1, turn, self._to_audit(turn, iteration + 1))
        return behind.to_come

    def _to_audit(self, turn: tuple[int, ...], iteration: int) -> tuple[int, Operator] | None:
        """The operator of the slots captured next that is rebuilt and compared: another one in each round."""
        if self._audit == "off" or not self._policy.apart or not turn or turn[0] >= len(self._planned_slots):
            return None
        operators = self._slots[turn[0]].active
        return turn[0], operators[(iteration - self._base) // len(self._planned_slots) % len(operators)]

    def _base_at(self, iteration: int) -> LoggedIteration:
        """What captures all slots together."""
        opened, self._open = self._open, None
        if opened is not None:
            self._attached.thread.drain()
            self.writer.abandon(opened)
        self._slots = self._apart_from_volatile(self._planned_slots)
        self._base = iteration
        self.writer.begin(self._slots)
        return LoggedIteration(iteration, tuple(s for s, plan in enumerate(self._slots) if plan.active))

    def _turn(self, iteration: int) -> tuple[int, ...]:
        """The slots that are captured behind an iteration."""
        count = len(self._planned_slots)
        turn = (iteration - self._base) % count
        slots = (turn, *range(count, len(self._slots)))
        return tuple(slot for slot in slots if self._slots[slot].active)

    def _apart_from_volatile(self, slots: tuple[SlotPlan, ...]) -> tuple[SlotPlan, ...]:
        if not self._volatile:
            return slots

        def is_volatile(op: Operator) -> bool:
            return any(piece.parameter in self._volatile for piece in op.pieces)

        kept = [SlotPlan(active=tuple(op for op in slot.active if not is_volatile(op))) for slot in slots]
        always = tuple(op for slot in slots for op in slot.active if is_volatile(op))
        return (*kept, SlotPlan(active=always))


class _FrozenWatch:
    """Looks closely at parameters that do not train only where something may have changed."""

    def __init__(self, live: LiveState) -> None:
        self._live = live
        self._generation = -1
        self._names: tuple[str, ...] = ()
        self._hidden = False
        self._seen: tuple[list[int], list[bytes]] = ([], [])
        self._digest = ""

    def look(self, look: Callable[[], tuple[str, StaticPart | None]], *, anew: bool) -> tuple[str, StaticPart | None]:
        """Their digest, and what to copy of them, if anything.

        Args:
            look: Looks closely.
            anew: Look in any case.
        """
        live = self._live
        if self._generation != live.generation:
            self._generation, anew = live.generation, True
            trains = set(live.trainable())
            self._names = tuple(name for name in live.parameters if name not in trains)
            # Of some tensor subclasses the values are elsewhere: a counter does not show that they change.
            self._hidden = any(is_wrapper(live.weight(name)) for name in self._names)
        seen = live.versions(self._names, 0)
        if not anew and not self._hidden and seen == self._seen:
            return self._digest, None
        self._seen = seen
        self._digest, static = look()
        return self._digest, static


def why_no_log(live: LiveState, watcher: StepWatcher, draws: DrawWatch) -> str:
    """Why what the optimizers do cannot be done again from what they are given, or "".

    Args:
        live: The live state.
        watcher: What was seen of the optimizers so far.
        draws: What was seen of the random generators in their steps.
    """
    coupled = why_coupled(live)
    if coupled:
        return coupled
    if live.has_inner:
        return "an optimizer works inside another one"
    if watcher.most_closure_calls > 1:
        return "an optimizer evaluates its closure several times per step"
    if draws.names:
        return f"{', '.join(draws.names)} draws random numbers in its step"
    return ""
