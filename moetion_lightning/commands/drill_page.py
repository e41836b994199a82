"""The one page that a drill says: whether this script recovers exactly, what differs first, and what to change."""

from __future__ import annotations

import html
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from moetion_lightning.testing.divergence import Outcome
from moetion_lightning.testing.drill_plan import Kill
from moetion_lightning.testing.records import RankRecords, Recording

__all__ = ["Page", "restarts"]

_COUNTED = {
    "losses": "losses",
    "inputs": "model inputs (sample order)",
    "parameter": "parameters",
    "optimizer": "optimizer state",
    "buffer": "buffers",
    "settings": "optimizer settings (learning rates)",
    "rng": "random generators",
}
_COLUMNS = 76
_STYLE = "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}pre{white-space:pre-wrap}"


@dataclass(frozen=True, kw_only=True)
class Restart:
    """What came of a kill.

    Args:
        rank: Global rank of the processes.
        reached: Last step before it.
        source: Where the state came from; "" if from nowhere.
        step: Step behind which training went on.
        replayed: Steps that only rebuilt the state.
        again: Steps that were done again in all.
        trained: Whether it came to train: the next kill may have come before.
    """

    rank: int
    reached: int
    source: str
    step: int
    replayed: int
    again: int
    trained: bool

    @property
    def is_anew(self) -> bool:
        """Whether it trained from the beginning, as if there had been nothing to go back to."""
        return self.trained and not self.source


def restarts(recording: Recording) -> list[Restart]:
    """All starts that followed on a kill, in their order, rank by rank."""
    found = []
    for rank, records in recording.ranks.items():
        reached = 0
        for number, start in enumerate(records.starts, start=1):
            if number > 1:
                found.append(
                    Restart(
                        rank=rank,
                        reached=reached,
                        source=start.found,
                        step=start.began_at,
                        replayed=_replayed(records, number),
                        again=_again(records, number, reached),
                        trained=start.first > 0,
                    )
                )
            reached = max(reached, start.last)
    return found


def _again(records: RankRecords, start: int, reached: int) -> int:
    return len({execution.step for execution in records.executions if execution.start == start} & {*range(reached + 1)})


