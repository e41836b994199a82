"""Effective training time ratio under real failures: useful time by wall time, ours against checkpoint files.

Random ranks of a job are killed with SIGKILL at random times (exponential, seeded), the same ones for both ways. Useful
time is the newest step reached times the time of a step that nothing disturbs; steps that are executed again are not
useful. The wall time begins with the first step, so that the common first start is not counted.

Beside each ratio stands what `moetion simulate` would say of the same kills, from what the run has measured itself:
the pace between failures and how long outages took.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _jobs import MODES, Job, JobError, end_on_sigterm, steps_of
from _predicted import observed, predicted
from _report import RESULTS, load_results, machine, machine_line, markdown_table, number, write_results
from _sizes import add_model_arguments, fill_medium, model_argv

NAMES = ("torchrun-file", "launch-warm")
_PROBE_EVERY = 4


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mtbf", type=float, default=30.0, help="mean time between failures of the job, seconds")
    parser.add_argument("--minutes", type=float, default=1.5, help="time under failures, for each way")
    parser.add_argument(
        "--variants", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=", ".join(NAMES)
    )
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--probe-steps", type=int, default=24, help="steps of each calibration")
    parser.add_argument("--seed", type=int, default=0, help="of the failures")
    parser.add_argument(
        "--timeout",
        type=float,
        default=90.0,
        help="seconds that a start may take, or that no step is new before it fails",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: the small model, 2 ranks, seconds only")
    parser.add_argument("--work-dir", type=Path, help="where checkpoints are written; default: the temporary directory")
    parser.add_argument("--logs", type=Path, help="keep the output of each job in this folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for ettr.json and ettr.md")
    parser.add_argument("--table", action="store_true", help="only print the markdown of the last results")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.small, args.ranks, args.mtbf, args.minutes, args.probe_steps = True, 2, 4.0, 0.1, 12
    return fill_medium(args)


# --- how the failures and the interval are set -----------------------------------------------------------------------


def failures(mtbf: float, seconds: float, ranks: int, seed: int) -> list[tuple[float, int]]:
    """When which rank is killed: exponential times between failures, ranks by chance. At least one failure."""
    rng = random.Random(seed)
    found: list[tuple[float, int]] = []
    at = 0.0
    while True:
        at += rng.expovariate(1 / mtbf)
        rank = rng.randrange(ranks)
        if at >= seconds:
            return found or [(seconds / 2, rank)]
        found.append((at, rank))


def best_interval(cost_seconds: float, mtbf: float, step_seconds: float) -> int:
    """Steps between saves that are best by Young and Daly: sqrt(2 C MTBF), at least one step."""
    return max(1, round(math.sqrt(2 * max(0.0, cost_seconds) * mtbf) / step_seconds))


def training_ratio(first_step: int, last_step: int, step_seconds: float, wall_seconds: float) -> float:
    """Useful time by wall time: every step counts once."""
    return (last_step - first_step) * step_seconds / wall_seconds


# --- calibration -----------------------------------------------------------------------------------------------------


def calibrate(args: argparse.Namespace) -> dict[str, float]:
    """The time of an undisturbed step, and the time that a save takes, of a job that saves every few steps."""
    argv = ["--every", str(_PROBE_EVERY), *model_argv(args)]
    with Job("torchrun-file", ranks=args.ranks, argv=argv, threads=args.threads, work_dir=args.work_dir) as job:
        job.until_step(args.probe_steps + _PROBE_EVERY, args.timeout)
        records = steps_of(job.records(), 0)
    return costs([r["step"] for r in records], [r["time"] for r in records], _PROBE_EVERY)


def costs(steps: Sequence[int], times: Sequence[float], every: int) -> dict[str, float]:
    """Medians over the steps after the first ``every`` ones.

    The save's time is that of the step that saves above one that does not; the other ranks wait for rank 0 in the next
    step, which is left out of both.
    """
    durations = {step: after - before for step, before, after in zip(steps[1:], times, times[1:]) if step > every}
    plain = [seconds for step, seconds in durations.items() if step % every and step % every != 1]
    saving = [seconds for step, seconds in durations.items() if step % every == 0]
    step_seconds = statistics.median(plain)
    return {"step_seconds": step_seconds, "save_seconds": max(0.0, statistics.median(saving) - step_seconds)}


# --- the run ---------------------------------------------------------------------------------------------------------


def run_under_failures(name: str, every: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train for the given time while ranks are killed by the schedule."""
    log = None if args.logs is None else args.logs / f"ettr-{name}.txt"
    argv = ["--every", str(every), *model_argv(args)]
    seconds = 60 * args.minutes
    schedule = failures(args.mtbf, seconds, args.ranks, args.seed)
    kills: list[dict[str, Any]] = []
    with Job(name, ranks=args.ranks, argv=argv, threads=args.threads, work_dir=args.work_dir, keep_log=log) as job:
        job.until_step(2, args.timeout)
        job.until_ready(args.timeout)
        job.records()
        began, first = time.time(), job.reached()
        progress = Progress(job.reached, args.timeout)
        for at, rank in [*schedule, (seconds, None)]:
            _wait(job, began + at, progress)
            if rank is not None:
                kills.append({"planned": at, "rank": rank, "at": _shoot(job, rank, began + seconds, began)})
        ended = time.time()
        wall = max(seconds, ended - began)
        last = newest_common(job.records(), args.ranks, ended)
        times = [r["time"] - began for r in steps_of(job.records(), 0) if began < r["time"] <= ended]
    shot = [kill["at"] for kill in kills if kill["at"] is not None]
    return {
        "name": name, "every": every, "wall_seconds": wall, "first_step": first, "last_step": last, "kills": kills,
        "executed_by_rank_0": len(times), **observed(times, shot),
    }  # fmt: skip


