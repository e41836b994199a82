"""Scripts without a line of this package: killed, started again, and equal bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file

from moetion_lightning.callbacks import DenseInMemoryCheckpoint, SparseExpertCheckpoint
from moetion_lightning.cli import main
from moetion_lightning.commands.automatic import Automatic, callbacks_of, loop_settings
from moetion_lightning.core.policy import DensePolicy, PartialExpertsPolicy, SparsePolicy
from moetion_lightning.entry_points import lightning_callbacks
from moetion_lightning.errors import ConfigurationError
from tests.runs.drill import Drill, read_events, read_logs

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


def _run_script(tmp_path: Path, body: str, *options: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("{body}", body))
    return subprocess.run(
        [sys.executable, "-m", "moetion_lightning", "run", *options, str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MOETION_MEMORY_DIR": str(tmp_path), "MOETION_JOB_ID": "job"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("reason", BODIES)
def test_loop_that_cannot_be_followed_trains_on_and_is_told(tmp_path: Path, reason: str) -> None:
    done = _run_script(tmp_path, BODIES[reason])
    assert done.returncode == 0, done.stderr
    assert reason in done.stderr
    assert "nothing is captured any more" in done.stderr
    assert not list(tmp_path.rglob("windows/*.json"))


def test_loop_left_in_the_middle_of_a_pass_goes_on(tmp_path: Path) -> None:
    body = (
        "for epoch in range(4):\n    for i, batch in enumerate(first):\n        step(batch)\n        if i == 1: break"
    )
    done = _run_script(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert "committed window" in done.stderr
    assert "every iteration is dense" not in done.stderr


def test_script_that_loads_its_own_state_is_left_alone(tmp_path: Path) -> None:
    body = (
        "accelerator.save_state('own')\nfor batch in first:\n    step(batch)\n"
        "accelerator.load_state('own')\nfor batch in first:\n    step(batch)"
    )
    done = _run_script(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert "the script restarts by itself" in done.stderr
    assert not list(tmp_path.rglob("windows/*.json"))


def test_state_that_the_script_loads_before_its_loop_wins_over_a_window(tmp_path: Path) -> None:
    body = "for x in first:\n    step(x)\naccelerator.save_state('own')\nraise KeyError('mine')"
    assert _run_script(tmp_path, body).returncode == 1
    assert list(tmp_path.rglob("windows/*.json"))
    done = _run_script(tmp_path, "accelerator.load_state('own')\nfor x in first:\n    step(x)")
    assert done.returncode == 0, done.stderr
    assert "the script restarts by itself" in done.stderr
    assert "is taken to where it was" not in done.stderr
    assert not list(tmp_path.rglob("windows/*.json"))


def test_window_of_a_script_with_the_line_is_not_taken_for_one_without(tmp_path: Path) -> None:
    body = (
        "import moetion_lightning.integrations as m\nrun = m.attach(accelerator, window=1)\n"
        "for _, x in run.steps(first):\n    step(x)\nraise KeyError('mine')"
    )
    assert _run_script(tmp_path, body).returncode == 1
    done = _run_script(tmp_path, "for x in first:\n    step(x)")
    assert done.returncode == 1
    assert "ForeignWindowError" in done.stderr
    assert list(tmp_path.rglob("windows/*.json"))


def test_failed_script_keeps_its_windows_and_shows_its_own_error(tmp_path: Path) -> None:
    done = _run_script(tmp_path, "for batch in first:\n    step(batch)\nraise KeyError('mine')")
    assert done.returncode == 1
    assert "KeyError: 'mine'" in done.stderr
    assert list(tmp_path.rglob("windows/*.json"))


def test_exit_status_of_the_script_is_that_of_the_command(tmp_path: Path) -> None:
    assert _run_script(tmp_path, "raise SystemExit(7)").returncode == 7


def test_module_sees_its_own_arguments(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    done = subprocess.run(
        [sys.executable, "-m", "moetion_lightning", "run", "-m", "mine", "--config", "theirs"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == "__main__ ['--config', 'theirs']", done.stderr


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--config", "no_such_recipe", "train.py"], "unknown recipe 'no_such_recipe'"),
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


def test_yaml_gives_callbacks_of_all_kinds(tmp_path: Path) -> None:
    text = """
callbacks:
  - class_path: DenseInMemoryCheckpoint
    init_args: {every_n_steps: 3}
  - class_path: lightning.pytorch.callbacks.LearningRateMonitor
"""
    made = callbacks_of(_yaml(tmp_path, text))
    assert [type(c).__name__ for c in made] == ["DenseInMemoryCheckpoint", "LearningRateMonitor"]


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
    """CPU time of a process, as a ratio of the least of three in one run: the machine may be busy with other things."""
    code = """
import sys, time
from lightning.fabric.utilities import registry
from lightning.pytorch import Trainer
if sys.argv[1] == "without":
    original = registry.entry_points
    registry.entry_points = lambda **given: [p for p in original(**given) if p.name != "moetion"]
Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
print(("moetion_lightning" in sys.modules), time.process_time())
"""
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(3):
        for kind, measured in seconds.items():
            done = subprocess.run(
                [sys.executable, "-c", code, kind], capture_output=True, text=True, timeout=120, check=True
            )
            loaded, value = done.stdout.split()
            assert loaded == str(kind == "with")
            measured.append(float(value))
    assert min(seconds["with"]) <= 1.2 * min(seconds["without"]), seconds
