"""The Hugging Face Trainer: a killed run ends in exactly the state of the run that was never killed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.integrations._trainer_weights import restore_left_out
from moetion_lightning.integrations.hf_trainer import MoEtionTrainerCallback
from moetion_lightning.testing.compare import compare_states
from tests.runs.drill import Drill, differences, read_events, read_logs, read_steps
from tests.runs.hf_trainer import Tokens, make_model

pytestmark = pytest.mark.hf

PLAIN: dict[str, Any] = {"runner": "tests.runs.hf_trainer"}
SAVING = {**PLAIN, "args": {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}}
EVALUATING = {
    **PLAIN,
    "early_stopping": True,
    "epochs": 4,
    "args": {
        **{"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3},
        **{"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_on_start": True},
    },
}
#: Killed in mid-epoch, and again while the next window is captured.
KILLS = [{"hook": "before_step", "step": 8}, {"event": "CaptureStarted", "copies": 2, "fields": {"iteration": 13}}]

RUNS: dict[str, dict[str, Any]] = {
    "accumulate-clip-warmup": PLAIN,
    "no-accumulation": {**PLAIN, "accumulate": 1, "clip": 0.0, "samples": 22},
    "ragged-epoch": {**PLAIN, "accumulate": 3, "samples": 46, "epochs": 3},
    "augment": {**PLAIN, "augment": True},
    "augment-workers": {**PLAIN, "augment": True, "args": {"dataloader_num_workers": 2}},
    "persistent-workers": {
        **PLAIN,
        "augment": True,
        "args": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    },
    "evaluation-workers-live-on": {
        **PLAIN,
        "args": {
            **{"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
            **{"eval_strategy": "steps", "eval_steps": 3},
        },
    },
    "stream": {**PLAIN, "augment": True, "stream": True, "max_steps": 22},
    "bf16": {**PLAIN, "args": {"bf16": True}},
    "scaler-skipped-step": {**PLAIN, "scaler": True, "overflow_at": 5},
    "plateau-input-tokens": {
        **PLAIN,
        "args": {
            **{"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0, "eval_strategy": "epoch"},
            **{"include_num_input_tokens_seen": "all", "logging_steps": 5},
        },
    },
    "callback-with-attributes-ignore-data-skip": {**PLAIN, "steering": True, "args": {"ignore_data_skip": True}},
}


@pytest.mark.parametrize("name", RUNS)
def test_killed_trainer_ends_bitwise_equal(drill: Drill, name: str) -> None:
    spec = RUNS[name]
    killed = drill.killed(spec, KILLS)
    assert differences(drill.reference(spec), killed) == []
    assert len(read_events(killed, "RestoreApplied")) == 2
    assert all(event["verified"] for event in read_events(killed, "ReplayFinished"))


@pytest.mark.parametrize("name", ["accumulate-clip-warmup", "persistent-workers", "scaler-skipped-step"])
def test_killed_trainer_that_logs_gradients_loses_one_iteration(drill: Drill, name: str) -> None:
    spec = {**RUNS[name], "policy_args": {"window": 3, "policy": "gradient_log"}}
    killed = drill.killed(spec, [{"hook": "before_step", "step": 8}, {"hook": "step_end", "step": 12}])
    assert differences(drill.reference(spec), killed) == []
    assert len(read_events(killed, "StateRebuilt")) == 2
    assert all(event["verified"] for event in read_events(killed, "ReplayFinished"))


@pytest.mark.parametrize(
    "name", ["accumulate-clip-warmup", "augment-workers", "persistent-workers", "bf16", "grouped", "seedable", "stream"]
)
def test_window_of_the_last_update_of_an_epoch(drill: Drill, name: str) -> None:
    """At its first iteration the next pass is begun, and no batch of it is drawn yet."""
    grouped: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__:  # before transformers 5
        grouped = {"group_by_length": True}
    more = {
        "grouped": {"args": grouped},
        "seedable": {"args": {"accelerator_config": {"use_seedable_sampler": True}}},
    }
    spec = {**PLAIN, **RUNS.get(name, {}), **more.get(name, {}), "policy_args": {"window": 1}}
    last_update = {"event": "WindowCommitted", "fields": {"last_iteration": 11}}
    killed = drill.killed(spec, [last_update])
    assert differences(drill.reference(spec), killed) == []
    assert 11 in {event["iteration"] for event in read_events(killed, "RestoreApplied")}


#: Each is the end of one process; the next one goes on from what it left. 22 steps in two epochs.
PHASES: dict[str, dict[str, dict[str, Any]]] = {
    "training": {
        "before-first-window": {"hook": "substep", "step": 1},
        "while-saving": {"hook": "saving", "step": 8},
        "between-micro-batches": {"hook": "substep", "step": 9},
        "after-step": {"hook": "after_step", "step": 9},
        "step-end": {"hook": "step_end", "step": 9},
        "epoch-end": {"hook": "epoch_end", "step": 11},
        "first-step-of-epoch": {"hook": "step_begin", "step": 11},
        "saved": {"hook": "saved", "step": 16},
        "last-step": {"hook": "step_end", "step": 22},
        "train-end": {"hook": "end", "step": 0},
    },
    "restore": {
        "first": {"hook": "step_end", "step": 10},
        "mid-restore": {"event": "RestoreStarted", "copies": 3},
        "restored": {"event": "RestoreApplied"},
        "replay": {"event": "ReplayIteration", "count": 2},
        "replay-done": {"event": "ReplayFinished"},
    },
}


@pytest.mark.parametrize("phases", PHASES)
def test_killed_in_each_phase(drill: Drill, phases: str) -> None:
    kills = list(PHASES[phases].values())
    killed = drill.killed(SAVING, kills)
    assert differences(drill.reference(SAVING), killed) == []
    assert len({event["pid"] for event in read_events(killed)}) == len(kills) + 1
    for checkpoint in (killed / "output").glob("checkpoint-*"):
        assert (checkpoint / "trainer_state.json").is_file(), f"{checkpoint.name} is not whole"


def test_early_stopping_and_best_model_are_those_of_the_whole_run(drill: Drill) -> None:
    """Patience, best metric and log history come back; the best model is loaded with its experts, also in both runs.

    The reference is our own run that was not killed: alone, the Trainer loads the best model without its experts.
    """
    whole = drill.killed(EVALUATING, [])
    killed = drill.killed(EVALUATING, [{"hook": "evaluate", "step": 6}, {"hook": "step_end", "step": 8}])
    assert differences(whole, killed) == []
    assert max(batch for _, batch in read_steps(killed)) < 44, "it did not stop early: the test shows nothing"


def test_seven_kills(drill: Drill) -> None:
    spec = {**SAVING, "augment": True}
    killed = drill.killed(spec, [{"hook": "substep", "step": step} for step in (2, 5, 7, 10, 12, 15, 19)])
    assert differences(drill.reference(spec), killed) == []


@pytest.mark.parametrize("what", ["activation", "adam_step", "data", "counters"])
def test_negative_control_notices_what_is_not_restored(drill: Drill, what: str) -> None:
    killed = drill.killed(PLAIN, [{"hook": "before_step", "step": 9}], **{"break": what})
    assert read_events(killed, "RestoreApplied")
    assert differences(drill.reference(PLAIN), killed) != []


@pytest.mark.slow
def test_two_ranks_killed_and_started_again(drill: Drill) -> None:
    spec = {**SAVING, "samples": 88, "ranks": 2, "args": {**SAVING["args"], "ddp_backend": "gloo"}}
    killed = drill.killed(spec, [{"hook": "before_step", "step": 9, "rank": 1}, {"hook": "saving", "step": 16}])
    assert differences(drill.reference(spec), killed) == []
    assert len(read_events(killed, "ReplayFinished")) == 4
    assert all(event["verified"] for event in read_events(killed, "ReplayFinished"))


def test_completed_run_leaves_no_window_and_begins_afresh(drill: Drill) -> None:
    killed = drill.killed(PLAIN, [{"hook": "substep", "step": 9}])
    memory = drill.memory_dir / killed.name
    assert not list(memory.rglob("windows/*.json"))
    assert drill.start({**PLAIN, "memory_dir": str(memory)}, killed).good
    assert len(read_steps(killed)[0, 1]) == 2  # all steps were done again, from the first one


# --- checkpoints of the Trainer itself -------------------------------------------------------------------------------


def _resumed(drill: Drill, capture: bool) -> Path:
    """A run that dies after its checkpoint at step 8, and is resumed from that by the Trainer."""
    spec = {**SAVING, "capture": capture}
    out = drill._directory("resumed")
    memory = drill.memory_dir / out.name
    memory.mkdir(mode=0o700)
    common = {**spec, "memory_dir": str(memory)}
    drill.start({**common, "kill": {"hook": "step_end", "step": 10}}, out)
    ended = drill.start({**common, "resume_from": "{out}/output/checkpoint-8"}, out)
    assert ended.good, read_logs(out)
    return out


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has no fused experts")
def test_trainer_alone_loses_fused_experts_and_with_the_callback_they_are_exact(drill: Drill) -> None:
    """Only weights and optimizer state: a resumed Trainer counts its mean loss anew, and its log has other values."""
    reference = drill.reference(SAVING) / "final.safetensors"
    alone = compare_states(reference, _resumed(drill, capture=False) / "final.safetensors", ("parameter:",))
    assert any("experts.gate_up_proj" in sentence for sentence in alone.differences)

    ours = _resumed(drill, capture=True)
    assert compare_states(reference, ours / "final.safetensors", ("parameter:", "optimizer:")).equal
    log = read_logs(ours)
    assert "it wins over" in log
    assert "the Trainer's own resume leaves 4 weights of Qwen3MoeForCausalLM at other values" in log
    assert not read_events(ours, "RestoreApplied")


def test_checkpoint_with_all_weights_is_left_alone(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path, save_original_format=False)
    state = torch.get_rng_state()
    assert restore_left_out(model, tmp_path) == []
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has no fused experts")
def test_left_out_experts_are_put_in_place_without_drawing_random_numbers(tmp_path: Path) -> None:
    saved, model = make_model(1), make_model(2)
    saved.save_pretrained(tmp_path)
    for name, weight in model.named_parameters():
        if "experts" not in name:
            weight.data.copy_(saved.get_parameter(name))
    state = torch.get_rng_state()
    assert len(restore_left_out(model, tmp_path)) == 4
    assert torch.equal(state, torch.get_rng_state())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, saved.get_parameter(name)), name


# --- settings and refusals -------------------------------------------------------------------------------------------


def _trainer(tmp_path: Path, memory_dir: Path, kind: type[Trainer] = Trainer, **arguments: Any) -> Trainer:
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "max_steps": 2, "disable_tqdm": True}
    return kind(
        model=make_model(),
        args=TrainingArguments(**settings, save_strategy="no", **arguments),
        train_dataset=Tokens(8, augment=False),
        callbacks=[MoEtionTrainerCallback(window=1, memory_dir=str(memory_dir), job_id="job")],
    )


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="MoEtionTrainerCallback: no setting is named 'windows'"):
        MoEtionTrainerCallback(windows=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match=r"MoEtionTrainerCallback: skip_batches=\[1, 3\] has no effect there"):
        MoEtionTrainerCallback(skip_batches=[3, 1, 3])


def test_batch_size_that_is_searched_for_is_refused(tmp_path: Path, memory_dir: Path) -> None:
    trainer = _trainer(tmp_path, memory_dir, auto_find_batch_size=True)
    with pytest.raises(ConfigurationError, match="auto_find_batch_size=True"):
        trainer.train()


def test_two_callbacks_are_refused(tmp_path: Path, memory_dir: Path) -> None:
    trainer = _trainer(tmp_path, memory_dir)
    trainer.add_callback(MoEtionTrainerCallback())
    with pytest.raises(ConfigurationError, match="expected one"):
        trainer.train()


def test_trainer_with_a_loop_of_its_own_is_told(tmp_path: Path, memory_dir: Path) -> None:
    class Own(Trainer):
        def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
            return self.callback_handler.on_train_begin(self.args, self.state, self.control)

    with pytest.raises(ConfigurationError, match="must call super"):
        _trainer(tmp_path, memory_dir, Own).train()


def test_trainer_is_left_as_it_was(tmp_path: Path, memory_dir: Path) -> None:
    trainer = _trainer(tmp_path, memory_dir)
    before = set(vars(trainer))
    trainer.train()
    assert {name for name in vars(trainer) if name not in before and callable(getattr(trainer, name))} == set()


def test_trainer_without_the_callback_is_not_touched(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, tmp_path)
    trainer.remove_callback(MoEtionTrainerCallback)
    seen: list[str] = []

    class Watching(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            seen.extend(n for n in ("_run_epoch", "training_step") if n in vars(trainer))

    trainer.add_callback(Watching())
    trainer.train()
    assert seen == []


def test_interrupted_replay_is_not_taken_for_the_end(
    tmp_path: Path, memory_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback that stops training (a time limit) may do so while steps are done again."""

    class Stop(TrainerCallback):
        def __init__(self, at: int) -> None:
            self.at = at

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == self.at:
                control.should_training_stop = True

    def train(stop: int, error: bool = False) -> Trainer:
        settings: dict[str, Any] = {"window": 4, "memory_dir": str(memory_dir), "job_id": "job"}
        trainer = Trainer(
            model=make_model(),
            args=TrainingArguments(
                str(tmp_path), use_cpu=True, report_to=[], max_steps=12, save_strategy="no", disable_tqdm=True
            ),
            train_dataset=Tokens(96, augment=False),
            callbacks=[Raise() if error else Stop(stop), MoEtionTrainerCallback(**settings)],
        )
        trainer.train()
        return trainer

    class Raise(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 10:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(12, error=True)
    windows = sorted(path.name for path in memory_dir.rglob("windows/*.json"))
    assert windows
    first = min(json.loads(path.read_text())["first_iteration"] for path in memory_dir.rglob("windows/*.json"))
    with caplog.at_level(logging.WARNING, "moetion_lightning"):
        train(first + 1)
    assert "its state is not whole, windows are kept" in caplog.text
    assert list(memory_dir.rglob("windows/*.json"))
    assert train(99).state.global_step == 12
