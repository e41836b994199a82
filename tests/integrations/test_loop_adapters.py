"""What the loop adapters promise beside exactness: other checkpoints, refusals, examples."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from moetion_lightning.core.policy import DensePolicy
from moetion_lightning.errors import ConfigurationError, ForeignWindowError
from moetion_lightning.integrations import FabricCheckpointing, SparseCheckpointing, attach
from moetion_lightning.integrations._gradients import LastingGradients
from moetion_lightning.integrations._loaders import Followed, follow
from moetion_lightning.integrations._other_loaders import OtherLoaders
from moetion_lightning.integrations.accelerate import _prepared_loaders
from moetion_lightning.testing.compare import compare_states
from tests.runs import program
from tests.runs.drill import ROOT, Drill, Zygote, differences, read_events, read_steps

SCRIPT: dict[str, Any] = {"runner": "tests.runs.own_restart"}
KILL = [{"step": 14}]


# --- an Accelerate script's own checkpoints --------------------------------------------------------------------------


def _both(first: Path, second: Path) -> list[str]:
    """Where two runs differ; Accelerate's own restart is not exact, so what it does again need not be the same."""
    found = list(compare_states(first / "final.safetensors", second / "final.safetensors").differences)
    return found if read_steps(first) == read_steps(second) else [*found, "losses"]


def test_unchanged_script_restarts_from_its_own_checkpoint_as_without_us(drill: Drill) -> None:
    alone = drill.killed({**SCRIPT, "attach": False}, KILL)
    attached = drill.killed(SCRIPT, KILL)
    assert _both(alone, attached) == []
    assert not read_events(attached, "RestoreApplied")
    assert "nothing is captured" in (attached / "log").read_text()


def test_loaded_checkpoint_wins_over_the_window(drill: Drill) -> None:
    alone = drill.killed({**SCRIPT, "attach": False}, KILL)
    guided = drill.killed({**SCRIPT, "steps": True}, KILL)
    assert _both(alone, guided) == []
    assert not read_events(guided, "RestoreApplied")
    assert "it wins over the window of iterations" in (guided / "log").read_text()


def test_checkpoint_made_without_us_loads_with_us(drill: Drill) -> None:
    alone = drill.killed({**SCRIPT, "attach": False}, KILL)
    changed = drill.killed({**SCRIPT, "attach": False}, KILL, attach=True, steps=True)
    assert _both(alone, changed) == []
    assert read_events(changed, "WindowCommitted")


@pytest.mark.parametrize("automatic", [False, True])
def test_window_is_taken_where_the_script_asks_for_it(drill: Drill, automatic: bool) -> None:
    """Steps are done again; folders of theirs are left alone while replaying, and written again afterwards."""
    spec = {**SCRIPT, "automatic": automatic, "every": 2, "steps": True, "window_first": True}
    reference = drill.reference({**spec, "attach": False, "steps": False})
    killed = drill.killed(spec, KILL)
    assert differences(reference, killed) == []
    assert read_events(killed, "RestoreApplied")
    assert "is not written: this step is done again" in (killed / "log").read_text()
    names = sorted(path.name for path in (reference / "checkpoints").iterdir())
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == names
    for name in names:
        saved = [run / "checkpoints" / name / "model.safetensors" for run in (reference, killed)]
        assert compare_states(*saved).equal


def test_loop_starts_where_a_loaded_checkpoint_stands_and_is_captured_from_there(drill: Drill) -> None:
    """Killed without a window, it starts at its checkpoint, in the second epoch; killed again, at its newest window."""
    spec = {**SCRIPT, "epochs": 2, "start_at": True, "window_first": True}
    wiped: list[Path] = []

    def wipe_once(memory: Path) -> None:
        if not wiped:
            wiped.extend(memory.iterdir())
            for folder in wiped:
                shutil.rmtree(folder)

    killed = drill.killed(spec, [{"step": 26}, {"step": 34}], between=wipe_once)
    assert differences(drill.reference({**spec, "attach": False, "start_at": False}), killed) == []
    restored = read_events(killed, "RestoreApplied")
    assert len(restored) == 1
    assert read_steps(killed).keys() == {(0, step) for step in range(40)}
    assert len(read_steps(killed)[0, 24]) == 2  # the checkpoint's next batch


