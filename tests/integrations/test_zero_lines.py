"""Scripts without a line of this package: killed, started again, and equal bit for bit."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from moetion_lightning.callbacks import DenseInMemoryCheckpoint, SparseExpertCheckpoint
from moetion_lightning.cli import main
from moetion_lightning.commands.automatic import Automatic, callbacks_of, loop_settings
from moetion_lightning.core.log_policy import GradientLogPolicy
from moetion_lightning.core.policy import DensePolicy, PartialExpertsPolicy, SparsePolicy
from moetion_lightning.entry_points import lightning_callbacks
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.integrations import SparseCheckpointing, zero_lines
from moetion_lightning.integrations._automatic_loop import AutomaticLoop
from tests.runs import program
from tests.runs.drill import Drill, Zygote, read_events, read_logs

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE: dict[str, Any] = {
    "runner": "tests.runs.upstream",
    "script": "examples/upstream_style/accelerate_script.py",
    "arguments": ["--cpu"],
}
LIGHTNING: dict[str, Any] = {
    "runner": "tests.runs.upstream",
    "script": "examples/upstream_style/lightning_script.py",
    "arguments": ["--accelerator", "cpu"],
}
HUGGING_FACE: dict[str, Any] = {"runner": "tests.runs.upstream", "script": "tests/runs/hf_script.py"}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and plain values of nested containers; floats exactly, without what tells the time."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if "runtime" not in str(key) and "per_second" not in str(key):
                yield from _leaves(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}.{index}")
    elif hasattr(value, "tolist") and not isinstance(value, torch.Tensor):
        yield from _leaves(value.tolist(), name)
    else:
        yield name, value


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    content = torch.load(path, weights_only=False)
    if path.suffix == ".ckpt":  # the checkpoint also says with which callbacks it was written
        return {k: content[k] for k in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")}
    return content


def _differences(first: Path, second: Path) -> list[str]:
    """Everything in which the files differ that a script has written."""
    suffixes = (".safetensors", ".bin", ".pkl", ".pt", ".ckpt", ".json")
    names = {p.relative_to(first / "output") for p in (first / "output").rglob("*") if p.suffix in suffixes}
    assert names, f"{first} holds nothing"
    found = [f"only in one: {n}" for n in names if not (second / "output" / n).is_file()]
    for name in sorted(names - {Path(f.removeprefix("only in one: ")) for f in found}):
        a, b = dict(_leaves(_read(first / "output" / name))), dict(_leaves(_read(second / "output" / name)))
        for key in sorted({*a, *b}):
            x, y = a.get(key), b.get(key)
            same = torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y
            if not same:
                found.append(f"{name}{key}")
    return found


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param([{"step": 10}], id="second-epoch"),
        pytest.param([{"eval": 3}], id="validation"),
        pytest.param([{"step": 8}, {"step": 2}, {"step": 9}], id="again-in-replay"),
        pytest.param([{"step": 2}], id="before-first-window"),
        pytest.param([{"eval": 6}], id="last-validation"),
    ],
)
def test_accelerate_script_recovers_by_moetion_run(drill: Drill, kills: list[dict[str, Any]]) -> None:
    """The states that the script saves after each epoch: also those that the killed process had saved already."""
    killed = drill.killed(ACCELERATE, kills)
    assert _differences(drill.reference(ACCELERATE), killed) == []
    if kills != [{"step": 2}]:
        assert read_events(killed, "RestoreApplied"), read_logs(killed)
        assert all(event["verified"] for event in read_events(killed, "ReplayFinished"))
        assert "Variables of the script" in read_logs(killed)
    assert not list((drill.memory_dir / killed.name).rglob("windows/*.json"))


@pytest.mark.parametrize("by_environment", [False, True], ids=["moetion-run", "MOETION"])
def test_lightning_script_recovers(drill: Drill, by_environment: bool) -> None:
    spec = {**LIGHTNING, "by_environment": by_environment}
    killed = drill.killed(spec, [{"step": 10}, {"step": 4}])
    assert _differences(drill.reference(LIGHTNING), killed) == []
    assert len(read_events(killed, "RestoreApplied")) == 2
    assert all(event["verified"] for event in read_events(killed, "ReplayFinished"))


@pytest.mark.hf
def test_trainer_script_recovers_by_moetion_run(drill: Drill) -> None:
    pytest.importorskip("transformers")
    killed = drill.killed(HUGGING_FACE, [{"step": 9}, {"step": 7}])
    assert _differences(drill.reference(HUGGING_FACE), killed) == []
    assert len(read_events(killed, "RestoreApplied")) == 2


@pytest.mark.slow
def test_accelerate_script_recovers_on_two_ranks(drill: Drill) -> None:
    spec = {**ACCELERATE, "ranks": 2, "arguments": ["--cpu", "--batch_size", "4"]}
    killed = drill.killed(spec, [{"step": 9, "rank": 1}])
    assert _differences(drill.reference(spec), killed) == []
    assert len(read_events(killed, "RestoreApplied")) == 2


def test_negative_control_script_alone_begins_anew(drill: Drill) -> None:
    """Without us, the second start trains everything again: the drill does see what we do."""
    out = drill._directory("alone")
    common = {**ACCELERATE, "capture": False, "memory_dir": "", "kill": {"step": 10}}
    assert not drill.start(common, out).good
    before = (out / "output" / "epoch_0" / "model.safetensors").stat().st_mtime_ns
    assert drill.start({**common, "kill": None}, out).good
    assert (out / "output" / "epoch_0" / "model.safetensors").stat().st_mtime_ns != before


# --- loops of other forms, in this process ---------------------------------------------------------------------------


SCRIPT = """
import torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
first, second = ([torch.ones(4, 2)[i] for i in range(4)] for _ in range(2))
model, optimizer, first, second = accelerator.prepare(
    model, optimizer, torch.utils.data.DataLoader(first), torch.utils.data.DataLoader(second)
)
def step(batch):
    accelerator.backward(model(batch).sum())
    optimizer.step()
    optimizer.zero_grad()
{body}
assert not any("moetion" in name for name in vars(accelerator) if callable(vars(accelerator)[name])), vars(accelerator)
"""
BODIES = {
    "several prepared dataloaders": "for loader in (first, second, first):\n    for x in loader:\n        step(x)",
    "outside of a loop": "for epoch in range(2):\n    for x in first:\n        step(x)\n    step(x)",
}


@dataclasses.dataclass
class Script:
    """Starts scripts by `moetion run`.

    Args:
        zygote: Starts processes.
        folder: Where they run and what they write.
    """

    zygote: Zygote
    folder: Path
    _count: int = 0

    def start(self, body: str) -> tuple[int, str]:
        """Exit status and output of a script with this body."""
        self._count += 1
        (self.folder / "script.py").write_text(SCRIPT.replace("{body}", body))
        log = self.folder / f"log{self._count}"
        command = program.spec(self.folder, "-m", "moetion_lightning", "run", "script.py")
        return self.zygote.run_group([command], [log], [self.environment]).codes[0], log.read_text()

    @property
    def environment(self) -> dict[str, str]:
        return {"MOETION_MEMORY_DIR": str(self.folder), "MOETION_JOB_ID": "job"}

    def windows(self) -> list[str]:
        return [path.name for path in self.folder.rglob("windows/*.json")]


@pytest.fixture
def script(zygote: Zygote, tmp_path: Path) -> Script:
    return Script(zygote, tmp_path)


@pytest.mark.parametrize("reason", BODIES)
def test_loop_that_cannot_be_followed_trains_on_and_is_told(script: Script, reason: str) -> None:
    status, said = script.start(BODIES[reason])
    assert status == 0, said
    assert reason in said
    assert "nothing is captured any more" in said
    assert script.windows() == []


def test_loop_left_in_the_middle_of_a_pass_goes_on(script: Script) -> None:
    """In a new interpreter, which imports Accelerate when the script does."""
    body = (
        "for epoch in range(4):\n    for i, batch in enumerate(first):\n        step(batch)\n        if i == 1: break"
    )
    (script.folder / "script.py").write_text(SCRIPT.replace("{body}", body))
    done = subprocess.run(
        [sys.executable, "-m", "moetion_lightning", "run", "script.py"], cwd=script.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **script.environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "committed " in done.stderr  # a window, or one iteration where copies are quick
    assert "every iteration is dense" not in done.stderr


def test_script_that_loads_its_own_state_is_left_alone(script: Script) -> None:
    body = (
        "accelerator.save_state('own')\nfor batch in first:\n    step(batch)\n"
        "accelerator.load_state('own')\nfor batch in first:\n    step(batch)"
    )
    status, said = script.start(body)
    assert status == 0, said
    assert "the script restarts by itself" in said
    assert script.windows() == []


def test_state_that_the_script_loads_before_its_loop_wins_over_a_window(script: Script) -> None:
    body = "for x in first:\n    step(x)\naccelerator.save_state('own')\nraise KeyError('mine')"
    assert script.start(body)[0] == 1
    assert script.windows()
    status, said = script.start("accelerator.load_state('own')\nfor x in first:\n    step(x)")
    assert status == 0, said
    assert "the script restarts by itself" in said
    assert "is taken to where it was" not in said
    assert script.windows() == ["000000000004.json"]  # it is only given up


def test_window_of_a_script_with_the_line_is_not_taken_for_one_without(script: Script) -> None:
    body = (
        "import moetion_lightning.integrations as m\nrun = m.attach(accelerator, window=1)\n"
        "for _, x in run.steps(first):\n    step(x)\nraise KeyError('mine')"
    )
    assert script.start(body)[0] == 1
    status, said = script.start("for x in first:\n    step(x)")
    assert status == 2
    last = said.splitlines()[-1]
    assert last.startswith("moetion run: error: ")
    assert "which this script does not have" in last
    assert script.windows()


def test_failed_script_keeps_its_windows_and_shows_its_own_error(script: Script) -> None:
    status, said = script.start("for batch in first:\n    step(batch)\nraise KeyError('mine')")
    assert status == 1
    assert said.splitlines()[-1] == "KeyError: 'mine'"
    frames = [line.split('"')[1] for line in said[said.index("Traceback") :].splitlines() if line.startswith("  File")]
    assert {Path(file).name for file in frames} == {"script.py"}, "the traceback begins in the script"
    assert script.windows()


def test_exit_status_of_the_script_is_that_of_the_command(script: Script) -> None:
    assert script.start("raise SystemExit(7)")[0] == 7


def test_module_sees_its_own_arguments(tmp_path: Path, zygote: Zygote) -> None:
    (tmp_path / "mine.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    log = tmp_path / "log"
    command = program.spec(tmp_path, "-m", "moetion_lightning", "run", "-m", "mine", "--config", "theirs")
    assert zygote.run(command, log) == 0, log.read_text()
    assert log.read_text().strip() == "__main__ ['--config', 'theirs']"


# --- what is told, and what is put aside -----------------------------------------------------------------------------


class _Script:
    """One start of an Accelerate script with two prepared loaders of 4 batches."""

    def __init__(self, memory_dir: Path) -> None:
        torch.manual_seed(1)
        self.accelerator = Accelerator(cpu=True)
        loaders = [DataLoader(torch.ones(4, 2)) for _ in range(2)]
        model = torch.nn.Linear(2, 1)
        prepared = self.accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), *loaders)
        self.model, self.optimizer, self.first, self.second = prepared
        policy = SparsePolicy(window=2, max_window=2, overlap_target=0.8)
        self.loop = AutomaticLoop(self.accelerator, {"policy": policy, "memory_dir": str(memory_dir), "job_id": "job"})

    def batches(self, loader: Any) -> Iterator[Any]:
        make = functools.partial(iter, loader)
        return self.loop.iterate([self.first, self.second].index(loader), loader, make)

    def step(self, batch: Any) -> None:
        self.accelerator.backward(self.model(batch).sum())
        self.optimizer.step()
        self.optimizer.zero_grad()


def _zip(script: _Script) -> None:
    for a, b in zip(script.batches(script.first), script.batches(script.second)):
        script.step(a + b)


def _next(script: _Script) -> None:
    other = script.batches(script.second)
    for a in script.batches(script.first):
        script.step(a + next(other))


def _evaluation_within(script: _Script) -> None:
    for a in script.batches(script.first):
        script.step(a)
        for _ in script.batches(script.second):
            break
        list(script.batches(script.second))


@pytest.mark.parametrize(("body", "followed"), [(_zip, False), (_next, False), (_evaluation_within, True)])
def test_dataloaders_that_are_iterated_at_once_are_not_followed(
    memory_dir: Path, caplog: pytest.LogCaptureFixture, body: Callable[[_Script], None], followed: bool
) -> None:
    script = _Script(memory_dir)
    body(script)
    assert script.loop.ended is not followed
    assert bool(list(memory_dir.rglob("windows/*.json"))) is followed
    assert caplog.text.count("several prepared dataloaders at once") == (0 if followed else 1)
    body(script)
    assert caplog.text.count("run.steps(first, second") == (0 if followed else 1)
    script.loop.close()


def test_own_files_are_not_written_while_done_passes_go_by(
    memory_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``save_file`` is imported by its own name, as scripts do."""
    before = _Script(memory_dir)
    for _ in range(2):
        for batch in before.batches(before.first):
            before.step(batch)
    before.loop.close(completed=False)

    functions = torch.save, safetensors.torch.serialize_file
    script = _Script(memory_dir)
    assert script.loop.on_the_way
    assert list(script.batches(script.first)) == []
    caplog.set_level("INFO", "moetion_lightning")
    torch.save(script.model.state_dict(), tmp_path / "best.pt")
    with (tmp_path / "empty.pt").open("wb") as file:
        torch.save({}, f=file)
    save_file({"x": torch.ones(1)}, tmp_path / "best.safetensors")
    torch.save(1, memory := io.BytesIO())
    assert memory.getbuffer().nbytes
    assert [path.name for path in tmp_path.iterdir() if path.stat().st_size] == []
    assert caplog.text.count("is not written: what the script saves here was saved before the restart") == 1
    assert str(tmp_path / "best.pt") in caplog.text

    for batch in script.batches(script.first):
        if script.loop.replaying:
            torch.save(1, tmp_path / "replayed.pt")
        script.step(batch)
    assert not script.loop.on_the_way
    assert (torch.save, safetensors.torch.serialize_file) == functions
    assert not (tmp_path / "replayed.pt").exists()
    script.loop.close()


