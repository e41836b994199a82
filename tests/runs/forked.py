"""``moetion launch`` and other launchers of torch's kind, without importing everything again. Runs in a child process.

The command is a fork, and so is each process that it starts; all else is as usual: sessions of their own, pipes,
signals, descriptors, environment, exit statuses.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from moetion_lightning.distributed import torch_elastic

_CLONE_NEWNET = 0x40000000
_TAKEN = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: What programs leave. A process group whose last owner is a DDP module may wait for ever when it is deleted: it joins
#: a thread that wants the interpreter's lock (torch 2.13).
KEPT: list[dict[str, Any]] = []


def leave(work: Callable[[], Any]) -> NoReturn:
    """Do the work of a forked process, and end as an interpreter would."""
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.last_type = type(error)  # as the interpreter does for an error that nobody catches
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Process:
    """What torch's elastic agent starts as ``subprocess.Popen``, as a fork of the launcher.

    Args:
        args: ``python -u -m MODULE ARGUMENTS``, or a script in the place of ``-m MODULE``.
        env: Its environment.
        stdin: ``PIPE``; None for the launcher's.
        stdout: A file; None for the launcher's.
        stderr: The same.
        start_new_session: True: it always leads one.
    """

    def __init__(
        self, args: Sequence[str], env: Mapping[str, str], start_new_session: bool, stdin: int | None = None,
        stdout: IO[str] | None = None, stderr: IO[str] | None = None,
    ) -> None:  # fmt: skip
        assert start_new_session
        program = list(args[args.index("-u") + 1 :])
        reads, writes = os.pipe() if stdin == subprocess.PIPE else (os.open(os.devnull, os.O_RDONLY), None)
        self.returncode: int | None = None
        is_new, tell = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            for number in _TAKEN:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.close(tell)
            os.dup2(reads, 0)
            for descriptor, file in ((1, stdout), (2, stderr)):
                if file is not None:
                    os.dup2(file.fileno(), descriptor)
            leave(lambda: _become(program, env))
        os.close(reads)
        os.close(tell)
        os.read(is_new, 1)  # Popen, too, returns when it leads its session and heeds signals as a new program does
        os.close(is_new)
        self.stdin = None if writes is None else os.fdopen(writes, "wb")

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked rank", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _become(program: list[str], env: Mapping[str, str]) -> None:
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2:
            try:
                # libuv keeps the numbers of a pipe, which it closes and makes anew in each fork: a DataLoader's worker
                # would lose what has these numbers then.
                if os.readlink(f"/proc/self/fd/{descriptor}").startswith("pipe:"):
                    os.dup2(0, descriptor)
                else:
                    os.close(descriptor)
            except OSError:  # the listing's own
                pass
    os.environ.clear()
    os.environ.update(env)
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if program[0] != "-m":
        sys.argv = program
        sys.path.insert(0, os.path.dirname(program[0]))
        KEPT.append(runpy.run_path(program[0], run_name="__main__"))
        return
    sys.argv = program[1:]
    sys.path.insert(0, os.getcwd())
    sys.modules.pop(program[1], None)
    KEPT.append(runpy.run_module(program[1], run_name="__main__", alter_sys=True))


def spec(
    *arguments: object, folder: Path | None = None, netns: str | None = None, module: str = "moetion_lightning"
) -> dict[str, Any]:
    """A command, for the zygote.

    Args:
        *arguments: What follows the name of the command.
        folder: Its current directory; None: the repository.
        netns: File of the network namespace in which it runs; None: this one.
        module: What the command is.
    """
    given = [str(argument) for argument in arguments]
    return {
        "runner": __name__,
        "arguments": given,
        "folder": None if folder is None else str(folder),
        "netns": netns,
        "module": module,
    }


def run(given: dict[str, Any]) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if given["netns"]:
        with open(given["netns"]) as file:
            assert ctypes.CDLL(None).setns(file.fileno(), _CLONE_NEWNET) == 0
    if given["folder"]:
        os.chdir(given["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch_elastic.subprocess = SimpleNamespace(Popen=Process, PIPE=subprocess.PIPE)  # type: ignore[attr-defined]
    subprocess_handler.Popen = Process  # type: ignore[attr-defined]
    sys.argv = ["moetion", *given["arguments"]]
    runpy.run_module(given["module"], run_name="__main__", alter_sys=False)