# --- refusals --------------------------------------------------------------------------------------------------------


class Bench:
    """A loop in this process."""

    def __init__(self, memory_dir: Path) -> None:
        self.memory_dir = memory_dir
        self.runs: list[SparseCheckpointing] = []

    def make(
        self,
        model: torch.nn.Module | None = None,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        **settings: Any,
    ) -> SparseCheckpointing:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4) if model is None else model
        optimizer = optimizer_class(model.parameters())
        given = {"memory_dir": str(self.memory_dir), "job_id": "bench", "window": 2, **settings}
        run = SparseCheckpointing(model, optimizer, **given)
        self.runs.append(run)
        run.model, run.optimizer = model, optimizer  # type: ignore[attr-defined]
        return run

    def train(self, run: Any, count: int = 100, epochs: int = 1) -> list[int]:
        seen = []
        for step, batch in run.steps(DataLoader(torch.arange(32.0).view(8, 4), batch_size=1), epochs=epochs):
            run.model(batch).sum().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            seen.append(step)
            if len(seen) == count:
                break
        return seen


@pytest.fixture
def bench(memory_dir: Path) -> Any:
    made = Bench(memory_dir)
    yield made
    for run in made.runs:
        run.close(completed=False)


def test_loop_goes_on_in_a_second_object_where_the_first_one_was_left(bench: Bench) -> None:
    def interrupted() -> None:
        with bench.make() as run:
            bench.train(run, 6)
            raise KeyError("interrupted")

    with pytest.raises(KeyError):
        interrupted()
    again = bench.make()
    assert again.resuming
    first = again.step
    assert first in (1, 3)  # after the first iteration of a window
    assert bench.train(again) == list(range(first, 8))


def test_second_loop_over_steps_is_refused(bench: Bench) -> None:
    run = bench.make()
    bench.train(run)
    with pytest.raises(ConfigurationError, match=r"steps\(\) is called again.*run.epochs\(3\)"):
        run.steps([1, 2])


