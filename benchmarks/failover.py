"""Seconds from the SIGKILL of one rank to the next new optimizer step, for several ways to survive, in one run.

A job of several data-parallel ranks trains; one rank is killed; a step is new if no rank had reached it before. The
jobs of all ways are started in turn, several rounds, and each is shot at several times; all ways get the same shots.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _jobs import MODES, Job, JobError, end_on_sigterm, steps_of
from _report import RESULTS, load_results, machine, machine_line, markdown_table, write_results
from _sizes import add_model_arguments, fill_medium, model_argv

NAMES = ("torchrun-file", "torchrun-ours", "launch-cold", "launch-warm")
_GOAL = 7.0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=", ".join(NAMES)
    )
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="jobs of each way, in turn")
    parser.add_argument("--kills", type=int, default=2, help="ranks killed in each job, one after the other")
    parser.add_argument("--steps", type=int, default=10, help="new steps between failures (and up to 3 more)")
    parser.add_argument("--seed", type=int, default=0, help="of the ranks that are killed, and when")
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds that a start or a recovery may take")
    parser.add_argument("--quick", action="store_true", help="a smoke test: the small model, 2 ranks, 1 kill of each")
    parser.add_argument("--work-dir", type=Path, help="where checkpoints are written; default: the temporary directory")
    parser.add_argument("--logs", type=Path, help="keep the output of each job in this folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for failover.json and failover.md")
    parser.add_argument("--table", action="store_true", help="only print the markdown of the last results")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.small, args.ranks, args.rounds, args.kills, args.steps = True, 2, 1, 1, 6
    return fill_medium(args)


def shots(args: argparse.Namespace) -> list[list[tuple[int, float, int]]]:
    """For each round: after how many new steps, and what part of one more, which rank is killed. For all ways alike."""
    rng = random.Random(args.seed)
    return [
        [(args.steps + rng.randrange(4), rng.random(), rng.randrange(args.ranks)) for _ in range(args.kills)]
        for _ in range(args.rounds)
    ]


def one_job(
    name: str, plan: Sequence[tuple[int, float, int]], args: argparse.Namespace, log: Path | None
) -> list[dict[str, Any]]:
    """Start a job, and kill its ranks as planned.

    Returns:
        What was measured at each kill; a kill that the job did not survive has a "note" and is the last one.
    """
    found: list[dict[str, Any]] = []
    with Job(
        name, ranks=args.ranks, argv=model_argv(args), threads=args.threads, work_dir=args.work_dir, keep_log=log
    ) as job:
        try:
            job.until_step(1, args.timeout)
            job.until_ready(args.timeout)
            for steps, part, rank in plan:
                job.until_step(job.reached() + steps, args.timeout)
                time.sleep(part * _step_seconds(job, rank))
                found.append(one_kill(job, rank, args))
                job.until_ready(args.timeout)
            found[0]["live_share"] = live_share(job)
        except JobError as error:
            found.append({"note": str(error)})
    return found


def _step_seconds(job: Job, rank: int) -> float:
    """Of the last steps."""
    times = [record["time"] for record in steps_of(job.records(), rank)][-6:]
    return statistics.median(after - before for before, after in zip(times, times[1:]))


def live_share(job: Job) -> float:
    """Part of the time of undisturbed iterations in which a loss lets the others keep their live state."""
    steps = [steps_of(job.records(), rank) for rank in range(job.ranks)]
    pairs = [(a, b) for own in steps for a, b in zip(own, own[1:]) if b["pid"] == a["pid"]]
    median = statistics.median(b["time"] - a["time"] for a, b in pairs)
    pairs = [(a, b) for a, b in pairs if b["time"] - a["time"] < 3 * median]
    updating = float(sum(b["updating"] for _, b in pairs))
    return 1.0 - updating / float(sum(b["time"] - a["time"] for a, b in pairs))


def one_kill(job: Job, rank: int, args: argparse.Namespace) -> dict[str, Any]:
    """Kill a rank and wait until all ranks have finished a new step."""
    before = job.pids()
    killed_at = job.kill_rank(rank)
    assert killed_at is not None  # it has just finished a step
    reached = max(r["step"] for r in job.records() if r["what"] == "step" and r["time"] <= killed_at)
    job.until_step(reached + 1, args.timeout)
    after = [r for r in job.records() if r["time"] > killed_at]
    new = {r: next(s for s in steps_of(after, r) if s["step"] > reached) for r in range(job.ranks)}
    survivors = [r for r in range(job.ranks) if r != rank and new[r]["pid"] == before.get(r)]
    return {
        "rank": rank,
        "reached": reached,
        "seconds": max(record["time"] for record in new.values()) - killed_at,
        "recomputed": max(
            sum(1 for s in steps_of(after, r) if s["step"] <= reached and s["pid"] == new[r]["pid"])
            for r in range(job.ranks)
        ),
        "survivors": len(survivors),
    }


# --- all of them -----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {
        "benchmark": "failover", "machine": machine(), "ranks": args.ranks, "threads": args.threads,
        "rows": [{"name": name, "kills": []} for name in args.variants],
    }  # fmt: skip
    started = time.perf_counter()
    for number, plan in enumerate(shots(args), 1):
        for row in results["rows"]:
            print(f"[round {number}/{args.rounds}, {time.perf_counter() - started:.0f} s] {row['name']}", flush=True)
            log = None if args.logs is None else args.logs / f"failover-{row['name']}-{number}.txt"
            measured = one_job(row["name"], plan, args, log)
            row["kills"] += measured
            for kill in measured:
                print(f"    {_describe(kill)}", flush=True)
            summarise(results["rows"])
            results["seconds"] = time.perf_counter() - started
            results["load_average_end"] = machine()["load_average"]
            results["goals"] = goals(results["rows"])
            write_results("failover", results, markdown(results), args.results)
    return results


def _describe(kill: dict[str, Any]) -> str:
    if "note" in kill:
        return f"failed: {kill['note']}"
    return (
        f"{kill['seconds']:.2f} s after rank {kill['rank']} at step {kill['reached']}; "
        f"{kill['recomputed']} steps again, {kill['survivors']} survivors"
    )


def summarise(rows: Sequence[dict[str, Any]]) -> None:
    """Median and range of each row, and its ratio to the first one: by the medians, and by pairs of the same kill."""
    first = rows[0]["kills"]
    for row in rows:
        good = [kill for kill in row["kills"] if "note" not in kill]
        row["failed"] = len(row["kills"]) - len(good)
        if not good:
            continue
        seconds = [kill["seconds"] for kill in good]
        row["median"], row["range"] = statistics.median(seconds), [min(seconds), max(seconds)]
        row["recomputed"] = statistics.median(kill["recomputed"] for kill in good)
        row["survivors"] = statistics.median(kill["survivors"] for kill in good)
        shares = [kill["live_share"] for kill in good if "live_share" in kill]
        if shares and row["name"].startswith("launch"):
            row["live_share"] = statistics.median(shares)
        base = [kill["seconds"] for kill in first if "note" not in kill]
        if base:
            times = [b / s for b in base for s in seconds]
            row["times_faster"] = statistics.median(base) / row["median"]
            row["times_range"] = [min(times), max(times)]


def goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goal of the issue, and whether it was met."""
    warm = next((r for r in rows if r["name"] == "launch-warm" and "times_faster" in r), None)
    if warm is None or rows[0]["name"] != "torchrun-file":
        return []
    return [{
        "goal": f"warm at least {_GOAL:.0f}x faster than torchrun + ModelCheckpoint",
        "measured": f"{warm['times_faster']:.1f}x",
        "met": warm["times_faster"] >= _GOAL,
    }]  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    about = (
        f"{machine_line(results)} {results['ranks']} ranks, {results['threads']} thread(s) each; SIGKILL of one rank; "
        "medians (range)."
    )
    rows = []
    for row in results["rows"]:
        label = MODES[row["name"]].label + (", every step" if row["name"] == "torchrun-file" else "")
        if "median" not in row:
            notes = [kill["note"] for kill in row["kills"]]
            rows.append([label, f"failed: {notes[-1][:100]}" if notes else "not yet", *["-"] * 6])
            continue
        low, high = row["range"]
        rows.append([
            label, f"{row['median']:.2f} ({low:.2f}..{high:.2f})", _ratio(row), f"{row['recomputed']:g}",
            f"{row['survivors']:g} of {results['ranks'] - 1}",
            f"{row['live_share']:.0%}" if "live_share" in row else "-", str(len(row["kills"]) - row["failed"]),
            str(row["failed"]),
        ])  # fmt: skip
    header = [
        "how", "kill to new step, s", "times faster than the first", "steps executed again", "processes that lived on",
        "share of an iteration that leaves live state",
        "kills", "not survived",
    ]  # fmt: skip
    parts = [about, markdown_table(header, rows)]
    if results.get("goals"):
        cells = [[g["goal"], g["measured"], "yes" if g["met"] else "no"] for g in results["goals"]]
        parts.append(markdown_table(["goal", "measured", "met"], cells))
    return "\n\n".join(parts)


def _ratio(row: dict[str, Any]) -> str:
    if "times_faster" not in row:
        return "-"
    low, high = row["times_range"]
    return f"{row['times_faster']:.1f} ({low:.1f}..{high:.1f})"


def main() -> None:
    args = parse()
    if args.table:
        print(markdown(load_results("failover", args.results)))
        return
    end_on_sigterm()
    results = measure(args)
    print(f"\n{markdown(results)}\n\nwritten to {args.results}/failover.json and failover.md")


if __name__ == "__main__":
    main()