def _replayed(records: RankRecords, start: int) -> int:
    return sum(execution.start == start and execution.is_replay for execution in records.executions)


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything that is said.

    Args:
        command: What was drilled.
        outcome: Of the comparison.
        recording: Of the disturbed run.
        kills: The kills that were done.
        planned: How many were planned.
        twin: What the twin was.
        divergence: Lines about what differs first; empty if nothing does.
        causes: Its likely causes.
        remedy: What to change.
        warnings: What else the user should know.
        seconds: Of the disturbed run and of its twin.
        refused: Why restarts did not continue, in their own words.
    """

    command: str
    outcome: Outcome
    recording: Recording
    kills: tuple[Kill, ...]
    planned: int
    twin: str
    divergence: tuple[str, ...]
    causes: tuple[str, ...]
    remedy: str
    warnings: tuple[str, ...]
    seconds: tuple[float, float]
    refused: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the script recovers exactly."""
        return self.outcome.exact and not self._anew()

    def _anew(self) -> list[Restart]:
        return [restart for restart in restarts(self.recording) if restart.is_anew]

    @property
    def verdict(self) -> str:
        """One sentence."""
        kills = f"{len(self.kills)} kill{'s'[: len(self.kills) != 1]}"
        if self.exact:
            return f"EXACT: after {kills} this script is bit for bit the run that never failed."
        if self._anew() and self.outcome.divergence is None:
            return f"NOT RECOVERED: of {kills}, {len(self._anew())} began again at the beginning."
        if self.outcome.divergence is None:
            return "NOTHING COMPARED: the runs have no step in common."
        if self.outcome.divergence.is_undisturbed:
            return "DIFFERS even without a failure: two runs of this script are not the same."
        return f"DIFFERS: after {kills} this script is not the run that never failed."

    def sections(self) -> list[tuple[str, list[str]]]:
        """Headings and their lines."""
        found = [("", [self.verdict, f"  {self.command}"])]
        if self.divergence:
            found.append(("What differs first", list(self.divergence)))
            found.append(("Likely cause", [f"- {cause}" for cause in self.causes]))
            found.append(("What to change", [self.remedy]))
        elif self._anew():
            found.append(("What to change", [_NOT_FOUND]))
        found.append(("Kills", self._kills()))
        found.append(("Compared", self._compared()))
        if self.warnings:
            found.append(("Note", [f"- {warning}" for warning in self.warnings]))
        return found

    def _kills(self) -> list[str]:
        after = restarts(self.recording)
        names = [kill.place for kill in self.kills]
        if len(self.recording.ranks) > 1:  # kill by kill, the restarts of its rank in their order
            left = list(after)
            after = []
            for kill in self.kills:
                own = next((restart for restart in left if restart.rank == kill.rank), None)
                if own is not None:
                    left.remove(own)
                    after.append(own)
            names = [f"rank {kill.rank}, {kill.place}" for kill in self.kills]
        rows = [["where", "behind step", "back at", "again", "replayed", "from"]]
        for name, restart in zip(names, after):
            source = restart.source.partition(",")[0]  # a stage's also says where its window was
            numbers = [restart.step, restart.again, restart.replayed] if restart.trained else "---"
            if not restart.trained:
                source = "killed again before it trained"
            rows.append([name, str(restart.reached), *map(str, numbers), source or "nowhere: it began anew"])
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = []
        for where, *columns, source in rows:
            shown = "  ".join(column.rjust(width) for column, width in zip(columns, widths[1:]))
            lines.append(f"{where.ljust(widths[0])}  {shown}  {source}")
        lines += [f"began anew: {reason}" for reason in self.refused]
        if len(self.kills) < self.planned:
            lines.append(f"{len(self.kills)} of {self.planned} planned kills came: the run ended before the others")
        return lines

    def _compared(self) -> list[str]:
        outcome = self.outcome
        ranks = f", {len(self.recording.ranks)} ranks" if len(self.recording.ranks) > 1 else ""
        counts = ", ".join(f"{outcome.compared[key]} {name}" for key, name in _COUNTED.items() if outcome.compared[key])
        return [
            f"with {self.twin}",
            f"{outcome.steps} steps{ranks}, in {outcome.executions} executions: {counts}",
            f"{self.seconds[0]:.0f} s with its restarts, {self.seconds[1]:.0f} s undisturbed",
        ]

    def text(self) -> str:
        """For a terminal."""
        blocks = []
        for heading, lines in self.sections():
            if heading not in ("", "Kills"):
                lines = [part for line in lines for part in _wrapped(line)]
            blocks.append("\n".join([heading, *(f"  {line}" for line in lines)] if heading else lines))
        return "\n\n".join(blocks)

    def markdown(self) -> str:
        """For a file."""
        blocks = ["# Drill", ""]
        for heading, lines in self.sections():
            blocks += [f"## {heading}", ""] if heading else []
            blocks += ["```", *lines, "```", ""]
        return "\n".join(blocks)

    def html(self) -> str:
        """For a browser."""
        parts = [f"<!doctype html><meta charset=utf-8><title>Drill</title><style>{_STYLE}</style><h1>Drill</h1>"]
        for heading, lines in self.sections():
            parts += [f"<h2>{html.escape(heading)}</h2>"] if heading else []
            parts.append(f"<pre>{html.escape(chr(10).join(lines))}</pre>")
        return "\n".join(parts) + "\n"

    def data(self) -> dict[str, Any]:
        """For a program."""
        outcome = self.outcome
        return {
            "exact": self.exact,
            "verdict": self.verdict,
            "command": self.command,
            "divergence": None if outcome.divergence is None else asdict(outcome.divergence),
            "causes": list(self.causes),
            "remedy": self.remedy,
            "kills": [asdict(kill) for kill in self.kills],
            "planned": self.planned,
            "restarts": [asdict(restart) for restart in restarts(self.recording)],
            "steps": outcome.steps,
            "executions": outcome.executions,
            "compared": outcome.compared,
            "twin": self.twin,
            "refused": list(self.refused),
            "warnings": list(self.warnings),
            "seconds": {"disturbed": self.seconds[0], "twin": self.seconds[1]},
        }


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip(" -")))
    return textwrap.wrap(line, _COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


_NOT_FOUND = (
    "A restart must find the windows of the same job: the same command, model and settings. What is drawn anew in each "
    "process (names, times, seeds) must not be part of them. Its output says why none was taken: see --keep."
)
