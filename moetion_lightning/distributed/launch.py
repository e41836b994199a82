"""Launching a node's share of a job: torchrun's settings, with our rendezvous and our agent."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.run import config_from_args, get_args_parser, parse_min_max_nnodes

from moetion_lightning.config import (
    BIND_ADDRESS_VARIABLE,
    FAILURE_DOMAIN_VARIABLE,
    JOB_ID_VARIABLE,
    LOCAL_ADDRESS_VARIABLE,
    NODE_TIMEOUT_VARIABLE,
    SECRET_VARIABLE,
    STORE_VARIABLE,
    child_environment,
    job_id_from_environment,
    job_secret_from_environment,
    socket_interface,
    unnumbered_slurm_nodes,
    update_environment,
    valid_job_id,
)
from moetion_lightning.distributed.agent import Agent
from moetion_lightning.distributed.bounded_store import StoreSilentError
from moetion_lightning.distributed.communicators import nccl_environment
from moetion_lightning.distributed.exits import FAILED, JobEndedError
from moetion_lightning.distributed.guard import Guard
from moetion_lightning.distributed.rendezvous import BACKEND, NodeRendezvous
from moetion_lightning.distributed.stable_store import STORE_ERRORS, format_endpoint
from moetion_lightning.distributed.torch_elastic import settings_of
from moetion_lightning.distributed.watchdog import Limits, parse_limits
from moetion_lightning.errors import ConfigurationError, LaunchError

__all__ = ["StopSignal", "add_options", "derive_job_id", "launch"]

_log = logging.getLogger(__name__)


def add_options(prog: str, description: str) -> argparse.ArgumentParser:
    """Torchrun's parser with our options; ``PET_*`` variables give defaults as there."""
    parser = get_args_parser()
    parser.prog, parser.description = prog, description
    parser.formatter_class, parser.allow_abbrev = argparse.RawDescriptionHelpFormatter, False
    parser.usage = f"{prog} [OPTIONS] [-m] SCRIPT [ARGUMENTS]"
    for action in parser._actions:
        action.required = action.required and action.dest != "training_script_args"
    # A default that a PET_ variable gave is text; torch's own are numbers.
    if parser.get_default("max_restarts") == 0:
        parser.set_defaults(max_restarts=10)
    parser.set_defaults(node_rank=None)
    ours = parser.add_argument_group("more than torchrun has")
    ours.add_argument("--standby", type=int, default=0, metavar="K", help="processes that stand by, all imported (0)")
    ours.add_argument(
        "--hang-timeout",
        metavar="SECONDS",
        help="shoot a rank whose main thread is silent for so long and that is behind the others: a number, or "
        "SECTION=SECONDS,... (start=900,step=60,validation=300,save=900; or ten times the longest silence seen)",
    )
    ours.add_argument(
        "--node-timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="a spare replaces a node silent so long",
    )
    ours.add_argument("--failure-domain", metavar="LABEL", help="what fails together with this node (host name)")
    ours.add_argument(
        "--interface",
        metavar="NAME",
        help="interface, subnet or address of this node (GLOO_SOCKET_IFNAME)",
    )
    ours.add_argument("--job-id", metavar="ID", help="identity of the job (from user, directory, script, arguments)")
    return parser


def derive_job_id(words: Sequence[str], *, is_module: bool) -> str:
    """The identity of a command: the same user, directory, script and arguments give the same one.

    Args:
        words: Script or module, and its arguments.
        is_module: Whether the first one is a module.
    """
    name = words[0] if is_module else Path(words[0]).stem
    name = "".join(c if c.isalnum() or c in "_-" else "_" for c in name)[:40] or "python"
    parts = [str(os.getuid()), os.getcwd(), sys.executable, "-m" if is_module else "", *words]
    return f"{name}-{hashlib.blake2b(chr(0).join(parts).encode(), digest_size=8).hexdigest()}"


