"""The agent of a node: starts its ranks, and starts a dead one again without touching the others."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch.distributed.distributed_c10d import Store

from moetion_lightning.config import GENERATION_VARIABLE
from moetion_lightning.distributed.generations import FINISHED_KEY, announce_loss
from moetion_lightning.distributed.heartbeat import LOST_EXIT
from moetion_lightning.distributed.launch_settings import Launch
from moetion_lightning.distributed.processes import Child, Program, describe_exit, end_all
from moetion_lightning.errors import LaunchError

__all__ = ["Agent"]

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 15.0
_REFILL_SECONDS = 5.0
_STANDBY_FAILURES = 3


class StandbyPool:
    """Processes that have imported everything and wait to become a rank.

    Args:
        size: Number of processes to keep.
        env: Their environment.
    """

    def __init__(self, size: int, env: Mapping[str, str]) -> None:
        self._size = size
        self._env = env
        self._children: list[Child] = []
        self._refill_at = 0.0
        self._failures = 0

    def tend(self) -> None:
        """Notice who is ready or dead, and start new ones when it is time."""
        for child in list(self._children):
            was_ready = child.is_ready
            child.listen(0.0)
            if child.is_ready and not was_ready:
                self._failures = 0
                _log.info("process %d stands by", child.pid)
            status = child.ended()
            if status is not None:
                self._children.remove(child)
                self._failures += 1
                self.rest()
                _log.warning("process %d, which stood by, ended: %s", child.pid, describe_exit(status))
                if self._failures == _STANDBY_FAILURES:
                    _log.warning("%d of them ended in a row: no more are started", self._failures)
        if self._failures < _STANDBY_FAILURES and time.monotonic() >= self._refill_at:
            while len(self._children) < self._size:
                self._children.append(Child.stand_by(self._env))

    def take(self, program: Program, env: Mapping[str, str]) -> Child | None:
        """Turn a ready process into a rank; None if none is ready."""
        for child in [c for c in self._children if c.is_ready]:
            self._children.remove(child)
            self.rest()
            if child.give_order(program, env):
                return child
            child.kill()
        return None

    def rest(self) -> None:
        """Start none for a while: a recovery needs the processor."""
        self._refill_at = time.monotonic() + _REFILL_SECONDS

    def close(self) -> None:
        """End all."""
        for child in self._children:
            child.kill()
        self._children.clear()


@dataclass
class _Loss:
    """Ranks that ended in the same look, by local rank."""

    reasons: dict[int, str] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class Agent:
    """Runs the ranks of one node until all are done.

    Args:
        settings: What to run.
        environment: Of all processes of the node.
        first_rank: Global rank of local rank 0.
        store: The run's store, for this object alone.
        stop_reason: Asked in each look; a text ends everything.
        refuse: Asked before a loss is announced; a text means that these ranks are not this node's any more.
    """

    def __init__(
        self,
        settings: Launch,
        environment: Mapping[str, str],
        first_rank: int,
        store: Store,
        *,
        stop_reason: Callable[[], str | None],
        refuse: Callable[[], str | None],
    ) -> None:
        self._settings = settings
        self._environment = environment
        self._first_rank = first_rank
        self._store = store
        self._stop_reason = stop_reason
        self._refuse = refuse
        self._standbys = StandbyPool(settings.standby, environment)
        self._workers: dict[int, Child] = {}
        self._restarts: Counter[int] = Counter()

    def run(self, generation: int) -> None:
        """Start all ranks, and look after them until each has ended with exit code 0.

        Args:
            generation: The generation in which they start: 0, or the one in which this node replaces a lost one.

        Raises:
            LaunchError: The job cannot go on, or must stop. All ranks are ended then.
        """
        try:
            for local_rank in range(self._settings.nproc_per_node):
                self._workers[local_rank] = self._start(local_rank, generation)
            self._look_after()
        finally:
            self._standbys.close()
            end_all(list(self._workers.values()), _GRACE_SECONDS)

    def _start(self, local_rank: int, generation: int) -> Child:
        env = self._rank_environment(local_rank, generation)
        return Child.start(self._settings.program, {**self._environment, **env})

    def _rank_environment(self, local_rank: int, generation: int) -> dict[str, str]:
        return {
            "RANK": str(self._rank(local_rank)),
            "LOCAL_RANK": str(local_rank),
            GENERATION_VARIABLE: str(generation),
        }

    def _look_after(self) -> None:
        looked_at = time.monotonic()
        while self._workers:
            time.sleep(_POLL_SECONDS)
            reason = self._stop_reason()
            if reason is not None:
                raise LaunchError(reason)
            now = time.monotonic()
            loss = self._collect(now - looked_at)
            looked_at = now
            if loss.reasons:
                self._replace(loss)
            self._standbys.tend()

    def _collect(self, elapsed_seconds: float) -> _Loss:
        loss = _Loss()
        for local_rank, child in list(self._workers.items()):
            child.listen(elapsed_seconds)
            hung = child.silent_seconds > self._settings.hang_timeout
            if hung:
                child.kill()
            status = child.ended()
            if status is None:
                continue
            if status == 0 or child.is_done:  # what ends a process whose program has returned changes nothing
                del self._workers[local_rank]
                self._store.add(FINISHED_KEY, 1)
                continue
            silent = f"hung: no heartbeat for {self._settings.hang_timeout:g} s"
            loss.reasons[local_rank] = silent if hung else describe_exit(status)
            loss.errors[local_rank] = child.error
            if status == LOST_EXIT:
                raise LaunchError(f"rank {self._rank(local_rank)} cannot go on.\n{self._last_lines(loss)}")
        return loss

    def _replace(self, loss: _Loss) -> None:
        reason = "; ".join(f"rank {self._rank(r)}: {text}" for r, text in loss.reasons.items())
        self._check_may_replace(loss, reason)
        self._standbys.rest()
        generation = announce_loss(self._store, [self._rank(r) for r in loss.reasons], reason)
        for local_rank, text in loss.reasons.items():
            env = self._rank_environment(local_rank, generation)
            taken = self._standbys.take(self._settings.program, env)
            child = taken or self._start(local_rank, generation)
            self._workers[local_rank] = child
            how = "which stood by" if taken else "started anew"
            _log.warning(
                "rank %d: %s; goes on as process %d, %s, in generation %d (restart %d of at most %d)",
                self._rank(local_rank),
                text,
                child.pid,
                how,
                generation,
                self._restarts.total(),
                self._settings.max_restarts,
            )

    def _check_may_replace(self, loss: _Loss, reason: str) -> None:
        refused = self._refuse()
        if refused is not None:
            raise LaunchError(refused)
        done = self._store.add(FINISHED_KEY, 0)
        if done:
            raise LaunchError(
                f"{reason}, after {done} ranks had already finished: the job cannot be completed together any more. "
                "Start the same command again; it continues from the newest state.\n" + self._last_lines(loss)
            )
        self._restarts.update(loss.reasons.keys())
        if self._restarts.total() > self._settings.max_restarts:
            counts = ", ".join(f"rank {self._rank(r)}: {n}" for r, n in sorted(self._restarts.items()))
            raise LaunchError(
                f"{reason}: more than {self._settings.max_restarts} restarts on this node (--max-restarts). "
                f"Deaths by rank: {counts}.\n" + self._last_lines(loss)
            )

    def _last_lines(self, loss: _Loss) -> str:
        parts = []
        for local_rank, text in loss.errors.items():
            lines = text or "(no Python error was reported; see its output above)"
            parts.append(f"last lines of rank {self._rank(local_rank)}:\n" + _indent(lines))
        return "\n".join(parts)

    def _rank(self, local_rank: int) -> int:
        return self._first_rank + local_rank


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
