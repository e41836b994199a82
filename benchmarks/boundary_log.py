"""What the log of stage boundaries costs a pipeline: iteration time, CPU, bytes, memory, and traffic (none).

One job of three processes (one stage each, 1F1B, gloo) trains in blocks of iterations, in turn without the log, with
it, without, and without once more. A block's ratio is formed with the blocks without around it; those of the second
kind of block without say how far a pipeline differs from itself here. First with EMULATED devices, one for each stage,
that sleep instead of computing, so that other programs on the machine disturb the time little; then really computing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _jobs import end_on_sigterm
from _pipeline_tables import NUM_STAGES, logged_in_all, markdown, median_error, quartiles
from _report import RESULTS, load_results, machine, write_results

_GOAL = 1.02


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[4, 8], metavar="M", help="at least 3")
    parser.add_argument("--samples", type=int, default=2, help="sequences of a micro-batch")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-expert", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=6, help="of the whole model; the stages share them")
    parser.add_argument("--forward-ms", type=float, default=20.0, help="emulated, of one micro-batch on one stage")
    parser.add_argument("--backward-ms", type=float, default=40.0, help="emulated, of one micro-batch on one stage")
    parser.add_argument("--window", type=int, default=4, help="iterations of a window, 2 or more")
    parser.add_argument("--block", type=int, default=2, help="iterations of a block")
    parser.add_argument("--rounds", type=int, default=12, help="blocks with the log")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a job may take")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: a small model, M = 4, one round, blocks of one iteration"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder for boundary_log.json and boundary_log.md"
    )
    parser.add_argument("--table", action="store_true", help="only print the markdown of the last results")
    args = parser.parse_args(argv)
    if args.quick:
        args.micro_batches, args.seq_len, args.d_model, args.d_expert, args.num_layers = [4], 32, 64, 64, 3
        args.window, args.block, args.rounds = 2, 1, 1
        args.forward_ms, args.backward_ms = 2.0, 4.0
    return args


# --- all of them -----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from _pipeline_job import run_ranks
    from _pipeline_log import run_rank  # with all that it imports, before the ranks are forked

    settings = (
        "samples", "seq_len", "d_model", "d_expert", "num_layers", "window", "block", "rounds", "forward_ms",
        "backward_ms",
    )  # fmt: skip
    results: dict[str, Any] = {
        "benchmark": "boundary_log", "machine": machine(), "settings": {name: getattr(args, name) for name in settings},
        "rows": [],
    }  # fmt: skip
    for emulated in (True, False):
        for count in args.micro_batches:
            started = time.perf_counter()
            found = run_ranks(
                NUM_STAGES,
                lambda rank: run_rank(rank, count, args, emulated=emulated),  # noqa: B023  # used at once
                timeout_seconds=args.timeout,
            )
            row = {"emulated": emulated, "micro_batches": count, "ranks": found, **summarise(found)}
            load = machine()["load_average"]
            row |= {"seconds": time.perf_counter() - started, "load": load[0]}
            results["rows"].append(row)
    results["load_average_end"] = load
    results["goals"] = goals(results["rows"])
    write_results("boundary_log", results, markdown(results), args.results)
    return results


def summarise(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of a job: of the slowest rank's time, and of all ranks' CPU time.

    Args:
        ranks: By stage, with "blocks": one without the log, and then by turns one with and three without, of which the
            middle one is compared with those around it, like the one with.
    """
    blocks = list(zip(*(rank["blocks"] for rank in ranks)))
    seconds = [max(block["seconds"] for block in one) for one in blocks]
    cpu = [sum(block["cpu"] for block in one) for one in blocks]
    on, off = range(1, len(blocks), 4), range(3, len(blocks), 4)
    logged, plain = [blocks[i] for i in on], [blocks[i] for i in range(len(blocks)) if i % 4 != 1]
    return {
        "iteration_seconds": statistics.median(seconds[i] for i in range(len(blocks)) if i % 4 != 1),
        "ratio": _ratios(seconds, on),
        "noise": _ratios(seconds, off),
        "cpu_ratio": _ratios(cpu, on),
        "cpu_noise": _ratios(cpu, off),
        "record_share": _share(logged, "record_seconds"),
        "norm_share": _share(logged, "norm_seconds"),
        "traffic_without": _traffic(plain),
        "traffic_with": _traffic(logged),
        "faults": [statistics.median(sum(rank["faults"] for rank in one) for one in kind) for kind in (plain, logged)],
    }


