"""``moetion launch | rendezvous``: start the ranks of a job, and serve its store on another host."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from moetion_lightning.errors import ConfigurationError

__all__ = ["launch", "rendezvous"]

_LAUNCH_DESCRIPTION = """\
Start the ranks of a script. A rank that dies or hangs is started again alone, with the same rank; the others keep
running and keep their state. Needs a script that rebuilds its process groups (MoEtion's Lightning strategies do).

The store at --rdzv-endpoint carries the job's secret: the endpoint must be on a network that you trust.
"""


def launch(args: Sequence[str]) -> int:
    """Run a node's share of a job.

    Args:
        args: Arguments after ``moetion launch``.

    Returns:
        The exit status: see :mod:`moetion_lightning.distributed.exits`.
    """
    from moetion_lightning.distributed.exits import JobEndedError
    from moetion_lightning.distributed.launch import add_options
    from moetion_lightning.distributed.launch import launch as run

    options = add_options("moetion launch", _LAUNCH_DESCRIPTION).parse_args(args)
    _log_to_stderr()
    try:
        run(options)
    except JobEndedError as error:
        print(f"moetion launch: {error}", file=sys.stderr)
        return error.code
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
    print(f"serving at {format_endpoint(options.host, store.port)}", flush=True)
    stop.wait()
    return 0


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("moetion: %(message)s"))
    logger = logging.getLogger("moetion_lightning.distributed")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
