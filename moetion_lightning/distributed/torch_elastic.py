"""torch's elastic agent, made to start single ranks again: everything here that is not torch's public interface.

What it relies on, tested in ``tests/unit/test_torch_elastic.py``: of ``LocalElasticAgent`` the methods
``_monitor_workers`` (its result ends ``run``, or does not), ``_restart_workers`` (which ``run`` calls when the
rendezvous says that nodes wait), ``_exit_barrier`` and ``_shutdown``, and ``_pcontext``, a
``SubprocessContext`` whose ``subprocess_handlers``, ``envs``, ``args``, ``entrypoint`` and ``error_files`` are by local
rank, with ``_tail_logs``; of ``SubprocessHandler`` the method ``_popen``; that ``LogsSpecs.reify`` may change the
ranks' environments; the variable ``TORCH_ELASTIC_WORKER_IDENTICAL`` (ranks follow from the node's number).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler, get_subprocess_handler
from torch.distributed.elastic.multiprocessing.tail_log import TailLog
from torch.distributed.elastic.rendezvous import RendezvousHandler
from torch.distributed.launcher.api import LaunchConfig

__all__ = ["BeginAgainError", "RankStart", "SingleRankAgent", "StandbyProcess", "end_session", "settings_of"]

#: Settings of the launcher that are a worker group's, too, and that not every version of torch has.
_OPTIONS = ("numa_options", "duplicate_stdout_filters", "duplicate_stderr_filters", "virtual_local_rank")
_LOOK_SECONDS = 0.05


class BeginAgainError(Exception):
    """All ranks of the job are to be stopped and started again."""


class StandbyProcess(SubprocessHandler):
    """A process whose rank, environment and log files come later, on its stdin."""

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(args=args, env=env, stdin=subprocess.PIPE, start_new_session=True)

    def give(self, line: bytes) -> bool:
        """Write a line and close. Returns whether it still read."""
        assert self.proc.stdin is not None
        try:
            self.proc.stdin.write(line)
            self.proc.stdin.close()
        except OSError:
            return False
        return True


@dataclass(frozen=True, kw_only=True)
class RankStart:
    """What a rank that is started again is given.

    Args:
        env: Its variables, besides those of the launcher.
        args: Arguments of the interpreter.
        stdout: File for its output; "" for the launcher's.
        stderr: The same.
    """

    env: Mapping[str, str]
    args: tuple[str, ...]
    stdout: str
    stderr: str


class _Logs(LogsSpecs):
    """Log files as the user wants them, a folder for each attempt, and variables of our own for each rank."""

    def __init__(self, inner: LogsSpecs, variables: Callable[[int], Mapping[str, str]]) -> None:
        self._inner = inner
        self._variables = variables
        self._attempts = -1

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        for local_rank, env in envs.items():
            env.update(self._variables(local_rank))
        return self.next(envs)

    def next(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Files of another attempt; only its folder has the number: the variable is the same for all processes."""
        self._attempts += 1
        numbered = {r: {**env, "TORCHELASTIC_RESTART_COUNT": str(self._attempts)} for r, env in envs.items()}
        files = self._inner.reify(numbered)
        for local_rank, env in envs.items():
            env.update(numbered[local_rank], TORCHELASTIC_RESTART_COUNT=env["TORCHELASTIC_RESTART_COUNT"])
        return files

    @property
    def root_log_dir(self) -> str:
        return self._inner.root_log_dir