def _share(blocks: Sequence[Sequence[dict[str, Any]]], name: str) -> float:
    """Of an iteration, of the rank with the largest share."""
    return statistics.median(max(rank[name] / rank["seconds"] for rank in one) for one in blocks)


def _ratios(values: Sequence[float], chosen: Sequence[int]) -> dict[str, Any]:
    """Of blocks to the mean of the one before and the one after."""
    found = [values[i] / statistics.mean((values[i - 1], values[i + 1])) for i in chosen]
    return {
        "median": statistics.median(found),
        "range": [min(found), max(found)],
        "quartiles": quartiles(found),
        "error": median_error(found),
    }


def _traffic(blocks: Sequence[Sequence[dict[str, Any]]]) -> dict[str, list[float]]:
    """Least and most per iteration, of all ranks together."""
    return {
        name: [min(totals), max(totals)]
        for name in ("sends", "send_bytes", "collectives")
        for totals in [[sum(rank[name] for rank in one) for one in blocks]]
    }


def goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals; "met" is None where the noise is too large to say."""
    found = []
    for row in rows:
        name = f"M = {row['micro_batches']}" + (", emulated" if row["emulated"] else "")
        for what, key in (("wall", ""), ("CPU", "cpu_")):
            if row["emulated"] and what == "CPU":  # next to nothing is computed there
                continue
            ratio, noise = row[f"{key}ratio"], row[f"{key}noise"]
            found.append({
                "goal": f"{name}: {what} time of an iteration with the log at most {_GOAL} of one without",
                "measured": f"{ratio['median']:.3f}" + (f" +- {2 * ratio['error']:.3f}" if ratio["error"] else ""),
                "met": verdict(ratio, noise),
            })  # fmt: skip
        if not row["emulated"]:
            found.append(_traffic_goal(name, row))
    return found


def _traffic_goal(name: str, row: dict[str, Any]) -> dict[str, Any]:
    same = all(row["traffic_with"][key] == row["traffic_without"][key] for key in ("sends", "send_bytes"))
    held = all(row["traffic_with"][key] == [total] * 2 for key, total in logged_in_all(row).items())
    return {
        "goal": f"{name}: with the log as many sends and bytes as without; it holds exactly what is sent",
        "measured": f"{'equal' if same else 'not equal'} in all blocks; {'equal' if held else 'not equal'} to it",
        "met": same and held,
    }


def verdict(ratio: dict[str, Any], noise: dict[str, Any]) -> bool | None:
    """Whether a ratio is within the goal.

    Args:
        ratio: With the log to without.
        noise: Without the log to without, which should be 1.

    Returns:
        None if the noise is off by more than the goal allows, or if twice the standard error of the median leaves it
        open.
    """
    if ratio["error"] is None or abs(noise["median"] - 1) > _GOAL - 1:
        return None
    if ratio["median"] + 2 * ratio["error"] <= _GOAL:
        return True
    return False if ratio["median"] - 2 * ratio["error"] > _GOAL else None


def main() -> None:
    args = parse()
    if args.table:
        print(markdown(load_results("boundary_log", args.results)))
        return
    end_on_sigterm()
    results = measure(args)
    print(f"\n{markdown(results)}\n\nwritten to {args.results}/boundary_log.json and boundary_log.md")


if __name__ == "__main__":
    main()
