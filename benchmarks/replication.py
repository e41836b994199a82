"""What a checkpoint after EVERY step costs in a data-parallel job, with copies in other ranks' memory.

All jobs (one per checkpointer, two or three processes each) live at the same time and take turns by blocks of steps:
one without, one with the first checkpointer, one without, one with the second, and so on. A block's ratio is formed
with the two blocks without around it. Each process is a failure domain of its own, so that one machine has replicas.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _jobs import end_on_sigterm
from _names import missing_package
from _report import (
    RESULTS,
    child_environment,
    load_results,
    machine,
    machine_line,
    markdown_table,
    number,
    write_results,
)
from _sizes import add_model_arguments, fill_medium, model_argv

LABELS = {
    "none": "none (against itself: the noise)",
    "ours-r0": "ours, no replica",
    "ours-r1": "ours, 1 replica",
    "ours-r2": "ours, 2 replicas",
    "copy": "dense copy to host memory, no replica",
    "dlrover": "DLRover memory, rank 0 only, no replica",
    "dlrover-all": "DLRover memory, every rank, no replica",
    "nvrx-clique": "NVRx local, clique of 2 (1 replica)",
}
#: Jobs by number of ranks.
GROUPS = {
    2: ("none", "ours-r0", "ours-r1", "copy", "dlrover", "dlrover-all", "nvrx-clique"),
    3: ("none", "ours-r0", "ours-r2"),
}
_PACKAGES = {"dlrover": "dlrover", "dlrover-all": "dlrover", "nvrx-clique": "nvrx"}
_UNREPLICATED = ("dlrover", "dlrover-all", "copy")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", nargs="+", choices=list(LABELS), default=list(LABELS), metavar="NAME", help=", ".join(LABELS)
    )
    parser.add_argument("--ranks", nargs="+", type=int, choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--window", type=int, default=4, help="of ours")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each checkpointer")
    parser.add_argument("--block", type=int, default=8, help="steps of a block; a multiple of the window is best")
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds that a block may take")
    parser.add_argument("--quick", action="store_true", help="a smoke test: the small model, 2 ranks, 1 round")
    parser.add_argument("--work-dir", type=Path, help="for files on disk; default: the temporary directory")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for replication.json and replication.md")
    parser.add_argument("--table", action="store_true", help="only print the markdown of the last results")
    parser.add_argument("--rank", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--disk", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.small, args.ranks, args.rounds = True, [2], 1
        if args.variants == list(LABELS):
            args.variants = ["none", "ours-r1", "copy"]
    return fill_medium(args)


class _Job:
    """The processes of one checkpointer. Raises RuntimeError where a rank fails or is late."""

    def __init__(self, name: str, ranks: int, args: argparse.Namespace) -> None:
        self.name = name
        self._timeout = args.timeout
        self._work = Path(tempfile.mkdtemp(prefix="moetion-bench-", dir=args.work_dir))
        shared = Path("/dev/shm")
        self._memory = (shared if os.access(shared, os.W_OK) else self._work) / f"{self._work.name}-memory"
        self._memory.mkdir(mode=0o700)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self._processes: list[subprocess.Popen[str]] = []
        self._reports: list[Any] = []
        for rank in range(ranks):
            read_end, write_end = os.pipe()
            command = [
                sys.executable, __file__, "--rank", name, "--report", str(write_end), "--job", self._work.name,
                "--disk", str(self._work), "--memory", str(self._memory), "--window", str(args.window),
                "--block", str(args.block), "--precision", args.precision, *model_argv(args),
            ]  # fmt: skip
            environment = child_environment(args.threads) | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": self._work.name, "TORCHELASTIC_USE_AGENT_STORE": "False",
                "GLOO_SOCKET_IFNAME": "lo", "ELASTIC_JOB_NAME": self._work.name,
            }  # fmt: skip
            with open(self._output(rank), "wb") as output:
                self._processes.append(
                    subprocess.Popen(
                        command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                        text=True, pass_fds=(write_end,), start_new_session=True,
                    )
                )  # fmt: skip
            os.close(write_end)
            self._reports.append(os.fdopen(read_end, encoding="utf-8"))
        self.about = self._read()[0]

    def _output(self, rank: int) -> Path:
        return self._work / f"output-{rank}.txt"

    def _read(self) -> list[dict[str, Any]]:
        deadline = time.monotonic() + self._timeout
        found = []
        for rank, report in enumerate(self._reports):
            ready, _, _ = select.select([report], [], [], max(0.0, deadline - time.monotonic()))
            line = report.readline() if ready else ""
            if not line:
                lines = self._output(rank).read_text(errors="replace").strip().splitlines()
                raise RuntimeError(f"rank {rank} {'ended' if ready else 'is late'}: {' | '.join(lines[-2:])[-300:]}")
            found.append(json.loads(line))
        return found

    def warm_up(self) -> None:
        """The first block, which allocates and is not measured."""
        self._read()

    def block(self) -> dict[str, Any]:
        """One block of steps on all ranks: of times the slowest rank's, of the rest the sum."""
        before = _loopback_bytes()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        reports = self._read()
        wires = [report["wire"] for report in reports]
        return {
            "step": max(report["step"] for report in reports),
            "step_ms": [round(1e3 * seconds, 2) for seconds in reports[0]["step_seconds"]],
            "stall": max(report["stall"] for report in reports),
            "wall": max(report["wall"] for report in reports),
            "cpu": sum(report["cpu"] for report in reports),
            "wire": None if None in wires else sum(wires),
            "loopback": _loopback_bytes() - before,
        }

    def close(self) -> None:
        """End the processes, and remove what they left."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # at the end of its input it ends
                process.stdin.close()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        for report in self._reports:
            report.close()
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.rmtree(self._memory, ignore_errors=True)
        for left in (*Path("/dev/shm").glob(f"{self._work.name}*"), *Path("/tmp/ckpt_sock").glob(self._work.name)):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _loopback_bytes() -> int:
    """Bytes that the loopback interface has carried."""
    with contextlib.suppress(OSError), open("/proc/net/dev", encoding="ascii") as devices:
        for line in devices:
            name, _, counters = line.partition(":")
            if name.strip() == "lo":
                return int(counters.split()[0])
    return 0


# --- all of them -----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {
        "benchmark": "replication", "machine": machine(), "block": args.block, "threads": args.threads,
        "window": args.window, "precision": args.precision, "rows": [],
    }  # fmt: skip
    started = time.perf_counter()

    def write(rows: Sequence[dict[str, Any]]) -> None:
        # After every round: a run that is cut short keeps what it has measured.
        finished = [row for row in results["rows"] if row["ranks"] != rows[0]["ranks"]]
        results["rows"] = [*finished, *rows]
        results["seconds"] = time.perf_counter() - started
        results["load_average_end"] = machine()["load_average"]
        results["goals"] = goals(results["rows"], args.window)
        write_results("replication", results, markdown(results), args.results)

    for ranks in args.ranks:
        names = [name for name in GROUPS[ranks] if name in args.variants]
        print(f"[{time.perf_counter() - started:.0f} s] {ranks} ranks: {', '.join(names)}", flush=True)
        for row in _group(ranks, names, args, write) if names else []:
            _print_row(row)
    return results


def _group(
    ranks: int, names: Sequence[str], args: argparse.Namespace, write: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """All jobs with the same number of ranks, in turn."""
    rows: dict[str, dict[str, Any]] = {name: {"name": name, "ranks": ranks} for name in names}
    with contextlib.ExitStack() as stack:
        base = _Job("none", ranks, args)
        stack.callback(base.close)
        base.warm_up()
        jobs: list[_Job] = []
        for name, row in rows.items():
            if name in _PACKAGES and missing_package(_PACKAGES[name]) is not None:
                row["note"] = "not installed"
                continue
            with _noting(row):
                job = _Job(name, ranks, args)
                stack.callback(job.close)
                job.warm_up()
                row["pairs"] = []
                jobs.append(job)
        with _noting({"name": "none"}):  # without it nothing can be compared: what was measured until then is kept
            around = base.block()
            for round_number in range(args.rounds):
                for job in [job for job in jobs if "note" not in rows[job.name]]:
                    block = None
                    with _noting(rows[job.name]):
                        block = job.block()
                    before, around = around, base.block()
                    if block is not None:
                        rows[job.name]["pairs"].append({"before": before, "block": block, "after": around})
                print(f"    round {round_number + 1} of {args.rounds}", flush=True)
                for row in rows.values():
                    row |= base.about
                    summarise(row, args.block)
                write(list(rows.values()))
    return list(rows.values())


@contextlib.contextmanager
def _noting(row: dict[str, Any]) -> Any:
    """A checkpointer that fails is a row that says so."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        row["note"] = f"failed: {error}"
        print(f"    {row['name']}: {row['note']}", file=sys.stderr, flush=True)


