"""``moetion demo ranks``: one rank of a job is killed and replaced; the others live on, and nothing is lost.

Both runs are ordinary ``moetion launch ... fit`` commands in child processes. The kill comes from outside: this process
reads the job's event file and sends SIGKILL to one rank, by its process id, while it captures a window.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moetion_lightning.demo.stage import (
    RECORDING,
    SPARSE,
    Checks,
    DemoError,
    KillMidWindow,
    Progress,
    Tail,
    add_common_arguments,
    finish,
    folders,
    last_output,
    last_step,
    read_lines,
    run_child,
    total,
)
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.recipes import recipe_path

__all__ = ["RanksOptions", "Recovery", "main", "run"]

_RECIPES = {"ddp": "ddp_moe_cpu", "fsdp2": "fsdp2_moe_cpu", "expert": "expert_parallel_moe_cpu"}
_STANDS_BY = "stands by"


@dataclass(frozen=True, kw_only=True)
class RanksOptions:
    """Settings of the demonstration.

    Args:
        folder: Where configurations, logs and results go.
        memory_dir: Base directory of the host-memory tier.
        strategy: ``"ddp"``, ``"fsdp2"`` or ``"expert"``.
        ranks: Processes of the job.
        kill_rank: The rank that is killed.
        standby: Processes that stand by; the kill waits until they are ready.
        steps: Optimizer steps of the whole run.
        window: Iterations of a window.
        kill_after_windows: Kill when this many windows are committed and the next one is half captured.
    """

    folder: Path
    memory_dir: Path
    strategy: str = "ddp"
    ranks: int = 4
    kill_rank: int = 2
    standby: int = 0
    steps: int = 40
    window: int = 4
    kill_after_windows: int = 3

    def __post_init__(self) -> None:
        needed = self.window * (self.kill_after_windows + 2) + 2
        if self.window < 2 or self.kill_after_windows < 1 or self.steps < needed:
            raise ConfigurationError(
                f"{self.steps} steps with windows of {self.window}, killed after {self.kill_after_windows} "
                f"windows; expected a window of at least 2, a kill after at least 1 window, and at least {needed} steps"
            )
        if self.strategy not in _RECIPES:
            raise ConfigurationError(f"--strategy {self.strategy!r}: expected one of {', '.join(_RECIPES)}")
        if self.ranks < 2 or (self.strategy == "expert" and self.ranks % 2):
            raise ConfigurationError(f"--ranks {self.ranks}: expected at least 2, and an even number for expert")
        if not 0 <= self.kill_rank < self.ranks:
            raise ConfigurationError(f"--kill-rank {self.kill_rank}: expected 0 to {self.ranks - 1}")
        if self.standby < 0:
            raise ConfigurationError(f"--standby {self.standby}: expected 0 or more")


def main(args: Sequence[str]) -> int:
    """Run ``moetion demo ranks``.

    Args:
        args: Arguments after ``moetion demo ranks``.

    Returns:
        0 if the job equals its twin bit for bit, 1 if anything differs, 2 if a run could not be carried out.
    """
    parser = argparse.ArgumentParser(
        prog="moetion demo ranks",
        description="Several ranks train, one is killed with SIGKILL and replaced while the others live on; compare.",
    )
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="processes of the job (4)")
    parser.add_argument("--strategy", choices=list(_RECIPES), default="ddp", help="how they train together (ddp)")
    parser.add_argument("--kill-rank", type=int, metavar="R", help="the rank that is killed (2, or the last one)")
    parser.add_argument("--standby", type=int, default=0, metavar="K", help="processes that stand by (0)")
    add_common_arguments(parser, steps=40, kill_after_windows=3)
    options = parser.parse_args(args)
    try:
        with folders(options.dir) as (folder, memory):
            return run(
                RanksOptions(
                    folder=folder,
                    memory_dir=memory,
                    strategy=options.strategy,
                    ranks=options.ranks,
                    kill_rank=min(2, options.ranks - 1) if options.kill_rank is None else options.kill_rank,
                    standby=options.standby,
                    steps=options.steps,
                    window=options.window,
                    kill_after_windows=options.kill_after_windows,
                )
            )
    except DemoError as error:
        print(f"moetion demo ranks: error: {error}", file=sys.stderr)
        return 2


def run(options: RanksOptions) -> int:
    """Carry out the demonstration and print its table.

    Args:
        options: Settings.

    Returns:
        0 if everything is equal, 1 otherwise.

    Raises:
        DemoError: A run could not be carried out, or its events show no recovery.
    """
    failing, twin = _Run(options, "failing"), _Run(options, "twin")
    progress = Progress(options.steps, every=10)
    print(
        f"a byte-level Mixture-of-Experts model on {options.ranks} ranks ({options.strategy}), {options.steps} steps, "
        f"windows of {options.window} steps"
    )

    begin = time.monotonic()
    kill = _KillRank(options, failing, progress.note)
    failing.execute(progress.phase(f"1/3 train, and kill rank {options.kill_rank} with SIGKILL"), kill.look)
    if kill.time is None:
        raise DemoError(f"the job ended before a rank could be killed; {last_output(failing.log)}")
    progress.done(f"finished, {time.monotonic() - begin:.1f} s")
    recovery = Recovery.of(read_lines(failing.events), options.kill_rank, kill.time)

    begin = time.monotonic()
    twin.execute(progress.phase("2/3 the same command, undisturbed"), lambda: None)
    progress.done(f"finished, {time.monotonic() - begin:.1f} s")

    progress.phase("3/3 compare")
    checks = _compare(failing, twin)
    progress.done("")
    return finish(_table(options, recovery), checks)


class _Run:
    """One job: its configuration, its files, and the launcher that runs its ranks."""

    def __init__(self, options: RanksOptions, name: str) -> None:
        self.folder = options.folder / name
        self.folder.mkdir()
        self.log = self.folder / "output.log"
        self.events = self.folder / "events.jsonl"
        self.losses = [self.folder / f"losses-{rank}.jsonl" for rank in range(options.ranks)]
        self.final = [self.folder / f"final-{rank}.safetensors" for rank in range(options.ranks)]
        self._config = self.folder / "config.yaml"
        self._config.write_text(yaml.safe_dump(self._configuration(options), sort_keys=False), encoding="utf-8")
        self._launch = ["launch", "--nproc-per-node", str(options.ranks), "--standby", str(options.standby)]

    def _configuration(self, options: RanksOptions) -> dict[str, Any]:
        text = recipe_path(_RECIPES[options.strategy]).read_text(encoding="utf-8")
        config: dict[str, Any] = yaml.safe_load(text)
        config["model"]["init_args"]["total_steps"] = options.steps
        trainer = config["trainer"]
        trainer.update(max_steps=options.steps, logger=False, default_root_dir=str(self.folder))
        trainer["enable_progress_bar"] = False
        if options.strategy == "fsdp2":
            trainer["strategy"]["init_args"]["data_parallel_size"] = options.ranks
        ours = {
            "window": options.window,
            "memory_dir": str(options.memory_dir),
            "events_path": str(self.events),
        }
        trainer["callbacks"] = [
            {"class_path": SPARSE, "init_args": ours},
            # Each rank puts its number before the ending.
            {"class_path": f"{RECORDING}.LossRecorder", "init_args": {"path": str(self.folder / "losses.jsonl")}},
            {"class_path": f"{RECORDING}.FinalState", "init_args": {"path": str(self.folder / "final.safetensors")}},
        ]
        return config

    def execute(self, show: Callable[[int], None], watch: Callable[[], None]) -> None:
        """Run the job to its end.

        Raises:
            DemoError: It failed or hung.
        """

        def look() -> bool:
            watch()
            show(last_step(self.losses[0]))
            return False

        fit = ["-m", "moetion_lightning", "fit", "--config", str(self._config)]
        status = run_child([*self._launch, *fit], self.log, look)
        if status != 0:
            raise DemoError(f"the job failed with status {status}; {last_output(self.log)}")


class _KillRank:
    """Sends SIGKILL to one rank when it is time."""

    def __init__(self, options: RanksOptions, job: _Run, note: Callable[[str], None]) -> None:
        self._rank = options.kill_rank
        self._standby = options.standby
        self._log = job.log
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
            self._note(f"rank {self._rank} (process {self._pid}) killed after step {self._due.last_step}")

    def _ready(self) -> bool:
        return self._standby == 0 or self._log.read_text(errors="replace").count(_STANDS_BY) >= self._standby


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What the events of a job say about the loss of a rank.

    Args:
        before: Process of each rank before the kill.
        after: Process of each rank in the end.
        reached: Newest step that a rank had finished.
        seconds: From the kill to the end of the first step that no rank had finished before.
        tiers: Where the state of each rank came from.
        again: Steps that were done again, the most of all ranks.
        verified: Whether all replayed steps agreed with their witnesses.
    """

    before: dict[int, int]
    after: dict[int, int]
    reached: int
    seconds: float
    tiers: dict[int, str]
    again: int
    verified: bool

    @classmethod
    def of(cls, events: Sequence[Mapping[str, Any]], killed: int, kill_time: float) -> Recovery:
        """Read it from the events of all ranks.

        Args:
            events: All events of the job, in the order of its file.
            killed: The rank that was killed.
            kill_time: When, in seconds since the epoch.

        Raises:
            DemoError: No process took the rank's place, or no new step was finished.
        """
        first: dict[int, int] = {}
        for event in events:
            first.setdefault(event["rank"], event["pid"])
        # No step can be finished between the loss and the newcomer's first word: what is older is from before the kill.
        joined = next((i for i, e in enumerate(events) if e["rank"] == killed and e["pid"] != first[killed]), None)
        if joined is None:
            raise DemoError(f"no process took the place of rank {killed}: its events come from process {first[killed]}")
        finished = [int(e["iteration"]) for e in events[:joined] if e["event"] == "IterationFinished"]
        reached = max(finished, default=0)
        later = [e for e in events if e["time"] > kill_time]
        steps = [e for e in events[joined:] if e["event"] == "IterationFinished"]
        new = next((e for e in steps if int(e["iteration"]) > reached), None)
        if new is None:
            raise DemoError(f"no step after step {reached} was finished once rank {killed} was replaced")
        restores = [e for e in later if e["event"] == "RestoreApplied"]
        return cls(
            before=first,
            after={event["rank"]: event["pid"] for event in events},
            reached=reached,
            seconds=float(new["time"]) - kill_time,
            tiers={e["rank"]: e["tier"] for e in later if e["event"] == "RestoreStarted"},
            again=max((reached - int(e["iteration"]) for e in restores), default=0),
            verified=all(e["verified"] for e in later if e["event"] in ("ReplayIteration", "ReplayFinished")),
        )