def test_run_that_ends_before_its_window_keeps_it(memory_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = _Script(memory_dir)
    for batch in before.batches(before.first):
        before.step(batch)
    before.loop.close(completed=False)
    functions = torch.save, safetensors.torch.serialize_file
    script = _Script(memory_dir)
    assert torch.save is not functions[0]
    script.accelerator.end_training()
    assert (torch.save, safetensors.torch.serialize_file) == functions
    assert "the windows are kept" in caplog.text
    assert list(memory_dir.rglob("windows/*.json"))


@pytest.mark.parametrize("on_the_way", [True, False])
def test_error_in_a_done_pass_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on_the_way: bool
) -> None:
    (tmp_path / "script.py").write_text("print(loss.item())")
    with monkeypatch.context() as patch:
        patch.setenv("MOETION", "default")
        patch.setattr(sys, "argv", list(sys.argv))
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "excepthook", sys.__excepthook__)
        patch.setattr(zero_lines, "after_import", lambda name, action: None)
        patch.setattr(zero_lines.ZeroLines, "on_the_way", on_the_way)
        with pytest.raises(NameError) as raised:
            main(["run", str(tmp_path / "script.py")])
        sys.excepthook(raised.type, raised.value, raised.tb)
        assert sys.excepthook is sys.__excepthook__
    _, _, after = capsys.readouterr().err.partition("NameError: name 'loss' is not defined\n")
    assert ("gave no batches" in after) is on_the_way
    assert ("MOETION_JOB_ID" in after) is on_the_way


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[zero_lines.ZeroLines]:
    """Without changing classes for the rest of this process."""
    monkeypatch.setattr(zero_lines, "after_import", lambda name, action: None)
    found = zero_lines.ZeroLines({})
    found.install()
    yield found
    found.finish(completed=True)


