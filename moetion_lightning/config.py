"""Settings, validated at construction. The only module that reads environment variables."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moetion_lightning.errors import ConfigurationError

__all__ = [
    "AUTOMATIC_VARIABLE",
    "DEFAULT_MTBF",
    "OF_THE_WINDOW",
    "OTHER_LIGHTNING",
    "TERMINATED_EXIT_CODE",
    "EngineConfig",
    "LaunchedProcess",
    "TorchrunWorker",
    "address_from_environment",
    "array_task",
    "automatic_setting",
    "child_environment",
    "default_memory_dir",
    "exchange_limit_seconds",
    "in_sweep",
    "job_id_from_environment",
    "job_secret_from_environment",
    "launched_devices",
    "launched_process",
    "launched_run",
    "node_hint",
    "notebook_name",
    "report_channel",
    "socket_interface",
    "started_rank",
    "torchrun_worker",
    "unnumbered_slurm_nodes",
    "update_environment",
    "valid_job_id",
]

#: Exit code of a process that SIGTERM has ended cleanly (128 + 15), as a shell reports it.
TERMINATED_EXIT_CODE = 143
#: Seconds between two failures of a large job: Llama 3's 16,384 GPUs saw 466 in 54 days (arXiv 2407.21783).
DEFAULT_MTBF = 10_000.0
#: Set this to a recipe's name, a YAML file's path, or "default": every Lightning Trainer then gets these callbacks.
AUTOMATIC_VARIABLE = "MOETION"
#: Settings that only the sparse policy has.
OF_THE_WINDOW = ("window", "max_window", "overlap_target", "mtbf")
#: What to do where a Trainer comes from the package's other name.
OTHER_LIGHTNING = (
    "this Trainer is pytorch_lightning's, whose classes are others than those of the package lightning: write `import "
    "lightning.pytorch as pl` in place of `import pytorch_lightning as pl`"
)
#: Set this to give a job an explicit identity, e.g. the id that the cluster's scheduler gave it.
JOB_ID_VARIABLE = "MOETION_JOB_ID"
#: Set this to say for one start what to continue: "auto", "newest", "never", or an iteration.
RESUME_VARIABLE = "MOETION_RESUME"
#: Set this to keep the host-memory tier somewhere else than /dev/shm.
MEMORY_DIR_VARIABLE = "MOETION_MEMORY_DIR"
#: The secret by which the ranks of a job know each other when they copy windows; the same on every rank.
SECRET_VARIABLE = "MOETION_SECRET"
#: Address or host name by which other nodes reach this one, where that is not the address of its interface.
ADDRESS_VARIABLE = "MOETION_ADDRESS"

# By which schedulers tell the tasks of an array of jobs apart.
_ARRAY_VARIABLES = ("SLURM_ARRAY_TASK_ID", "PBS_ARRAY_INDEX", "PBS_ARRAYID", "SGE_TASK_ID", "LSB_JOBINDEX")
# By which servers tell a kernel which notebook it serves.
_NOTEBOOK_VARIABLES = ("JPY_SESSION_NAME", "COLAB_NOTEBOOK_ID")
# By which schedulers and launchers number the nodes of a job.
_NODE_VARIABLES = ("SLURM_NODEID", "PET_NODE_RANK", "JOB_COMPLETION_INDEX", "GROUP_RANK")
# By which agents tell a process that it is one trial of many.
_SWEEP_VARIABLES = ("WANDB_SWEEP_ID",)

#: Set this to name the interface, subnet or address of this node for traffic between nodes.
INTERFACE_VARIABLE = "MOETION_INTERFACE"

# Set by `moetion launch` for each process that it starts.
STORE_VARIABLE = "MOETION_STORE"
GENERATION_VARIABLE = "MOETION_GENERATION"
FAILURE_DOMAIN_VARIABLE = "MOETION_FAILURE_DOMAIN"
LOCAL_ADDRESS_VARIABLE = "MOETION_LOCAL_ADDR"
BIND_ADDRESS_VARIABLE = "MOETION_BIND_ADDR"
REPORT_VARIABLE = "MOETION_REPORT"
LAUNCHER_PID_VARIABLE = "MOETION_LAUNCHER_PID"
NODE_TIMEOUT_VARIABLE = "MOETION_NODE_TIMEOUT"
PREDECESSOR_VARIABLE = "MOETION_PREDECESSOR"
#: Seconds that a rank waits for the slowest other one where all exchange something.
EXCHANGE_TIMEOUT_VARIABLE = "MOETION_EXCHANGE_TIMEOUT"


def job_id_from_environment() -> str | None:
    """The job identity given by the environment, if any."""
    return os.environ.get(JOB_ID_VARIABLE) or None


def array_task() -> str:
    """Which task of an array of jobs this process belongs to; "" if it belongs to none."""
    return next((f"task {os.environ[name]}" for name in _ARRAY_VARIABLES if os.environ.get(name)), "")


def node_hint() -> int | None:
    """Which node of its job this is, as its scheduler says; None where none does."""
    return next((int(os.environ[name]) for name in _NODE_VARIABLES if os.environ.get(name, "").isdigit()), None)


def unnumbered_slurm_nodes() -> int:
    """Nodes on which ``srun`` has started this command; 1 without it."""
    value = os.environ.get("SLURM_STEP_NUM_NODES", "")
    return int(value) if value.isdigit() else 1


def socket_interface() -> str | None:
    """Names of network interfaces that the environment gives for traffic between nodes, if any."""
    return os.environ.get(INTERFACE_VARIABLE) or os.environ.get("GLOO_SOCKET_IFNAME") or None


def notebook_name() -> str:
    """The notebook that this process serves, where its server says so."""
    return next((os.environ[name] for name in _NOTEBOOK_VARIABLES if os.environ.get(name)), "")


def in_sweep(libraries: Sequence[str]) -> bool:
    """Whether this process seems to look for good settings.

    Args:
        libraries: Modules that are imported only for that.
    """
    return any(name in sys.modules for name in libraries) or any(os.environ.get(name) for name in _SWEEP_VARIABLES)


def automatic_setting() -> str | None:
    """Which callbacks every Lightning Trainer shall get, if the environment asks for some."""
    value = os.environ.get(AUTOMATIC_VARIABLE, "").strip()
    return None if value.lower() in ("", "0", "false", "off", "no") else value


def default_memory_dir() -> Path | None:
    """Base directory of the host-memory tier given by the environment, if any."""
    value = os.environ.get(MEMORY_DIR_VARIABLE)
    return Path(value) if value else None


def job_secret_from_environment() -> str | None:
    """The secret that the ranks of this job share, if the environment gives one."""
    return os.environ.get(SECRET_VARIABLE) or None


def address_from_environment() -> str | None:
    """By which address other nodes reach this one, if the environment says so."""
    return os.environ.get(ADDRESS_VARIABLE) or None


def predecessor_from_environment() -> str:
    """How the process ended whose place this one takes, as ``moetion launch`` saw it; "" where nobody says so."""
    return os.environ.get(PREDECESSOR_VARIABLE, "")


def child_environment() -> dict[str, str]:
    """A copy of this process's environment, as the base of a child's."""
    return dict(os.environ)


def update_environment(values: Mapping[str, str]) -> None:
    """Set environment variables of this process: one that stood by becomes a rank."""
    os.environ.update(values)


@dataclass(frozen=True, kw_only=True)
class LaunchedProcess:
    """What ``moetion launch`` told this process.

    Args:
        rank: Global rank.
        world_size: Ranks of the job.
        store_host: Host of the stable store.
        store_port: Port of the stable store.
        run_id: Prefix of this run's keys in the store.
        generation: Generation in which this process was started; 0 at first.
        failure_domain: Label of what fails together with this process.
        local_address: Address of this node by which the other nodes reach it.
        bind_address: Address of this node's interface, to listen on; the same unless a network translates addresses.
        node_timeout: Seconds after which the loss of a node is announced; 0 in a job of one node.
    """

    rank: int
    world_size: int
    store_host: str
    store_port: int
    run_id: str
    generation: int
    failure_domain: str
    local_address: str
    node_timeout: float = 0.0
    bind_address: str = ""


def launched_process() -> LaunchedProcess | None:
    """What ``moetion launch`` told this process; None if it was started in another way.

    Raises:
        ConfigurationError: A variable is missing or is no number.
    """
    if not os.environ.get(STORE_VARIABLE):
        return None
    host, _, port = os.environ[STORE_VARIABLE].rpartition(":")
    try:
        return LaunchedProcess(
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            store_host=host.strip("[]"),
            store_port=int(port),
            run_id=os.environ["TORCHELASTIC_RUN_ID"],
            generation=int(os.environ[GENERATION_VARIABLE]),
            failure_domain=os.environ.get(FAILURE_DOMAIN_VARIABLE, ""),
            local_address=os.environ.get(LOCAL_ADDRESS_VARIABLE, "127.0.0.1"),
            node_timeout=float(os.environ.get(NODE_TIMEOUT_VARIABLE, "0")),
            bind_address=os.environ.get(BIND_ADDRESS_VARIABLE, ""),
        )
    except (KeyError, ValueError) as error:
        raise ConfigurationError(
            f"{STORE_VARIABLE}={os.environ[STORE_VARIABLE]!r} is set, but the rest of what `moetion launch` sets is "
            f"missing or malformed ({type(error).__name__}: {error}). Start the job with `moetion launch`, or unset it."
        ) from error


def started_rank() -> int:
    """This process's global rank, as ``moetion launch`` or ``torchrun`` told it; 0 if neither started it."""
    launched, worker = launched_process(), torchrun_worker()
    return launched.rank if launched is not None else 0 if worker is None else worker.rank