class SingleRankAgent(LocalElasticAgent):
    """Starts the ranks of a node as ``torchrun`` does, and leaves it to a subclass what becomes of each of them.

    Args:
        config: torchrun's settings.
        args: Arguments of the interpreter.
        handler: The rendezvous.

    Raises:
        ConfigurationError: torch is older than the one that this is made for.
    """

    def __init__(self, config: LaunchConfig, args: tuple[str, ...], handler: RendezvousHandler) -> None:
        spec = WorkerSpec(
            role=config.role,
            local_world_size=config.nproc_per_node,
            entrypoint=sys.executable,
            args=args,
            rdzv_handler=handler,
            max_restarts=config.max_restarts,
            monitor_interval=min(config.monitor_interval, _LOOK_SECONDS),
            event_log_handler=config.event_log_handler,
            **settings_of(config, *_OPTIONS),
        )
        assert config.logs_specs is not None
        self._logs = _Logs(config.logs_specs, self.variables)
        super().__init__(
            spec,
            self._logs,
            log_line_prefix_template=config.log_line_prefix_template,
            **settings_of(config, "shutdown_timeout"),
        )
        self._more_tails: list[TailLog] = []

    # --- for the subclass ------------------------------------------------------------------------------------------

    def variables(self, local_rank: int) -> Mapping[str, str]:
        """Variables of a rank's first process, besides torch's."""
        raise NotImplementedError

    def look_after(self) -> bool:
        """Called at each interval. Returns whether all ranks are done.

        Raises:
            BeginAgainError: All nodes stop their ranks, meet, and start them again.
            JobEndedError: The job ends.
        """
        raise NotImplementedError

    @property
    def context(self) -> Any:
        """The processes of this node."""
        return self._pcontext

    @property
    def processes(self) -> dict[int, SubprocessHandler]:
        """The newest process of each local rank."""
        return self.context.subprocess_handlers if self._pcontext is not None else {}

    def rank(self, local_rank: int) -> int:
        """Global rank."""
        return int(self._worker_group.workers[local_rank].global_rank)

    def prepare(self, local_rank: int, variables: Mapping[str, str]) -> RankStart:
        """Log files and environment of the next process of a rank; its output is shown as that of the first one."""
        context = self.context
        envs = {r: dict(env) for r, env in context.envs.items()}
        files = self._logs.next(envs)
        for tail, paths, stream in zip(
            _tails(context), (files.tee_stdouts, files.tee_stderrs), (sys.stdout, sys.stderr)
        ):
            if local_rank in paths:
                named = {local_rank: paths[local_rank]}
                self._more_tails.append(TailLog(context.name, named, stream, tail._log_line_prefixes).start())
        context.error_files[local_rank] = files.error_files[local_rank]
        context.envs[local_rank] |= {
            **variables,
            "TORCHELASTIC_ERROR_FILE": envs[local_rank]["TORCHELASTIC_ERROR_FILE"],
        }
        return RankStart(
            env=context.envs[local_rank],
            args=context.args[local_rank],
            stdout=files.stdouts[local_rank],
            stderr=files.stderrs[local_rank],
        )

    def start(self, local_rank: int, given: RankStart) -> SubprocessHandler:
        """A new process for a rank."""
        return get_subprocess_handler(
            entrypoint=self.context.entrypoint,
            args=given.args,
            env=dict(given.env),
            stdout=given.stdout,
            stderr=given.stderr,
            local_rank_id=local_rank,
            **settings_of(self._worker_group.spec, "numa_options"),
        )

    def replace(self, local_rank: int, process: SubprocessHandler) -> None:
        """From now on this process is the rank."""
        self.processes[local_rank] = process
        self._worker_group.workers[local_rank].id = process.proc.pid

    # --- torch's side ----------------------------------------------------------------------------------------------

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        try:
            if not self.look_after():
                return RunResult(state=WorkerState.HEALTHY)
        except BeginAgainError:
            self._restart_workers(worker_group)
            return RunResult(state=WorkerState.HEALTHY)
        return RunResult(
            state=WorkerState.SUCCEEDED, return_values={worker.global_rank: None for worker in worker_group.workers}
        )

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        for handler in self.processes.values():
            end_session(handler)  # they may wait for those that are gone; what they hold is in memory that stays
        super()._restart_workers(worker_group)

    def _exit_barrier(self) -> None:
        """Nodes end by the rendezvous, whose waits have limits."""

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._shutdown(*args, **kwargs)
        finally:
            for handler in self.processes.values():
                end_session(handler)
            for tail in self._more_tails:
                tail.stop()
            self._more_tails.clear()


def settings_of(settings: Any, *names: str) -> dict[str, Any]:
    """Those of a launch's settings that this version of torch has."""
    return {name: getattr(settings, name) for name in names if hasattr(settings, name)}


def _tails(context: Any) -> list[TailLog]:
    """What shows the first processes' output and errors; torch before 2.9 has a name for each of the two."""
    return list(getattr(context, "_tail_logs", None) or (context._stdout_tail, context._stderr_tail))


def end_session(handler: SubprocessHandler) -> None:
    """SIGKILL to a process and all that it started (each leads a session of its own); does not wait."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: no permission if all are dead
        os.killpg(handler.proc.pid, signal.SIGKILL)