@pytest.mark.parametrize(
    ("accelerator", "expected"),
    [(False, "SparseCheckpointing"), (True, "dataloader to accelerator.prepare()")],
)
def test_script_whose_loop_is_not_found_is_told_so(
    watching: zero_lines.ZeroLines, caplog: pytest.LogCaptureFixture, accelerator: bool, expected: str
) -> None:
    watching._accelerator_made = accelerator
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    optimizer.step()
    optimizer.step()
    assert caplog.text.count("nothing is captured: the script makes an optimizer step") == 1
    assert expected in caplog.text


def test_script_with_a_loop_of_this_package_is_not_told_that_nothing_is_captured(
    watching: zero_lines.ZeroLines, caplog: pytest.LogCaptureFixture, memory_dir: Path
) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters())
    with SparseCheckpointing(model, optimizer, memory_dir=str(memory_dir), job_id="job") as run:
        for _, batch in run.steps(DataLoader(torch.ones(4, 2))):
            model(batch).sum().backward()
            optimizer.step()
    assert "nothing is captured" not in caplog.text


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--config", "no_such_recipe", "train.py"], "--config='no_such_recipe': unknown recipe 'no_such_recipe'"),
        (["no_such_file.py"], "'no_such_file.py' is no file"),
    ],
)
def test_wrong_usage_is_told(capsys: pytest.CaptureFixture[str], args: list[str], expected: str) -> None:
    assert main(["run", *args]) == 2
    assert expected in capsys.readouterr().err


