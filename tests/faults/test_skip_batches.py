"""Batches that are left out: the run is the one whose loader does not have them, whenever it is killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from moetion_lightning.callbacks import SparseExpertCheckpoint
from moetion_lightning.commands.state_tables import report_tables
from moetion_lightning.commands.tables import text
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.storage.inspect import describe
from moetion_lightning.testing.compare import compare_states
from tests.runs.drill import Drill, differences, read_events, read_logs, read_steps

LOG: dict[str, Any] = {"policy": "gradient_log", "policy_args": {"window": 4}, "block": "fused"}
#: 7 batches an epoch: in the middle, two in a row, over an epoch's end, the last of all.
SKIPPED = [3, 4, 9, 13, 14, 20]
RUNS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "gradient-log": {"callbacks": ["checkpoint", "early_stopping"], "val_check_interval": 3, **LOG},
    "accumulate": {"accumulate": 3, "samples": 56},
    "workers": {"loader": "persistent", **LOG},
    "stream": {"loader": "stream", **LOG},
}
#: Whose loader cannot leave batches out by itself: compared with the run that is not killed.
OTHERS: dict[str, dict[str, Any]] = {
    "two-loaders": {"loader": "combined", "augment": True, **LOG},
    "reloaded": {"reload": 1, "augment": True, **LOG},
}


def _kills(name: str) -> list[dict[str, Any]]:
    hooks = [("backward", 3), ("validation", 8 if name in ("accumulate", "gradient-log") else 5), ("batch_end", 10)]
    return [{"hook": hook, "step": step} for hook, step in hooks]


@pytest.mark.parametrize("name", RUNS)
def test_killed_around_batches_that_are_left_out(drill: Drill, name: str) -> None:
    spec = {"skip_batches": SKIPPED, **RUNS[name]}
    killed = drill.killed(spec, _kills(name))
    assert differences(drill.reference(spec), killed) == []
    assert read_events(killed, "RestoreApplied")
    assert read_events(killed, "ReplayMismatch") == []


@pytest.mark.parametrize("name", OTHERS)
def test_killed_in_other_loaders(drill: Drill, name: str) -> None:
    spec = {"skip_batches": SKIPPED, **OTHERS[name]}
    unbroken = drill.killed(spec, [])
    assert [sum(epoch == e for e, _ in read_steps(unbroken)) for epoch in range(3)] == [5, 5, 5]
    assert differences(unbroken, drill.killed(spec, _kills(name))) == []


def test_each_rank_leaves_out_its_own(drill: Drill) -> None:
    """Also where a rank is replaced, and the other one goes back in its process."""
    spec = {"ranks": 2, "samples": 56, "skip_batches": SKIPPED, **LOG}
    unbroken = drill.killed(spec, [])
    assert [sum(epoch == e for e, _ in read_steps(unbroken, 1)) for epoch in range(3)] == [5, 5, 5]
    killed = drill.killed(spec, [{"hook": "backward", "step": 8, "rank": 1}])
    assert differences(unbroken, killed) == []
    assert read_events(killed, "StateRebuilt")
    replaced, ended, _ = drill.elastic(spec, [{"hook": "before_step", "step": 8, "rank": 1}])
    assert ended.good, f"{ended}\n{read_logs(replaced)}"
    assert differences(unbroken, replaced) == []


def _ends_as(reference: Path, out: Path) -> bool:
    """Whether the state and what was trained on last under each number are the reference's."""
    theirs, ours = read_steps(reference), read_steps(out)
    states = compare_states(reference / "final.safetensors", out / "final.safetensors").equal
    return states and all(ours[key][-1] == records[-1] for key, records in theirs.items())


@pytest.mark.parametrize("skipped", [[14], [16, 20]])
def test_going_back_to_before_a_batch(drill: Drill, skipped: list[int]) -> None:
    """The user's way: train on, see the spike, go back and leave it out."""
    args = {"window": 4, "keep_rounds": 2}
    spec = {**LOG, "policy_args": args}
    kill = {"hook": "backward", "step": 20, "committed": {"last_iteration": 19}}
    killed = drill.killed(spec, [kill], skip_batches=skipped, policy_args={**args, "resume": skipped[0]})
    assert [event["iteration"] for event in read_events(killed, "StateRebuilt")] == [skipped[0]]
    assert _ends_as(drill.reference({**spec, "skip_batches": skipped}), killed)
    assert not _ends_as(drill.reference(spec), killed), "the comparison sees nothing"
    assert read_events(killed, "ReplayMismatch") == []


