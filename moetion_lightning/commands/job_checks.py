"""What `moetion plan` and `moetion simulate` refuse, by the option's own name, before anything is read or run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.planning.job import RankState
from moetion_lightning.planning.quantities import number_text

__all__ = ["MOST_RANKS", "TIME", "Range", "check_job", "check_ranges", "check_state", "replicas_of"]

#: The least and the most that an option may be, and how that is said.
Range = tuple[float, float, str]

MOST_RANKS = 10_000_000
_LONGEST = 1000 * 365 * 86400.0
TIME: Range = (1e-6, _LONGEST, "a time greater than 0 (from 0.001ms to 365000d), e.g. 10min")
_PAUSE: Range = (0.0, _LONGEST, "a time from 0 to 365000d, e.g. 30s")
_COUNT: Range = (1, MOST_RANKS, f"a whole number from 1 to {MOST_RANKS:,}")
_SHARE: Range = (0.0, 1.0, "a share from 0 to 1")
_BANDWIDTH: Range = (1.0, 1e18, "bytes per second greater than 0 (from 1 to 1e18), e.g. 25GB/s")
_PER_PARAMETER: Range = (0.01, 1000.0, "bytes of one parameter, from 0.01 to 1000")
_RANGES: Mapping[str, Range] = {
    "parameters": (1.0, 1e18, "a number from 1 to 1e18, e.g. 671B"),
    "experts": (0, 1_000_000, "a number of routed experts from 0 (a dense model) to 1,000,000"),
    "experts_per_token": (1, 1_000_000, "a number of experts from 1, fewer than --experts"),
    "active_parameters": (1.0, 1e18, "a number from 1, less than --parameters, e.g. 37B"),
    "full_bytes": _PER_PARAMETER,
    "compute_bytes": _PER_PARAMETER,
    "gradient_bytes": _PER_PARAMETER,
    "ranks": _COUNT,
    "ranks_per_node": _COUNT,
    "model_ranks": (1, MOST_RANKS, "a whole number from 1 to --ranks"),
    "copy_bandwidth": _BANDWIDTH,
    "network_bandwidth": _BANDWIDTH,
    "storage_bandwidth": _BANDWIDTH,
    "host_memory": (1.0, 1e18, "bytes from 1 to 1e18, e.g. 64GiB; without it, memory is not checked"),
    "replicas": (0, MOST_RANKS, "a number of copies from 0, fewer than there are nodes"),
    "persist_every": TIME,
    "interference": _SHARE,
    "iteration_time": TIME,
    "window": (1, 1000, "a number of iterations from 1 to 1000"),
    "mtbf": TIME,
    "node_mtbf": TIME,
    "node_losses": _SHARE,
    "detection": _PAUSE,
    "start_time": _PAUSE,
    "group_time": _PAUSE,
}


def check_ranges(options: argparse.Namespace, ranges: Mapping[str, Range]) -> None:
    """Refuse what is out of range.

    Args:
        options: Parsed arguments; None: not given.
        ranges: What each may be.

    Raises:
        ConfigurationError: One is not.
    """
    for name, (least, most, expected) in ranges.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise ConfigurationError(f"{_flag(name)} {value:g}: expected {expected}")


def check_job(options: argparse.Namespace) -> None:
    """Refuse what the arguments of both commands cannot be, alone or together.

    Args:
        options: Parsed arguments.

    Raises:
        ConfigurationError: A value is out of range, or contradicts another one.
    """
    check_ranges(options, _RANGES)
    if options.model_ranks is not None and options.model_ranks > options.ranks:
        raise ConfigurationError(f"--model-ranks {options.model_ranks}: expected from 1 to --ranks {options.ranks}")
    replicas_of(options, options.ranks)
    given = [name for name in ("mtbf", "node_mtbf", "trace") if getattr(options, name) is not None]
    if len(given) > 1:
        names = " and ".join(map(_flag, given))
        raise ConfigurationError(f"{names}: give one of them, each says how often the job fails")
    if options.trace_span is not None and options.trace is None:
        raise ConfigurationError(f"--trace-span {options.trace_span}: expected --trace FILE, too")
    if options.picture is not None:
        _check_picture(options.picture)
    if options.target is not None:
        for name in ("parameters", "experts", "active_parameters"):
            if getattr(options, name) is not None:
                raise ConfigurationError(
                    f"{options.target} and {_flag(name)}: give one of them, both say what the model is"
                )
    elif options.parameters is not None:
        _check_experts(options)


def replicas_of(options: argparse.Namespace, ranks: int) -> int:
    """The copies on other nodes: what was given, else one where there is another node.

    Args:
        options: Parsed arguments.
        ranks: Of the job.

    Raises:
        ConfigurationError: There are fewer nodes.
    """
    others: int = -(-ranks // options.ranks_per_node) - 1
    if options.replicas is None:
        return min(1, others)
    given: int = options.replicas
    if given > others:
        most = "0" if others == 0 else f"from 0 to {others}"
        raise ConfigurationError(
            f"--replicas {given}: expected {most}, since each copy is on another node, and "
            f"{number_text(ranks, 'rank')} with --ranks-per-node {options.ranks_per_node} are "
            f"{number_text(others + 1, 'node')}"
        )
    return given


def check_state(state: RankState, model: str, ranks: int) -> None:
    """Refuse a job whose ranks have nothing to capture.

    Args:
        state: What one rank captures.
        model: What is planned, in a word.
        ranks: Of the job.

    Raises:
        ConfigurationError: It is less than a byte.
    """
    if state.full_bytes < 1:
        raise ConfigurationError(
            f"{model} on {number_text(ranks, 'rank')}: expected at least one byte of state on each; give fewer --ranks"
        )


def _check_experts(options: argparse.Namespace) -> None:
    if options.active_parameters is not None and not options.experts:
        raise ConfigurationError(f"--active-parameters {options.active_parameters:g}: --experts is needed, too")
    if not options.experts:
        return
    if options.active_parameters is None:
        raise ConfigurationError(f"--experts {options.experts}: --active-parameters is needed, too")
    if options.experts < 2:
        raise ConfigurationError(f"--experts {options.experts}: expected at least 2, or 0 for a dense model")
    if options.experts_per_token >= options.experts:
        raise ConfigurationError(
            f"--experts-per-token {options.experts_per_token}: expected fewer than --experts {options.experts} (it "
            "is 8 where it is not given)"
        )
    if options.active_parameters >= options.parameters:
        raise ConfigurationError(
            f"--active-parameters {options.active_parameters:g}: expected fewer than --parameters "
            f"{options.parameters:g}"
        )


def _check_picture(path: Path) -> None:
    if path.suffix.lower() != ".svg":
        raise ConfigurationError(f"--picture {path}: expected a name that ends in .svg, the only form that is drawn")
    if not path.parent.is_dir():
        raise ConfigurationError(f"--picture {path}: cannot be written, there is no folder {path.parent}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
