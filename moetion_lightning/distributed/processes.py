"""The launcher's side of its child processes: ranks, and processes that stand by to become one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moetion_lightning.config import LAUNCHER_PID_VARIABLE, REPORT_FD_VARIABLE
from moetion_lightning.distributed.heartbeat import BEAT, DONE, READY

__all__ = ["Child", "Program", "describe_exit", "end_all"]

_LONGEST_STEP_SECONDS = 1.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Program:
    """What the ranks run.

    Args:
        argv: Script or module, and its arguments.
        is_module: Whether the first one is a module.
    """

    argv: tuple[str, ...]
    is_module: bool


class Child:
    """A child process in a session of its own, with a pipe on which it reports.

    It must be made by the thread that lives as long as the launcher: the kernel tells a child of its parent *thread's*
    death.

    Args:
        module: Module to run by this interpreter.
        args: Its arguments.
        env: Its environment, without the pipe's variables.
        takes_order: Whether :meth:`give_order` will be called.
    """

    def __init__(self, module: str, args: Sequence[str], env: Mapping[str, str], *, takes_order: bool = False) -> None:
        self.is_ready = False
        self.silent_seconds = 0.0
        self.error = ""
        self._beats = False
        #: Whether its program has returned.
        self.is_done = False
        self._reports, write_end = os.pipe()
        os.set_blocking(self._reports, False)
        os.set_blocking(write_end, False)
        own = {REPORT_FD_VARIABLE: str(write_end), LAUNCHER_PID_VARIABLE: str(os.getpid())}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", module, *args],
                env={**env, **own},
                stdin=subprocess.PIPE if takes_order else subprocess.DEVNULL,
                pass_fds=(write_end,),
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        self.pid = self._process.pid

    @classmethod
    def start(cls, program: Program, env: Mapping[str, str]) -> Child:
        """Start a rank."""
        args = ("-m", *program.argv) if program.is_module else program.argv
        return cls("moetion_lightning.distributed.worker", args, env)

    @classmethod
    def stand_by(cls, env: Mapping[str, str]) -> Child:
        """Start a process that waits for :meth:`give_order`."""
        return cls("moetion_lightning.distributed.standby", (), env, takes_order=True)

    def give_order(self, program: Program, env: Mapping[str, str]) -> bool:
        """Make a process that stands by a rank.

        Args:
            program: What to run.
            env: Variables to set besides those that it was started with.

        Returns:
            Whether it took the order; False if it died.
        """
        assert self._process.stdin is not None
        order = {"env": dict(env), "argv": program.argv, "module": program.is_module}
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.close()
        except OSError:
            return False
        return True

    def listen(self, elapsed_seconds: float) -> None:
        """Read what it reported and count its silence.

        Args:
            elapsed_seconds: Time since the last call. Of a long pause (this launcher itself was stopped) only a second
                counts, so that nobody is killed for it.
        """
        try:
            data = os.read(self._reports, 65536)
            self._beats = self._beats and bool(data)  # the program closed the pipe: no more beats to expect
        except BlockingIOError:
            data = b""
        self.is_ready = self.is_ready or READY in data
        self.is_done = self.is_done or DONE in data
        self._beats = (self._beats or BEAT in data) and not self.is_done
        self.error = data.translate(None, BEAT + READY + DONE).decode(errors="replace") or self.error
        if data or not self._beats:
            self.silent_seconds = 0.0
        else:
            self.silent_seconds += min(elapsed_seconds, _LONGEST_STEP_SECONDS)

    def ended(self) -> int | None:
        """Its exit status (minus the signal's number if one killed it), or None while it runs.

        What it left in its session is killed.
        """
        if self._process.returncode is None and self._process.poll() is not None:
            self.listen(0.0)
            self._kill_session()
            self._close()
        return self._process.returncode

    def terminate(self) -> None:
        """Ask it to end."""
        if self._process.returncode is None:
            self._process.terminate()

    def kill(self) -> None:
        """Kill it and all processes of its session, and wait."""
        if self._process.returncode is None:
            self._kill_session()
            self._process.wait()
            self._close()

    def _kill_session(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: no permission if all are dead
            os.killpg(self.pid, signal.SIGKILL)  # the session's first process leads its process group

    def _close(self) -> None:
        os.close(self._reports)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()


def end_all(children: Sequence[Child], grace_seconds: float) -> None:
    """SIGTERM to all, and SIGKILL to those that still run after a while."""
    for child in children:
        child.terminate()
    deadline = time.monotonic() + grace_seconds
    while time.monotonic() < deadline and any(child.ended() is None for child in children):
        time.sleep(_POLL_SECONDS)
    for child in children:
        child.kill()


def describe_exit(status: int) -> str:
    """``exit code 1``, or ``killed by SIGKILL``."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
