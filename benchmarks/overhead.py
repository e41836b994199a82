"""What a checkpoint after EVERY iteration costs: time, stall, CPU, bytes and host memory, relative to none.

Each checkpointer runs in a process of its own. In that process two Trainers fit the same model, one without and one
with the checkpointer, and take turns: a block of steps without, a block with, and so on. A block's ratio is formed with
the two blocks without around it, so that a change of the machine's load hits both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _names import LABELS, NOT_PEERS, OURS, missing_package
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
from _sizes import add_model_arguments, model_argv

PRECISIONS = ("32-true", "bf16-mixed")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", nargs="+", choices=list(LABELS), default=list(LABELS), metavar="NAME", help=", ".join(LABELS)
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--seconds", type=float, default=12.0, help="measured time per variant and precision")
    parser.add_argument("--block", type=int, default=8, help="iterations per block; a multiple of the windows is best")
    parser.add_argument("--peer-block", type=int, default=4, help="the same for peers, whose saves take longer")
    parser.add_argument("--max-rounds", type=int, default=12, help="pairs of blocks at most; at least two are run")
    parser.add_argument("--work-dir", type=Path, help="where peers write their files; default: the temporary directory")
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="NAME=PYTHON",
        help="interpreter of another environment for one variant (e.g. dlrover=/opt/dlrover/bin/python); repeatable",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for overhead.json and overhead.md")
    parser.add_argument("--table", action="store_true", help="only print the markdown of the last results")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "PRECISION", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--profile", type=Path, help="(with one variant) write cProfile statistics of its training thread"
    )
    add_model_arguments(parser)
    return parser.parse_args(argv)


# --- one variant, in a process of its own ----------------------------------------------------------------------------


class _Player:
    """One of the two trainings: its clock ticks once an iteration and hands the turn over at the end of each block."""

    def __init__(self, index: int, turns: Any, block: int, warmup: int, drain: Any, stall: Any, stop: Any) -> None:
        self.index, self.turns, self.block, self.warmup = index, turns, block, warmup
        self.drain, self.stall, self.stop = drain, stall, stop
        self.blocks: list[dict[str, Any]] = []
        self.iterations = 0
        self.trainer: Any = None

    def tick(self) -> None:
        from _timing import cpu_seconds

        now = time.perf_counter()
        self.iterations += 1
        if self.iterations > self.warmup:
            self._seconds.append(now - self._last)
            self._stalls.append(self.stall.seconds - self._stalled)
        if self.iterations < self.warmup or len(getattr(self, "_seconds", ())) % self.block:
            self._last, self._stalled = now, self.stall.seconds
            return
        self.drain()
        if self.iterations > self.warmup:
            ended = time.perf_counter()
            self.blocks.append(
                {
                    "seconds": self._seconds,
                    "stall": self._stalls,
                    "cpu": cpu_seconds() - self._cpu,
                    "wall": ended - self._started,
                    "drain": ended - now,
                }
            )
        self.trainer.should_stop = self.stop(self)
        if not self.trainer.should_stop:
            self.turns.pass_on(self.index)
            self.turns.wait(self.index)
            # The other side may have been told to stop meanwhile; this block is then the last one.
        self._seconds, self._stalls = [], []
        self._stalled = self.stall.seconds
        self._cpu = cpu_seconds()
        self._started = self._last = time.perf_counter()


def child(args: argparse.Namespace) -> None:
    """Measure one variant and write its numbers."""
    name, precision, file = args.child
    import torch
    from _checkpointers import Places, make, window_of
    from _model import dense_bytes, make_loader, make_model
    from _timing import HookClock, MemoryPeak, Turns
    from lightning.pytorch import Trainer

    _quiet()
    torch.set_num_threads(args.threads)
    work = Path(file).parent
    places = Places(disk=work / "disk", memory=_memory_root(work), job=f"bench-{os.getpid()}")
    stall = HookClock()
    checkpointer = make(name, places, clock=stall)
    for callback in checkpointer.callbacks:
        stall.watch(callback)
    window = window_of(name)
    # The first windows allocate their buffers, and the first three iterations are watched for compute dtypes.
    longest = {"dense": 1, "sparse-auto": 8}.get(name, window)
    warmup = 3 if name not in ("dense", *OURS) else 4 + 2 * longest
    deadline: list[float] = []

    def stop(player: _Player) -> bool:
        if not deadline:
            deadline.append(time.perf_counter() + args.seconds)
        if player.index == 0:
            rounds = len(player.blocks) - 1
            return rounds >= args.max_rounds or (rounds >= 2 and time.perf_counter() > deadline[0])
        return players[0].done

    turns = Turns(2)
    players = [
        _Player(0, turns, args.block, 3, lambda: None, HookClock(), stop),
        _Player(1, turns, args.block, warmup, checkpointer.drain, stall, stop),
    ]
    players[0].done = players[1].done = False
    errors: list[BaseException] = []

    def fit(player: _Player) -> None:
        with_it = player.index == 1
        try:
            turns.wait(player.index)
            module = make_model(args)
            module.clock = player.tick
            player.trainer = Trainer(
                accelerator="cpu", devices=1, precision=precision, max_epochs=1, logger=False,
                enable_progress_bar=False, enable_model_summary=False,
                enable_checkpointing=with_it and name.startswith("lightning"),
                callbacks=checkpointer.callbacks if with_it else [], plugins=checkpointer.plugins if with_it else None,
                default_root_dir=work / f"root{player.index}",
            )  # fmt: skip
            player.parameters = sum(p.numel() for p in module.parameters())
            player.dense_bytes = dense_bytes(module)
            if with_it and args.profile:
                import cProfile

                profile = cProfile.Profile()
                profile.enable()
            player.trainer.fit(module, make_loader(args))
            if with_it and args.profile:
                profile.disable()
                profile.dump_stats(args.profile)
        except BaseException as error:
            errors.append(error)
        finally:
            player.done = True
            turns.leave(player.index)

    with MemoryPeak(places.memory) as memory:
        threads = [threading.Thread(target=fit, args=(player,)) for player in players]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    try:
        if errors:
            raise errors[0]
        record = _summary(players, args)
        record |= {
            "private_bytes": memory.private_bytes,
            "shared_bytes": memory.shared_bytes,
            "bytes_per_iteration": checkpointer.bytes_per_iteration(),
            "window": None if checkpointer.log is None else _window_seen(checkpointer.log),
            "capture_ms": None
            if checkpointer.log is None
            else 1e3 * statistics.median(checkpointer.log.capture_seconds),
        }
        Path(file).write_text(json.dumps(record), encoding="utf-8")
    finally:
        shutil.rmtree(places.memory, ignore_errors=True)


def _window_seen(log: Any) -> int | None:
    return log.windows[-1][1] - log.windows[-1][0] + 1 if log.windows else None


def _memory_root(work: Path) -> Path:
    shared = Path("/dev/shm")
    return (shared if shared.is_dir() and os.access(shared, os.W_OK) else work) / f"{work.name}-{os.getpid()}"


def _quiet() -> None:
    import logging

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning", "moetion_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _summary(players: Sequence[_Player], args: argparse.Namespace) -> dict[str, Any]:
    """Ratios of each block with the checkpointer to the blocks without before and after it."""
    none, other = players[0].blocks, players[1].blocks
    ratios: dict[str, list[float]] = {"median": [], "wall": [], "cpu": []}
    for index, block in enumerate(other):
        around = none[index : index + 2]
        if not around:
            break
        base = {
            "median": statistics.fmean(statistics.median(b["seconds"]) for b in around),
            "wall": statistics.fmean(b["wall"] for b in around),
            "cpu": statistics.fmean(b["cpu"] for b in around),
        }
        ratios["median"].append(statistics.median(block["seconds"]) / base["median"])
        ratios["wall"].append(block["wall"] / base["wall"])
        ratios["cpu"].append(block["cpu"] / base["cpu"])
    stalls = [s for block in other for s in block["stall"]]
    return {
        "blocks": {
            side: [[round(1e3 * s, 2) for s in block["seconds"]] for block in player.blocks]
            for side, player in zip(("none", "with"), players)
        },
        "rounds": len(ratios["median"]),
        "parameters": players[0].parameters,
        "dense_bytes": players[0].dense_bytes,
        "none_ms": 1e3 * statistics.median(s for b in none for s in b["seconds"]),
        "none_cpu_ms": 1e3 * statistics.median(b["cpu"] for b in none) / args.block,
        "ratio": statistics.median(ratios["median"]),
        "ratio_range": [min(ratios["median"]), max(ratios["median"])],
        "ratio_wall": statistics.median(ratios["wall"]),
        "ratio_cpu": statistics.median(ratios["cpu"]),
        "stall_ms": 1e3 * statistics.median(stalls),
        "stall_mean_ms": 1e3 * statistics.fmean(stalls),
        "drain_ms": 1e3 * statistics.median(b["drain"] for b in other),
    }


# --- all of them -----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    pythons = dict(item.split("=", 1) for item in args.peer_python)
    results: dict[str, Any] = {
        "benchmark": "overhead", "machine": machine(), "block": args.block, "threads": args.threads, "rows": [],
    }  # fmt: skip
    runs = [(precision, name) for precision in args.precisions for name in args.variants]
    started = time.perf_counter()
    for count, (precision, name) in enumerate(runs, 1):
        print(f"[{count}/{len(runs)}, {time.perf_counter() - started:.0f} s] {precision} {name}", flush=True)
        row: dict[str, Any] = {"name": name, "precision": precision}
        missing = None if name in pythons else missing_package(name)
        if missing is not None:
            row["note"] = "not installed"
        else:
            row |= _run_child(name, precision, pythons.get(name, sys.executable), args, model_argv(args))
        _print_row(row)
        results["rows"].append(row)
        results["seconds"] = time.perf_counter() - started
        results["load_average_end"] = machine()["load_average"]
        results["goals"] = goals(results["rows"])
        # After every row: a run that is cut short keeps what it has measured.
        write_results("overhead", results, markdown(results), args.results)
    return results


def _run_child(name: str, precision: str, python: str, args: argparse.Namespace, sizes: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="moetion-bench-", dir=args.work_dir) as folder:
        file = Path(folder) / "numbers.json"
        command = [python, __file__, "--child", name, precision, str(file), "--seconds", str(args.seconds)]
        block = args.block if name in NOT_PEERS else args.peer_block
        command += ["--block", str(block), "--max-rounds", str(args.max_rounds), *sizes]
        if args.profile:
            command += ["--profile", str(args.profile)]
        environment = child_environment(args.threads)
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=60 + 12 * args.seconds,
            )
        except subprocess.TimeoutExpired:
            return {"note": "ran past its time"}
        if done.returncode or not file.exists():
            lines = [line for line in done.stdout.strip().splitlines() if line.strip()]
            print("\n".join(lines[-12:]), file=sys.stderr)
            return {"note": f"failed: {(lines or ['no output'])[-1][:120]}"}
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return record


def _print_row(row: dict[str, Any]) -> None:
    if "note" in row:
        print(f"    {row['note']}", flush=True)
        return
    low, high = row["ratio_range"]
    print(
        f"    {row['ratio']:.3f}x ({low:.3f}..{high:.3f}, {row['rounds']} rounds), with drain "
        f"{row['ratio_wall']:.3f}x, CPU {row['ratio_cpu']:.3f}x, stall {row['stall_ms']:.1f} ms, "
        f"{row['bytes_per_iteration'] / 1e6:.0f} MB/iteration; none: {row['none_ms']:.0f} ms",
        flush=True,
    )


# --- what it means ---------------------------------------------------------------------------------------------------


def goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals of the issue, each with what was measured and whether it was met."""
    found: list[dict[str, Any]] = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        measured = {r["name"]: r for r in rows if r["precision"] == precision and "note" not in r}
        noise = measured.get("none")
        for name in OURS:
            row = measured.get(name)
            if row is None:
                continue
            found.append(
                {
                    "goal": f"{name}: iteration within 2 % of none",
                    "precision": precision,
                    "measured": f"{100 * (row['ratio'] - 1):+.1f} % (CPU {100 * (row['ratio_cpu'] - 1):+.1f} %"
                    + (f"; none against none {100 * (noise['ratio'] - 1):+.1f} %)" if noise else ")"),
                    "met": row["ratio"] <= 1.02,
                }
            )
        peers = {n: r for n, r in measured.items() if n not in NOT_PEERS}
        ours = {n: r for n, r in measured.items() if n in OURS}
        for label, dense in (
            ("third-party dense peer", peers),
            ("dense copy in memory (ours)", _only(measured, "dense")),
        ):
            if not dense or not ours:
                continue
            for key, what in (("ratio_wall", "time"), ("ratio_cpu", "CPU")):
                best, own = min(dense, key=lambda n: dense[n][key]), min(ours, key=lambda n: ours[n][key])
                theirs, mine = dense[best][key] - 1, ours[own][key] - 1
                times = theirs / mine if mine > 0 else float("inf")
                found.append(
                    {
                        "goal": f"{what} overhead at least 4x less than the best {label}",
                        "precision": precision,
                        "measured": f"{own} {100 * mine:+.1f} %, {best} {100 * theirs:+.1f} %"
                        + (f": {times:.1f}x" if mine > 0 and theirs > 0 else ""),
                        "met": theirs > 0 and times >= 4,
                    }
                )
        row = measured.get("sparse-w4")
        if row is not None and precision == "bf16-mixed":
            share = row["bytes_per_iteration"] / row["dense_bytes"]
            found.append(
                {
                    "goal": "bytes per iteration at most 1/3 of dense at W = 4",
                    "precision": precision,
                    "measured": f"{share:.3f}",
                    "met": share <= 1 / 3,
                }
            )
    return found


