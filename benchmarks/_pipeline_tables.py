"""The tables of the boundary log's benchmark, and what both pipeline benchmarks say of their goals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from _report import machine_line, markdown_table

__all__ = ["NUM_STAGES", "VERDICTS", "logged_in_all", "markdown", "median_error", "quartiles"]

NUM_STAGES = 3
_OTHERS = (2, 4, 8, 16, 32)  # numbers of micro-batches for which bytes are told
VERDICTS = {True: "yes", False: "no", None: "not shown: too much noise"}


def quartiles(values: Sequence[float]) -> list[float]:
    """Ends of the middle half."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def median_error(values: Sequence[float]) -> float | None:
    """Standard error of the median, from the middle half (of normal values); None of a single value."""
    if len(values) < 2:
        return None
    low, high = quartiles(values)
    return (high - low) / 1.35 * 1.25 / math.sqrt(len(values))


def logged_in_all(row: dict[str, Any]) -> dict[str, int]:
    """What is in the logs of all ranks after one iteration."""
    found = [rank["iteration_bytes"][str(row["micro_batches"])] for rank in row["ranks"]]
    return {"sends": sum(one["records"] for one in found), "send_bytes": sum(one["sent"] for one in found)}


def markdown(results: dict[str, Any]) -> str:
    s, rows = results["settings"], [row for row in results["rows"] if not row["emulated"]]
    sizes = ", ".join(f"{rank['parameters'] / 1e6:.1f} M" for rank in rows[0]["ranks"])
    about = (
        f"{machine_line(results)} {NUM_STAGES} stages of {sizes} parameters, 1F1B, one process and one thread each; "
        f"micro-batches of {s['samples']} x {s['seq_len']} tokens, d_model {s['d_model']}, 32-bit. {s['rounds']} pairs "
        f"of blocks of {s['block']} iterations; medians (range; in brackets the middle half). **Emulated: one device "
        f"per stage**, which sleeps {s['forward_ms']:g} ms for a forward and {s['backward_ms']:g} ms for a backward of "
        "a micro-batch instead of computing; as many bytes of activations pass; next to no parameters."
    )
    parts = [about, "### Time", _time_table(results["rows"]), "### Bytes and memory (computing)", _byte_table(rows)]
    parts += [_other_table(rows), "### Traffic (computing)", _traffic_table(rows), "### Goals"]
    cells = [[g["goal"], g["measured"], VERDICTS[g["met"]]] for g in results["goals"]]
    return "\n\n".join([*parts, markdown_table(["goal", "measured", "met"], cells)])


def _time_table(rows: Sequence[dict[str, Any]]) -> str:
    header = [
        "devices", "M", "iteration, ms", "with / without", "without / without: the noise", "CPU, with / without",
        "CPU, without / without", "records take", "norms take", "load",
    ]  # fmt: skip
    return markdown_table(header, [
        [
            "emulated" if row["emulated"] else "computing", str(row["micro_batches"]),
            f"{1e3 * row['iteration_seconds']:.0f}",
            *(_ratio(row[name]) for name in ("ratio", "noise")),
            # Next to nothing is computed by emulated devices.
            *("-" if row["emulated"] else _ratio(row[name]) for name in ("cpu_ratio", "cpu_noise")),
            f"{100 * row['record_share']:.2f} %", f"{100 * row['norm_share']:.2f} %",
            f"{row['load']:.1f}",
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
    return "end" if stage in (0, NUM_STAGES - 1) else "middle"


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
        logged = logged_in_all(row)
        held = [str(logged["sends"]), f"{logged['send_bytes'] / 1e6:.6f}", "-"]
        cells.append([str(row["micro_batches"]), "records in it", *held])
    return markdown_table(header, cells)


def _span(found: Sequence[float], pattern: str) -> str:
    low, high = (pattern.format(value) for value in found)
    return low if low == high else f"{low}..{high}"
