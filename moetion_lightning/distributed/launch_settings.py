"""What ``moetion launch`` is told: each option once, with its default and its help."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from moetion_lightning.config import valid_job_id
from moetion_lightning.distributed.processes import Program
from moetion_lightning.distributed.stable_store import parse_endpoint
from moetion_lightning.errors import ConfigurationError

__all__ = ["Launch"]

_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str}


def _option(default: Any, metavar: str, text: str) -> Any:
    return field(default=default, metadata={"metavar": metavar, "help": text})


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Settings of one launcher.

    Args:
        program: Script or module with its arguments. All others are options: see ``moetion launch --help``.

    Raises:
        ConfigurationError: A value is out of range.
    """

    program: Program
    nproc_per_node: int = _option(1, "N", "ranks on each node (1)")
    nnodes: str = _option("1", "MIN[:MAX]", "nodes; beyond MIN, launchers wait as spares (1)")
    node_rank: int | None = _option(None, "K", "take only this node's place (default: any)")
    rdzv_endpoint: str | None = _option(
        None,
        "HOST:PORT",
        "the job's store: of `moetion rendezvous`; else the first launcher on HOST serves it and must not die",
    )
    standby: int = _option(0, "K", "processes that have imported everything and stand by (0)")
    max_restarts: int = _option(10, "R", "ranks started again on this node, in total (10)")
    hang_timeout: float = _option(30.0, "SECONDS", "kill a rank silent for so long (30)")
    node_timeout: float = _option(10.0, "SECONDS", "a spare replaces a node silent so long (10)")
    failure_domain: str | None = _option(None, "LABEL", "what fails together with this node, e.g. its rack (host name)")
    local_addr: str | None = _option(None, "ADDR", "address of this node (default: found; 127.0.0.1 for one node)")
    job_id: str | None = _option(
        None, "ID", "identity of the job (default: from user, directory, script and arguments)"
    )

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Let a parser know all options."""
        for option in _options():
            kind = _TYPES[str(option.type).partition(" ")[0]]
            parser.add_argument(_flag(option.name), type=kind, default=option.default, **option.metadata)

    @classmethod
    def of(cls, program: Program, options: argparse.Namespace) -> Launch:
        """What a parser has found."""
        return cls(program=program, **{option.name: getattr(options, option.name) for option in _options()})

    @property
    def min_nodes(self) -> int:
        """Nodes of the job."""
        return self._nodes()[0]

    @property
    def max_nodes(self) -> int:
        """More than ``min_nodes``: this launcher may wait as a spare."""
        return self._nodes()[1]

    def _nodes(self) -> tuple[int, int]:
        least, colon, most = self.nnodes.partition(":")
        try:
            parsed = int(least), int(most) if colon else int(least)
        except ValueError:
            parsed = 0, 0
        if not 1 <= parsed[0] <= parsed[1]:
            raise ConfigurationError(
                f"--nnodes {self.nnodes!r}: expected N or MIN:MAX with 1 <= MIN <= MAX, for example 2:3"
            )
        return parsed

    def __post_init__(self) -> None:
        for name, expected, ok in self._rules():
            if not ok:
                raise ConfigurationError(f"{_flag(name)} {getattr(self, name)!r}: expected {expected}")
        if self.rdzv_endpoint is not None:
            parse_endpoint(self.rdzv_endpoint)
        if not self.program.is_module and not Path(self.program.argv[0]).is_file():
            raise ConfigurationError(f"no file {self.program.argv[0]!r} in {os.getcwd()}; a module needs -m before it")

    def _rules(self) -> Iterator[tuple[str, str, bool]]:
        """Option, what is expected, and whether it is so."""
        last = self.min_nodes - 1
        yield "nproc_per_node", "at least 1", self.nproc_per_node >= 1
        yield "standby", "0 or more", self.standby >= 0
        yield "max_restarts", "0 or more", self.max_restarts >= 0
        yield "hang_timeout", "at least 2 seconds", self.hang_timeout >= 2
        yield "node_timeout", "at least 2 seconds", self.node_timeout >= 2
        yield "node_rank", f"0 to {last}", self.node_rank is None or 0 <= self.node_rank <= last
        yield "rdzv_endpoint", "HOST:PORT with --nnodes", self.max_nodes == 1 or self.rdzv_endpoint is not None
        expected = "1 to 100 letters, digits, '.', '_' or '-', not starting with '.'"
        yield "job_id", expected, self.job_id is None or valid_job_id(self.job_id)


def _options() -> list[Field[Any]]:
    return [option for option in fields(Launch) if option.metadata]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
