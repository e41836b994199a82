"""What the log of stage boundaries costs a pipeline: iteration time, CPU, bytes, memory, and traffic (none).

One job of three processes (one stage each, 1F1B, gloo) trains in blocks of iterations, in turn without the log, with
it, without, and without once more. A block's ratio is formed with the blocks without around it; those of the second
kind of block without say how far a pipeline differs from itself here.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _jobs import end_on_sigterm
from _report import RESULTS, load_results, machine, machine_line, markdown_table, write_results

_GOAL = 1.02
_NUM_STAGES = 3
_OTHERS = (2, 4, 8, 16, 32)  # numbers of micro-batches for which bytes are told


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[4, 8], metavar="M", help="at least 3")
    parser.add_argument("--samples", type=int, default=2, help="sequences of a micro-batch")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-expert", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=6, help="of the whole model; the stages share them")
    parser.add_argument("--window", type=int, default=4, help="iterations of a window, 2 or more")
    parser.add_argument("--block", type=int, default=2, help="iterations of a block")
    parser.add_argument("--rounds", type=int, default=16, help="blocks with the log")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a job may take")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a small model, M = 4, one round")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder for boundary_log.json and boundary_log.md"
    )
    parser.add_argument("--table", action="store_true", help="only print the markdown of the last results")
    args = parser.parse_args(argv)
    if args.quick:
        args.micro_batches, args.seq_len, args.d_model, args.d_expert, args.num_layers = [4], 32, 64, 64, 3
        args.window, args.rounds = 2, 1
    return args


# --- one rank --------------------------------------------------------------------------------------------------------


class _Rank:
    """The stage of one process, and what it measures."""

    def __init__(self, rank: int, num_micro_batches: int, args: argparse.Namespace) -> None:
        from _pipeline import Stage, Wire
        from _pipeline_models import language_loss, make_language_model, make_tokens

        self._args = args
        self._make_tokens = make_tokens
        model = make_language_model(
            d_model=args.d_model, d_expert=args.d_expert, num_layers=args.num_layers, seq_len=args.seq_len
        )
        self.samples = args.samples * num_micro_batches
        self.stage = Stage(
            model, lambda tokens: language_loss(model, tokens), make_tokens(0, args.samples, args.seq_len),
            num_stages=_NUM_STAGES, num_micro_batches=num_micro_batches, world=_NUM_STAGES, rank=rank,
        )  # fmt: skip
        self.wire = Wire()
        self.logged = 0  # iterations that the log has seen
        self._trained = 0

    def block(self, *, logging: bool, iterations: int | None = None) -> dict[str, Any]:
        """Train a block of iterations, and say what it took."""
        import torch.distributed as dist

        count = iterations or self._args.block
        if logging:
            self.stage.start_log(self.logged + 1)
        else:
            self.stage.stop_log()
        batches = [self._make_tokens(self._trained + i, self.samples, self._args.seq_len) for i in range(count)]
        dist.barrier()
        before, clock = self.wire.read(), self.stage.clock.seconds
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
            "log_seconds": (self.stage.clock.seconds - clock) / count,
            "sends": sends / count,
            "send_bytes": send_bytes / count,
            "collectives": collectives / count,
        }

    def _free(self) -> None:
        """What the engine frees when a window is committed, here in the iteration in which it ends."""
        window, log = self._args.window, self.stage.log
        assert log is not None
        if self.logged % window == 0:
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
            for boundary in range(_NUM_STAGES + 1)
            for direction in ("F", "B")
            for _, tensors in log.sent(number, boundary, direction)  # type: ignore[arg-type]
            for tensor in tensors
        ]
        return {"records": len(sent), "sent": sum(sent), "batch": log.iteration_bytes - sum(sent)}


def _peak_bytes(*, reset: bool) -> int | None:
    """Most resident memory of this process since the last reset; None where the system does not tell."""
    try:
        if reset:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")
        with open("/proc/self/status", encoding="ascii") as status:
            return next((1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:")), None)
    except OSError:
        return None


def run_rank(rank: int, num_micro_batches: int, args: argparse.Namespace) -> dict[str, Any]:
    """All blocks of one job, on one rank."""
    me = _Rank(rank, num_micro_batches, args)
    me.block(logging=False, iterations=3)  # shapes are learnt, the optimizer's state appears
    _peak_bytes(reset=True)
    blocks = [me.block(logging=False)]
    peak_without = _peak_bytes(reset=False)
    for number in range(args.rounds):
        if rank == 0:
            print(f"  M = {num_micro_batches}, round {number + 1}/{args.rounds}", flush=True)
        for logging in (True, False, False, False):
            blocks.append(me.block(logging=logging))
    log = me.stage.start_log(me.logged + 1)
    fill = 2 * args.window
    _peak_bytes(reset=True)
    me.block(logging=True, iterations=fill)
    peak_with = _peak_bytes(reset=False)
    shown = {count: me.bytes_of(count) for count in sorted({num_micro_batches, max(3, num_micro_batches // 2)})}
    return {
        "blocks": blocks,
        "parameters": sum(p.numel() for p in me.stage.parameters.values()),
        "state_bytes": sum(t.numel() * t.element_size() for t in me.stage.state()),
        "high_water_bytes": log.high_water_bytes,
        "peak_without": peak_without,
        "peak_with": peak_with,
        "iteration_bytes": {str(count): found for count, found in shown.items()},
    }


# --- all of them -----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from _pipeline_job import run_ranks

    settings = ("samples", "seq_len", "d_model", "d_expert", "num_layers", "window", "block", "rounds")
    results: dict[str, Any] = {
        "benchmark": "boundary_log", "machine": machine(), "settings": {name: getattr(args, name) for name in settings},
        "rows": [],
    }  # fmt: skip
    for count in args.micro_batches:
        started = time.perf_counter()
        found = run_ranks(_NUM_STAGES, lambda rank: run_rank(rank, count, args), timeout_seconds=args.timeout)  # noqa: B023
        row = {"micro_batches": count, "ranks": found, **summarise(found), "seconds": time.perf_counter() - started}
        results["rows"].append(row)
        results["load_average_end"] = machine()["load_average"]
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
        "log_share": statistics.median(max(b["log_seconds"] / b["seconds"] for b in one) for one in logged),
        "traffic_without": _traffic(plain),
        "traffic_with": _traffic(logged),
    }


def _ratios(values: Sequence[float], chosen: Sequence[int]) -> dict[str, Any]:
    """Of blocks to the mean of the one before and the one after."""
    found = [values[i] / statistics.mean((values[i - 1], values[i + 1])) for i in chosen]
    return {"median": statistics.median(found), "range": [min(found), max(found)], "quartiles": _quartiles(found)}


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def _traffic(blocks: Sequence[Sequence[dict[str, Any]]]) -> dict[str, list[float]]:
    """Least and most per iteration, of all ranks together."""
    return {
        name: [min(totals), max(totals)]
        for name in ("sends", "send_bytes", "collectives")
        for totals in [[sum(rank[name] for rank in one) for one in blocks]]
    }


def goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        count, ratio, noise = row["micro_batches"], row["ratio"], row["noise"]
        found.append({
            "goal": f"M = {count}: an iteration with the log takes at most {_GOAL} of one without",
            "measured": f"{ratio['median']:.3f} (the same without the log: {noise['median']:.3f})",
            "met": ratio["median"] <= _GOAL,
        })  # fmt: skip
        same = all(row["traffic_with"][name] == row["traffic_without"][name] for name in ("sends", "send_bytes"))
        found.append({
            "goal": f"M = {count}: as many sends, of as many bytes, with the log as without",
            "measured": "equal in every block" if same else "not equal",
            "met": same,
        })  # fmt: skip
    return found


# --- the tables ------------------------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    s = results["settings"]
    sizes = ", ".join(f"{rank['parameters'] / 1e6:.1f} M" for rank in results["rows"][0]["ranks"])
    about = (
        f"{machine_line(results)} {_NUM_STAGES} stages of {sizes} parameters, 1F1B, one process and one thread each; "
        f"micro-batches of {s['samples']} x {s['seq_len']} tokens, d_model {s['d_model']}, 32-bit. {s['rounds']} pairs "
        f"of blocks of {s['block']} iterations; medians (range; in brackets the middle half)."
    )
    parts = [about, "### Time", _time_table(results["rows"]), "### Bytes and memory", _byte_table(results["rows"])]
    parts += [_other_table(results["rows"]), "### Traffic", _traffic_table(results["rows"]), "### Goals"]
    cells = [[g["goal"], g["measured"], "yes" if g["met"] else "no"] for g in results["goals"]]
    return "\n\n".join([*parts, markdown_table(["goal", "measured", "met"], cells)])


def _time_table(rows: Sequence[dict[str, Any]]) -> str:
    header = [
        "M", "iteration, ms", "with / without", "without / without: the noise", "CPU, with / without",
        "CPU, without / without", "time in the log's own code",
    ]  # fmt: skip
    return markdown_table(header, [
        [
            str(row["micro_batches"]), f"{1e3 * row['iteration_seconds']:.0f}",
            *(_ratio(row[name]) for name in ("ratio", "noise", "cpu_ratio", "cpu_noise")),
            f"{100 * row['log_share']:.2f} %",
        ]
        for row in rows
    ])  # fmt: skip


def _ratio(found: dict[str, Any]) -> str:
    (low, high), (lower, upper) = found["range"], found["quartiles"]
    return f"{found['median']:.3f} ({low:.2f}..{high:.2f}) [{lower:.3f}..{upper:.3f}]"


def _byte_table(rows: Sequence[dict[str, Any]]) -> str:
    header = [
        "M", "stage", "records / step", "sent and logged, MB / step", "batch, MB / step", "log at most, MB",
        "of the stage's state", "process's peak above none, MB",
    ]  # fmt: skip
    cells = []
    for row in rows:
        for stage, rank in enumerate(row["ranks"]):
            found = rank["iteration_bytes"][str(row["micro_batches"])]
            peak = "-"
            if rank["peak_with"] is not None and rank["peak_without"] is not None:
                peak = f"{(rank['peak_with'] - rank['peak_without']) / 1e6:.1f}"
            cells.append([
                str(row["micro_batches"]), f"{stage} ({_place(stage)})", str(found["records"]),
                f"{found['sent'] / 1e6:.2f}", f"{found['batch'] / 1e6:.3f}", f"{rank['high_water_bytes'] / 1e6:.1f}",
                f"{100 * rank['high_water_bytes'] / rank['state_bytes']:.0f} %", peak,
            ])  # fmt: skip
    return markdown_table(header, cells)


def _place(stage: int) -> str:
    return "end" if stage in (0, _NUM_STAGES - 1) else "middle"


def _other_table(rows: Sequence[dict[str, Any]]) -> str:
    """The same bytes for other numbers of micro-batches: measured where it was, else by the micro-batch."""
    row = rows[-1]
    count, ranks = row["micro_batches"], row["ranks"]
    measured = {r["micro_batches"]: r["ranks"] for r in rows}
    header = ["MB / step of stage", *(f"M = {m}" for m in _OTHERS)]
    cells = []
    for stage in (0, 1):
        each = ranks[stage]["iteration_bytes"][str(count)]["sent"] / count
        values = [
            f"{_sent(measured[m], stage, m) / 1e6:.2f} measured" if m in measured else f"{m * each / 1e6:.2f}"
            for m in _OTHERS
        ]
        cells.append([f"{stage} ({_place(stage)}), micro-batches of one size", *values])
    half = max(3, count // 2)
    for stage in (0, 1):
        whole = _sent(ranks, stage, count) / 1e6
        values = [
            f"{_sent(ranks, stage, m) / 1e6:.2f} measured" if m in (count, half) else f"{whole:.2f}" for m in _OTHERS
        ]
        cells.append([f"{stage} ({_place(stage)}), a batch of one size (that of M = {count})", *values])
    return markdown_table(header, cells)


def _sent(ranks: Sequence[dict[str, Any]], stage: int, count: int) -> int:
    found: int = ranks[stage]["iteration_bytes"][str(count)]["sent"]
    return found


def _traffic_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["M", "log", "sends / step, all ranks", "MB sent / step, all ranks", "collective calls / step, all ranks"]
    cells = []
    for row in rows:
        for label, name in (("without", "traffic_without"), ("with", "traffic_with")):
            found = row[name]
            cells.append([
                str(row["micro_batches"]), label, _span(found["sends"], "{:g}"),
                _span([value / 1e6 for value in found["send_bytes"]], "{:.6f}"), _span(found["collectives"], "{:g}"),
            ])  # fmt: skip
    return markdown_table(header, cells)


def _span(found: Sequence[float], pattern: str) -> str:
    low, high = (pattern.format(value) for value in found)
    return low if low == high else f"{low}..{high}"


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