def summarise(row: dict[str, Any], steps: int) -> None:
    """Ratios of each block to the blocks without before and after it; medians and ranges over the rounds."""
    pairs = row.get("pairs")
    if "note" in row or not pairs:
        return

    def ratios(key: str) -> list[float]:
        return [p["block"][key] / statistics.fmean([p["before"][key], p["after"][key]]) for p in pairs]

    step = ratios("step")
    row["none_ms"] = 1e3 * statistics.median(p[side]["step"] for p in pairs for side in ("before", "after"))
    row["ratio"], row["ratio_range"] = statistics.median(step), [min(step), max(step)]
    wall = ratios("wall")
    row["ratio_wall"], row["ratio_wall_range"] = statistics.median(wall), [min(wall), max(wall)]
    row["ratio_cpu"] = statistics.median(ratios("cpu"))
    row["stall_ms"] = 1e3 * statistics.median(p["block"]["stall"] for p in pairs)
    wires = [p["block"]["wire"] for p in pairs]
    row["wire_bytes"] = None if None in wires else statistics.fmean(wires) / steps
    # Other programs' traffic only adds to it, and every block sends the same: so the least is the best estimate.
    without = min(p[side]["loopback"] for p in pairs for side in ("before", "after"))
    row["loopback_bytes"] = max(0, min(p["block"]["loopback"] for p in pairs) - without) / steps