def launched_run() -> tuple[str, int]:
    """The launch that this process belongs to and the generation in which it was started; ("", 0) for none."""
    process = launched_process()
    return ("", 0) if process is None else (process.run_id, process.generation)


def exchange_limit_seconds() -> float:
    """How long a rank waits for the others where all exchange something: ``MOETION_EXCHANGE_TIMEOUT``, 1,800 s.

    Raises:
        ConfigurationError: It is no positive number.
    """
    text = os.environ.get(EXCHANGE_TIMEOUT_VARIABLE) or "1800"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        raise ConfigurationError(f"{EXCHANGE_TIMEOUT_VARIABLE}={text!r}: expected seconds, more than 0")
    return seconds


def launched_devices() -> tuple[int, int] | None:
    """Processes on each node, and nodes, as ``moetion launch`` or ``torchrun`` told this process; None without them."""
    names = ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
    if any(not os.environ.get(name) for name in names):
        return None
    return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["GROUP_WORLD_SIZE"])


def report_channel() -> tuple[str, int] | None:
    """File by which this process shows its launcher signs of life, and the launcher's process id, if any."""
    path, pid = os.environ.get(REPORT_VARIABLE), os.environ.get(LAUNCHER_PID_VARIABLE)
    return (path, int(pid)) if path and pid else None


