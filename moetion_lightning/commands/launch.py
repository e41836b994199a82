"""``moetion launch | rendezvous``: start the ranks of a job, and serve its store on another host."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from moetion_lightning.errors import ConfigurationError, LaunchError

__all__ = ["launch", "rendezvous"]

_LAUNCH_DESCRIPTION = """\
Start the ranks of a script. A rank that dies or hangs is started again alone, with the same rank; the others keep
running and keep their state. Needs a script that rebuilds its process groups (MoEtion's Lightning strategies do).

The store at --rdzv-endpoint carries the job's secret: the endpoint must be on a network that you trust.
"""

_ENDPOINT_HELP = "the job's store: of `moetion rendezvous`; else the first launcher on HOST serves it and must not die"


def launch(args: Sequence[str]) -> int:
    """Run a node's share of a job.

    Args:
        args: Arguments after ``moetion launch``.

    Returns:
        0 when all ranks ended with 0; 1 when the job failed; 128 and the signal's number when it was stopped by one.
    """
    options = _launch_parser().parse_args(args)
    from moetion_lightning.distributed import launch as launching
    from moetion_lightning.distributed.processes import Program

    least, most = launching.parse_nodes(options.nnodes)
    settings = launching.Launch(
        program=Program(argv=(options.script, *options.arguments), is_module=options.module),
        nproc_per_node=options.nproc_per_node,
        min_nodes=least,
        max_nodes=most,
        node_rank=options.node_rank,
        rdzv_endpoint=options.rdzv_endpoint,
        standby=options.standby,
        max_restarts=options.max_restarts,
        hang_timeout=options.hang_timeout,
        node_timeout=options.node_timeout,
        failure_domain=options.failure_domain,
        local_addr=options.local_addr,
        job_id=options.job_id,
    )
    _log_to_stderr()
    stop = launching.StopSignal()
    stop.install()
    try:
        launching.launch(settings, stop)
    except LaunchError as error:
        print(f"moetion launch: {error}", file=sys.stderr)
        return 1 if stop.number is None else 128 + stop.number
    return 0


def rendezvous(args: Sequence[str]) -> int:
    """Serve the stable store until a signal comes.

    Args:
        args: Arguments after ``moetion rendezvous``.
    """
    parser = argparse.ArgumentParser(
        prog="moetion rendezvous",
        description="Serve the store of jobs of several nodes, on a host that may be outside of them. It keeps nothing "
        "on disk: when it ends, its jobs end. Whoever reaches the port can read and write: use a trusted network.",
    )
    parser.add_argument("--port", type=int, required=True, help="port to serve on; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDR", help="interface to serve on (127.0.0.1)")
    options = parser.parse_args(args)
    from moetion_lightning.distributed.launch import StopSignal
    from moetion_lightning.distributed.stable_store import format_endpoint, host_store

    try:
        store = host_store(options.host, options.port)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"--host {options.host} --port {options.port}: {error}; expected an address of this machine and a free port"
        ) from error
    stop = StopSignal()
    stop.install()
    print(f"serving at {format_endpoint(options.host, store.port)}", flush=True)
    stop.wait()
    return 0


def _launch_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moetion launch",
        usage="moetion launch [OPTIONS] SCRIPT [ARGUMENTS]\n       moetion launch [OPTIONS] -m MODULE [ARGUMENTS]",
        description=_LAUNCH_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nproc-per-node", type=int, default=1, metavar="N", help="ranks on each node (1)")
    add("--nnodes", default="1", metavar="MIN[:MAX]", help="nodes; beyond MIN, launchers wait as spares (1)")
    add("--node-rank", type=int, metavar="K", help="take only this node's place (default: any)")
    add("--rdzv-endpoint", metavar="HOST:PORT", help=_ENDPOINT_HELP)
    add("--standby", type=int, default=0, metavar="K", help="processes that have imported everything and stand by (0)")
    add("--max-restarts", type=int, default=10, metavar="R", help="ranks started again on this node, in total (10)")
    add("--hang-timeout", type=float, default=30.0, metavar="SECONDS", help="kill a rank silent for so long (30)")
    add(
        "--node-timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="a spare replaces a node silent so long (10)",
    )
    add("--failure-domain", metavar="LABEL", help="what fails together with this node, e.g. its rack (host name)")
    add("--local-addr", metavar="ADDR", help="address of this node (default: found; 127.0.0.1 for one node)")
    add("--job-id", metavar="ID", help="identity of the job (default: from user, directory, script and arguments)")
    add("-m", "--module", action="store_true", help="SCRIPT is a module, as for python -m")
    add("script", metavar="SCRIPT", help="what each rank runs")
    add("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("moetion: %(message)s"))
    logger = logging.getLogger("moetion_lightning.distributed")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