class StopSignal:
    """Notes the first signal that asks this process to end; :meth:`check` raises torch's ``SignalException`` then.

    A handler that raises would do so anywhere: with a lock held, in the middle of starting processes, or where Python
    only prints what was raised.

    Args:
        names: The signals, as of ``--signals-to-handle``; what this process was started to ignore (nohup) stays so.
    """

    def __init__(self, names: str = "SIGTERM,SIGINT,SIGHUP") -> None:
        numbers = [getattr(signal, name.strip(), None) for name in names.split(",")]
        self._taken = [number for number in numbers if number and signal.getsignal(number) != signal.SIG_IGN]
        self._number: signal.Signals | None = None

    def install(self) -> None:
        """Take the signals; also from torch's agent, whose handler raises."""
        for number in self._taken:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self._number = self._number or signal.Signals(number)

    def check(self) -> None:
        """Raise if there was a signal. Called at least each second, but for what has a limit of its own."""
        if self._number is not None:
            raise SignalException(f"stopped by {self._number.name}", self._number)

    def wait(self) -> None:
        """Take the signals, and sleep until there is one."""
        with contextlib.suppress(SignalException):
            self.install()
            while True:
                self.pause(0.2)

    def pause(self, seconds: float) -> None:
        """Sleep, unless there was a signal."""
        self.check()
        time.sleep(seconds)


def launch(options: argparse.Namespace) -> None:
    """Run a node's share of a job until it is done.

    Args:
        options: What the parser of :func:`add_options` has found.

    Raises:
        JobEndedError: The job failed or was stopped; no process of it is left on this node.
        ConfigurationError: A setting is wrong, or does not fit the job's other launchers.
    """
    job_id = _job_id(options)
    params, limits = _check(options, job_id), Limits(parse_limits(options.hang_timeout))
    try:
        config, _, _ = config_from_args(options)
    except (ValueError, AssertionError) as error:
        raise ConfigurationError(str(error)) from error
    if config.nproc_per_node < 1:
        raise ConfigurationError(f"--nproc-per-node {options.nproc_per_node!r}: expected at least 1")
    params.config |= {**config.rdzv_configs} | {"ranks_per_node": config.nproc_per_node}
    stop = StopSignal(*settings_of(config, "signals_to_handle").values())
    stop.install()
    handler: NodeRendezvous | None = None
    guard = Guard()
    try:
        handler = NodeRendezvous(params, in_place=True, pause=stop.pause)
        update_environment(_environment(options, handler, job_id, handler.nodes * config.nproc_per_node))
        program = [*(["-m"] if options.module else []), options.training_script, *options.training_script_args]
        agent = Agent(config, program, handler, standby=options.standby, limits=limits, guard=guard, stop=stop)
        _run(agent, handler)
    except SignalException as end:
        raise JobEndedError(str(end), 128 + end.sigval) from None
    except (LaunchError, ConfigurationError):
        raise
    except STORE_ERRORS as error:
        line = str(error).splitlines()[0]
        raise JobEndedError(f"the rendezvous does not answer any more ({line})") from error
    finally:
        if handler is not None:
            handler.shutdown()
        guard.close()
        if options.log_dir is None and config.logs_specs is not None:  # made for the error files alone
            shutil.rmtree(config.logs_specs.root_log_dir, ignore_errors=True)


def _run(agent: Agent, handler: NodeRendezvous) -> None:
    try:
        if agent.run() is None:
            _log.info("the job finished without this spare")
            return
        handler.finish()
        handler.wait_for_end()
    except (JobEndedError, SignalException) as error:
        if handler.has_spares and (isinstance(error, SignalException) or error.only_here):
            raise  # only this node leaves: a spare takes its place
        with contextlib.suppress(StoreSilentError):
            handler.fail_if_ours(str(error).splitlines()[0])
        if (
            isinstance(error, JobEndedError)
            and os.path.isfile(error.error_file)
            and "TORCHELASTIC_ERROR_FILE" in child_environment()
        ):
            get_error_handler().dump_error_file(error.error_file, FAILED)
        raise