def _yaml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("setting", ["1", "default", "True"])
def test_default_setting_is_sparse_expert_checkpoint(setting: str) -> None:
    (callback,) = callbacks_of(setting)
    assert type(callback) is SparseExpertCheckpoint
    assert callback.config == SparseExpertCheckpoint().config


@pytest.mark.parametrize("setting", ["tiny_moe_cpu", "recipe:tiny_moe_cpu"])
def test_recipe_gives_its_callbacks(setting: str) -> None:
    (callback,) = callbacks_of(setting)
    assert isinstance(callback, SparseExpertCheckpoint)
    assert callback.config.window == 4


def test_unknown_recipe_is_told_with_where_it_is_named() -> None:
    with pytest.raises(ConfigurationError, match="^MOETION='nosuch': unknown recipe 'nosuch'"):
        callbacks_of("nosuch")


def test_yaml_gives_callbacks_of_all_kinds(tmp_path: Path) -> None:
    text = """
callbacks:
  - class_path: DenseInMemoryCheckpoint
    init_args: {every_n_steps: 3}
  - class_path: lightning.pytorch.callbacks.LearningRateMonitor
"""
    made = callbacks_of(_yaml(tmp_path, text))
    assert [type(c).__name__ for c in made] == ["DenseInMemoryCheckpoint", "LearningRateMonitor"]