def _print_row(row: dict[str, Any]) -> None:
    if "ratio" in row:
        low, high = row["ratio_range"]
        print(
            f"    {row['name']}: {row['ratio']:.3f}x ({low:.3f}..{high:.3f}), whole block {row['ratio_wall']:.3f}x, "
            f"CPU {row['ratio_cpu']:.3f}x, {row['loopback_bytes'] / 1e6:.1f} MB/step over loopback; none "
            f"{row['none_ms']:.0f} ms",
            flush=True,
        )


def goals(rows: Sequence[dict[str, Any]], window: int) -> list[dict[str, Any]]:
    """The goals of the issue, each with what was measured and whether it was met."""
    measured = {(r["ranks"], r["name"]): r for r in rows if "ratio" in r}
    ours = measured.get((2, "ours-r1"))
    found: list[dict[str, Any]] = []
    if ours is None:
        return found
    for name in _UNREPLICATED:
        other = measured.get((2, name))
        if other is not None:
            found.append({
                "goal": f"ours with 1 replica costs no more than: {LABELS[name]}",
                "measured": f"step {ours['ratio']:.2f}x against {other['ratio']:.2f}x; whole block "
                f"{ours['ratio_wall']:.2f}x against {other['ratio_wall']:.2f}x",
                "met": ours["ratio"] <= other["ratio"] and ours["ratio_wall"] <= other["ratio_wall"],
            })  # fmt: skip
    share = ours["wire_bytes"] / ours["dense_bytes"]
    found.append({
        "goal": f"bytes on the wire per step and replica at most 1/W = {1 / window:.3f} of the dense state",
        "measured": f"{share:.3f}",
        "met": share <= 1 / window,
    })  # fmt: skip
    return found


def markdown(results: dict[str, Any]) -> str:
    rows = results["rows"]
    about = machine_line(results)
    if rows:
        about += (
            f" Model: {rows[0]['parameters'] / 1e6:.1f} M parameters, dense state {rows[0]['dense_bytes'] / 1e6:.0f} "
            f"MB, {results['precision']}, {results['threads']} thread(s) a rank; a checkpoint after every step; ours "
            f"with W = {results['window']}. Median over rounds (range)."
        )
    parts = [about]
    header = [
        "checkpointer", "step", "whole block, drained", "CPU", "stall, ms", "MB / step sent", "of dense",
        "MB / step over loopback",
    ]  # fmt: skip
    for ranks in dict.fromkeys(row["ranks"] for row in rows):
        chosen = [row for row in rows if row["ranks"] == ranks]
        base = next((r["none_ms"] for r in chosen if "none_ms" in r), None)
        parts.append(f"### {ranks} ranks (none: {number(base, '{:.0f}')} ms a step)")
        parts.append(markdown_table(header, [_cells(row) for row in chosen]))
    if results.get("goals"):
        parts.append("### Goals")
        cells = [[g["goal"], g["measured"], "yes" if g["met"] else "no"] for g in results["goals"]]
        parts.append(markdown_table(["goal", "measured", "met"], cells))
    return "\n\n".join(parts)


def _cells(row: dict[str, Any]) -> list[str]:
    label = LABELS[row["name"]]
    if "ratio" not in row:
        return [label, row.get("note", "not measured")[:100], *["-"] * 6]
    wire = row["wire_bytes"]
    return [
        label, "{:.2f}x ({:.2f}..{:.2f})".format(row["ratio"], *row["ratio_range"]),
        "{:.2f}x ({:.2f}..{:.2f})".format(row["ratio_wall"], *row["ratio_wall_range"]),
        f"{row['ratio_cpu']:.2f}x", f"{row['stall_ms']:.1f}",
        number(None if wire is None else wire / 1e6, "{:.1f}"),
        number(None if wire is None else wire / row["dense_bytes"], "{:.3f}"),
        f"{row['loopback_bytes'] / 1e6:.1f}",
    ]  # fmt: skip


def main() -> None:
    args = parse()
    if args.rank:
        from _replicated import run_rank

        run_rank(args)
        return
    if args.table:
        print(markdown(load_results("replication", args.results)))
        return
    end_on_sigterm()
    results = measure(args)
    text = markdown(results)
    print(f"\n{text}\n\nwritten to {args.results}/replication.json and .md in {results['seconds']:.0f} s")


if __name__ == "__main__":
    main()
