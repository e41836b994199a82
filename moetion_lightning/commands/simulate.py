"""``moetion simulate``: a job under failures, event by event, next to the closed form."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from xml.etree.ElementTree import Element

from moetion_lightning.commands.job_arguments import Arguments, add_job, as_quantity, read_job
from moetion_lightning.commands.job_checks import (
    MOST_RANKS,
    TIME,
    Range,
    check_ranges,
    check_state,
    replicas_of,
)
from moetion_lightning.commands.plan import job_line
from moetion_lightning.commands.tables import paragraph, print_json, show, table
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.planning.comparison import (
    CAUSE_HEADER,
    HEADER,
    Compared,
    as_json,
    cause_rows,
    compare,
    compare_rows,
)
from moetion_lightning.planning.failures import FailureModel
from moetion_lightning.planning.job import Job, RankState
from moetion_lightning.planning.picture import bars, lines, save
from moetion_lightning.planning.quantities import count, duration, number_text, time_text
from moetion_lightning.planning.sources import group_seconds

__all__ = ["simulate"]

_MOST = 10_000_000  # failures: a minute or more
_RANGES: dict[str, Range] = {
    "shape": (0.1, 100.0, "a number from 0.1 to 100; 0.7 is usual"),
    "burst_nodes": (1.0, 1000.0, "a number of nodes from 1 to 1000"),
    "repeats": (0.0, 0.99, "a share from 0 to 0.99"),
    "time": TIME,
}
_ENOUGH = 5000  # failures: the ratio's chance error is then far below the difference of the two ways


def simulate(args: Sequence[str]) -> int:
    """Print both ways beside each other.

    Args:
        args: Arguments after ``moetion simulate``.
    """
    parser = argparse.ArgumentParser(
        prog="moetion simulate",
        usage="moetion simulate TARGET | --parameters N --iteration-time T [OPTIONS], see moetion simulate --help",
        description="Effective training time ratio (ETTR) and lost time by cause of each checkpoint policy: a job "
        "under failures, event by event, next to the closed form. It takes the arguments of `moetion plan`.",
    )
    add_job(parser)
    more = parser.add_argument_group("the simulation")
    more.add_argument("--failures", choices=["exponential", "weibull", "correlated"], default="exponential")
    more.add_argument("--shape", type=float, default=0.7, help="of weibull (%(default)s)")
    more.add_argument("--burst-nodes", type=float, default=1.5, metavar="N", help="correlated: nodes a failure takes")
    more.add_argument(
        "--repeats", type=float, default=0.2, metavar="SHARE", help="correlated: followed by another soon"
    )
    more.add_argument(
        "--time",
        type=as_quantity(duration),
        metavar="T",
        help="how long the job runs, e.g. 30d (5,000 failures; a trace: once)",
    )
    more.add_argument("--seed", type=int, default=0, help="of the failures (%(default)s)")
    more.add_argument("--policy", nargs="+", default=[], metavar="NAME", help="only these: sparse gradient_log dense "
                      "partial two_phase files")  # fmt: skip
    more.add_argument("--scale", nargs="+", default=[], metavar="RANKS", help="for each of these numbers of ranks: the "
                      "state is shared by all, the more nodes the more failures (an --mtbf stays)")  # fmt: skip
    options = parser.parse_args(args)
    check_ranges(options, _RANGES)
    known = {"sparse", "gradient_log", "dense", "partial", "two_phase", "files"}
    if set(options.policy) - known:
        raise ConfigurationError(f"--policy {' '.join(options.policy)}: expected of {', '.join(sorted(known))}")
    scales = [_scale(text) for text in options.scale]
    given = read_job(options)
    if "partial" in options.policy and not given.job.state.num_experts:
        raise ConfigurationError("--policy partial: expected a model with routed experts (--experts)")
    found = {job.ranks: _run(options, given, job) for job in _jobs(options, given, scales)}
    if options.picture is not None:
        save(_picture(given, found), options.picture)
    if options.json:
        print_json({str(ranks): as_json(rows) for ranks, rows in found.items()})
        return 0
    show(paragraph(job_line(given)))
    for ranks, rows in found.items():
        if len(found) > 1:
            show(f"\n{number_text(ranks, 'rank')}")
        show("", table(HEADER, compare_rows(rows), right=set(range(1, len(HEADER)))))
        show("", table(CAUSE_HEADER, cause_rows(rows), right=set(range(1, len(CAUSE_HEADER)))))
    show("", paragraph(_note(options, given)))
    return 0


def _run(options: argparse.Namespace, given: Arguments, job: Job) -> list[Compared]:
    if given.trace is not None:
        model = FailureModel(kind="trace", trace=given.trace[0], trace_seconds=given.trace[1])
        seconds = given.trace[1]
    else:
        model = FailureModel(
            kind=options.failures, mtbf=job.mtbf, shape=options.shape, burst_nodes=options.burst_nodes,
            repeats=options.repeats,
        )  # fmt: skip
        seconds = _ENOUGH * job.mtbf
    if options.time is not None:
        seconds = options.time
    if seconds / model.mean_seconds > _MOST:
        raise ConfigurationError(
            f"--time {seconds:g}: {seconds / model.mean_seconds:.2g} failures, expected at most {_MOST:,}; give a "
            "shorter time"
        )
    return compare(job, model, seconds, seed=options.seed, window=options.window, names=options.policy)


def _scale(text: str) -> int:
    """A number of ranks as it was given."""
    ranks = count(text)
    if not 1 <= ranks <= MOST_RANKS or ranks != int(ranks):
        raise ConfigurationError(f"--scale {text}: expected whole numbers of ranks from 1 to {MOST_RANKS:,}")
    return int(ranks)


def _jobs(options: argparse.Namespace, given: Arguments, scales: Sequence[int]) -> list[Job]:
    """The job at each scale: the whole state stays, and each rank has its share; so do nodes' failures."""
    if not scales:
        return [given.job]
    jobs = []
    for ranks in scales:
        job = given.job
        if options.model_ranks and ranks < options.model_ranks:
            raise ConfigurationError(f"--scale {ranks}: expected at least --model-ranks {options.model_ranks}")
        factor = 1.0 if options.model_ranks else job.ranks / ranks
        state = RankState(
            full_bytes=round(job.state.full_bytes * factor),
            compute_bytes=round(job.state.compute_bytes * factor),
            gradient_bytes=round(job.state.gradient_bytes * factor),
            expert_share=job.state.expert_share,
            num_experts=job.state.num_experts,
        )
        check_state(state, given.model, ranks)
        groups = group_seconds(ranks) if options.group_time is None else options.group_time
        nodes = -(-ranks // job.ranks_per_node)
        jobs.append(replace(
            job, state=state, ranks=ranks, mtbf=given.node_mtbf / nodes if given.node_mtbf else job.mtbf,
            outage=replace(job.outage, groups=groups), replicas=replicas_of(options, ranks),
        ))  # fmt: skip
    return jobs


def _note(options: argparse.Namespace, given: Arguments) -> str:
    if given.trace is not None:
        failures, seconds = given.trace
        nodes = sum(failure.nodes for failure in failures)
        return (
            f"The trace has {number_text(len(failures), 'failure')} of {number_text(nodes, 'node')} in "
            f"{time_text(seconds)}; "
            "the closed form takes exponential times with the same mean."
        )
    if options.failures != "exponential":
        return f"Failures are {options.failures}; the closed form takes exponential times with the same mean."
    return "Both ways take failures at exponential times; what is left of a difference is chance, and whole iterations."


def _picture(given: Arguments, found: dict[int, list[Compared]]) -> Element:
    title = f"{given.model}, a failure every {time_text(given.job.mtbf)}"
    if len(found) == 1:
        (rows,) = found.values()
        parts = {
            row.cost.callback.partition("Checkpoint(")[0]: {
                "useful": row.simulated.shares.ettr,
                **row.simulated.shares.causes,
            }
            for row in rows
        }
        return bars(f"Where the time goes: {title}", parts, y_label="share of the time")
    series: dict[str, list[tuple[float, float]]] = {}
    points: dict[str, list[tuple[float, float]]] = {}
    for ranks, rows in sorted(found.items()):
        for row in rows:
            name = row.cost.callback.partition("Checkpoint(")[0]
            series.setdefault(name, []).append((ranks, row.cost.shares.ettr))
            points.setdefault(name, []).append((ranks, row.simulated.shares.ettr))
    lowest = min(y for values in (*series.values(), *points.values()) for _, y in values)
    return lines(
        f"Effective training time by scale (line: closed form): {given.model}", series, points=points,
        x_label="ranks", y_label="ETTR", y_min=math.floor(5 * lowest) / 5, x_text=lambda ranks: f"{ranks:,.0f}",
    )  # fmt: skip
