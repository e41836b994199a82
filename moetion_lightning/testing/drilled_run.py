"""A run of a user's command in a folder of its own, left alone or killed as planned and started again each time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetion_lightning.testing.drill_plan import ANYTIME, Kill, Kills
from moetion_lightning.testing.processes import RunError, Tail, last_output, run_child
from moetion_lightning.testing.records import Recording, read_recording

__all__ = ["DrilledRun", "NotRestartedError"]

_KILLED = -signal.SIGKILL


class NotRestartedError(RunError):
    """The run could not go on after a kill."""


@dataclass(kw_only=True)
class DrilledRun:
    """One run.

    Args:
        folder: Its folder: ``work`` is where the command runs, ``records`` what was recorded.
        arguments: The command, as arguments of ``python -m``.
        variables: Changes of its environment.
        timeout_seconds: How long one start may take.
        starts_ranks: Whether the command is a launcher, which starts lost ranks again by itself.
        show: Called with the newest step while it runs.
    """

    folder: Path
    arguments: Sequence[str]
    variables: dict[str, str | None]
    timeout_seconds: float
    starts_ranks: bool = False
    show: Callable[[int], None] = lambda step: None
    starts: int = 0

    @property
    def records(self) -> Path:
        """Folder of the records."""
        return self.folder / "records"

    @property
    def log(self) -> Path:
        """What the command said."""
        return self.folder / "output.log"

    def recording(self) -> Recording:
        """What was recorded so far."""
        return read_recording(self.records)

    def execute(self, plan: Path | None = None) -> int:
        """Run the command to its end, as often as it takes.

        Args:
            plan: Folder of the kills; None: it is left alone.

        Returns:
            How many kills were done.

        Raises:
            NotRestartedError: It failed after a kill.
            RunError: It failed or hung, or was killed by somebody else.
        """
        kills = None if plan is None else Kills(plan)
        while True:
            before = 0 if kills is None else kills.done
            self.starts += 1
            watch = _Watch(self.records, kills, self.show, kills_ranks=self.starts_ranks)
            status = run_child(
                self.arguments,
                self.log,
                watch.look,
                folder=self.folder / "work",
                variables=self.variables,
                timeout_seconds=self.timeout_seconds,
            )
            done = 0 if kills is None else kills.done
            if status == 0:
                return done
            if status != _KILLED or done == before:
                kind = NotRestartedError if done else RunError
                after = f" after {done} kills" if done else ""
                raise kind(f"start {self.starts} ended with status {status}{after}; {last_output(self.log)}")


class _Watch:
    """Follows the records of a start, and kills it when it is time for a kill from outside."""

    def __init__(
        self, records: Path, kills: Kills | None, show: Callable[[int], None], *, kills_ranks: bool = False
    ) -> None:
        self._records = records
        self._kills = kills
        self._show = show
        self._kills_ranks = kills_ranks
        self._older = frozenset(records.glob("rank-*.jsonl"))
        self._tails: dict[Path, Tail] = {}
        self._pids: dict[int, int] = {}
        self._steps: dict[int, int] = {}
        self._step_seconds = 0.0
        self._stepped_at = 0.0
        self._committed = False
        self._due_at: float | None = None

    def look(self) -> bool:
        """Take new records; whether to kill the command itself."""
        for path in self._records.glob("rank-*.jsonl"):
            if path not in self._older:
                tail = self._tails.setdefault(path, Tail(path))
                for record in tail.new():
                    self._take(int(path.name.split("-")[1]), record)
        kill = None if self._kills is None else self._kills.next()
        return kill is not None and kill.phase == ANYTIME and self._kill(kill)

    def _take(self, rank: int, record: dict[str, Any]) -> None:
        if record["kind"] == "start":
            self._pids[rank] = record["pid"]
        elif record["kind"] in ("committed", "found"):
            self._committed = True
        elif record["kind"] == "step":
            now = time.monotonic()
            self._step_seconds, self._stepped_at = now - (self._stepped_at or now), now
            self._steps[rank] = record["step"]
            self._show(record["step"])

    def _kill(self, kill: Kill) -> bool:
        if not self._committed or self._steps.get(kill.rank, 0) < kill.step:
            return False
        if self._due_at is None:
            self._due_at = time.monotonic() + kill.delay * self._step_seconds
        if time.monotonic() < self._due_at:
            return False
        assert self._kills is not None
        self._due_at = None
        if not self._kills.take(kill, ANYTIME):
            return False
        if self._kills_ranks:
            os.kill(self._pids[kill.rank], signal.SIGKILL)
        return not self._kills_ranks
