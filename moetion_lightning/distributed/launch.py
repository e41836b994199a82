"""Launching a job: finds or serves the stable store, claims a place, and runs its ranks by an agent."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from pathlib import Path

from torch.distributed.distributed_c10d import PrefixStore, Store

from moetion_lightning.config import (
    FAILURE_DOMAIN_VARIABLE,
    JOB_ID_VARIABLE,
    LOCAL_ADDRESS_VARIABLE,
    NODE_TIMEOUT_VARIABLE,
    SECRET_VARIABLE,
    STORE_VARIABLE,
    child_environment,
    job_id_from_environment,
    job_secret_from_environment,
)
from moetion_lightning.distributed.agent import Agent
from moetion_lightning.distributed.generations import FINISHED_KEY, announce_loss
from moetion_lightning.distributed.launch_settings import Launch
from moetion_lightning.distributed.nodes import NodeLease, Place, Roster, check_claim
from moetion_lightning.distributed.processes import Program
from moetion_lightning.distributed.stable_store import (
    STORE_ERRORS,
    connect_store,
    format_endpoint,
    host_store,
    join_or_host,
    parse_endpoint,
)
from moetion_lightning.errors import LaunchError, MoEtionError

__all__ = ["StopSignal", "derive_job_id", "launch"]

_log = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"
_CONNECT_SECONDS = 300.0


class StopSignal:
    """Notes the signal that asks this launcher to end."""

    def __init__(self) -> None:
        self.number: int | None = None

    def install(self) -> None:
        """Take SIGTERM, SIGINT and SIGHUP of this process, except those that it was started to ignore (nohup)."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.number = number

    def reason(self) -> str | None:
        """In words; None if there was none."""
        return None if self.number is None else f"stopped by {signal.Signals(self.number).name}"

    def wait(self) -> None:
        """Sleep until there is one."""
        while self.number is None:
            time.sleep(0.2)  # goes on after a handler returned

    def pause(self, seconds: float) -> None:
        """Sleep.

        Raises:
            LaunchError: The launcher is to end.
        """
        time.sleep(seconds)
        reason = self.reason()
        if reason is not None:
            raise LaunchError(reason)


def derive_job_id(program: Program) -> str:
    """The identity of a command: the same user, directory, script and arguments give the same one."""
    name = Path(program.argv[0]).stem if not program.is_module else program.argv[0]
    name = "".join(c if c.isalnum() or c in "_-" else "_" for c in name)[:40] or "python"
    parts = [str(os.getuid()), os.getcwd(), sys.executable, "-m" if program.is_module else "", *program.argv]
    return f"{name}-{hashlib.blake2b(chr(0).join(parts).encode(), digest_size=8).hexdigest()}"


def launch(settings: Launch, stop: StopSignal) -> None:
    """Run a node's share of a job until it is done.

    Args:
        settings: What to run.
        stop: Notes the signals that end this launcher.

    Raises:
        LaunchError: The job failed or was stopped; no process of it is left on this node.
        ConfigurationError: A setting does not fit the job's other launchers.
    """
    if settings.rdzv_endpoint is None:
        address = settings.local_addr or _LOOPBACK
        server = host_store(address)
        host, port, is_host = address, server.port, True
    else:
        host, port = parse_endpoint(settings.rdzv_endpoint)
        hosted = join_or_host(host, port, _CONNECT_SECONDS, stop.pause)
        is_host = hosted is not None
        server = hosted or connect_store(host, port)
        address = settings.local_addr or _address_towards(host, port)
    try:
        _Node(settings, stop, server, host, port, address).run(is_host=is_host)
    except MoEtionError:
        raise
    except STORE_ERRORS as error:
        line = str(error).splitlines()[0]
        raise LaunchError(
            f"the rendezvous at {format_endpoint(host, port)} does not answer any more ({line})"
        ) from error