def test_number_of_epochs_is_given_once(bench: Bench) -> None:
    run = bench.make()
    assert next(run.epochs(2)) == 0
    with pytest.raises(ConfigurationError, match=r"give the number to epochs\(\) alone"):
        run.steps([1], epochs=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows": 3}, "no setting is named 'windows'"),
        ({"window": 0}, "window=0: expected"),
        ({"window": 2, "policy": DensePolicy()}, "window=2 has no effect with policy=DensePolicy"),
    ],
)
def test_wrong_setting_is_refused(bench: Bench, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        bench.make(**settings)


def test_what_cannot_be_saved_is_not_registered(bench: Bench) -> None:
    run = bench.make()
    with pytest.raises(ConfigurationError, match=r"counter=int; expected an object with state_dict\(\)"):
        run.register(counter=3)
    run.register(noise=torch.Generator())
    with pytest.raises(ConfigurationError, match="this name is taken"):
        run.register(noise=torch.Generator())
    bench.train(run, 1)
    with pytest.raises(ConfigurationError, match="before the loop begins"):
        run.register(late=torch.Generator())


def test_other_registered_objects_are_refused(bench: Bench) -> None:
    run = bench.make()
    run.register(average=torch.nn.Linear(1, 1))
    bench.train(run, 6)
    run.close(completed=False)
    with pytest.raises(ForeignWindowError, match=r"\['average'\] is only in the window"):
        bench.train(bench.make())


def test_other_number_of_loaders_is_refused(bench: Bench) -> None:
    run = bench.make()
    bench.train(run, 6)
    run.close(completed=False)
    with pytest.raises(ForeignWindowError, match="a loop over 1 loaders, this one has 2"):
        next(bench.make().steps([1], [2]))


def test_window_that_no_loop_came_to_is_kept(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    run = bench.make()
    bench.train(run, 6)
    run.close(completed=False)
    again = bench.make()
    assert again.resuming
    again.close()
    assert caplog.text.count("the windows are kept") == 1
    assert list(bench.memory_dir.rglob("windows/*.json"))


def test_other_optimizer_is_refused(bench: Bench) -> None:
    run = bench.make()
    bench.train(run, 6)
    run.close(completed=False)
    with pytest.raises(ForeignWindowError, match="captured with the optimizers AdamW, this run has SGD"):
        bench.train(bench.make(optimizer_class=torch.optim.SGD))


def test_loader_of_another_length_is_refused(bench: Bench) -> None:
    run = bench.make()
    bench.train(run, 6)
    run.close(completed=False)
    with pytest.raises(ForeignWindowError, match=r"over \[8\] batches an epoch, this one has \[5\]"):
        next(bench.make().steps(range(5)))


def test_start_at_needs_a_length(bench: Bench) -> None:
    with pytest.raises(ConfigurationError, match=r"start_at\(3, list_iterator\): expected a step >= 0 and a loader"):
        bench.make().start_at(3, iter([1, 2]))


def test_several_loaders_and_modules_train_together(bench: Bench) -> None:
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    settings: dict[str, Any] = {"memory_dir": str(bench.memory_dir), "job_id": "two", "window": 2}
    with SparseCheckpointing({"a": first, "b": second}, optimizer, **settings) as run:
        taken = [batch for _, batch in run.steps([1, 2, 3], "xy")]
    assert taken == [(1, "x"), (2, "y")]


def test_moetion_launch_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"MOETION_STORE": "h:1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MOETION_GENERATION": "0"}
    for name, value in {**values, "TORCHELASTIC_RUN_ID": "r"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="under `moetion launch`.*Start this script with torchrun"):
        bench.make()


def test_attach_expects_an_accelerator() -> None:
    with pytest.raises(ConfigurationError, match=r"attach\(str\): expected an accelerate.Accelerator"):
        attach("x")  # type: ignore[arg-type]


class _Prepared:
    """A process of an Accelerate script: its loaders, and what is captured beside its objects."""

    def __init__(self, num_loaders: int, **settings: Any) -> None:
        self.accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**settings))
        made = [DataLoader(torch.arange(6), batch_size=2) for _ in range(num_loaders)]
        self.loaders = [self.accelerator.prepare(loader) for loader in made]
        self.others = OtherLoaders("attach(accelerator)", lambda: _prepared_loaders(self.accelerator, []))

    def passes(self) -> None:
        for loader in self.loaders:
            list(loader)


def _shuffled(wrapped: bool) -> Followed:
    loader = DataLoader(torch.arange(8), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    return follow(prepare_data_loader(loader, put_on_device=False) if wrapped else loader)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("drawn", [0, 2, 4])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "accelerate"])
def test_where_a_loader_stands_is_known_before_it_draws_after_a_restart(wrapped: bool, drawn: int, begun: bool) -> None:
    torch.manual_seed(1)
    followed = _shuffled(wrapped)
    batches = followed.iterate()
    for _ in range(drawn):
        next(batches)
    saved = followed.snapshot()
    left = [batch.tolist() for batch in batches]
    for seed in (2, 3):  # killed twice, before anything was drawn
        torch.manual_seed(seed)
        followed = _shuffled(wrapped)
        followed.restore(saved)
        if begun and seed == 2:
            followed.iterate()
        saved = followed.snapshot()
    assert [batch.tolist() for batch in followed.iterate()] == left


