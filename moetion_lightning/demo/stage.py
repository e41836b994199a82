"""What the demonstrations share: where they write, how they run and watch a child, and what they show meanwhile."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.testing.folders import run_folders, shared_memory

__all__ = [
    "RECORDING",
    "SPARSE",
    "Checks",
    "KillMidWindow",
    "Progress",
    "add_common_arguments",
    "check_windows",
    "finish",
    "folders",
    "last_step",
    "total",
]

SPARSE = "moetion_lightning.callbacks.SparseExpertCheckpoint"
RECORDING = "moetion_lightning.testing.recording"

# --- settings --------------------------------------------------------------------------------------------------------


def add_common_arguments(parser: argparse.ArgumentParser, *, steps: int, kill_after_windows: int) -> None:
    """Options of every demonstration.

    Args:
        parser: Its parser.
        steps: Default of ``--steps``.
        kill_after_windows: Default of ``--kill-after-windows``.
    """
    add = parser.add_argument
    add("--steps", type=int, default=steps, help=f"optimizer steps of the whole run ({steps})")
    add("--window", type=int, default=4, help="iterations of a window (4)")
    add(
        "--kill-after-windows",
        type=int,
        default=kill_after_windows,
        help=f"committed windows before the kill ({kill_after_windows})",
    )
    add("--dir", type=Path, help="keep configurations, logs and results in this folder")


def check_windows(steps: int, window: int, kill_after_windows: int) -> None:
    """Check that the kill falls into the run, with a window to go back to and steps to go on with.

    Args:
        steps: Optimizer steps of the whole run.
        window: Iterations of a window.
        kill_after_windows: Committed windows before the kill.

    Raises:
        ConfigurationError: It does not.
    """
    needed = window * (kill_after_windows + 2) + 2
    if window < 2 or kill_after_windows < 1 or steps < needed:
        raise ConfigurationError(
            f"{steps} steps with windows of {window}, killed after {kill_after_windows} "
            f"windows; expected a window of at least 2, a kill after at least 1 window, and at least {needed} steps"
        )


def folders(wanted: Path | None) -> contextlib.AbstractContextManager[tuple[Path, Path]]:
    """See :func:`run_folders`.

    Args:
        wanted: The user's folder.
    """
    return run_folders(wanted, "--dir", "moetion-demo-", shared_memory())


# --- watching it -----------------------------------------------------------------------------------------------------


class KillMidWindow:
    """Decides from the events when to kill: some windows are committed and half of the next one is captured.

    Args:
        windows: Committed windows before the kill.
        rank: The rank to kill, in a run of several; only its events count.
    """

    def __init__(self, windows: int, rank: int | None = None) -> None:
        self._windows = windows
        self._rank = rank
        self._committed = 0
        self.last_step = 0
        self.due = False

    def watch(self, events: Sequence[Mapping[str, Any]]) -> bool:
        """Take new events; whether it is time to kill."""
        for event in events:
            if event.get("rank") != self._rank:
                continue
            if event["event"] == "WindowCommitted":
                self._committed += 1
            elif event["event"] == "IterationFinished":
                self.last_step = max(self.last_step, int(event["iteration"]))
            elif event["event"] == "CaptureFinished" and self._committed >= self._windows:
                half = math.ceil(int(event["num_slots"]) / 2)
                self.due = self.due or int(event["slot"]) + 1 == half
        return self.due


def last_step(losses: Path) -> int:
    """Last step that was recorded, from the end of the file."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        with losses.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 1000))
            return int(json.loads(file.read().splitlines()[-1])["global_step"])
    return 0


# --- showing it ------------------------------------------------------------------------------------------------------


class Progress:
    """One line a phase, with a live step counter.

    Args:
        steps: Steps of a run.
        every: Show each so many steps where the output is no terminal.
    """

    def __init__(self, steps: int, every: int = 20) -> None:
        self._steps = steps
        self._live = sys.stdout.isatty()
        self._every = 1 if self._live else every
        self._label = ""
        self._shown = 0

    def phase(self, label: str) -> Callable[[int], None]:
        """Begin a phase; the result shows a step."""
        self._label, self._shown = label, 0
        print(f"[{label}]", end="" if self._live else "\n", flush=True)
        return self._show

    def _show(self, step: int) -> None:
        if step >= self._shown + self._every:
            self._shown = step
            if self._live:
                print(f"\r[{self._label}] step {step}/{self._steps} ", end="", flush=True)
            else:
                print(f"    step {step}/{self._steps}", flush=True)

    def note(self, text: str) -> None:
        """Say something in the middle of a phase, on a line of its own."""
        print(f"\n    {text}" if self._live else f"    {text}", flush=True)

    def done(self, outcome: str) -> None:
        """End the phase."""
        print(f"\r[{self._label}] {outcome:<30}" if self._live else f"    {outcome}", flush=True)


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Outcome of the comparison.

    Args:
        rows: Lines of the table.
        differences: One sentence for each thing that differs.
        equal: Whether everything was compared and nothing differs.
    """

    rows: list[tuple[str, str]]
    differences: list[str]
    equal: bool


def total(results: Mapping[str, Sequence[Any]]) -> Checks:
    """Sum up comparisons (:class:`~moetion_lightning.testing.compare.Comparison`).

    Args:
        results: For each thing that was compared, the outcomes of all ranks.
    """
    rows = []
    for name, parts in results.items():
        different = sum(len(part.differences) for part in parts)
        verdict = "bitwise equal" if all(part.equal for part in parts) else f"{different} differ"
        rows.append((name, f"{verdict} ({sum(part.compared for part in parts)} compared)"))
    every = [part for parts in results.values() for part in parts]
    return Checks(
        rows=rows,
        differences=[difference for part in every for difference in part.differences],
        equal=bool(every) and all(part.equal for part in every),
    )


def finish(rows: Sequence[tuple[str, str]], checks: Checks) -> int:
    """Print the table and the verdict.

    Args:
        rows: Lines of the table, before those of the comparison.
        checks: The comparison.

    Returns:
        Exit status: 0 if everything is equal, 1 otherwise.
    """
    table = [*rows, *checks.rows]
    width = max(len(label) for label, _ in table)
    print()
    for label, value in table:
        print(f"  {label:<{width}}  {value}")
    print()
    if checks.equal:
        print("bitwise equal: parameters, optimizer state, losses")
        return 0
    print("NOT EQUAL:")
    for difference in checks.differences[:10]:
        print(f"  {difference}")
    return 1