def test_batches_cannot_be_left_out() -> None:
    with pytest.raises(ConfigurationError, match=r"without attach\(accelerator\): skip_batches=\[1\] has no effect"):
        AutomaticLoop(None, {"skip_batches": [1]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainer: {max_steps: 3}", "has no callbacks"),
        ("callbacks: [{class_path: NoSuchCallback}]", "NoSuchCallback"),
        ("callbacks: [{class_path: SparseExpertCheckpoint, init_args: {window: 0}}]", "window=0"),
        ("callbacks: [", "MOETION="),
    ],
)
def test_wrong_yaml_is_told(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        callbacks_of(_yaml(tmp_path, text))


@pytest.mark.parametrize(
    ("callback", "policy"),
    [
        ("{class_path: SparseExpertCheckpoint, init_args: {window: 5, job_id: a}}", SparsePolicy),
        ("{class_path: GradientLogCheckpoint, init_args: {window: 5, job_id: a}}", GradientLogPolicy),
        ("{class_path: DenseInMemoryCheckpoint, init_args: {every_n_steps: 3, job_id: a}}", DensePolicy),
        (
            "{class_path: PartialExpertsCheckpoint, init_args: {num_experts_per_checkpoint: 2, job_id: a}}",
            PartialExpertsPolicy,
        ),
    ],
)
def test_loops_get_the_settings_of_the_callback(tmp_path: Path, callback: str, policy: type) -> None:
    settings = loop_settings(_yaml(tmp_path, f"callbacks: [{callback}]"))
    assert type(settings["policy"]) is policy
    assert settings["job_id"] == "a"


def test_configuration_that_does_not_capture_is_refused_for_loops(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="0 of its callbacks capture"):
        loop_settings(_yaml(tmp_path, "callbacks: [{class_path: DenseReconstruction}]"))


# --- Lightning's entry point -----------------------------------------------------------------------------------------


def test_trainer_gets_nothing_when_the_variable_is_not_set() -> None:
    assert lightning_callbacks() == []
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert not [c for c in trainer.callbacks if type(c).__module__.startswith("moetion_lightning.")]


@pytest.mark.parametrize("value", ["", "0", "off", "False"])
def test_variable_can_say_no(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MOETION", value)
        assert lightning_callbacks() == []


def test_trainer_gets_what_the_variable_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MOETION", "tiny_moe_cpu")
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    (automatic,) = [c for c in trainer.callbacks if isinstance(c, Automatic)]
    assert isinstance(automatic._callbacks[0], SparseExpertCheckpoint)


class _Seen(Callback):
    """Writes down which callbacks a trainer has while it trains."""

    names: list[str]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.names = [type(c).__name__ for c in trainer.callbacks]


def _fit(memory_dir: Path, tmp_path: Path, own: list[Callback]) -> list[str]:
    from lightning.pytorch.demos.boring_classes import BoringModel

    seen = _Seen()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=2, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=[seen, *own],
    )  # fmt: skip
    trainer.fit(BoringModel())
    return seen.names


@pytest.mark.parametrize("has_one", [False, True])
def test_trainer_that_captures_already_gets_no_second_one(
    monkeypatch: pytest.MonkeyPatch, memory_dir: Path, tmp_path: Path, has_one: bool
) -> None:
    own: list[Callback] = [DenseInMemoryCheckpoint(memory_dir=str(memory_dir))] if has_one else []
    with monkeypatch.context() as patch:
        patch.setenv("MOETION", "1")
        patch.setenv("MOETION_MEMORY_DIR", str(memory_dir))
        names = _fit(memory_dir, tmp_path, own)
    assert ("SparseExpertCheckpoint" in names) is not has_one
    assert ("DenseInMemoryCheckpoint" in names) is has_one


def test_entry_point_imports_next_to_nothing() -> None:
    code = """
import sys
before = set(sys.modules)
from importlib.metadata import entry_points
(point,) = [p for p in entry_points(group="lightning.pytorch.callbacks_factory") if p.name == "moetion"]
assert point.load()() == []
ours = sorted(n for n in sys.modules if n.startswith("moetion_lightning"))
print(ours, sorted({"torch", "lightning", "yaml", "jsonargparse"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    ours = [
        "moetion_lightning",
        "moetion_lightning.config",
        "moetion_lightning.entry_points",
        "moetion_lightning.errors",
    ]
    assert done.stdout.strip() == f"{ours} []"


def test_entry_point_costs_next_to_nothing() -> None:
    """CPU time of a process, as a ratio of medians in one run: the machine may be busy with something else.

    Each process is a copy of one that has imported Lightning, whose time counts for each.
    """
    code = """
import os, sys, time
from lightning.fabric.utilities import registry
from lightning.pytorch import Trainer
imported = time.process_time()
for number in range(10):
    kind = ("with", "without")[number % 2]
    sys.stdout.flush()
    if os.fork() == 0:
        if kind == "without":
            original = registry.entry_points
            registry.entry_points = lambda **given: [p for p in original(**given) if p.name != "moetion"]
        Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
        print(kind, "moetion_lightning" in sys.modules, imported + time.process_time(), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for line in done.stdout.splitlines():
        kind, loaded, value = line.split()
        assert loaded == str(kind == "with")
        seconds[kind].append(float(value))
    assert [len(values) for values in seconds.values()] == [5, 5]
    assert statistics.median(seconds["with"]) <= 1.2 * statistics.median(seconds["without"]), seconds
