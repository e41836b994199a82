"""MoC-System, Fig. 5, 14 and 15: the proportion of lost tokens over faults, by K, with dynamic K and two levels.

Measured: a small byte-level MoE (two MoE layers of eight experts, top 2) trains on CPU with
``PartialExpertsCheckpoint``, is killed by SIGKILL and started again. The paper's one fault at the midpoint has K = 2 of
8 experts, a checkpoint every 32 iterations and PLT 3.75 %: a training of 1,280 iterations. Here it is every 4 of 160,
the same ratio.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from _paper import Row, publish

from moetion_lightning.callbacks import PartialExpertsCheckpoint
from moetion_lightning.events import Event
from moetion_lightning.planning.picture import lines
from moetion_lightning.recipes.data import StdlibText
from moetion_lightning.recipes.models import ByteMoE
from moetion_lightning.testing.faults import KillAt

STEPS, EVERY = 160, 4
EXPERTS = 8
MIDDLE = (82,)  # behind the checkpoint of iteration 80
MANY = (34, 66, 98, 130)
LIMIT = 0.0375


@dataclass(frozen=True)
class Case:
    """One training.

    Args:
        name: In the table.
        policy: Arguments of the callback; None: no callback.
        faults: Iterations behind which the process is killed.
        loses_memory: Whether host memory is lost with it, as with its node.
    """

    name: str
    policy: dict[str, Any] | None
    faults: Sequence[int] = ()
    loses_memory: bool = False


@dataclass
class Outcome:
    """What came of it: PLT of the whole training after each fault, and the mean loss of the last 20 steps."""

    plt: list[float] = field(default_factory=list)
    loss: float = 0.0


def cases() -> list[Case]:
    fixed = {k: {"num_experts_per_checkpoint": k, "plt_limit": None} for k in (1, 2, 4, 8)}
    found = [Case("no fault", None)]
    found += [Case(f"K = {k}, one fault", policy, MIDDLE) for k, policy in fixed.items()]
    found += [Case(f"K = {k}, four faults", fixed[k], MANY) for k in (1, 2, 4)]
    found.append(Case("K = 1, dynamic, four faults", {"num_experts_per_checkpoint": 1, "plt_limit": LIMIT}, MANY))
    load = {"num_experts_per_checkpoint": 2, "plt_limit": None, "selection": "load_aware"}
    found.append(Case("K = 2, load aware, one fault", load, MIDDLE))
    two = {"num_experts_per_checkpoint": 4, "num_experts_persisted": 1, "plt_limit": None}
    found.append(Case("K_snapshot = 4, K_persist = 1, the process dies", two, MIDDLE))
    found.append(Case("K_snapshot = 4, K_persist = 1, the node is lost", two, MIDDLE, loses_memory=True))
    return found


class Losses(pl.Callback):
    """Writes each step's loss."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *rest: Any) -> None:
        with self._path.open("a") as file:
            file.write(f"{trainer.global_step} {float(outputs['loss'])}\n")