def _only(rows: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: rows[name]} if name in rows else {}


def markdown(results: dict[str, Any]) -> str:
    rows = results["rows"]
    first = next((r for r in rows if "note" not in r), None)
    parts = [machine_line(results)]
    if first is not None:
        parts[0] += (
            f" Model: {first['parameters'] / 1e6:.1f} M parameters, dense state {first['dense_bytes'] / 1e6:.0f} MB, "
            f"{results['threads']} thread(s) for training, a checkpoint after every iteration."
        )
    for precision in dict.fromkeys(row["precision"] for row in rows):
        chosen = [r for r in rows if r["precision"] == precision]
        base = next((r for r in chosen if r["name"] == "none" and "note" not in r), None)
        title = f"### {precision}"
        if base is not None:
            title += f" (none: {base['none_ms']:.0f} ms, {base['none_cpu_ms']:.0f} ms CPU per iteration)"
        parts.append(title)
        parts.append(markdown_table(
            [
                "checkpointer", "iteration", "range", "with drain", "CPU", "stall, ms (mean)", "MB / iteration",
                "of dense", "host memory above none, MB",
            ],
            [_cells(row, base, LABELS[row["name"]]) for row in chosen],
        ))  # fmt: skip
    if results["goals"]:
        parts.append("### Goals")
        parts.append(markdown_table(
            ["goal", "precision", "measured", "met"],
            [[g["goal"], g["precision"], g["measured"], "yes" if g["met"] else "no"] for g in results["goals"]],
        ))  # fmt: skip
    return "\n\n".join(parts)