class Progress:
    """Sees that a job stands still: what it reaches then is no result.

    Args:
        reached: The newest step of all ranks.
        limit: Seconds without a new one.
    """

    def __init__(self, reached: Callable[[], int], limit: float) -> None:
        self._reached, self._limit = reached, limit
        self._last = reached(), time.monotonic()

    def check(self) -> None:
        """Raise ``JobError`` if nothing has moved for too long."""
        reached, now = self._reached(), time.monotonic()
        if reached != self._last[0]:
            self._last = reached, now
        elif now - self._last[1] > self._limit:
            raise JobError(f"no new step for {self._limit:.0f} s behind step {reached} (see --timeout)")


def _wait(job: Job, when: float, progress: Progress) -> None:
    def over() -> bool:
        progress.check()
        return time.time() >= when

    job.until(over, when - time.time() + 10, "the time is up")


def _shoot(job: Job, rank: int, deadline: float, began: float) -> float | None:
    """Kill the rank's process, or wait for one if there is none just now. Returns when; None if there came none."""
    while time.time() < deadline:
        killed_at = job.kill_rank(rank)
        if killed_at is not None:
            return killed_at - began
        time.sleep(0.05)
    return None


def newest_common(records: Sequence[dict[str, Any]], ranks: int, until: float) -> int:
    """The newest step that all ranks had finished by a time."""
    return min(
        max((r["step"] for r in steps_of(records, rank) if r["time"] <= until), default=0) for rank in range(ranks)
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {
        "benchmark": "ettr", "machine": machine(), "ranks": args.ranks, "threads": args.threads,
        "mtbf_seconds": args.mtbf, "minutes": args.minutes, "calibrations": [], "rows": [],
    }  # fmt: skip
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:.0f} s] {text}", flush=True)

    say("calibration")
    calibrations = results["calibrations"]
    calibrations.append(calibrate(args))
    for name in args.variants:
        before = calibrations[-1]
        every = best_interval(before["save_seconds"], args.mtbf, before["step_seconds"])
        say(f"{name}: step {before['step_seconds']:.3f} s, save {before['save_seconds']:.3f} s" + (
            f", best interval {every} steps" if name == "torchrun-file" else ""))  # fmt: skip
        row = run_under_failures(name, every if name == "torchrun-file" else 1, args)
        say(f"reached step {row['last_step']} with {len(row['kills'])} failures; calibration")
        calibrations.append(calibrate(args))
        results["rows"].append(row | summarise(row, before, calibrations[-1], args.mtbf))
        say(f"{name}: {results['rows'][-1]['ettr']:.3f}")
        results["seconds"] = time.perf_counter() - started
        results["load_average_end"] = machine()["load_average"]
        write_results("ettr", results, markdown(results), args.results)
    return results


def summarise(
    row: dict[str, Any], before: dict[str, float], after: dict[str, float], mtbf: float
) -> dict[str, Any]:  # fmt: skip
    """The ratio with the mean of the calibrations around it, its range with either alone, and the simulator's."""

    def with_step(step_seconds: float) -> float:
        return training_ratio(row["first_step"], row["last_step"], step_seconds, row["wall_seconds"])

    either = sorted(with_step(c["step_seconds"]) for c in (before, after))
    step_seconds = statistics.fmean(c["step_seconds"] for c in (before, after))
    prediction = predicted(
        step_seconds=step_seconds, every=row["every"], seconds=row["wall_seconds"], mtbf=mtbf,
        kills=[kill["at"] for kill in row["kills"] if kill["at"] is not None], pace_seconds=row["pace_seconds"],
        outages=row["outages"],
    )  # fmt: skip
    return {
        "ettr": with_step(step_seconds), "ettr_range": either, "step_seconds": step_seconds, "predicted": prediction,
    }  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    about = (
        f"{machine_line(results)} {results['ranks']} ranks, {results['threads']} thread(s) each; MTBF "
        f"{results['mtbf_seconds']:g} s, {60 * results['minutes']:.0f} s for each way, the same failures."
    )
    rows = []
    for row in results["rows"]:
        done = [kill for kill in row["kills"] if kill["at"] is not None]
        low, high = row["ettr_range"]
        said, pace = row.get("predicted", {}), row.get("pace_seconds")  # older results have none
        rows.append([
            MODES[row["name"]].label, f"{row['every']} steps", f"{row['ettr']:.2f} ({low:.2f}..{high:.2f})",
            number(said.get("simulated")), number(said.get("closed_form")),
            str(len(done)), str(row["last_step"] - row["first_step"]),
            number(1e3 * row["step_seconds"], "{:.0f}"), number(pace and 1e3 * pace, "{:.0f}"),
            ", ".join(f"{seconds:.1f}" for seconds in row.get("outages", ())) or "-",
        ])  # fmt: skip
    header = [
        "how", "saves every", "effective training time ratio", "simulated", "closed form", "failures", "new steps",
        "undisturbed step, ms", "step between failures, ms", "outages, s",
    ]  # fmt: skip
    return f"{about}\n\n{markdown_table(header, rows)}"


def main() -> None:
    args = parse()
    if args.table:
        print(markdown(load_results("ettr", args.results)))
        return
    end_on_sigterm()
    try:
        results = measure(args)
    except JobError as error:
        sys.exit(f"ettr: {error}")
    print(f"\n{markdown(results)}\n\nwritten to {args.results}/ettr.json and ettr.md in {results['seconds']:.0f} s")


if __name__ == "__main__":
    main()
