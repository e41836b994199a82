"""A job of several ranks, one of which is killed from outside: what the demonstrations of many processes share.

A job is an ordinary ``moetion launch ... fit`` command in child processes. The kill comes from outside: the
demonstration reads the job's event file and sends SIGKILL to one rank, by its process id, while it captures a window.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moetion_lightning.demo.recovery import Recovery
from moetion_lightning.demo.stage import (
    RECORDING,
    SPARSE,
    Checks,
    KillMidWindow,
    Progress,
    add_common_arguments,
    check_windows,
    finish,
    folders,
    last_step,
    total,
)
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.recipes import recipe_path
from moetion_lightning.testing.processes import RunError, Tail, last_output, read_lines, run_child

__all__ = ["Job", "JobOptions", "add_job_arguments", "compare", "from_arguments", "read_recipe", "run_jobs"]

_STANDS_BY = "stands by"


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Settings of a demonstration with several ranks.

    Args:
        folder: Where configurations, logs and results go.
        memory_dir: Base directory of the host-memory tier.
        ranks: Processes of the job.
        kill_rank: The rank that is killed.
        standby: Processes that stand by; the kill waits until they are ready.
        steps: Optimizer steps of the whole run.
        window: Iterations of a window.
        kill_after_windows: Kill when this many windows are committed and the next one is half captured.
    """

    folder: Path
    memory_dir: Path
    ranks: int = 4
    kill_rank: int = 2
    standby: int = 0
    steps: int = 40
    window: int = 4
    kill_after_windows: int = 3

    def __post_init__(self) -> None:
        check_windows(self.steps, self.window, self.kill_after_windows)
        if self.ranks < 2:
            raise ConfigurationError(f"--ranks {self.ranks}: expected at least 2")
        if not 0 <= self.kill_rank < self.ranks:
            raise ConfigurationError(f"--kill-rank {self.kill_rank}: expected 0 to {self.ranks - 1}")
        if self.standby < 0:
            raise ConfigurationError(f"--standby {self.standby}: expected 0 or more")


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every demonstration with several ranks.

    Args:
        parser: Its parser.
    """
    parser.add_argument("--standby", type=int, default=0, metavar="K", help="processes that stand by (0)")
    add_common_arguments(parser, steps=40, kill_after_windows=3)


def from_arguments(name: str, options: argparse.Namespace, demo: Callable[[dict[str, Any]], int]) -> int:
    """Carry out a demonstration in its folders.

    Args:
        name: Its command, for messages.
        options: Parsed arguments.
        demo: The demonstration; gets the common settings as keyword arguments of :class:`JobOptions`.

    Returns:
        Its exit status, or 2 if a run could not be carried out.
    """
    common = ("standby", "steps", "window", "kill_after_windows")
    try:
        with folders(options.dir) as (folder, memory):
            given = {key: getattr(options, key) for key in common}
            return demo({"folder": folder, "memory_dir": memory, **given})
    except RunError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2


class Job:
    """One job: its configuration, its files, and the launcher that runs its ranks.

    Args:
        options: Settings.
        name: Of its folder.
        config: What it trains, of ``moetion fit``; its SparseExpertCheckpoint gets the settings of the demonstration.
        recorders: Further callbacks by class path, each with the name of the file that it writes.
    """

    def __init__(
        self, options: JobOptions, name: str, config: Mapping[str, Any], recorders: Mapping[str, str] | None = None
    ) -> None:
        self.folder = options.folder / name
        self.folder.mkdir()
        self.log = self.folder / "output.log"
        self.events = self.folder / "events.jsonl"
        self.losses = [self.folder / f"losses-{rank}.jsonl" for rank in range(options.ranks)]
        self.final = [self.folder / f"final-{rank}.safetensors" for rank in range(options.ranks)]
        self._config = self.folder / "config.yaml"
        whole = self._configuration(options, config, recorders or {})
        self._config.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
        self._launch = ["launch", "--nproc-per-node", str(options.ranks), "--standby", str(options.standby)]

    def _configuration(
        self, options: JobOptions, config: Mapping[str, Any], recorders: Mapping[str, str]
    ) -> dict[str, Any]:
        trainer = {
            **config["trainer"],
            "max_steps": options.steps,
            "logger": False,
            "default_root_dir": str(self.folder),
            "enable_progress_bar": False,
        }
        ours = {"window": options.window, "memory_dir": str(options.memory_dir), "events_path": str(self.events)}
        callbacks = [
            {**given, "init_args": {**given["init_args"], **ours}} if given["class_path"] == SPARSE else given
            for given in trainer["callbacks"]
        ]
        # Each rank puts its number before the ending.
        files = {f"{RECORDING}.LossRecorder": "losses.jsonl", f"{RECORDING}.FinalState": "final.safetensors"}
        for class_path, file in {**files, **recorders}.items():
            callbacks.append({"class_path": class_path, "init_args": {"path": str(self.folder / file)}})
        model = {**config["model"], "init_args": {**config["model"]["init_args"], "total_steps": options.steps}}
        return {**config, "trainer": {**trainer, "callbacks": callbacks}, "model": model}

    def execute(self, show: Callable[[int], None], watch: Callable[[], None]) -> None:
        """Run the job to its end.

        Args:
            show: Shows the step that it has reached.
            watch: Called again and again meanwhile.

        Raises:
            RunError: It failed or hung.
        """

        def look() -> bool:
            watch()
            show(last_step(self.losses[0]))
            return False

        fit = ["-m", "moetion_lightning", "fit", "--config", str(self._config)]
        status = run_child(["moetion_lightning", *self._launch, *fit], self.log, look)
        if status != 0:
            raise RunError(f"the job failed with status {status}; {last_output(self.log)}")


def read_recipe(name: str) -> dict[str, Any]:
    """The configuration of a packaged recipe.

    Args:
        name: Its name.
    """
    config: dict[str, Any] = yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))
    return config


def run_jobs(
    options: JobOptions,
    failing: Job,
    twin: Job,
    victim: str,
    table: Callable[[Recovery], list[tuple[str, str]]],
) -> int:
    """Run one job with a kill and one without, and print what came of it.

    Args:
        options: Settings.
        failing: The job of which a rank is killed.
        twin: The job that is left alone.
        victim: What the killed rank is called.
        table: The lines that are printed above the comparison.

    Returns:
        0 if everything is equal, 1 otherwise.

    Raises:
        RunError: A run could not be carried out, or its events show no recovery.
    """
    progress = Progress(options.steps, every=10)
    begin = time.monotonic()
    kill = _KillRank(options, failing, victim, progress.note)
    failing.execute(progress.phase(f"1/3 train, and kill {victim} with SIGKILL"), kill.look)
    if kill.time is None:
        raise RunError(f"the job ended before a rank could be killed; {last_output(failing.log)}")
    progress.done(f"finished, {time.monotonic() - begin:.1f} s")
    rows = table(Recovery.of(read_lines(failing.events), options.kill_rank, kill.time))

    begin = time.monotonic()
    twin.execute(progress.phase("2/3 the same command, undisturbed"), lambda: None)
    progress.done(f"finished, {time.monotonic() - begin:.1f} s")

    progress.phase("3/3 compare")
    checks = compare(failing, twin)
    progress.done("")
    return finish(rows, checks)


class _KillRank:
    """Sends SIGKILL to one rank when it is time."""

    def __init__(self, options: JobOptions, job: Job, victim: str, note: Callable[[str], None]) -> None:
        self._rank = options.kill_rank
        self._standby = options.standby
        self._log = job.log
        self._victim = victim
        self._note = note
        self._tail = Tail(job.events)
        self._due = KillMidWindow(options.kill_after_windows, options.kill_rank)
        self._pid = 0
        self.time: float | None = None

    def look(self) -> None:
        """Take new events; kill when it is time."""
        if self.time is not None:
            return
        new = self._tail.new()
        for event in new:
            if event["rank"] == self._rank:
                self._pid = event["pid"]
        self._due.due = False  # only what is new counts: those who stand by may not have been ready before
        if self._due.watch(new) and self._ready():
            self.time = time.time()
            os.kill(self._pid, signal.SIGKILL)
            self._note(f"{self._victim} (process {self._pid}) killed after step {self._due.last_step}")

    def _ready(self) -> bool:
        return self._standby == 0 or self._log.read_text(errors="replace").count(_STANDS_BY) >= self._standby


def compare(failing: Job, twin: Job) -> Checks:
    """Compare final states and losses of all ranks.

    Args:
        failing: One job.
        twin: The other one.
    """
    from moetion_lightning.testing.compare import compare_losses, compare_states  # torch: not for --help

    finals, losses = list(zip(failing.final, twin.final)), list(zip(failing.losses, twin.losses))
    return total(
        {
            "parameters and buffers, all ranks": [compare_states(*pair, ("parameter:", "buffer:")) for pair in finals],
            "optimizer state, all ranks": [compare_states(*pair, ("optimizer:",)) for pair in finals],
            "losses, all ranks": [compare_losses(*pair) for pair in losses],
        }
    )