def _check(options: argparse.Namespace, job_id: str) -> RendezvousParameters:
    try:
        least, most = parse_min_max_nnodes(options.nnodes)
    except (ValueError, RuntimeError):
        least = most = 0
    endpoint = options.rdzv_endpoint
    if not endpoint and most > 1 and (options.master_addr != "127.0.0.1" or options.master_port is not None):
        endpoint = format_endpoint(options.master_addr.strip("[]"), options.master_port or 29500)
    rules = (
        (1 <= least <= most, "nnodes", "N or MIN:MAX with 1 <= MIN <= MAX, for example 2:3"),
        (bool(endpoint) or most <= 1, "rdzv_endpoint", "HOST:PORT with --nnodes"),
        (options.rdzv_backend in ("static", "c10d", BACKEND), "rdzv_backend", "none, or torchrun for other backends"),
        (not options.no_python, "no_python", "a Python script or module (torchrun starts other programs)"),
        (options.max_restarts >= 0, "max_restarts", "0 or more"),
        (options.standby >= 0, "standby", "0 or more"),
        (options.node_timeout >= 2, "node_timeout", "at least 2 seconds"),
        (options.node_rank is None or 0 <= options.node_rank < max(least, 1), "node_rank", f"0 to {least - 1}"),
        (valid_job_id(job_id), "job_id", "1 to 100 letters, digits, '.', '_' or '-', not starting with '.'"),
    )
    for holds, name, expected in rules:
        if not holds:
            raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(options, name)!r}: expected {expected}")
    script = options.training_script
    if not options.module and not Path(script).is_file():
        raise ConfigurationError(f"no file {script!r} in {os.getcwd()}; a module needs -m before it")
    if most == 1 and unnumbered_slurm_nodes() > 1:
        _log.warning(
            "srun has started this on %d nodes, and each trains alone: give --nnodes", unnumbered_slurm_nodes()
        )
    given = {"node_timeout": options.node_timeout, "node_rank": options.node_rank}
    interface = options.interface or (socket_interface() if most > 1 else None)
    params = RendezvousParameters(
        BACKEND, endpoint or "", job_id, least, most, options.local_addr, **given, interface=interface
    )
    options.rdzv_endpoint, options.rdzv_backend = endpoint, BACKEND
    for name in ("node_rank", "master_addr"):  # torch warns of what it does not use
        delattr(options, name)
    return params


def _job_id(options: argparse.Namespace) -> str:
    named = options.rdzv_id if options.rdzv_id != "none" else None
    options.job_id = options.job_id or job_id_from_environment() or named
    words = [options.training_script, *options.training_script_args]
    return options.job_id or derive_job_id(words, is_module=options.module)


def _environment(options: argparse.Namespace, handler: NodeRendezvous, job_id: str, world_size: int) -> dict[str, str]:
    """Of all processes of this node."""
    several = bool(options.rdzv_endpoint)
    secret = job_secret_from_environment()
    if secret is None and not several:
        secret = secrets.token_hex(32)  # in the store, every user of this machine could read it
    elif secret is None:
        secret = handler.agree("moetion/secret", secrets.token_hex(32))
    kept = {name: child_environment().get(name, value) for name, value in nccl_environment(world_size).items()}
    return kept | {
        "TORCH_ELASTIC_WORKER_IDENTICAL": "1",
        STORE_VARIABLE: format_endpoint(handler.host, handler.port),
        SECRET_VARIABLE: secret,
        JOB_ID_VARIABLE: job_id,
        FAILURE_DOMAIN_VARIABLE: options.failure_domain or socket.gethostname(),
        LOCAL_ADDRESS_VARIABLE: handler.address.advertise,
        BIND_ADDRESS_VARIABLE: handler.address.bind,
        NODE_TIMEOUT_VARIABLE: str(options.node_timeout if handler.nodes > 1 else 0.0),
    }
