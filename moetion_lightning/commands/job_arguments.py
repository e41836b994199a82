"""Arguments of ``moetion plan`` and ``moetion simulate``: the model, the hardware, the failures."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moetion_lightning.commands.job_checks import check_job, check_state, replicas_of
from moetion_lightning.commands.tables import add_json
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.planning.job import Job, Outage, RankState, state_of
from moetion_lightning.planning.quantities import byte_count, count, count_text, duration
from moetion_lightning.planning.sources import META_NODE_MTBF, group_seconds
from moetion_lightning.planning.traces import read_trace
from moetion_lightning.recipes import PREFIX, recipe_path

if TYPE_CHECKING:
    from moetion_lightning.core.explain import Explanation
    from moetion_lightning.planning.failures import Failure

__all__ = ["Arguments", "add_job", "as_quantity", "read_job"]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the arguments say.

    Args:
        job: The job.
        model: What is planned, in a word.
        node_mtbf: Seconds between two failures of one node; 0 where the job's own are given.
        trace: Failures of a trace, and its length in seconds.
    """

    job: Job
    model: str
    node_mtbf: float
    trace: tuple[list[Failure], float] | None


def add_job(parser: argparse.ArgumentParser) -> None:
    """Let a parser know the arguments.

    Args:
        parser: The parser.
    """
    parser.add_argument("target", nargs="?", help="recipe:NAME, FILE.yaml or package.module:Class; else --parameters")
    parser.add_argument("--init", metavar="JSON", help="arguments of an importable class or factory")
    parser.add_argument("--meta", action="store_true", help="build an importable module without memory")

    model = parser.add_argument_group("the model, where no target is given")
    model.add_argument("--parameters", type=as_quantity(count), metavar="N", help="e.g. 671B")
    model.add_argument("--experts", type=int, metavar="N", help="routed experts of each MoE layer")
    model.add_argument("--experts-per-token", type=int, default=8, metavar="K", help="%(default)s")
    model.add_argument("--active-parameters", type=as_quantity(count), metavar="N", help="of one token, e.g. 37B")
    model.add_argument("--full-bytes", type=float, default=12.0, metavar="B", help="weights and optimizer state (12)")
    model.add_argument("--compute-bytes", type=float, default=2.0, metavar="B", help="as the forward reads them (2)")
    model.add_argument("--gradient-bytes", type=float, default=4.0, metavar="B", help="as optimizers read them (4)")

    machine = parser.add_argument_group("the hardware, by rank")
    machine.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks of the job")
    machine.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="%(default)s")
    machine.add_argument("--model-ranks", type=int, metavar="N", help="ranks that hold the model once, where each "
                         "replica captures all of it (else captures are shared by all ranks)")  # fmt: skip
    machine.add_argument("--live-copies", action="store_true", help="living ranks hold whatever a lost one held (DDP)")
    machine.add_argument("--copy-bandwidth", type=as_quantity(byte_count), metavar="B/s",
                         help="device to host; of a target: measured here; else 25GB/s")  # fmt: skip
    machine.add_argument(
        "--network-bandwidth", type=as_quantity(byte_count), default=25e9, metavar="B/s", help="25GB/s"
    )
    machine.add_argument(
        "--storage-bandwidth", type=as_quantity(byte_count), default=0.125e9, metavar="B/s", help="0.125GB/s"
    )
    machine.add_argument(
        "--host-memory", type=as_quantity(byte_count), metavar="B", help="for snapshots of a rank (not checked)"
    )
    machine.add_argument("--replicas", type=int, metavar="N", help="copies on other nodes (1; 0 on one node)")
    machine.add_argument("--persist-every", type=as_quantity(duration), metavar="T", help="copies of "
                         "snapshots in memory to storage (ten times as long as one takes, at least 1min)")  # fmt: skip
    machine.add_argument("--interference", type=float, default=0.25, metavar="SHARE", help="of a copy's time, that "
                         "training loses beside it (0.25)")  # fmt: skip
    machine.add_argument("--iteration-time", type=as_quantity(duration), metavar="T", help="of a recipe: measured here")
    machine.add_argument("--window", type=int, metavar="W", help="of the sparse policy (else the best)")

    fails = parser.add_argument_group("the failures")
    fails.add_argument(
        "--mtbf", type=as_quantity(duration), metavar="T", help="between two failures of the job, e.g. 10min"
    )
    fails.add_argument("--node-mtbf", type=as_quantity(duration), metavar="T", help="of one node, "
                       "where --mtbf is not given (154d: 6.5 failures in 1,000 node-days)")  # fmt: skip
    fails.add_argument("--trace", type=Path, metavar="FILE", help="a public trace; its failures in place of --mtbf")
    fails.add_argument("--trace-span", metavar="FROM,TO", help="a part of it, e.g. 470min,830min")
    fails.add_argument("--node-losses", type=float, default=0.2, metavar="SHARE", help="of the failures, that take a "
                       "node's memory with them, where it has no copies (0.2)")  # fmt: skip
    fails.add_argument(
        "--detection", type=as_quantity(duration), default=5.0, metavar="T", help="until a failure is seen (5s)"
    )
    fails.add_argument("--start-time", type=as_quantity(duration), default=0.0, metavar="T",
                       help="of processes that replace the lost ones (0: warm standby)")  # fmt: skip
    fails.add_argument(
        "--group-time", type=as_quantity(duration), metavar="T", help="to make communicators (5s to 30s by ranks)"
    )
    add_json(parser)
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw it, too")


