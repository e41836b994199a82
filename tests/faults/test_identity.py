"""A window is taken only by the fit that it belongs to, and complete means that the process ended well."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from moetion_lightning.testing.compare import compare_states
from tests.runs.drill import Drill

#: What the first start of a story without captures knows nothing of.
_OF_LATER_STARTS = ("window", "settings", "skip")


class Story:
    """Starts one story again and again, in one folder and one host memory."""

    def __init__(self, drill: Drill, story: str, out: Path | None = None, **spec: Any) -> None:
        self.drill = drill
        self.out = out or drill._directory(story)
        self.memory = drill.memory_dir / self.out.name
        self.memory.mkdir(mode=0o700, exist_ok=out is not None)
        self.spec = {"story": story, "runner": "tests.runs.stories", **spec}
        self.starts = 0

    def start(self, kill: str | None = None, code: int | None = None, **more: Any) -> str:
        """One start; returns what it printed."""
        log = self.out / f"log{self.starts}"
        spec = {**self.spec, "out": str(self.out), "memory_dir": str(self.memory), "start": self.starts, "kill": kill}
        ended = self.drill.zygote.run({**spec, **more}, log)
        self.starts += 1
        expected = code if code is not None else -signal.SIGKILL if kill else 0
        text = log.read_text()
        assert ended == expected, f"{ended}: {text}"
        return text

    def steps(self, start: int | None = None) -> dict[str, tuple[str, list[int]]]:
        lines = (self.out / "steps.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return {r["step"]: (r["loss"], r["ids"]) for r in records if start in (None, r["start"])}

    def twin(self, **more: Any) -> Story:
        """The story that our callback never touched: told once, and compared with by all tests."""
        spec = {name: value for name, value in {**self.spec, **more}.items() if name not in _OF_LATER_STARTS}
        spec["capture"] = False
        first = spec.pop("changes", {}).get("0")
        if first:
            spec["changes"] = {"0": first}
        folder = self.drill.references.get(spec, lambda out: Story(self.drill, out=out, **spec).start())
        return Story(self.drill, out=folder, **spec)

    def differences(self, other: Story) -> list[str]:
        found = [f"step {s}" for s in {**self.steps(), **other.steps()} if self.steps().get(s) != other.steps().get(s)]
        for path in sorted(other.out.glob("final*.safetensors")):
            found += [f"{path.name}: {d}" for d in compare_states(path, self.out / path.name).differences]
        return found

    def windows(self) -> list[Path]:
        return [path for path in self.memory.rglob("*.json") if path.name[0].isdigit()]


WINDOWS = pytest.mark.parametrize("window", [1, 4])


@WINDOWS
def test_the_same_command_continues_in_the_default_trainer(drill: Drill, window: int) -> None:
    story = Story(drill, "plain", window=window)
    story.start(kill="9")
    story.start(kill="16")
    story.start()
    assert story.differences(story.twin()) == []
    assert len(story.steps(2)) < 12
    assert story.windows() == []


@WINDOWS
def test_the_second_trial_of_a_sweep_is_what_it_is_alone(drill: Drill, window: int) -> None:
    story = Story(drill, "sweep", fails=True, window=window)
    story.start()
    assert story.differences(story.twin()) == []


def test_a_sweep_that_is_killed_continues_the_trial_that_was_under_way(drill: Drill) -> None:
    story = Story(drill, "sweep", seeds=(1, 1, 1), lrs=(0.1, 0.01, 0.003))
    story.start(kill="t2-9")
    story.start()
    assert story.differences(story.twin()) == []
    again = story.steps(1)
    assert not {"t1-0", "t2-0"} & set(again)  # the end of the first trial is known, the second one goes on
    assert "t3-0" in again


def test_trials_of_other_widths_do_not_end_a_sweep(drill: Drill) -> None:
    story = Story(drill, "sweep", fails=True, widths=(16, 8, 4))
    story.start()
    assert story.differences(story.twin()) == []


GRIDS: dict[str, dict[str, Any]] = {
    "rates": {"lrs": (0.1, 0.01, 0.003)},
    "optimizers": {"optimizers": ("AdamW", "SGD", "RMSprop"), "lrs": (0.01, 0.01, 0.01)},
    "widths": {"widths": (16, 8, 4)},
}


@pytest.mark.parametrize(("grid", "window"), [("rates", 1), ("rates", 4), ("optimizers", 4), ("widths", 1)])
def test_a_trial_that_was_stopped_is_not_taken_for_the_next_one(drill: Drill, grid: str, window: int) -> None:
    """The next one is killed before its first window, more than once, and is the first fit of its process then."""
    story = Story(drill, "sweep", fails=True, skip=True, seeds=(1, 1, 1), window=window, **GRIDS[grid])
    story.start(kill="t2-0")
    story.start(kill="t2-0")
    story.start(kill="t3-0")
    story.start(kill="t3-0")
    text = story.start()
    assert story.differences(story.twin()) == []
    assert "the run ended" not in text


def test_a_trial_that_is_stopped_in_each_process_is_no_run_that_ends_there(drill: Drill) -> None:
    story = Story(drill, "sweep", fails=True)
    story.start(kill="t2-9")
    story.start(kill="t3-9")
    text = story.start()
    assert "the run ended" not in text
    assert story.differences(story.twin()) == []
    assert "t1-0" not in story.steps(2)


def test_a_killed_trial_of_a_study_is_not_taken_for_the_next_one(drill: Drill) -> None:
    story = Story(drill, "study")
    story.start(kill="t1-9")
    text = story.start()
    twin = Story(drill, "study", capture=False)
    (twin.out / "tried").write_text("1\n")
    twin.start()
    assert story.differences(twin) == [d for d in story.differences(twin) if d.startswith("step t1-")]
    assert "lr of Net is 0.1 there, 0.01 here" in text


@pytest.mark.parametrize("kill", ["p3-9", "p2-2", "after-2"])
def test_phases_that_are_skipped_leave_the_window_to_its_phase(drill: Drill, kill: str) -> None:
    story = Story(drill, "phases")
    story.start(kill=kill)
    story.start()
    assert story.differences(story.twin()) == []


@pytest.mark.parametrize(("kill", "skip"), [("f2-9", False), ("f2-9", True), ("f2-2", True)])
def test_folds_that_begin_alike_are_told_apart(drill: Drill, skip: bool, kill: str) -> None:
    story = Story(drill, "folds", skip=skip)
    story.start(kill=kill)
    story.start()
    assert story.differences(story.twin()) == []


def test_a_notebook_cell_that_is_changed_and_run_again_begins_anew(drill: Drill) -> None:
    story = Story(drill, "notebook", interrupted=True)
    story.start()
    assert story.differences(story.twin()) == []


def test_a_notebook_continues_in_a_new_kernel(drill: Drill) -> None:
    story = Story(drill, "notebook")
    story.start(kill="second-9")
    story.start()
    assert story.differences(story.twin()) == []
    assert "second-0" not in story.steps(1)


def test_tasks_of_an_array_do_not_take_each_other_s_windows(drill: Drill) -> None:
    story = Story(drill, "array")
    for task in (1, 2):
        story.start(kill=f"a{task}-9", task=task)
    for task in (1, 2):
        story.start(task=task)
        assert f"a{task}-0" not in story.steps(story.starts - 1)
        assert compare_states(story.twin(task=task).out / "final.safetensors", story.out / "final.safetensors").equal


@pytest.mark.parametrize(
    "moves",
    [{"root": "runs/{time}"}, {"cwd": "outputs/{time}"}, {"argv": ["train.py", "--run", "{time}"]}],
    ids=["timestamped-root", "hydra", "argument"],
)
def test_where_nothing_is_found_the_windows_of_the_same_script_are_named(drill: Drill, moves: dict[str, Any]) -> None:
    story = Story(drill, "plain", **moves)
    story.start(kill="9")
    text = story.start(kill="9")
    said = [line for line in text.splitlines() if "MOETION_JOB_ID=" in line]
    assert len(said) == 1
    assert "window of iterations 5..8" in said[0]
    job = said[0].partition("MOETION_JOB_ID=")[2].split()[0]
    story.start(settings={"job_id": job})
    assert "0" not in story.steps(2)
    assert story.differences(story.twin()) == []


def test_a_changed_learning_rate_is_named_and_the_window_s_counts(drill: Drill) -> None:
    story = Story(drill, "plain", changes={"1": {"net": {"lr": 0.001}}})
    story.start(kill="9")
    text = story.start()
    assert "lr of AdamW is 0.01 in the window and 0.001 in this script (the window's counts)" in text
    assert "lr of Net is 0.01 in the window and 0.001 in this script (this script's counts)" in text
    assert story.differences(story.twin()) == []


def test_a_changed_learning_rate_can_count(drill: Drill) -> None:
    settings = {"on_changed_settings": "script"}
    story = Story(drill, "plain", settings=settings, changes={"1": {"net": {"lr": 0.001}}})
    story.start(kill="9")
    text = story.start()
    assert "lr of AdamW is 0.01 in the window and 0.001 in this script (this script's counts, once" in text
    twin = story.twin()
    assert "step 8" not in story.differences(twin)  # the replay is exact
    assert "step 9" in story.differences(twin)


def test_a_changed_setting_that_a_replay_cannot_undo_is_its_likely_cause(drill: Drill) -> None:
    story = Story(drill, "plain", changes={"1": {"trainer": {"gradient_clip_val": 0.001}}})
    story.start(kill="9")
    text = story.start()
    assert "APPROXIMATE" in text
    assert "Likely cause: what was changed since the window was captured (gradient_clip_val" in text
    assert "outside of its .state" not in text


def test_more_steps_are_possible_and_said(drill: Drill) -> None:
    story = Story(drill, "plain", changes={"1": {"trainer": {"max_epochs": 5}}})
    story.start(kill="9")
    text = story.start()
    assert "max_epochs is 3 in the window and 5 in this script (this script's counts)" in text
    assert story.differences(story.twin(trainer={"max_epochs": 5}, changes={})) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"net": {"optimizer": "SGD"}}, "captured with the optimizers AdamW, this run has SGD"),
        ({"net": {"width": 16}}, "belongs to another model: parameter 'first.weight'"),
        ({"batch_size": 7}, "over [7] batches an epoch, this one has [4]"),
    ],
    ids=["optimizer", "model", "batch-size"],
)
def test_what_cannot_be_restored_is_refused_before_the_first_step(drill: Drill, change: Any, says: str) -> None:
    story = Story(drill, "plain", changes={"1": change})
    story.start(kill="9")
    text = story.start(code=1)
    assert "ForeignWindowError" in text
    assert says in text
    assert "resume='never'" in text
    assert story.steps(1) == {}
    story.start()  # undone, it continues
    assert story.differences(story.twin(changes={})) == []


def test_another_seed_begins_anew_and_the_old_windows_are_kept_until_it_has_its_own(drill: Drill) -> None:
    story = Story(drill, "plain", changes={"1": {"seed": 2}, "2": {"seed": 1}})
    story.start(kill="9")
    text = story.start(kill="2")
    assert "seed 1 there, 2 here" in text
    assert "MOETION_RESUME=newest" in text
    assert "0" in story.steps(1)
    story.start()  # the first seed again: its window was only set aside
    assert "0" not in story.steps(2)


def test_windows_that_cannot_be_read_are_no_fresh_start(drill: Drill) -> None:
    story = Story(drill, "plain")
    story.start(kill="9")
    for path in story.windows():
        path.write_bytes(path.read_bytes()[:100])
    text = story.start(code=1)
    assert "No whole window of job" in text
    assert story.windows() != []
    story.start(settings={"resume": "never"})


def test_a_script_without_a_seed_continues(drill: Drill) -> None:
    story = Story(drill, "plain", seed=None)
    story.start(kill="9")
    story.start()
    assert "0" not in story.steps(1)


@pytest.mark.parametrize(("then", "window"), [("raise", 1), ("raise", 4), ("exit", 4), ("kill", 1)])
def test_a_failure_after_training_continues_at_its_end(drill: Drill, then: str, window: int) -> None:
    story = Story(drill, "plain", window=window, changes={"0": {"then": then}})
    story.start(code={"raise": 1, "exit": 3, "kill": -signal.SIGKILL}[then])
    story.start()
    assert len(story.steps(1)) <= 2 * window
    assert story.differences(story.twin(changes={})) == []
    assert story.windows() == []
    story.start()  # the process has ended well: the same command trains again
    assert "0" in story.steps(2)


def test_a_failure_after_training_keeps_the_end_on_storage(drill: Drill, tmp_path: Path) -> None:
    story = Story(drill, "plain", changes={"0": {"then": "raise"}}, settings={"persist_dir": str(tmp_path / "p")})
    story.start(code=1)
    other = Story(drill, "plain", settings=story.spec["settings"])
    other.out = story.out  # the same command, whose memory is lost
    other.starts = 1
    other.start()
    assert len(story.steps(1)) <= 8


@WINDOWS
def test_a_window_of_the_run_that_began_from_a_checkpoint_is_newer_than_it(drill: Drill, window: int) -> None:
    story = Story(drill, "checkpoints", given="base", window=window)
    story.start(kill="16")
    story.start(kill="23")
    text = story.start()
    assert "is newer, and is of the run that began there" in text
    assert "7" not in story.steps(1)
    assert story.differences(story.twin()) == []


def test_a_window_wins_over_a_checkpoint_of_its_own_run_that_is_hardly_newer(drill: Drill) -> None:
    story = Story(drill, "checkpoints", given="last")
    story.start(kill="6")
    text = story.start()
    assert "is of the same run and 1 steps older, but exact" in text
    assert story.differences(story.twin()) == []


@pytest.mark.parametrize("given", ["last", "hpc"])
def test_a_checkpoint_that_lightning_has_chosen_loses_to_a_newer_window(drill: Drill, given: str) -> None:
    story = Story(drill, "checkpoints", given=given, window=1)
    story.start(kill="14")
    text = story.start()
    assert "is newer" in text
    assert "10" not in story.steps(1)
    assert story.differences(story.twin()) == []


def test_an_older_checkpoint_that_the_user_names_wins_and_says_what_is_given_up(drill: Drill) -> None:
    story = Story(drill, "checkpoints", given="old")
    story.start(kill="16")
    text = story.start()
    assert "resume='newest'" in text
    assert "5" in story.steps(1)


# --- the other adapters -----------------------------------------------------------------------------------------------

LOOPS = pytest.mark.parametrize("kind", ["plain", "accelerate", "hf"])


@LOOPS
def test_a_sweep_of_loops_takes_no_other_trial_s_window(drill: Drill, kind: str) -> None:
    story = Story(drill, "loops", kind=kind, lrs=(1.0, 0.01), fails="1-9")
    story.start(kill="2-9")
    story.start()
    assert "2-0" not in story.steps(1)
    twin = story.twin()
    assert [d for d in story.differences(twin) if not d.startswith("step 1-")] == []


@LOOPS
def test_a_loop_that_fails_after_training_continues_at_its_end(drill: Drill, kind: str) -> None:
    story = Story(drill, "loops", kind=kind, changes={"0": {"then": "raise"}})
    story.start(code=1)
    story.start()
    assert 0 < len(story.steps(1)) <= 8
    assert story.differences(story.twin(changes={})) == []
    assert story.windows() == []


@LOOPS
def test_a_changed_learning_rate_of_a_loop_is_named(drill: Drill, kind: str) -> None:
    story = Story(drill, "loops", kind=kind, lrs=(0.01,))
    story.start(kill="1-9")
    text = story.start(lrs=(0.001,))
    assert "lr of AdamW" in text
    assert "0.01 in the window and 0.001 in this script (the window's counts)" in text
    assert story.differences(story.twin()) == []
