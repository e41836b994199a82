"""What fault tolerance costs a job of several ranks whose steps are short, where the time is Python's, not the bytes'.

In each round the same job is trained once in each way, in a turning order, each time in new processes. Printed are the
median time of a step, and its ratio to that of the same round without checkpoints.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _jobs import MODES, Job, end_on_sigterm, steps_of
from _report import RESULTS, load_results, machine, machine_line, markdown_table, write_results
from _sizes import add_model_arguments, model_argv

NAMES = ("plain", "torchrun-ours", "launch-cold")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=120, help="steps that are measured in each job")
    parser.add_argument("--warm-up", type=int, default=30, help="steps before those")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds that a job may take")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 2 ranks, one round, a few steps")
    parser.add_argument(
        "--work-dir", type=Path, help="where the jobs' folders are made; default: the temporary directory"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for short_steps.json and short_steps.md")
    parser.add_argument("--table", action="store_true", help="only print the markdown of the last results")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    args.small = True
    if args.quick:
        args.rounds, args.steps, args.warm_up, args.ranks = 1, 12, 4, 2
    return args


def step_seconds(name: str, args: argparse.Namespace) -> float:
    """The median step of one job."""
    with Job(name, ranks=args.ranks, argv=model_argv(args), threads=args.threads, work_dir=args.work_dir) as job:
        job.until_step(args.warm_up + args.steps, args.timeout)
        times = [r["time"] for r in steps_of(job.records(), 0)][args.warm_up : args.warm_up + args.steps]
    return statistics.median(after - before for before, after in zip(times, times[1:]))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {
        "benchmark": "short_steps", "machine": machine(), "ranks": args.ranks, "threads": args.threads,
        "steps": args.steps, "rounds": [],
    }  # fmt: skip
    started = time.perf_counter()
    for number in range(args.rounds):
        order = NAMES[number % len(NAMES) :] + NAMES[: number % len(NAMES)]
        found = {name: step_seconds(name, args) for name in order}
        results["rounds"].append(found)
        shown = ", ".join(f"{MODES[name].label} {1e3 * found[name]:.1f} ms" for name in NAMES)
        print(f"[{time.perf_counter() - started:.0f} s] round {number + 1}: {shown}", flush=True)
        results["load_average_end"] = machine()["load_average"]
        write_results("short_steps", results, markdown(results), args.results)
    return results


def markdown(results: dict[str, Any]) -> str:
    rounds = results["rounds"]
    about = (
        f"{machine_line(results)} {results['ranks']} ranks, {results['threads']} thread(s) each; {len(rounds)} rounds "
        f"of {results['steps']} steps in new processes; ratios within a round, smallest and largest in brackets."
    )
    rows = []
    for name in NAMES:
        ratios = sorted(one[name] / one["plain"] for one in rounds)
        median = 1e3 * statistics.median(one[name] for one in rounds)
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}..{ratios[-1]:.3f})"
        rows.append([MODES[name].label, f"{median:.1f}", "1" if name == "plain" else spread])
    return f"{about}\n\n{markdown_table(['how', 'step, ms', 'of torchrun alone'], rows)}"


def main() -> None:
    args = parse()
    if args.table:
        print(markdown(load_results("short_steps", args.results)))
        return
    end_on_sigterm()
    results = measure(args)
    print(f"\n{markdown(results)}\n\nwritten to {args.results}/short_steps.json and short_steps.md")


if __name__ == "__main__":
    main()