def test_going_back_into_an_epoch_without_the_rest_of_it_is_refused(drill: Drill) -> None:
    out = drill._directory("refused")
    (out / "memory").mkdir(mode=0o700)
    args = {"window": 4, "keep_rounds": 1}
    spec = {**LOG, "policy_args": args, "memory_dir": str(out / "memory")}
    drill.start({**spec, "kill": {"hook": "backward", "step": 15, "committed": {"last_iteration": 14}}}, out)
    again = {**spec, "policy_args": {**args, "resume": 12}, "skip_batches": [12, 13]}
    assert drill.start(again, out).codes == [1]
    assert "skip_batches has all batches from 12 on, where training continues, to 13, the end of" in read_logs(out)
    assert drill.start({**again, "skip_batches": [12]}, out).good
    assert _ends_as(drill.reference({**LOG, "skip_batches": [12]}), out)


@pytest.mark.parametrize("policy", [{}, LOG], ids=["sparse", "gradient-log"])
def test_what_was_left_out_stays_out_without_the_setting(drill: Drill, policy: dict[str, Any]) -> None:
    """A window says it: its replay leaves out the same; `moetion inspect` shows it."""
    spec = {"skip_batches": [7, 9], **policy}
    shown: list[str] = []
    kill = {"hook": "backward", "step": 10, "committed": {"first_iteration": 4} if not policy else None}
    killed = drill.killed(
        spec,
        [{name: value for name, value in kill.items() if value}],
        between=lambda memory: shown.append(text(*report_tables(describe(memory)))),
        skip_batches=[],
    )
    assert differences(drill.reference(spec), killed) == []
    assert "left out of training (skip_batches): batch" in shown[0]
    assert read_events(killed, "ReplayMismatch") == []


def test_a_batch_that_was_trained_on_stays_in_the_replay_and_is_named(drill: Drill) -> None:
    kill = {"hook": "backward", "step": 8, "committed": {"first_iteration": 4}}
    killed = drill.killed({}, [kill], skip_batches=[2, 6])
    assert differences(drill.reference({}), killed) == []
    assert "batches 2, 6 cannot be left out any more" in read_logs(killed)


@pytest.mark.parametrize(
    "spec",
    [
        {"form": "epochs"},
        {"framework": "fabric", "loader": "workers", "augment": True},
        {"framework": "accelerate", "augment": True, "accumulate": 2},
    ],
    ids=["plain", "fabric", "accelerate"],
)
def test_killed_loops(drill: Drill, spec: dict[str, Any]) -> None:
    spec = {"runner": "tests.runs.loops", "skip_batches": SKIPPED, **spec}
    killed = drill.killed(spec, [{"hook": "backward", "step": 5}, {"hook": "batch_end", "step": 12}])
    assert differences(drill.reference(spec), killed) == []
    assert read_events(killed, "RestoreApplied")
    assert read_events(killed, "ReplayMismatch") == []


@pytest.mark.parametrize(
    ("skipped", "said"),
    [
        (list(range(7, 14)), "skip_batches has all of 7..13, which are all batches of epoch 1"),
        ([-1], "skip_batches=[-1]: expected a list of batch numbers (ints >= 0)"),
    ],
)
def test_refused_at_the_beginning(drill: Drill, skipped: list[int], said: str) -> None:
    out = drill._directory("refused")
    ended = drill.start({"skip_batches": skipped, "memory_dir": str(out / "memory")}, out)
    assert ended.codes == [1]
    assert said in read_logs(out)
    assert not (out / "steps.jsonl").exists() or not (out / "steps.jsonl").read_text()


class _DrawsItself(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, dataloader_iter: Iterator[Any]) -> Any:
        raise AssertionError("no step comes")

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def test_a_step_that_draws_its_batches_itself_is_refused(tmp_path: Path) -> None:
    callback = SparseExpertCheckpoint(memory_dir=str(tmp_path), skip_batches=[1])
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="skip_batches with a training_step\\(dataloader_iter\\)"):
        trainer.fit(_DrawsItself(), DataLoader(torch.zeros(4, 1)))
