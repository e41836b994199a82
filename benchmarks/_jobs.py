"""Jobs of several ranks that are started, watched through their progress file, shot at and ended."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from _report import child_environment

__all__ = ["MODES", "Job", "JobError", "Mode", "end_on_sigterm", "steps_of"]

_SCRIPT = Path(__file__).parent / "_job.py"
_POLL_SECONDS = 0.02
_STANDBY = "--standby"
#: Without this, restarts under torchrun of torch 2.13 read addresses of dead ranks and hang (gloo).
_SEPARATE_STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
_TORCHRUN = ("torch.distributed.run", "--standalone", "--monitor-interval", "0.1")


@dataclass(frozen=True)
class Mode:
    """A way to survive.

    Args:
        label: In tables.
        launcher: Module that starts the ranks, with its arguments.
        checkpoint: What ``_job.py`` gets as ``--checkpoint``.
        environment: Added to the launcher's.
        standbys: Processes that stand by.
    """

    label: str
    launcher: tuple[str, ...]
    checkpoint: str
    environment: dict[str, str]
    standbys: int = 0


MODES = {
    "plain": Mode("torchrun, no checkpoint", _TORCHRUN, "none", _SEPARATE_STORES),
    "torchrun-file": Mode("torchrun + ModelCheckpoint", _TORCHRUN, "model-checkpoint", _SEPARATE_STORES),
    "torchrun-ours": Mode("torchrun + ours", _TORCHRUN, "ours", {}),
    "launch-cold": Mode("moetion launch", ("moetion_lightning", "launch"), "ours", {}),
    "launch-warm": Mode(
        "moetion launch --standby 1", ("moetion_lightning", "launch", "--standby", "1"), "ours", {}, standbys=1
    ),
}


class JobError(RuntimeError):
    """A job ended or hung; the message has the last lines of its output."""


class Job:
    """One job: all its ranks, in a folder of its own on disk and one in host memory. Use it with ``with``.

    Args:
        mode: Key of :data:`MODES`.
        ranks: Number of ranks.
        argv: Further arguments of ``_job.py``.
        threads: Intra-op threads of a rank.
        max_restarts: For the launcher.
        work_dir: Where the folder on disk is made; None for the temporary directory.
        keep_log: Copy the output here at the end.
    """

    def __init__(
        self,
        mode: str,
        *,
        ranks: int,
        argv: Sequence[str] = (),
        threads: int = 1,
        max_restarts: int = 100,
        work_dir: Path | None = None,
        keep_log: Path | None = None,
    ) -> None:
        self.mode = MODES[mode]
        self.ranks = ranks
        self._work = Path(tempfile.mkdtemp(prefix="moetion-bench-", dir=work_dir))
        shared = Path("/dev/shm")
        self._memory = (shared if os.access(shared, os.W_OK) else self._work) / f"{self._work.name}-memory"
        self._memory.mkdir(mode=0o700)
        self._log = self._work / "output.txt"
        self._keep_log = keep_log
        self._progress = self._work / "progress.jsonl"
        self._offset = 0
        self._records: list[dict[str, Any]] = []
        command = [
            sys.executable, "-m", *self.mode.launcher, "--nproc-per-node", str(ranks),
            "--max-restarts", str(max_restarts), str(_SCRIPT), "--checkpoint", self.mode.checkpoint,
            "--work", str(self._work), "--memory", str(self._memory), *argv,
        ]  # fmt: skip
        environment = {**child_environment(threads), "GLOO_SOCKET_IFNAME": "lo", **self.mode.environment}
        with open(self._log, "ab") as output:
            self._launcher = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exc_info: object) -> None:
        children = self._descendants()
        if self._launcher.poll() is None:
            for process in [*children, psutil.Process(self._launcher.pid)]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self._launcher.wait()
        psutil.wait_procs(children, timeout=20)
        if self._keep_log is not None:
            self._keep_log.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._log, self._keep_log)
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.rmtree(self._memory, ignore_errors=True)

    # --- watching ------------------------------------------------------------------------------------------------

    def records(self) -> list[dict[str, Any]]:
        """Everything that the ranks wrote down so far, in order."""
        if self._progress.exists():
            with open(self._progress, "rb") as progress:
                progress.seek(self._offset)
                data = progress.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offset += len(whole)
            self._records += [json.loads(line) for line in whole.splitlines()]
        return self._records

    def reached(self) -> int:
        """The newest step that all ranks have finished."""
        newest = [0] * self.ranks
        for record in self.records():
            if record["what"] == "step":
                newest[record["rank"]] = max(newest[record["rank"]], record["step"])
        return min(newest)

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for a condition.

        Raises:
            JobError: The job ended, or the time is up.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if self._launcher.poll() is not None:
                raise JobError(f"the job ended with status {self._launcher.returncode} before {what}: {self.tail()}")
            if time.monotonic() > deadline:
                raise JobError(f"not in {seconds:.0f} s: {what} (all ranks are at {self.reached()}): {self.tail()}")
            time.sleep(_POLL_SECONDS)

    def until_step(self, step: int, seconds: float) -> None:
        """Wait until all ranks have finished a step.

        Raises:
            JobError: See :meth:`until`.
        """
        self.until(lambda: self.reached() >= step, seconds, f"step {step}")

    def until_ready(self, seconds: float) -> None:
        """Wait until the processes that stand by have imported everything and are idle."""
        seen: dict[int, float] = {}

        def idle() -> bool:
            waiting = self._standing_by()
            before, now = dict(seen), {p.pid: sum(p.cpu_times()[:2]) for p in waiting}
            seen.clear()
            seen.update(now)
            time.sleep(0.5)
            ready = [pid for pid, used in now.items() if used > 1.0 and used - before.get(pid, 0.0) < 0.03]
            return len(ready) >= self.mode.standbys

        if self.mode.standbys:
            self.until(idle, seconds, "the processes that stand by were ready")

    def pids(self) -> dict[int, int]:
        """The living process of each rank, as far as its script has begun."""
        newest = {record["rank"]: record["pid"] for record in self.records()}
        alive = {process.pid for process in self._descendants() if _lives(process)}
        return {rank: pid for rank, pid in newest.items() if pid in alive}

    def tail(self, lines: int = 3) -> str:
        """The last lines of the output."""
        found = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(line[:200] for line in found[-lines:]) or "no output"

    # --- shooting ------------------------------------------------------------------------------------------------

    def kill_rank(self, rank: int) -> float | None:
        """SIGKILL to the living process of a rank, wherever it is in its life.

        Returns:
            When; None if there is none just now.
        """
        victim = self.pids().get(rank) or self._starting(rank)
        if victim is None:
            return None
        now = time.time()
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            return now
        return None

    def _starting(self, rank: int) -> int | None:
        """A process of this rank whose script has not begun yet."""
        for process in self._descendants():
            with contextlib.suppress(psutil.Error):
                if _lives(process) and process.environ().get("RANK") == str(rank):
                    return int(process.pid)
        return None

    def _descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._launcher.pid).children(recursive=True)
        except psutil.Error:
            return []

    def _standing_by(self) -> list[psutil.Process]:
        ranks = set(self.pids().values())
        found = []
        for process in self._descendants():
            with contextlib.suppress(psutil.Error):
                if process.pid not in ranks and process.cmdline()[-1:] == [_STANDBY]:
                    found.append(process)
        return found


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def end_on_sigterm() -> None:
    """End this program by an exception when it is told to, so that it ends its jobs first."""

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ending them is not to be interrupted
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def steps_of(records: Sequence[dict[str, Any]], rank: int) -> list[dict[str, Any]]:
    """The steps that a rank finished, in order; repeated ones too."""
    return [r for r in records if r["what"] == "step" and r["rank"] == rank]