@dataclass(frozen=True, kw_only=True)
class TorchrunWorker:
    """What ``torchrun`` told this process, where the store of its agent also serves the process groups.

    Args:
        rank: Global rank.
        world_size: Ranks of the job.
        store_host: Host of the agent's store.
        store_port: Port of the agent's store.
        run_id: Identity of the run, the same over restarts.
    """

    rank: int
    world_size: int
    store_host: str
    store_port: int
    run_id: str


def torchrun_worker() -> TorchrunWorker | None:
    """What ``torchrun`` told this process; None if process groups do not use the store of a torchrun agent."""
    env = os.environ
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    if env.get(STORE_VARIABLE) or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or any(n not in env for n in names):
        return None
    return TorchrunWorker(
        rank=int(env["RANK"]),
        world_size=int(env["WORLD_SIZE"]),
        store_host=env["MASTER_ADDR"],
        store_port=int(env["MASTER_PORT"]),
        run_id=env["TORCHELASTIC_RUN_ID"],
    )


def valid_job_id(job_id: str) -> bool:
    """Whether it can be the name of a folder: 1 to 100 letters, digits, '.', '_' or '-', not starting with '.'."""
    plain = 0 < len(job_id) <= 100 and all(c.isalnum() or c in "._-" for c in job_id)
    return plain and not job_id.startswith(".")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of the engine: the same, with the same defaults, in every adapter.

    Args:
        window: Iterations over which the state is spread; "auto" measures what captures cost, and takes the window
            with the least expected cost: what they add to the iterations, and what failures throw away.
        max_window: Upper limit for "auto".
        overlap_target: Share of an iteration behind which copies can hide, in (0, 1].
        mtbf: Seconds between two failures of this job (all ranks together) that "auto" expects.
        skip_frozen_gradients: While replaying, skip the weight gradients of operators that are not rebuilt yet
            (clipping then uses the recorded norm). Off, because code that reads ``.grad`` finds None there. Has no
            effect with a gradient scaler ("16-mixed"), and where several ranks replay together.
        memory_dir: Directory for windows in host memory; None takes /dev/shm.
        persist_dir: Directory or fsspec URL to which committed windows are copied in the background; None for none.
        persist_every_n_windows: Copy only every n-th window.
        keep_persisted: Windows to keep in persist_dir.
        job_id: Identity under which windows are found again; None derives it from user, directory and command line.
        resume: "auto" continues the newest window of the fit that began like this one, "newest" the newest one of this
            job that fits the model, whatever began it; an iteration takes the window that has it, also an older one;
            "never" starts afresh. The environment variable MOETION_RESUME says it for one start.
        on_changed_settings: Whose settings of optimizers and schedulers training goes on with, where the script has
            changed them since the window was captured: the "window"'s, or the "script"'s (after the replay).
        on_mismatch: What to do when a replayed iteration differs from the recorded one (non-deterministic training):
            "warn" or "raise".
        skip_batches: Numbers of batches that are drawn from the training loader and thrown away, not trained on, after
            a spike of the loss with ``resume=<iteration>``. They count (micro-)batches as they are drawn, from 0 over
            the whole training: epoch * batches of an epoch + index in it; each rank leaves out its own.
        keep_rounds: Of a gradient log: how many older rounds of restore points stay, so that ``resume=<iteration>`` can
            go back to any iteration in them.
        audit: Of a gradient log: at every iteration one operator is rebuilt from its last capture and the log, and must
            equal its new capture bit for bit. If it does not: "warn" (and capture it whole from then on) or "raise",
            before the state is committed. "off": none is.
        grace_seconds: Seconds after SIGTERM within which committed windows are brought to storage; fewer than the
            scheduler gives before it kills (Kubernetes, SLURM and torchrun: 30).
        stale_after_seconds: Age after which the host memory of a dead job is reclaimed.
        elementwise_optimizers: Qualified class names of third-party optimizers whose update is elementwise, so that
            experts of a fused parameter may be captured one by one.
        sharding: How state that several ranks hold is dealt out to them: "auto", "equal", "adaptive", or "none" (each
            rank captures its own copy).
        replicas: Copies of each rank's windows in the memory of ranks on other failure domains; "auto" is 1 where there
            are several domains, else 0.
        failure_domain: What fails together with this rank; None takes its node (or what the launcher was told).
        interface: Interface on which each node serves its windows to the others: names, subnets or addresses with
            commas between, the first that a node has, as in ``GLOO_SOCKET_IFNAME``. None takes loopback on one machine,
            else the first interface that is up. ``MOETION_ADDRESS`` says by which address others reach the node, where
            that is another one.

    Raises:
        ConfigurationError: A value is out of range.
    """

    window: int | Literal["auto"] = "auto"
    max_window: int = 32
    overlap_target: float = 0.8
    mtbf: float = DEFAULT_MTBF
    skip_frozen_gradients: bool = False
    memory_dir: str | None = None
    persist_dir: str | None = None
    persist_every_n_windows: int = 1
    keep_persisted: int = 1
    job_id: str | None = None
    resume: int | Literal["auto", "newest", "never"] = "auto"
    on_changed_settings: Literal["window", "script"] = "window"
    on_mismatch: Literal["warn", "raise"] = "warn"
    skip_batches: Sequence[int] = ()
    keep_rounds: int = 0
    audit: Literal["warn", "raise", "off"] = "warn"
    grace_seconds: float = 25.0
    stale_after_seconds: float = 24 * 3600.0
    elementwise_optimizers: Sequence[str] = ()
    sharding: Literal["auto", "equal", "adaptive", "none"] = "auto"
    replicas: int | Literal["auto"] = "auto"
    failure_domain: str | None = None
    interface: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "elementwise_optimizers", tuple(self.elementwise_optimizers))
        said = os.environ.get(RESUME_VARIABLE, "").strip()
        if said:
            object.__setattr__(self, "resume", int(said) if said.isdigit() else said)
        if _are_numbers(self.skip_batches):
            object.__setattr__(self, "skip_batches", tuple(sorted(set(self.skip_batches))))
        for name, expected, ok in self._rules():
            if not ok:
                shown = RESUME_VARIABLE if said and name == "resume" else name
                raise ConfigurationError(f"{shown}={getattr(self, name)!r}: expected {expected}")

    def _rules(self) -> Iterator[tuple[str, str, bool]]:
        """Name, what is expected, and whether it is so."""
        yield "window", 'a number of iterations >= 1, or "auto"', self.window == "auto" or _is_count(self.window)
        yield "max_window", "an int >= 1", _is_count(self.max_window)
        yield "overlap_target", "a share in (0, 1]", 0 < self.overlap_target <= 1
        yield "mtbf", "seconds > 0", self.mtbf > 0
        resume_ok = self.resume in ("auto", "newest", "never") or _is_count(self.resume)
        yield "resume", '"auto", "newest", "never", or an iteration >= 1', resume_ok
        yield "on_changed_settings", '"window" or "script"', self.on_changed_settings in ("window", "script")
        yield "skip_batches", "a list of batch numbers (ints >= 0)", _are_numbers(self.skip_batches)
        yield "keep_rounds", "a number of rounds >= 0", _is_count(self.keep_rounds, at_least=0)
        yield "audit", '"warn", "raise" or "off"', self.audit in ("warn", "raise", "off")
        yield "on_mismatch", '"warn" or "raise"', self.on_mismatch in ("warn", "raise")
        yield "persist_every_n_windows", "an int >= 1", _is_count(self.persist_every_n_windows)
        yield "keep_persisted", "an int >= 1", _is_count(self.keep_persisted)
        yield "grace_seconds", "seconds > 0", self.grace_seconds > 0
        yield "stale_after_seconds", "seconds > 0", self.stale_after_seconds > 0
        methods = ("auto", "equal", "adaptive", "none")
        yield "sharding", '"auto", "equal", "adaptive" or "none"', self.sharding in methods
        replicas_ok = self.replicas == "auto" or _is_count(self.replicas, at_least=0)
        yield "replicas", 'a number of copies >= 0, or "auto"', replicas_ok
        expected = "1 to 100 letters, digits, '.', '_' or '-', not starting with '.'"
        yield "job_id", expected, self.job_id is None or valid_job_id(self.job_id)


def _is_count(value: object, at_least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _are_numbers(value: object) -> bool:
    return (
        isinstance(value, Collection)
        and not isinstance(value, str)
        and all(_is_count(number, at_least=0) for number in value)
    )
