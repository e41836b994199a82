"""What :class:`~moetion_lightning.testing.step_recorder.StepRecorder` has written, read again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetion_lightning.testing.processes import read_lines

__all__ = ["Execution", "RankRecords", "Recording", "Start", "read_recording", "step_of_iteration"]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """One optimizer step, as one process executed it.

    Args:
        step: Its number, from 1.
        start: Which start of the rank it was, from 1.
        is_replay: Whether it rebuilt a restored state: the state behind it is whole only at the end of the replay.
        is_undisturbed: Whether neither this rank's process nor its state was replaced before.
        quantities: By kind ("inputs", "settings", "losses", "tensors", "rng"), values by name.
    """

    step: int
    start: int
    is_replay: bool
    is_undisturbed: bool
    quantities: dict[str, dict[str, str]]
    #: Norms of tensors, for messages.
    norms: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Start:
    """One process of a rank.

    Args:
        pid: Its process id.
        began_at: Step behind which it began to train; 0: at the beginning.
        found: Where the state came from that it continued; "" if there was none.
        first: First step that it executed; 0 if none.
        last: Last one.
        restored: Steps to which it went back in its middle, without a new process.
    """

    pid: int
    began_at: int = 0
    found: str = ""
    first: int = 0
    last: int = 0
    restored: list[int] = field(default_factory=list)


@dataclass(kw_only=True)
class RankRecords:
    """One rank's records of all its starts, in order."""

    starts: list[Start] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)
    #: The step behind which an iteration was complete, by the fit of the script (from 1) and the iteration.
    iterations: dict[tuple[int, int], int] = field(default_factory=dict)
    committed: bool = False
    ended: bool = False

    @property
    def last_step(self) -> int:
        """The highest step that was executed."""
        return max((execution.step for execution in self.executions), default=0)

    def by_step(self) -> dict[int, list[Execution]]:
        """All executions of each step, in order."""
        found: dict[int, list[Execution]] = {}
        for execution in self.executions:
            found.setdefault(execution.step, []).append(execution)
        return dict(sorted(found.items()))

    def add(self, record: dict[str, Any]) -> None:
        """Take a line."""
        kind = record["kind"]
        if kind == "start":
            self.starts.append(Start(pid=record["pid"]))
        elif kind == "iteration":
            self.iterations[record["fit"], record["iteration"]] = record["step"]
        elif kind == "committed":
            self.committed = True
        elif kind == "found":
            self.starts[-1].found = record["tier"]
        elif kind == "restored":
            self._restored(record["step"])
        elif kind == "step":
            self._step(record)
        elif kind == "end":
            self.ended = True

    def _restored(self, step: int) -> None:
        start = self.starts[-1]
        if start.first:
            start.restored.append(step)
        else:
            start.began_at = step

    def _step(self, record: dict[str, Any]) -> None:
        start = self.starts[-1]
        start.first = start.first or record["step"]
        start.last = record["step"]
        tensors = record.get("tensors", {})
        quantities = {
            "inputs": _numbered("micro-batch", record["inputs"]),
            "settings": record["settings"],
            "losses": _numbered("micro-batch", record["losses"]),
            "tensors": {name: digest for name, (digest, _) in tensors.items()},
            "rng": record["rng"],
        }
        self.executions.append(
            Execution(
                step=record["step"],
                start=len(self.starts),
                is_replay=record["replay"],
                is_undisturbed=len(self.starts) == 1 and not start.restored,
                quantities=quantities,
                norms={name: norm for name, (_, norm) in tensors.items() if norm},
            )
        )


def _numbered(what: str, values: list[str]) -> dict[str, str]:
    return {f"{what} {number}": value for number, value in enumerate(values, start=1)}


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One run.

    Args:
        ranks: Records by global rank.
    """

    ranks: dict[int, RankRecords]

    @property
    def last_step(self) -> int:
        """The highest step that some rank executed."""
        return max((records.last_step for records in self.ranks.values()), default=0)


def read_recording(folder: str | Path) -> Recording:
    """Read a run's records; without ranks if there are none.

    Args:
        folder: Where its recorders wrote.
    """
    ranks: dict[int, RankRecords] = {}
    for path in sorted(Path(folder).glob("rank-*-*.jsonl")):
        records = ranks.setdefault(int(path.name.split("-")[1]), RankRecords())
        for line in read_lines(path):
            records.add(line)
    return Recording(ranks=dict(sorted(ranks.items())))


def step_of_iteration(folder: str | Path, rank: int, fit: int, iteration: int) -> int:
    """Behind which optimizer step an iteration of the engine was complete.

    Args:
        folder: Where the recorders write.
        rank: This rank; others are asked where it has not written of that iteration: its process died too early.
        fit: Which fit of the script it is of, from 1: each one counts its iterations anew.
        iteration: The iteration.

    Returns:
        The step; so many steps behind the earlier fits, where nobody has written of it.
    """
    ranks = read_recording(folder).ranks
    for number in sorted(ranks, key=lambda other: (other != rank, other)):
        if (fit, iteration) in ranks[number].iterations:
            return ranks[number].iterations[fit, iteration]
    known = [(key[0], step) for records in ranks.values() for key, step in records.iterations.items()]
    return max((step for earlier, step in known if earlier < fit), default=0) + iteration