class _Node:
    """One launcher's share of a job."""

    def __init__(self, settings: Launch, stop: StopSignal, store: Store, host: str, port: int, address: str) -> None:
        self._settings = settings
        self._stop = stop
        self._host = host
        self._port = port
        self._address = address
        self._job_id = settings.job_id or job_id_from_environment() or derive_job_id(settings.program)
        self._roster = Roster(
            store,
            self._job_id,
            num_nodes=settings.min_nodes,
            ranks_per_node=settings.nproc_per_node,
            node_timeout=settings.node_timeout,
            pause=stop.pause,
        )
        self._lease: NodeLease | None = None

    def run(self, *, is_host: bool) -> None:
        place = self._roster.claim(
            self._settings.node_rank, may_wait=self._settings.max_nodes > self._settings.min_nodes
        )
        if place is None:
            _log.info("the job finished without this spare")
            return
        try:
            self._run_place(place)
        finally:
            if self._lease is not None:
                self._lease.close()
        if is_host and self._settings.rdzv_endpoint is not None:
            self._roster.wait_for_end()

    def _run_place(self, place: Place) -> None:
        if self._settings.rdzv_endpoint is not None:
            client = connect_store(self._host, self._port, self._settings.node_timeout / 2)
            self._lease = NodeLease(PrefixStore(self._roster.run_id, client), place, self._settings.node_timeout)
        generation = self._first_generation(place)
        store = self._roster.store
        agent = Agent(
            self._settings,
            self._environment(place.slot),
            place.slot * self._settings.nproc_per_node,
            store,
            stop_reason=self._stop_reason,
            refuse=lambda: check_claim(store, place),
        )
        try:
            agent.run(generation)
        except LaunchError as error:
            self._tell_others(place, error)
            raise
        self._roster.finish(place.slot)

    def _tell_others(self, place: Place, error: LaunchError) -> None:
        """End the run, unless this node's ranks go on elsewhere."""
        has_spares = self._settings.max_nodes > self._settings.min_nodes
        if self._stop.number is not None and has_spares:
            return  # only this node leaves: a spare takes its place
        with contextlib.suppress(*STORE_ERRORS):
            if check_claim(self._roster.store, place) is None:
                self._roster.fail(f"on node {place.slot}: {str(error).splitlines()[0]}")

    def _first_generation(self, place: Place) -> int:
        if place.taken_over is None:
            self._roster.wait_for_all()
            return 0
        first = place.slot * self._settings.nproc_per_node
        ranks = range(first, first + self._settings.nproc_per_node)
        reason = f"node {place.slot} ({place.taken_over}) gave no sign of life for {self._settings.node_timeout:g} s"
        if self._roster.store.add(FINISHED_KEY, 0):
            self._roster.fail(f"{reason}, after others had finished")
            raise LaunchError(f"{reason}, after others had finished: start the job again; it continues from its state")
        generation = announce_loss(self._roster.store, ranks, reason)
        _log.warning("%s: this launcher runs its ranks, in generation %d", reason, generation)
        return generation

    def _stop_reason(self) -> str | None:
        return self._stop.reason() or (self._lease.stop_reason if self._lease is not None else None)

    def _environment(self, slot: int) -> dict[str, str]:
        """Of all processes of this node."""
        settings = self._settings
        store = self._roster.store
        secret = job_secret_from_environment()
        if secret is None:
            secret = store.compare_set("moetion/secret", "", secrets.token_hex(32)).decode()
        base = child_environment()
        if settings.nproc_per_node > 1 and "OMP_NUM_THREADS" not in base:
            base["OMP_NUM_THREADS"] = "1"  # as torchrun does; it must be there before torch is imported
        return base | {
            "WORLD_SIZE": str(settings.min_nodes * settings.nproc_per_node),
            "LOCAL_WORLD_SIZE": str(settings.nproc_per_node),
            "GROUP_RANK": str(slot),
            "GROUP_WORLD_SIZE": str(settings.min_nodes),
            "MASTER_ADDR": self._host,
            "MASTER_PORT": str(self._port),
            "TORCHELASTIC_RUN_ID": self._roster.run_id,
            # Of survivors and replacements alike: a prefix made from it must be the same on all ranks.
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": str(settings.max_restarts),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            STORE_VARIABLE: format_endpoint(self._host, self._port),
            SECRET_VARIABLE: secret,
            JOB_ID_VARIABLE: self._job_id,
            FAILURE_DOMAIN_VARIABLE: settings.failure_domain or socket.gethostname(),
            LOCAL_ADDRESS_VARIABLE: self._address,
            NODE_TIMEOUT_VARIABLE: str(settings.node_timeout if settings.min_nodes > 1 else 0.0),
        }


def _address_towards(host: str, port: int) -> str:
    """The address of the interface from which ``host`` is reached."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])