def train(case: Case, folder: Path, fault: int | None) -> None:
    """One start of a training, to its end or the fault."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "moetion_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    pl.seed_everything(1, verbose=False)
    callbacks: list[pl.Callback] = [Losses(folder / "losses")]
    if case.policy is not None:
        storage = {"persist_dir": str(folder / "storage")} if "num_experts_persisted" in case.policy else {}
        sinks: list[Any] = [_linger] if storage else []
        if fault is not None:
            sinks.append(KillAt("IterationFinished", iteration=fault))
        callbacks.append(PartialExpertsCheckpoint(
            **case.policy, **storage, every_n_steps=EVERY, memory_dir=str(folder / "memory"), job_id="job", sinks=sinks,
            events_path=str(folder / "events.jsonl"),
        ))  # fmt: skip
    trainer = pl.Trainer(
        max_steps=STEPS, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(ByteMoE(d_model=32, d_expert=64, num_experts=EXPERTS, total_steps=STEPS), StdlibText(batch_size=4))


def series_text(values: Sequence[float]) -> str:
    return " ".join(f"{value:.1%}" for value in values) or "-"


def _linger(event: Event) -> None:
    """Give storage a little time after each iteration, so that hardly a checkpoint is passed over."""
    if event.kind == "IterationFinished":
        time.sleep(0.004)


def run(case: Case, folder: Path) -> Outcome:
    """All starts of a training, each in a process of its own."""
    folder.mkdir()
    (folder / "memory").mkdir(mode=0o700)
    for fault in [*case.faults, None]:
        status = _in_child(case, folder, fault)
        if status != (0 if fault is None else -signal.SIGKILL):
            sys.exit(f"{case.name}, fault at {fault}: ended with {status}")
        if case.loses_memory and fault is not None:
            for job in (folder / "memory").iterdir():
                shutil.rmtree(job)
    outcome = Outcome()
    events = folder / "events.jsonl"
    for line in events.read_text().splitlines() if events.exists() else []:
        event = json.loads(line)
        if event["event"] == "PartialExpertsRestored":
            # The event has the share of all tokens so far; the paper's is that of the whole training.
            outcome.plt.append(event["plt"] * event["iteration"] / STEPS)
    losses = dict(line.split() for line in (folder / "losses").read_text().splitlines())
    outcome.loss = statistics.fmean(float(losses[str(step)]) for step in range(STEPS - 19, STEPS + 1))
    return outcome


def _in_child(case: Case, folder: Path, fault: int | None) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train(case, folder, fault)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    found: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="moetion-papers-") as folder:
        for index, case in enumerate(cases()):
            found[case.name] = run(case, Path(folder, str(index)))
            print(f"{case.name}: PLT {series_text(found[case.name].plt)}, loss {found[case.name].loss:.4f}", flush=True)

    def last(name: str) -> str:
        return f"{found[name].plt[-1]:.2%}"

    plain = found["no fault"].loss
    ones = [name for name in found if name.endswith("one fault") and name.startswith("K = ") and "load" not in name]
    losses = [found[name].loss for name in ones]
    rows = [
        Row("PLT, K = 2 of 8, one fault at the midpoint", "3.75 %", last("K = 2, one fault"),
            "the same ratio of interval and training; experts have (0 + 1 + 2 + 3) / 4 intervals less than all"),
        *(Row(f"PLT, {name}", "-", last(name), f"about (8 / K - 1) / 2 intervals of {STEPS // EVERY}") for name in ones
          if name != "K = 2, one fault"),
        Row("PLT, K = 2, load aware", "less or equal", last("K = 2, load aware, one fault"),
            "experts with most unsaved tokens first; routing is nearly even here"),
        Row("PLT after four faults, K = 1", "grows with each fault", series_text(found["K = 1, four faults"].plt),
            "in proportion to the faults"),
        Row("PLT after four faults, K = 4", "-", series_text(found["K = 4, four faults"].plt), "as above"),
        Row("PLT after four faults, dynamic K from 1, limit 3.75 %", "K grows 1 -> 4, PLT levels off",
            series_text(found["K = 1, dynamic, four faults"].plt),
            "K doubles after a restore above the limit; the limit is held against the tokens so far, not all"),
        Row("two levels (4 in memory, 1 on storage): the process dies", "lower than from storage",
            last("K_snapshot = 4, K_persist = 1, the process dies"), "as K = 4: memory has them"),
        Row("two levels: the node is lost", "as K = 1 or worse",
            last("K_snapshot = 4, K_persist = 1, the node is lost"),
            "storage writes one expert of a layer at a time; how many checkpoints it took depends on the machine"),
        Row("loss at the end, one fault against none", "4.8808 .. 4.8856 against 4.8851",
            f"{min(losses):.4f} .. {max(losses):.4f} against {plain:.4f}",
            "another model, another text, which it has hardly learned; more is lost by K = 1 than by K = 8"),
    ]  # fmt: skip
    series = {
        name.removesuffix(", four faults"): [(float(n), plt) for n, plt in enumerate([0.0, *outcome.plt])]
        for name, outcome in found.items()
        if name.endswith("four faults")
    }
    publish(
        "lost_tokens", "MoC-System, Fig. 5, 14, 15: proportion of lost tokens, measured", rows,
        notes=[
            f"Real trainings of {STEPS} steps with a checkpoint every {EVERY}, real SIGKILLs, two MoE layers of "
            f"{EXPERTS} experts, top 2. PLT as in the paper: of all tokens of the whole training.",
            "Accuracy on downstream tasks is not measured: a model of this size says nothing of it.",
        ],
        figure=lines(
            "Proportion of lost tokens over faults", series, x_label="faults", y_label="PLT",
            x_text=lambda x: f"{x:.0f}", y_max=round(1.1 * max(y for values in series.values() for _, y in values), 2),
            logarithmic=False,
        ),
        data={name: {"plt": outcome.plt, "loss": outcome.loss} for name, outcome in found.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