def _table(options: RanksOptions, recovery: Recovery) -> list[tuple[str, str]]:
    rows = [("killed after step", f"{recovery.reached} of {options.steps}")]
    for rank, before in sorted(recovery.before.items()):
        after = recovery.after[rank]
        change = "the same process" if before == after else f"replaced by process {after}"
        source = recovery.tiers.get(rank, "kept its own")
        rows.append((f"rank {rank}", f"process {before}: {change}; state: {source}"))
    verified = "" if recovery.verified else ", NOT verified"
    rows.append(("seconds from the kill to the next new step", f"{recovery.seconds:.1f}"))
    rows.append(("steps done again", f"{recovery.again} (at most 2 x {options.window}){verified}"))
    return rows


def _compare(failing: _Run, twin: _Run) -> Checks:
    from moetion_lightning.testing.compare import compare_losses, compare_states  # torch: not for --help

    finals, losses = list(zip(failing.final, twin.final)), list(zip(failing.losses, twin.losses))
    return total(
        {
            "parameters and buffers, all ranks": [compare_states(*pair, ("parameter:", "buffer:")) for pair in finals],
            "optimizer state, all ranks": [compare_states(*pair, ("optimizer:",)) for pair in finals],
            "losses, all ranks": [compare_losses(*pair) for pair in losses],
        }
    )