def test_passes_over_other_loaders_are_restored_without_drawing() -> None:
    before = _Prepared(2, use_stateful_dataloader=True)
    before.passes()
    after = _Prepared(2, use_stateful_dataloader=True)
    generators = torch.get_rng_state()
    after.others.restore(before.others.snapshot())
    assert torch.equal(torch.get_rng_state(), generators)
    assert [loader.iteration for loader in after.loaders] == [1, 1]
    drawn = []
    for process in (before, after):
        torch.set_rng_state(generators)
        process.passes()
        drawn.append(torch.rand(()))
    assert drawn[0] == drawn[1]


def test_passes_over_other_loaders_that_cannot_be_restored_are_named(caplog: pytest.LogCaptureFixture) -> None:
    before = _Prepared(2, use_stateful_dataloader=True)
    left = iter(before.loaders[1])
    next(left)
    before.others.snapshot()
    before.others.snapshot()
    assert caplog.text.count("a pass over prepared loader 1 (DataLoaderShard) was begun and is not at its end") == 1
    list(left)
    fresh = _Prepared(1, use_stateful_dataloader=True)
    fresh.others.restore(before.others.snapshot())
    assert "prepared loader 1 (DataLoaderShard) may differ after this restart: it is not there yet" in caplog.text
    iterated = _Prepared(1, use_stateful_dataloader=True)
    iterated.passes()
    iterated.others.restore(_Prepared(1, use_stateful_dataloader=True).others.snapshot())
    assert "prepared loader 0 (DataLoaderShard) may differ after this restart: it was iterated before" in caplog.text


def test_fabric_callback_says_what_is_missing() -> None:
    with pytest.raises(ConfigurationError, match=r"Fabric\(callbacks=\[...\]\), and call fabric.setup\(\) first"):
        next(FabricCheckpointing(job_id="none").steps([1]))


# --- gradients -------------------------------------------------------------------------------------------------------


def _zero(optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()


def _zero_in_place(optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize(
    ("before_backward", "lasting"),
    [(_zero, False), (_zero_in_place, True), (lambda optimizer: None, True)],
    ids=["none", "zeros", "kept"],
)
def test_what_becomes_of_gradients_is_seen(
    before_backward: Callable[[torch.optim.Optimizer], None], lasting: bool
) -> None:
    """Also of an idle expert's: gradients of zero make Adam move it, None does not."""
    module = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    optimizer = torch.optim.AdamW(module.parameters())
    gradients = LastingGradients(dict(module.named_parameters()), [optimizer])
    for used in (module, module[:1], module[:1]):
        before_backward(optimizer)
        sum(part(torch.ones(1, 2)).sum() for part in used).backward()  # type: ignore[union-attr]
        optimizer.step()
        found = gradients.capture()
    assert bool(found) is lasting
    gradients.remove()


# --- examples --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "fabric", "accelerate"])
def test_example_killed_and_started_again_prints_the_same_losses(
    name: str, tmp_path: Path, memory_dir: Path, zygote: Zygote
) -> None:
    """The first, undisturbed start of one of them is in a new interpreter, as a user's."""
    settings = {"MOETION_MEMORY_DIR": str(memory_dir), "MOETION_JOB_ID": f"example-{name}"}
    script = ROOT / "examples" / f"{name}_loop.py"

    def losses(said: str) -> dict[str, str]:
        lines = (line.partition(": ") for line in said.splitlines() if line.startswith("step"))
        return {step: loss for step, _, loss in lines}

    def start(log: str, kill_at: str = "") -> dict[str, str]:
        path = tmp_path / log
        ended = zygote.run_group([program.spec(tmp_path, script, kill_at=kill_at)], [path], [settings])
        assert ended.codes == [-signal.SIGKILL if kill_at else 0], path.read_text()
        return losses(path.read_text())

    if name == "plain":
        done = subprocess.run(
            [sys.executable, str(script)], cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        whole = losses(done.stdout)
    else:
        whole = start("whole")
    first = start("first", kill_at="step 30")
    rest = start("rest")
    assert "step 30" in first
    assert "step 0" not in rest  # it did not begin anew
    assert {**first, **rest} == whole
    assert all(first[step] == rest[step] for step in first.keys() & rest.keys())
