"""MoEvement, sections 2 and 6: what checkpoints cost an iteration, of four systems at one named set of parameters."""

from __future__ import annotations

from _paper import Row, publish
from _testbed import SYSTEMS, TESTBED, every_iteration, systems

from moetion_lightning.planning.picture import bars


def main() -> None:
    found, slower = systems(), every_iteration()
    sparse = found["MoEvement"]
    window = sparse.cycle.interval
    dense = TESTBED.state.full_bytes
    rows = [
        Row("MoEvement, overhead of an iteration", "<= 2 %", f"{sparse.overhead:.1%}",
            "fitted: the share of a copy's time that training loses beside it, 2.7 %"),
        Row("Gemini, overhead", "11 .. 15 %", f"{found['Gemini'].overhead:.1%}",
            "fitted: a snapshot every 12 iterations; the paper's interval is not given"),
        Row("CheckFreq, overhead", "not given", f"{found['CheckFreq'].overhead:.2%}",
            f"its interval follows from the storage: {found['CheckFreq'].cycle.interval} iterations for one snapshot"),
        Row("MoC-System, overhead", "up to 470 %", f"{found['MoC-System'].overhead:.0%}",
            "taken from the paper: no link of the testbed gives it"),
        Row("Gemini in every iteration", "2.5x slower", f"{slower['Gemini']:.1f}x",
            "fitted: an iteration takes 1.47 s"),
        Row("CheckFreq in every iteration", "27.4x slower", f"{slower['CheckFreq']:.1f}x",
            "not fitted: 2.05 GB of each GPU at 52 MB/s"),
        Row("MoEvement, bytes of an iteration against dense", "55 % less",
            f"{1 - sparse.bytes_per_iteration / dense:.0%} less (W = {window})",
            "the paper's number is of W = 3 with equal counts of operators; ours are balanced by bytes, with W = 4"),
    ]  # fmt: skip
    publish(
        "overhead", "MoEvement: overhead of four systems at one set of parameters", rows,
        notes=["Parameters: `benchmarks/papers/_testbed.py`. Overheads that were measured, on CPUs: `../overhead.md`."],
        figure=bars(
            "Overhead of an iteration (MoC-System's 470 % is cut off)",
            {name: {"overhead": min(0.2, found[name].overhead)} for name in SYSTEMS}, y_label="share of an iteration",
            y_max=0.2,
        ),
        data={name: found[name].overhead for name in SYSTEMS} | {"every_iteration": slower},
    )  # fmt: skip


if __name__ == "__main__":
    main()