def _cells(row: dict[str, Any], base: dict[str, Any] | None, label: str) -> list[str]:
    if row["name"] == "sparse-auto" and row.get("window"):
        label += f" (chose {row['window']})"
    if "note" in row:
        return [label, row["note"], *["-"] * 7]
    memory = None
    if base is not None:
        memory = (row["private_bytes"] + row["shared_bytes"] - base["private_bytes"]) / 1e6
    low, high = row["ratio_range"]
    return [
        label, f"{row['ratio']:.3f}x", f"{low:.2f}..{high:.2f}", f"{row['ratio_wall']:.3f}x",
        f"{row['ratio_cpu']:.3f}x",
        f"{row['stall_ms']:.1f} ({row['stall_mean_ms']:.1f})", f"{row['bytes_per_iteration'] / 1e6:.0f}",
        f"{row['bytes_per_iteration'] / row['dense_bytes']:.3f}", number(memory, "{:.0f}"),
    ]  # fmt: skip


def main() -> None:
    args = parse()
    if args.child:
        child(args)
        return
    if args.table:
        print(markdown(load_results("overhead", args.results)))
        return
    results = measure(args)
    text = markdown(results)
    print(f"\n{text}\n\nwritten to {args.results}/overhead.json and overhead.md in {results['seconds']:.0f} s")


if __name__ == "__main__":
    main()