def read_job(options: argparse.Namespace) -> Arguments:
    """The job that is described.

    Args:
        options: Parsed arguments.

    Raises:
        ConfigurationError: Something is missing, contradicts itself, or cannot be read.
    """
    check_job(options)
    trace, mtbf, node_mtbf = None, options.mtbf, 0.0
    if options.trace is not None:
        trace = read_trace(options.trace, **_span(options.trace_span))
        mtbf = trace[1] / len(trace[0])
    elif mtbf is None:
        node_mtbf = META_NODE_MTBF if options.node_mtbf is None else options.node_mtbf
        mtbf = node_mtbf / -(-options.ranks // options.ranks_per_node)
    state, model, iteration_seconds, bandwidth = _model(options)
    check_state(state, model, options.ranks)
    groups = group_seconds(options.ranks) if options.group_time is None else options.group_time
    job = Job(
        state=state,
        ranks=options.ranks,
        ranks_per_node=options.ranks_per_node,
        iteration_seconds=iteration_seconds,
        copy_bandwidth=options.copy_bandwidth or bandwidth,
        network_bandwidth=options.network_bandwidth,
        storage_bandwidth=options.storage_bandwidth,
        host_memory=options.host_memory or 0.0,
        replicas=replicas_of(options, options.ranks),
        persist_seconds=options.persist_every or 0.0,
        interference=options.interference,
        live_copies=options.live_copies,
        node_losses=options.node_losses,
        mtbf=mtbf,
        outage=Outage(detection=options.detection, start=options.start_time, groups=groups),
    )
    return Arguments(job=job, model=model, node_mtbf=node_mtbf, trace=trace)


def _model(options: argparse.Namespace) -> tuple[RankState, str, float, float]:
    """What a rank captures, what the model is called, an iteration's seconds, and the bandwidth of copies."""
    shared_by = options.model_ranks or options.ranks
    if options.target is None:
        if options.parameters is None or options.iteration_time is None:
            raise ConfigurationError(
                "give a target (recipe:NAME, FILE.yaml, package.module:Class), or --parameters and --iteration-time"
            )
        state = state_of(
            options.parameters, shared_by, experts=options.experts or 0, expert_parameters=_expert_parameters(options),
            full=options.full_bytes, compute=options.compute_bytes, gradient=options.gradient_bytes,
        )  # fmt: skip
        return state, f"{count_text(options.parameters)} parameters", options.iteration_time, 25e9
    found, iteration_seconds, bandwidth = _explained(options)
    if not iteration_seconds:
        raise ConfigurationError(
            f"{options.target}: --iteration-time is needed: an importable module is not trained here"
        )
    experts = max((layer.num_experts for layer in found.layers), default=0)
    expert_bytes = sum(row.full_bytes for row in found.rows if row.kind == "expert")
    state = RankState(
        full_bytes=found.dense_bytes // shared_by,
        compute_bytes=found.compute_bytes // shared_by,
        gradient_bytes=found.gradient_bytes // shared_by,
        expert_share=expert_bytes / max(1, found.dense_bytes),
        num_experts=experts,
    )
    return state, found.title, iteration_seconds, bandwidth


def _explained(options: argparse.Namespace) -> tuple[Explanation, float, float]:
    """The module's operators, an iteration's seconds (0: not known) and the bandwidth of copies here."""
    import torch

    from moetion_lightning.capture.thread import measure_bandwidth
    from moetion_lightning.commands.explain import load_module, observe_recipe
    from moetion_lightning.core.explain import explain
    from moetion_lightning.core.policy import SparsePolicy

    target: str = options.target
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = options.iteration_time or 0.0
    if target.startswith(PREFIX) or target.endswith((".yaml", ".yml")):
        path = recipe_path(target) if target.startswith(PREFIX) else Path(target)
        if not path.is_file():
            raise ConfigurationError(f"no such file: {path}")
        found = observe_recipe(path, window=1)[0]
        return found, given or found.iteration_seconds, measure_bandwidth(device)
    module = load_module(target, options.init or "{}", meta=options.meta)
    found = explain(module, policy=SparsePolicy(1, 1, 0.8))
    return found, given, measure_bandwidth(device)


def _expert_parameters(options: argparse.Namespace) -> float:
    """Parameters of all routed experts: what one token does not use, and the share of it that it does."""
    if not options.experts:
        return 0.0
    used = options.experts_per_token / options.experts
    return float(min(options.parameters, (options.parameters - options.active_parameters) / (1 - used)))


def _span(text: str | None) -> dict[str, float]:
    if text is None:
        return {}
    start, comma, stop = text.partition(",")
    if not comma:
        raise ConfigurationError(f"--trace-span {text!r}: expected two times, e.g. 470min,830min")
    span = {"start": duration(start), "stop": duration(stop)}
    if not span["start"] < span["stop"]:
        raise ConfigurationError(f"--trace-span {text}: expected an end after the beginning, e.g. 470min,830min")
    return span


def as_quantity(parse: Callable[[str], float]) -> Callable[[str], float]:
    """A type for argparse, whose own message says nothing of what is expected."""

    def call(text: str) -> float:
        try:
            return parse(text)
        except ConfigurationError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return call
