"""What the log of stage boundaries costs a pipeline: iteration time, CPU, bytes, memory, and traffic (none).

One job of three processes (one stage each, 1F1B, gloo) trains in blocks of iterations, in turn without the log, with
it, without, and without once more. A block's ratio is formed with the blocks without around it; those of the second
kind of block without say how far a pipeline differs from itself here. First with EMULATED devices, one for each stage,
that sleep instead of computing, so that other programs on the machine disturb the time little; then really computing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _jobs import end_on_sigterm
from _pipeline_tables import NUM_STAGES, logged_in_all, markdown
from _report import RESULTS, load_results, machine, write_results

if TYPE_CHECKING:
    from _pipeline_models import Workload

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


# --- one rank --------------------------------------------------------------------------------------------------------


class _Rank:
    """The stage of one process, and what it measures."""

    def __init__(self, rank: int, num_micro_batches: int, args: argparse.Namespace, *, emulated: bool) -> None:
        from _pipeline import Stage, Wire

        self.args = args
        self.work = self._make_work(emulated)
        self.samples = args.samples * num_micro_batches
        self.stage = Stage(
            self.work.module, self.work.step, self.work.batch(0, args.samples),
            num_stages=NUM_STAGES, num_micro_batches=num_micro_batches, world=NUM_STAGES, rank=rank,
        )  # fmt: skip
        self.wire = Wire()
        self.logged = 0  # iterations that the log has seen
        self._trained = 0

    def _make_work(self, emulated: bool) -> Workload:
        from _pipeline_models import Device, Workload

        args = self.args
        if emulated:
            device = Device(args.forward_ms / 1e3, args.backward_ms / 1e3)
            return Workload.emulated(NUM_STAGES, seq_len=args.seq_len, d_model=args.d_model, device=device)
        return Workload.computing(
            seq_len=args.seq_len, d_model=args.d_model, d_expert=args.d_expert, num_layers=args.num_layers
        )

    def block(self, *, logging: bool, iterations: int | None = None) -> dict[str, Any]:
        """Train a block of iterations, and say what it took."""
        import torch.distributed as dist

        count = iterations or self.args.block
        if logging:
            self.stage.start_log(self.logged + 1)
        else:
            self.stage.stop_log()
        batches = [self.work.batch(self._trained + i, self.samples) for i in range(count)]
        dist.barrier()
        before, clock = self.wire.read(), self.stage.clock
        records, norms = clock.records, clock.norms
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        cpu, started = time.process_time(), time.perf_counter()
        for number, batch in enumerate(batches):
            self.stage.train(self._trained + number, batch, logging=logging)
            if logging:
                self.logged += 1
                self._free()
        seconds = time.perf_counter() - started
        self._trained += count
        sends, send_bytes, collectives = (now - then for now, then in zip(self.wire.read(), before))
        return {
            "seconds": seconds / count,
            "cpu": (time.process_time() - cpu) / count,
            "faults": (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / count,
            "record_seconds": (clock.records - records) / count,
            "norm_seconds": (clock.norms - norms) / count,
            "sends": sends / count,
            "send_bytes": send_bytes / count,
            "collectives": collectives / count,
        }

    def _free(self) -> None:
        """What the engine frees when a window is committed, here in the iteration in which it ends."""
        window, log = self.args.window, self.stage.log
        assert log is not None
        if self.logged % window == 0:
            with self.stage.clock.recording():
                log.free(self.logged - window + 2)  # its first iteration is never replayed

    def bytes_of(self, num_micro_batches: int) -> dict[str, int]:
        """Bytes that one iteration of this very batch leaves in the log when it is cut otherwise."""
        usual, self.stage.num_micro_batches = self.stage.num_micro_batches, num_micro_batches
        self.block(logging=True, iterations=1)
        self.stage.num_micro_batches = usual
        log, number = self.stage.log, self.logged
        assert log is not None
        sent = [
            tensor.numel() * tensor.element_size()
            for boundary in range(NUM_STAGES + 1)
            for direction in ("F", "B")
            for _, tensors in log.sent(number, boundary, direction)
            for tensor in tensors
        ]
        return {"records": len(sent), "sent": sum(sent), "batch": log.iteration_bytes - sum(sent)}


def _reset_peak() -> None:
    """Give free memory back to the system, and begin the peak of resident memory anew, where that is possible."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")


def _peak_bytes() -> int | None:
    """Most resident memory of this process since the last reset; None where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next((1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:")), None)
    except OSError:
        return None


def run_rank(rank: int, num_micro_batches: int, args: argparse.Namespace, *, emulated: bool) -> dict[str, Any]:
    """All blocks of one job, on one rank."""
    me = _Rank(rank, num_micro_batches, args, emulated=emulated)
    me.block(logging=False, iterations=3)  # shapes are learnt, the optimizer's state appears
    if me.work.device is not None:
        me.work.device.busy = True
    blocks = [me.block(logging=False)]
    for number in range(args.rounds):
        if rank == 0:
            kind = "emulated" if emulated else "computing"
            print(f"  M = {num_micro_batches}, {kind}, round {number + 1}/{args.rounds}", flush=True)
        for logging in (True, False, False, False):
            blocks.append(me.block(logging=logging))
    found = {"blocks": blocks, "parameters": sum(p.numel() for p in me.stage.parameters.values())}
    return found if emulated else {**found, **_sizes(me, num_micro_batches)}


def _sizes(me: _Rank, num_micro_batches: int) -> dict[str, Any]:
    """Memory, and bytes of an iteration."""
    log, peaks = me.stage.start_log(me.logged + 1), []
    for logging in (False, True):
        log.clear()
        _reset_peak()
        me.block(logging=logging, iterations=2 * me.args.window)
        peaks.append(_peak_bytes())
    counts = sorted({num_micro_batches, max(3, num_micro_batches // 2)})
    return {
        "state_bytes": sum(t.numel() * t.element_size() for t in me.stage.state()),
        "high_water_bytes": log.high_water_bytes,
        "peak_without": peaks[0],
        "peak_with": peaks[1],
        "iteration_bytes": {str(count): me.bytes_of(count) for count in counts},
    }


# --- all of them -----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from _pipeline_job import run_ranks

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
    low, _, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return {
        "median": statistics.median(found),
        "range": [min(found), max(found)],
        "quartiles": [low, high],
        "error": (high - low) / 1.35 * 1.25 / math.sqrt(len(found)) if len(found) > 1 else None,  # of the median
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
        for what, key in (("wall", "ratio"), ("CPU", "cpu_ratio")):
            if row["emulated"] and what == "CPU":  # next to nothing is computed there
                continue
            ratio = row[key]
            found.append({
                "goal": f"{name}: {what} time of an iteration with the log at most {_GOAL} of one without",
                "measured": f"{ratio['median']:.3f}" + (f" +- {2 * ratio['error']:.3f}" if ratio["error"] else ""),
                "met": verdict(ratio),
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


def verdict(ratio: dict[str, Any]) -> bool | None:
    """Whether a ratio is within the goal; None if twice the standard error of its median leaves that open."""
    if ratio["error"] is None:
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
