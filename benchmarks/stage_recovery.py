"""A lost stage that replays alone from its neighbours' logs, against a rollback of all stages.

The wall times are of EMULATED devices, one for each stage: a stage's forward and backward of a micro-batch sleep
instead of computing, because a few cores would distort the real thing. Schedule, messages, logs and replay are the real
ones. What skipping frozen operators' gradients saves, and the copy from a living peer, are not emulated.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _jobs import end_on_sigterm
from _pipeline_tables import VERDICTS
from _report import RESULTS, load_results, machine, machine_line, markdown_table, write_results

_TOLERANCE = 0.10  # of the bound
#: Stages, micro-batches and replicas of each job.
_CASES = ((3, 3, 1), (3, 12, 1), (6, 6, 1), (6, 24, 1), (3, 6, 2))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forward-ms", type=float, default=20.0, help="emulated, of one micro-batch on one stage")
    parser.add_argument("--backward-ms", type=float, default=40.0, help="emulated, of one micro-batch on one stage")
    parser.add_argument("--iterations", type=int, default=3, help="iterations that are repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=256, help="of what crosses a boundary: 64 rows of so many floats")
    parser.add_argument("--copy-mb", type=float, default=60.0, help="state of a stage that is copied from a peer")
    parser.add_argument("--window", type=int, default=4, help="iterations of a window, for the frozen operators")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a job may take")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 3 stages, short emulated times, one round")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for stage_recovery.json and .md")
    parser.add_argument("--table", action="store_true", help="only print the markdown of the last results")
    args = parser.parse_args(argv)
    args.cases, args.model = list(_CASES), {"d_model": 256, "d_expert": 512, "num_layers": 2}
    args.samples, args.seq_len, args.frozen_rounds = 2, 128, 25
    if args.quick:
        args.forward_ms, args.backward_ms, args.iterations, args.rounds = 2.0, 4.0, 2, 1
        args.cases, args.model = [(3, 3, 1), (2, 2, 2)], {"d_model": 32, "d_expert": 64, "num_layers": 2}
        args.seq_len, args.copy_mb, args.frozen_rounds = 16, 1.0, 1
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from _pipeline_frozen import run_frozen
    from _pipeline_job import run_ranks
    from _pipeline_recovery import Case, run_case, summarise

    settings = ("forward_ms", "backward_ms", "iterations", "rounds", "width", "copy_mb", "window", "model", "seq_len")
    results: dict[str, Any] = {
        "benchmark": "stage_recovery", "emulated": "one device per stage: forward and backward sleep",
        "machine": machine(), "settings": {name: getattr(args, name) for name in settings}, "rows": [],
    }  # fmt: skip
    for stages, micro_batches, replicas in args.cases:
        print(f"  {stages} stages, {micro_batches} micro-batches, {replicas} pipelines", flush=True)
        case = Case(
            stages=stages, micro_batches=micro_batches, replicas=replicas, iterations=args.iterations,
            rounds=args.rounds, forward_seconds=args.forward_ms / 1e3, backward_seconds=args.backward_ms / 1e3,
            samples=64, width=args.width, copy_bytes=int(args.copy_mb * 1e6),
        )  # fmt: skip
        started = time.perf_counter()
        found = run_ranks(case.world, lambda rank: run_case(rank, case), timeout_seconds=args.timeout)  # noqa: B023
        load = machine()["load_average"][0]
        results["rows"].append({**summarise(case, found), "seconds": time.perf_counter() - started, "load": load})
    print("  frozen operators", flush=True)
    (results["frozen"],) = run_ranks(
        1,
        lambda rank: run_frozen(
            window=args.window, micro_batches=4, samples=args.samples, seq_len=args.seq_len, sizes=args.model,
            rounds=args.frozen_rounds,
        ),
        timeout_seconds=args.timeout,
    )  # fmt: skip
    results["load_average_end"] = machine()["load_average"]
    results["goals"] = goals(results)
    write_results("stage_recovery", results, markdown(results), args.results)
    return results


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for row in results["rows"]:
        name = f"{row['stages']} stages, M = {row['micro_batches']}"
        name += f", {row['replicas']} pipelines" if row["replicas"] > 1 else ""
        found.append({
            "goal": f"{name}: a replay takes M/(M+S-1) = {row['bound']:.3f} of a rollback, within 10 %",
            "measured": f"{row['ratio']:.3f} ({row['ratio'] / row['bound']:.2f} of the bound)",
            "met": _keeps_to(row["ratio"] / row["bound"]),
        })  # fmt: skip
        found.append({
            "goal": f"{name}: it computes 1/S = {1 / row['stages']:.3f} of what a rollback does",
            "measured": f"{row['work'][0]:.3f}" + ("" if _is_one(row["work"]) else f"..{row['work'][1]:.3f}"),
            "met": all(abs(share - 1 / row["stages"]) < 1e-9 for share in row["work"]),
        })  # fmt: skip
    saved = results["frozen"]["saved_of_skipped"]
    margin = f" +- {200 * saved['error']:.0f}" if saved["error"] else ""
    found.append({
        "goal": "skipping their weight gradients saves a third of what replaying frozen operators costs",
        "measured": f"{100 * saved['median']:.0f}{margin} %",
        "met": _reaches(saved, 1 / 3),
    })  # fmt: skip
    return found


def _keeps_to(relative: float) -> bool | None:
    """Whether a ratio is within the tolerance of its bound; None where it is far below.

    Nothing is that fast: the machine has slowed the rollback, which needs all processes at the same time.
    """
    if relative < 1 - _TOLERANCE:
        return None
    return relative <= 1 + _TOLERANCE


def _reaches(found: dict[str, Any], goal: float) -> bool | None:
    """Whether a median is at least the goal; None if twice its standard error leaves it open."""
    if found["error"] is None or abs(found["median"] - goal) <= 2 * found["error"]:
        return None
    return bool(found["median"] > goal)


def _is_one(span: Sequence[float]) -> bool:
    return span[0] == span[1]


# --- the tables ------------------------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    s = results["settings"]
    about = (
        f"{machine_line(results)} **Emulated: one device per stage**, which sleeps {s['forward_ms']:g} ms for a "
        f"forward and {s['backward_ms']:g} ms for a backward of a micro-batch instead of computing; real 1F1B "
        f"schedule, messages over gloo, logs and replay; every final state is compared bit for bit. "
        f"{s['iterations']} iterations are repeated, {s['rounds']} rounds; medians over rounds and stages (range)."
    )
    parts = [about, _replay_table(results), "### The way below the bound: a living peer", _copy_table(results)]
    parts += ["### Frozen operators (not emulated: one process computes)", _frozen_table(results), "### Goals"]
    cells = [[g["goal"], g["measured"], VERDICTS[g["met"]]] for g in results["goals"]]
    return "\n\n".join([*parts, markdown_table(["goal", "measured", "met"], cells)])


def _replay_table(results: dict[str, Any]) -> str:
    header = [
        "stages", "M", "pipelines", "rollback, ms / iteration", "replay of one stage, ms / iteration",
        "replay / rollback", "bound M/(M+S-1)", "of the bound", "replay / busy", "rollback / (busy + bubble)",
        "computed / rollback", "load",
    ]  # fmt: skip
    count = results["settings"]["iterations"]
    cells = []
    for row in results["rows"]:
        replays = [seconds for stage in row["replays"].values() for seconds in stage["seconds"]]
        low, high = row["ratio_range"]
        replay, back, least = (
            statistics.median(replays),
            statistics.median(row["rollback_seconds"]),
            row["least_seconds"],
        )
        cells.append([
            str(row["stages"]), str(row["micro_batches"]), str(row["replicas"]), f"{1e3 * back / count:.0f}",
            f"{1e3 * replay / count:.0f}", f"{row['ratio']:.3f} ({low:.3f}..{high:.3f})", f"{row['bound']:.3f}",
            f"{row['ratio'] / row['bound']:.2f}", f"{replay / least:.2f}", f"{back * row['bound'] / least:.2f}",
            f"{row['work'][1]:.3f}", f"{row['load']:.1f}",
        ])  # fmt: skip
    return markdown_table(header, cells)


def _copy_table(results: dict[str, Any]) -> str:
    header = [
        "stages", "M", "pipelines", "copy of a stage's state, MB", "copy, ms (range)",
        "replay by the stage's peers, emulated, ms", "rollback, emulated, ms", "copy / replay",
    ]  # fmt: skip
    cells = []
    for row in results["rows"]:
        if not row["copy_seconds"]:
            continue
        copied = statistics.median(row["copy_seconds"])
        replayed = statistics.median(seconds for stage in row["replays"].values() for seconds in stage["seconds"])
        cells.append([
            str(row["stages"]), str(row["micro_batches"]), str(row["replicas"]), f"{results['settings']['copy_mb']:g}",
            f"{1e3 * copied:.0f} ({1e3 * min(row['copy_seconds']):.0f}..{1e3 * max(row['copy_seconds']):.0f})",
            f"{1e3 * replayed:.0f}", f"{1e3 * statistics.median(row['rollback_seconds']):.0f}",
            f"{copied / replayed:.3f}",
        ])  # fmt: skip
    return markdown_table(header, cells)


def _frozen_table(results: dict[str, Any]) -> str:
    frozen = results["frozen"]
    header = ["CPU time, of a replay with all gradients", "forward, backward and step", "forward and backward"]
    share = f"{100 * frozen['skipped_share']:.0f} %"
    return markdown_table(header, [
        [f"saved (window of {frozen['window']}, {share} of the elements skipped on average)",
         _percent(frozen["saved"]), _percent(frozen["saved_passes"])],
        ["saved of what the skipped operators cost (by their share)",
         _percent(frozen["saved_of_skipped"]), _percent(frozen["saved_passes_of_skipped"])],
        ["end state bit for bit that of the original run", *["yes" if frozen["exact"] else "no"] * 2],
    ])  # fmt: skip


def _percent(found: dict[str, Any]) -> str:
    low, high = found["range"]
    return f"{100 * found['median']:.0f} % ({100 * low:.0f}..{100 * high:.0f})"


def main() -> None:
    args = parse()
    if args.table:
        print(markdown(load_results("stage_recovery", args.results)))
        return
    end_on_sigterm()
    results = measure(args)
    print(f"\n{markdown(results)}\n\nwritten to {args.results}/stage_recovery.json and stage_recovery.md")


if __name__ == "__main__":
    main()
