"""A SLURM cluster on this machine: munged, slurmctld, and one slurmd for each node, as distributions package them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests import command
from tests.runs.ranks import free_port

LIMIT_SECONDS = 240.0
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel", "squeue")


def missing() -> str:
    """Why there can be no cluster here; "" if there can."""
    without = [name for name in PROGRAMS if shutil.which(name) is None]
    if without:
        return f"not installed: {', '.join(without)} (Debian: apt-get install slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "slurmd starts jobs as root only"
    return "" if os.environ.get("MOETION_TEST_CLUSTERS") else "run `make test-slurm`"


def until(condition: Callable[[], Any], what: Callable[[], str]) -> Any:
    """As :func:`tests.command.until`, with time for a cluster's daemons."""
    return command.until(condition, what, LIMIT_SECONDS)


class Cluster:
    """Nodes n0, n1, ... on loopback.

    Args:
        folder: Everything that the daemons write.
        num_nodes: Nodes; each takes one task of a job.
    """

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self._folder = folder
        for name in ("state", "spool", "log"):
            (folder / name).mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._socket = folder / "munge.socket"
        self._conf = folder / "slurm.conf"
        self._conf.write_text(self._settings(num_nodes))
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {"SLURM_CONF": str(self._conf)}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        folder = self._folder
        munge = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={self._socket}"]
        munge += [f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed", f"--log-file={folder}/log/m"]
        try:
            self._begin("munged", *munge)
            until(self._socket.exists, self.logs)
            self._begin("slurmctld", "slurmctld", "-D", "-c", "-i", "-f", self._conf)
            for node in self._nodes:
                self._begin(node, "slurmd", "-D", "-f", self._conf, "-N", node)
            until(lambda: set(self.states().values()) == {"idle"}, self.logs)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self._ask("scancel", "--full", "--signal=KILL", "--user=root")
            self._ask("scancel", "--user=root")
        for daemon in reversed(self._daemons.values()):  # slurmd leaves its steps to themselves
            for step in self._steps(daemon):
                step.kill()
            daemon.kill()
            daemon.wait()

    def submit(self, script: str, *options: str) -> str:
        """Submit a batch script. Returns the job's number."""
        return self._ask("sbatch", "--parsable", *options, stdin=script).strip()

    def scontrol(self, *words: str) -> str:
        return self._ask("scontrol", *words)

    def send(self, job: str, number: signal.Signals) -> None:
        """Send a signal to all tasks of a job, as SLURM does before its time is over."""
        self._ask("scancel", f"--signal={number.name}", job)

    def ended(self, job: str) -> bool:
        """Whether a job has ended. One that was requeued starts at once, not when two minutes are over."""
        lines = self._ask("squeue", "--noheader", "--array", "--format=%F %i %r").splitlines()
        mine = [line.split() for line in lines if line.split()[0] == job]
        for _, number, reason in mine:
            if reason == "BeginTime":
                self.scontrol("update", f"jobid={number}", "starttime=now")
        return not mine

    def states(self) -> dict[str, str]:
        """State of each node."""
        lines = self._ask("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
        return dict(line.split() for line in lines)  # type: ignore[misc]

    def lose(self, node: str) -> None:
        """A node loses power; the health check of the cluster notices it."""
        daemon = self._daemons[node]
        for process in self._steps(daemon):
            with contextlib.suppress(psutil.Error):
                process.kill()
        daemon.kill()
        daemon.wait()
        self.scontrol("update", f"nodename={node}", "state=down", "reason=power")

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in (self._folder / "log").iterdir())

    # --- inside --------------------------------------------------------------------------------------------------

    def _settings(self, num_nodes: int) -> str:
        folder, host = self._folder, socket.gethostname().split(".")[0]
        self._nodes = [f"n{number}" for number in range(num_nodes)]
        lines = [
            "ClusterName=one-machine", f"SlurmctldHost={host}(127.0.0.1)", "SlurmUser=root", "SlurmdUser=root",
            "AuthType=auth/munge", f"AuthInfo=socket={self._socket}", f"SlurmctldPort={free_port()}",
            "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny", "SlurmdParameters=config_overrides",
            f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool/%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmdPidFile={folder}/slurmd-%n.pid",
            f"SlurmctldLogFile={folder}/log/slurmctld", f"SlurmdLogFile={folder}/log/slurmd-%n",
            "ProctrackType=proctrack/pgid", "TaskPlugin=task/none", "MpiDefault=none", "ReturnToService=2",
            "SelectType=select/cons_tres", "SelectTypeParameters=CR_CPU", "JobRequeue=1", "KillWait=15",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=1,requeue_delay=0",
        ]  # fmt: skip
        for node in self._nodes:
            lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=1")
        return "\n".join([*lines, "PartitionName=all Nodes=ALL Default=YES State=UP", ""])

    def _begin(self, name: str, *command: object) -> None:
        with (self._folder / "log" / f"{name}-output").open("w") as log:
            self._daemons[name] = subprocess.Popen(
                [str(word) for word in command], env=self.env, stdout=log, stderr=subprocess.STDOUT
            )

    @staticmethod
    def _steps(daemon: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """What runs on a node: its daemon's children, and those that have left it, by the node's name."""
        name = daemon.args[-1]  # type: ignore[index]
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                env = process.environ()
                if process.pid != daemon.pid and env.get("SLURMD_NODENAME") == name and "one-machine" in env.values():
                    found.append(process)
        if daemon.poll() is None:
            found += psutil.Process(daemon.pid).children(recursive=True)
        return found

    def _ask(self, *command: str, stdin: str = "") -> str:
        done = subprocess.run(command, env=self.env, input=stdin, capture_output=True, text=True, timeout=LIMIT_SECONDS)
        if done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}\n{self.logs()}")
        return done.stdout
