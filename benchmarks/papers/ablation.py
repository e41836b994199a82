"""MoEvement, Fig. 13: what each part of the method is worth, by switching it off."""

from __future__ import annotations

import statistics
from dataclasses import replace

from _paper import Row, publish, results_of
from _testbed import TESTBED, systems

from moetion_lightning.planning.picture import bars
from moetion_lightning.planning.policies import gradient_log, sparse

STAGES, MICRO_BATCHES = 12, 24


def measured() -> tuple[float, float]:
    """Of a replay's time, what is left without weight gradients of frozen operators, and what a stage alone takes."""
    results = results_of("stage_recovery")
    alone = statistics.median(row["ratio"] for row in results["rows"])
    return 1.0 - results["frozen"]["saved"]["median"], alone


def main() -> None:
    frozen, alone = measured()
    bound = MICRO_BATCHES / (MICRO_BATCHES + STAGES - 1)
    whole = replace(TESTBED, outage=systems()["CheckFreq"].cycle.outage)
    steps = [
        ("a whole job starts again", replace(whole, outage=replace(whole.outage, restore=0.0))),
        ("+ a warm standby", TESTBED),
        ("+ no weight gradients\nof frozen operators", replace(TESTBED, replay=frozen)),
        ("+ a stage alone,\nfrom logs", replace(TESTBED, replay=frozen * alone)),
    ]
    ratios = {name: sparse(job, 8).shares.ettr for name, job in steps}
    replays = {name: sparse(job, 8).cycle.outage.rebuild for name, job in steps}
    ratios["gradient log:\nno replay"] = gradient_log(TESTBED).shares.ettr
    names = list(ratios)
    rows = [
        Row("sparse windows alone", "0.37 .. 0.57", f"{ratios[names[0]]:.2f}",
            "0.37 means 1,000 s for each failure; with Table 3's parameters a replay of W = 8 takes 10 s: another set"),
        Row("recovery without weight gradients of frozen operators", "-33 %", f"{frozen - 1:.0%} (of a replay's time)",
            "measured on CPUs (stage_recovery.md): a third of what a frozen operator costs is less of a whole replay"),
        Row("order by popularity", "+32 / +15 / 0 % of ETTR (64 / 32 / 4 experts)", "not shown",
            "it changes how much is frozen, which is worth at most the row above; the paper's gain does not follow"),
        Row("a stage alone, from its neighbours' logs", "to 0.97", f"{ratios[names[3]]:.3f} (replay x {alone:.2f})",
            f"measured, emulated stages; bound M / (M + S - 1) = {bound:.2f} of {STAGES} stages, {MICRO_BATCHES} "
            "micro-batches"),
        Row("the same, against a global rollback", "-23 % of recovery (one of three stages)", f"{alone - 1:.0%}",
            "measured on 3 and 6 emulated stages; the fewer micro-batches, the more bubbles are saved"),
        *(Row(f"ours: {name}".replace("\n", " "), "-", f"{ratios[name]:.3f}",
              f"replay {replays[name]:.1f} s" if name in replays else "optimizer steps instead; it moves more bytes")
          for name in names),
    ]  # fmt: skip
    publish(
        "ablation", "MoEvement, Fig. 13: features switched off one by one", rows,
        notes=[
            "W = 8 in all rows, so that a replay is long enough to be seen; other parameters: "
            "`benchmarks/papers/_testbed.py`.",
            "How much a stage alone and skipped gradients save was measured with our engine, see "
            "`../stage_recovery.md`; what that is worth at a failure every 10 min is computed.",
        ],
        figure=bars(
            "Effective training time, a failure every 10 min, W = 8", {n: {"useful": v} for n, v in ratios.items()},
            y_label="ETTR",
        ),
        data={"ettr": ratios, "frozen": frozen, "alone": alone},
    )  # fmt: skip


if __name__ == "__main__":
    main()
