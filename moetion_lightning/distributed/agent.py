"""The agent of a node: starts its ranks, and starts a dead or hung one again without touching the others."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.launcher.api import LaunchConfig

from moetion_lightning.config import (
    GENERATION_VARIABLE,
    LAUNCHER_PID_VARIABLE,
    PREDECESSOR_VARIABLE,
    REPORT_VARIABLE,
)
from moetion_lightning.distributed.bounded_store import StoreSilentError
from moetion_lightning.distributed.exits import NO_PROGRESS, STATE_LOST, STRANDED, JobEndedError, describe_exit
from moetion_lightning.distributed.generations import FINISHED_KEY, announce_loss
from moetion_lightning.distributed.guard import Guard
from moetion_lightning.distributed.lease import check_claim
from moetion_lightning.distributed.progress import STACKS_SIGNAL, Report, Section, State
from moetion_lightning.distributed.rendezvous import NodeRendezvous
from moetion_lightning.distributed.standby import RANK_MODULE, StandbyPool
from moetion_lightning.distributed.torch_elastic import BeginAgainError, SingleRankAgent, end_session
from moetion_lightning.distributed.watchdog import Limits, Sign, Watch, behind_all

__all__ = ["Agent"]

_log = logging.getLogger(__name__)

_STACKS_SECONDS = 2.0
_KILL_SECONDS = 20.0  # a process in uninterruptible sleep (a wedged device, a dead NFS server) does not end
_FRUITLESS = 5  # starts of one rank in a row without progress
_SAME_ERROR = 2  # starts before the first step that end by the same error,
_SAME_ERROR_LATER = 3  # and in a row, without progress, after it
_LIVED_SECONDS = 300.0  # stands for progress in scripts that do not say where they are
_ERROR_LINES = 12
_BEGINNING = 0, -1  # of a script that has not said where it is: stage and iteration


class Stop(Protocol):
    """A signal that asks this process to end, taken and looked at."""

    def install(self) -> None: ...
    def check(self) -> None: ...


@dataclass
class _Rank:
    """What is known of a local rank."""

    report: Report
    watch: Watch
    started: float
    is_done: bool = False
    shot: str = ""  # why
    shot_at: float = 0.0
    tries: int = 0  # since the last progress
    last_error: str = ""
    same_errors: int = 0


@dataclass
class _Loss:
    """Ranks that ended in the same look, by local rank."""

    reasons: dict[int, str] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    error_file: str = ""
    is_stranded: bool = False


class Agent(SingleRankAgent):
    """Runs the ranks of one node until all are done.

    Args:
        config: torchrun's settings.
        program: What the ranks run: arguments of :mod:`~.rank`.
        handler: The rendezvous.
        standby: Number of processes that stand by.
        limits: How long ranks may be silent.
        guard: Ends what is left if this process is killed.
        stop: Raises when this process is to end.
    """

    def __init__(
        self,
        config: LaunchConfig,
        program: Sequence[str],
        handler: NodeRendezvous,
        *,
        standby: int,
        limits: Limits,
        guard: Guard,
        stop: Stop,
    ) -> None:
        super().__init__(config, (*RANK_MODULE, *program), handler)
        self._max_restarts = config.max_restarts
        self._nodes = handler
        self._stop = stop
        self._limits = limits
        self._guard = guard
        self._standbys = StandbyPool(standby, guard)
        self._ranks: dict[int, _Rank] = {}
        self._deaths: Counter[int] = Counter()
        self._failures = self._starts_alone = 0
        self._furthest = _BEGINNING
        self._has_failed = False
        self._looked_at = 0.0
        self._generation = 0

    # --- starting --------------------------------------------------------------------------------------------------

    def variables(self, local_rank: int) -> Mapping[str, str]:
        """Of a rank's first process."""
        return self._new(local_rank, Report(), self._generation)

    def _new(self, local_rank: int, report: Report, generation: int) -> dict[str, str]:
        rank = _Rank(report, Watch(report, self._limits), time.monotonic())
        before = self._ranks.get(local_rank)
        if before is not None:
            rank.tries, rank.last_error, rank.same_errors = before.tries, before.last_error, before.same_errors
            before.report.close()
        self._ranks[local_rank] = rank
        own = {GENERATION_VARIABLE: str(generation), REPORT_VARIABLE: report.path}
        return own | {LAUNCHER_PID_VARIABLE: str(os.getpid())}

    def _first_generation(self) -> int:
        """That in which this node's ranks start: 0, or the one in which they replace those of a lost node."""
        handler, spec = self._nodes, self._worker_group.spec
        place = handler.place
        if place is None or place.taken_over is None:
            return 0
        first = place.slot * spec.local_world_size
        reason = f"node {place.slot} ({place.taken_over}) gave no sign of life for {handler.node_timeout:g} s"
        generation = None
        if not handler.store.add(FINISHED_KEY, 0):
            generation = announce_loss(handler.store, range(first, first + spec.local_world_size), reason)
        if generation is None:
            reason += ", after training had ended"
            if handler.begin_again(reason):
                _log.warning("%s: all ranks begin again from the newest state", reason)
                raise BeginAgainError
            handler.fail(reason)
            raise JobEndedError(f"{reason}: start the job again, it goes on from its state")
        _log.warning("%s: this launcher runs its ranks, in generation %d", reason, generation)
        return generation

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        self._starts_alone = 0
        try:
            self._generation = self._first_generation()
        except BeginAgainError:
            self._rendezvous(worker_group)
            return self._start_workers(worker_group)
        self._looked_at = time.monotonic()
        pids: dict[int, Any] = super()._start_workers(worker_group)
        self._stop.install()  # torch has put its own handlers in its place
        for pid in pids.values():
            self._guard.add(pid)
        return pids

    # --- looking after them ----------------------------------------------------------------------------------------

    def look_after(self) -> bool:
        """Notice who ended or hangs, and start them again. Returns whether all are done."""
        now = time.monotonic()
        elapsed, self._looked_at = now - self._looked_at, now
        self._stop.check()
        reason = self._nodes.stop_reason()
        if reason is not None:
            self._end_at_once()
            raise JobEndedError(reason)
        try:
            loss = self._collect(elapsed, now)
            if loss.reasons:
                self._replace(loss)
            else:
                self._shoot_hung()
        except StoreSilentError:
            self._end_at_once()
            raise
        self._standbys.tend()
        return all(rank.is_done for rank in self._ranks.values())

    def _collect(self, elapsed: float, now: float) -> _Loss:
        loss = _Loss()
        for local_rank, rank in self._ranks.items():
            if rank.is_done:
                continue
            process = self.processes[local_rank]
            rank.watch.look(elapsed)
            status = process.proc.poll()
            if status is None:
                if rank.shot and now - rank.shot_at > _KILL_SECONDS:
                    raise JobEndedError(
                        f"process {process.proc.pid} of rank {self.rank(local_rank)} ({rank.shot}) does not end by "
                        f"SIGKILL within {_KILL_SECONDS:g} s: it sleeps in the kernel, as with a wedged device or file "
                        "system. This node leaves the job; look at it, or restart it, before it is used again.",
                        only_here=True,
                    )
                limit = self._limits.least[Section.STEP]
                if rank.watch.done > limit and not rank.shot:
                    self._shoot(local_rank, f"did not end within {limit:g} s after its program had returned")
                continue
            end_session(process)
            self._guard.remove(process.proc.pid)
            self._note_progress(rank, now)
            if status == 0 or rank.report.state == State.DONE:  # what ends it then changes nothing
                rank.is_done = True
                self._nodes.store.add(FINISHED_KEY, 1)
                continue
            self._judge(local_rank, rank, rank.report.exit_code or status, loss)
        for rank in self._ranks.values():
            self._note_progress(rank, now)
        return loss

    def _note_progress(self, rank: _Rank, now: float) -> None:
        """An iteration that no rank had come to before, or a long life: what failed before is over."""
        at = rank.report.stage, rank.report.iteration
        lived = at == _BEGINNING and now - rank.started > _LIVED_SECONDS
        if at > self._furthest or (lived and rank.tries):
            self._furthest = max(self._furthest, at)
            self._has_failed = False
            for other in self._ranks.values():
                other.tries = other.same_errors = 0

    def _is_alone(self) -> bool:
        """Whether the job has one rank: nobody goes on without it, and it can begin again at any time."""
        return self._worker_group.workers[0].world_size == 1

    def _judge(self, local_rank: int, rank: _Rank, status: int, loss: _Loss) -> None:
        error_file = self.context.error_files[local_rank]
        error, signature = _read_error(error_file)
        loss.reasons[local_rank] = rank.shot or describe_exit(status)
        loss.errors[local_rank] = error
        loss.error_file = loss.error_file or (error_file if error else "")
        loss.is_stranded |= status == STRANDED
        self._deaths[local_rank] += 1
        signature = signature or describe_exit(status)
        rank.same_errors = rank.same_errors + 1 if signature == rank.last_error else 1
        rank.last_error = signature
        name = f"rank {self.rank(local_rank)}"
        if status == STATE_LOST:
            raise JobEndedError(f"{name} cannot go on.\n{self._last_lines(loss)}", STATE_LOST, loss.error_file)
        has_begun = self._furthest >= (1, 0)
        if status > 0 and rank.same_errors >= (_SAME_ERROR_LATER if has_begun else _SAME_ERROR):
            where = "at the same place" if has_begun else "before its first step"
            raise JobEndedError(
                f"{name} ended {rank.same_errors} times {where} by the same error ({signature}): "
                f"the script fails by itself.\n{self._last_lines(loss)}",
                NO_PROGRESS,
                loss.error_file,
            )
        if rank.tries >= _FRUITLESS:
            raise JobEndedError(
                f"{name}: {loss.reasons[local_rank]}: {rank.tries + 1} starts in a row made no progress.\n"
                + self._last_lines(loss),
                NO_PROGRESS,
                loss.error_file,
            )

    def _replace(self, loss: _Loss) -> None:
        reason = "; ".join(f"rank {self.rank(r)}: {text}" for r, text in loss.reasons.items())
        self._check_may_replace(loss, reason)
        done = self._nodes.store.add(FINISHED_KEY, 0)
        if done:
            self._all_again(loss, f"{reason}, after {done} ranks had already finished")
        if loss.is_stranded:
            self._all_again(loss, f"{reason}, and the others cannot take it back")
        self._standbys.rest()
        for rank in self._ranks.values():
            rank.watch.disturb()
        generation = self._announce(loss, reason)
        if generation is None:
            self._all_again(loss, f"{reason}, after training had ended")
        for local_rank, text in loss.reasons.items():
            self._ranks[local_rank].tries += 1
            process, how = self._start_again(local_rank, generation, text)
            _log.warning(
                "rank %d: %s; goes on as process %d, %s, in generation %d (failure %d of at most %d)",
                self.rank(local_rank),
                text,
                process.proc.pid,
                how,
                generation,
                self._failures,
                self._max_restarts,
            )

    def _announce(self, loss: _Loss, reason: str) -> int | None:
        if self._is_alone():
            self._starts_alone += 1  # it begins as the first process did, with keys of its own
            return 0
        return announce_loss(self._nodes.store, [self.rank(r) for r in loss.reasons], reason)

    def _start_again(self, local_rank: int, generation: int, reason: str) -> tuple[SubprocessHandler, str]:
        variables = {PREDECESSOR_VARIABLE: reason}
        if self._starts_alone:
            variables["TORCHELASTIC_RUN_ID"] = f"{self._nodes.run_id}.{self._starts_alone}"
        given = self.prepare(local_rank, {**variables, GENERATION_VARIABLE: str(generation)})
        env = {name: value for name, value in given.env.items() if name != REPORT_VARIABLE}  # it has one of its own
        argv = given.args[len(RANK_MODULE) :]
        taken = self._standbys.take({"env": env, "argv": argv, "stdout": given.stdout, "stderr": given.stderr})
        if taken is not None:
            process: SubprocessHandler = taken[0]
            self._new(local_rank, taken[1], generation)
        else:
            own = self._new(local_rank, Report(), generation)
            process = self.start(local_rank, replace(given, env={**given.env, **own}))
        self._guard.add(process.proc.pid)
        self.replace(local_rank, process)
        return process, "started anew" if taken is None else "which stood by"

    def _check_may_replace(self, loss: _Loss, reason: str) -> None:
        handler = self._nodes
        refused = check_claim(handler.store, handler.place) if handler.place is not None else None
        if refused is not None:
            raise JobEndedError(refused)
        # Ranks that die of one another's death are one failure; a rank that dies once more is another one.
        if not self._has_failed or (any(self._ranks[r].tries for r in loss.reasons) and not loss.is_stranded):
            self._failures += 1
        self._has_failed = True
        if self._failures > self._max_restarts:
            counts = ", ".join(f"rank {self.rank(r)}: {n}" for r, n in sorted(self._deaths.items()))
            raise JobEndedError(
                f"{reason}: more than {self._max_restarts} failures on this node (--max-restarts). "
                f"Deaths by rank: {counts}.\n" + self._last_lines(loss),
                error_file=loss.error_file,
            )

    def _all_again(self, loss: _Loss, reason: str) -> NoReturn:
        """Single ranks cannot join the others: all begin again if they can."""
        if self._nodes.begin_again(reason):
            _log.warning(
                "%s: all ranks begin again from the newest state (failure %d of at most %d)",
                reason,
                self._failures,
                self._max_restarts,
            )
            for local_rank in loss.reasons:
                self._ranks[local_rank].tries += 1
            raise BeginAgainError
        raise JobEndedError(
            f"{reason}: the job cannot be completed together any more. "
            "Start the same command again; it continues from the newest state.\n" + self._last_lines(loss),
            error_file=loss.error_file,
        )

    def _last_lines(self, loss: _Loss) -> str:
        parts = []
        for local_rank, text in loss.errors.items():
            lines = text or "(no Python error was reported; see its output above)"
            indented = "\n".join(f"    {line}" for line in lines.splitlines())
            parts.append(f"last lines of rank {self.rank(local_rank)}:\n{indented}")
        return "\n".join(parts)

    # --- hangs -----------------------------------------------------------------------------------------------------

    def _shoot_hung(self) -> None:
        living = {r: rank for r, rank in self._ranks.items() if not rank.is_done}
        lease = self._nodes.lease
        standings = {r: rank.watch.standing() for r, rank in living.items()}
        if lease is not None:
            lease.standings = list(standings.values())
        if any(rank.shot for rank in living.values()):
            return  # the others may have waited for it
        if not any(standing[-1] >= Sign.SILENT for standing in standings.values()):
            return
        try:
            elsewhere = [] if lease is None else lease.others()
        except StoreSilentError:
            return  # the lease has a limit of its own
        hung = behind_all(standings, elsewhere)
        for local_rank, why in [(r, living[r].watch.complaint() or "") for r in hung]:
            self._shoot(local_rank, why)

    def _shoot(self, local_rank: int, why: str) -> None:
        rank, process = self._ranks[local_rank], self.processes[local_rank]
        stacks = _stacks(process, rank.report)
        _log.warning("rank %d: %s; its stacks:\n%s", self.rank(local_rank), why, stacks)
        rank.shot, rank.shot_at = why, time.monotonic()
        end_session(process)
        for other in self._ranks.values():
            other.watch.disturb()

    # --- the end ---------------------------------------------------------------------------------------------------

    def _end_at_once(self) -> None:
        """Others may take this node's place soon: nothing of it may go on then."""
        for process in self.processes.values():
            end_session(process)

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        self._standbys.close()
        super()._shutdown(*args, **kwargs)
        for process in self.processes.values():
            if process.proc.poll() is not None:
                self._guard.remove(process.proc.pid)
        for rank in self._ranks.values():
            rank.report.close()


def _stacks(process: SubprocessHandler, report: Report) -> str:
    before = report.stacks()
    if report.beats or report.ticks:
        process.proc.send_signal(STACKS_SIGNAL)
    deadline = time.monotonic() + _STACKS_SECONDS
    text = ""
    while time.monotonic() < deadline:
        time.sleep(0.1)
        now = report.stacks().removeprefix(before)
        if now and now == text:  # all of it is there
            return now
        text = now
    return text or "(none: the process does not answer; it is stopped, or sleeps in the kernel)"


def _read_error(path: str) -> tuple[str, str]:
    """The last lines of the error that a rank wrote down, and its kind and text in one line."""
    try:
        with open(path, encoding="utf-8") as file:
            message = json.load(file)["message"]
    except (OSError, ValueError, KeyError):
        return "", ""
    if isinstance(message, str):
        return message, message
    lines = str(message["extraInfo"]["py_callstack"]).splitlines()
    return "\n".join(lines[-_ERROR_LINES:]), str(message["message"])
