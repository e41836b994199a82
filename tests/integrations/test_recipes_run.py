"""Every packaged recipe is run for a few steps, as its users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moetion_lightning.cli import main
from moetion_lightning.recipes import Recipe, list_recipes, recipe_path
from moetion_lightning.testing.compare import compare_losses, compare_states, read_losses, read_state
from tests.command import Forked
from tests.runs import forked, program
from tests.runs.drill import Zygote
from tests.runs.golden import check_losses
from tests.runs.ranks import environments


def _marked(recipe: Recipe) -> object:
    return pytest.param(recipe, id=recipe.name, marks=[pytest.mark.hf] if "CausalLM" in recipe.path.read_text() else [])


RECIPES = [_marked(recipe) for recipe in list_recipes()]
PIPELINES = [_marked(recipe) for recipe in list_recipes() if recipe.name.startswith("pipeline_")]
#: What one process can run too.
ALONE = [_marked(recipe) for recipe in list_recipes() if not recipe.name.startswith("pipeline_")]
RECORDING = "moetion_lightning.testing.recording"
ONE_RANK = ("--trainer.devices", "1", "--trainer.strategy", "auto")


def _is_of_ranks(recipe: Recipe) -> bool:
    return "strategy" in yaml.safe_load(recipe.path.read_text())["trainer"]


def _fit(recipe: Recipe, folder: Path, *arguments: str, steps: int = 6) -> None:
    status = main(
        [
            *("fit", "--config", f"recipe:{recipe.name}", "--trainer.max_steps", str(steps)),
            *("--trainer.enable_progress_bar", "false", "--trainer.logger", "false"),
            *("--trainer.default_root_dir", str(folder)),
            *(ONE_RANK if _is_of_ranks(recipe) else ()),
            *arguments,
            *(f"--trainer.callbacks+={RECORDING}.LossRecorder", f"--trainer.callbacks.path={folder / 'losses.jsonl'}"),
            *(f"--trainer.callbacks+={RECORDING}.FinalState", f"--trainer.callbacks.path={folder / 'final'}"),
        ]
    )
    assert status == 0


@pytest.fixture
def own_memory(memory_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host-memory tier of recipes, which name none themselves, in a folder of this test."""
    monkeypatch.setenv("MOETION_MEMORY_DIR", str(memory_dir))
    return memory_dir


@pytest.mark.parametrize("recipe", ALONE)
def test_recipe_runs_and_its_weights_move(
    recipe: Recipe, own_memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _fit(recipe, tmp_path)
    losses = read_losses(tmp_path / "losses.jsonl")
    values = [float.fromhex(v[-1]) for v in losses.values()]
    assert len(values) >= 6
    assert values[-1] < values[0]
    if not _is_of_ranks(recipe):
        found = [v[-1] for v in losses.values()]
        skipped = check_losses(recipe.name, found, with_transformers="CausalLM" in recipe.path.read_text())
        if skipped:
            pytest.skip(f"the recipe runs, and its losses were not compared: {skipped}")


@pytest.mark.parametrize("recipe", ALONE)
def test_recipe_with_its_callback_equals_the_run_without_any(
    recipe: Recipe, own_memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Capturing changes nothing: not the weights, not the optimizer state, not a single loss."""
    monkeypatch.chdir(tmp_path)
    with_callback, without = tmp_path / "with", tmp_path / "without"
    _fit(recipe, with_callback)
    _fit(recipe, without, "--trainer.callbacks", "null")
    assert compare_states(with_callback / "final", without / "final").differences == ()
    assert compare_losses(with_callback / "losses.jsonl", without / "losses.jsonl").equal


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_explained(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"recipe:{recipe.name}", "--all"]) == 0
    out = capsys.readouterr().out
    tokens = [int(line.split()[-1].replace(",", "")) for line in out.splitlines() if "/expert/" in line]
    model = yaml.safe_load(recipe.path.read_text())["model"]["init_args"]
    layers = model["num_layers"] if "num_layers" in model else model["config"]["num_hidden_layers"]
    assert len(tokens) == layers * 8
    assert sum(tokens) % (8 * 64 * 2 * layers) == 0  # every token of 8 x 64 goes to 2 experts in each layer
    assert sum(tokens) > 0
    assert ("pipeline of 3 ranks, 3 stages" in out) == recipe.name.startswith("pipeline_")


def test_loss_recorder_names_every_sample(tmp_path: Path, own_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = next(r for r in list_recipes() if r.name == "tiny_moe_cpu")
    _fit(recipe, tmp_path, "--trainer.callbacks", "null", steps=3)
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    seen = [sample for line in lines for sample in line["sample_ids"]]
    assert len(seen) == len(set(seen)) == 3 * 8
    assert [line["global_step"] for line in lines] == [1, 2, 3]


def _fit_ranks(
    name: str, folder: Path, ranks: int, launcher: str, zygote: Zygote | None = None, *, callbacks: bool = True
) -> None:
    """Run a recipe of several ranks for 5 steps.

    Args:
        name: Of the recipe.
        folder: For what it writes.
        ranks: How many.
        launcher: Who starts them: ``"launch"``, or nobody but Lightning.
        zygote: It forks them in the launcher's place, or the launcher and them.
        callbacks: Whether the recipe has its own ones.
    """
    folder.mkdir(exist_ok=True)
    config = yaml.safe_load(recipe_path(name).read_text())
    trainer = config["trainer"]
    trainer.update(max_steps=5, logger=False, enable_progress_bar=False, default_root_dir=str(folder))
    trainer["callbacks"] = [
        *(trainer["callbacks"] if callbacks else []),
        {"class_path": f"{RECORDING}.LossRecorder", "init_args": {"path": str(folder / "losses.jsonl")}},
        {"class_path": f"{RECORDING}.FinalState", "init_args": {"path": str(folder / "final")}},
    ]
    if launcher == "launch":
        del trainer["devices"]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    fit = ["-m", "moetion_lightning", "fit", "--config", str(path)]
    if launcher == "launch":
        assert zygote is not None
        command = forked.spec("launch", "--nproc-per-node", ranks, *fit, folder=folder)
        launched = Forked(zygote, command, folder / "log", dict(os.environ))
        try:
            assert launched.wait(180) == 0, (folder / "log").read_text()
        finally:
            launched.kill()
        return
    if zygote is not None:
        logs = [folder / f"log-{rank}" for rank in range(ranks)]
        memory = {"MOETION_MEMORY_DIR": os.environ["MOETION_MEMORY_DIR"]}
        given = [{**environment, **memory} for environment in environments(ranks, name)]
        ended = zygote.run_group([program.spec(folder, *fit)] * ranks, logs, given)
        assert ended.good, "\n".join(log.read_text() for log in logs)
        return
    done = subprocess.run(
        [sys.executable, *fit],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PIPELINES)
def test_pipeline_recipe_equals_the_run_without_callbacks(
    recipe: Recipe, own_memory: Path, tmp_path: Path, zygote: Zygote
) -> None:
    """Capturing windows and logging boundaries changes nothing, under torchrun's rules.

    That it is the same under `moetion launch` is shown in test_demos.py; test_launch_training.py starts torchrun.
    """
    launched, plain = tmp_path / "launched", tmp_path / "plain"
    _fit_ranks(recipe.name, launched, 3, "", zygote)
    _fit_ranks(recipe.name, plain, 3, "", zygote, callbacks=False)
    held = []
    for rank in range(3):
        assert compare_states(launched / f"final-{rank}", plain / f"final-{rank}").differences == ()
        assert compare_losses(launched / f"losses-{rank}.jsonl", plain / f"losses-{rank}.jsonl").equal
        tensors = read_state(launched / f"final-{rank}")[0]
        held.append({name for name in tensors if name.endswith(":exp_avg")})
    assert sum(map(len, held)) == len(set().union(*held)) > 0  # each rank trains its own stage
    values = [float.fromhex(v[-1]) for v in read_losses(launched / "losses-0.jsonl").values()]
    assert len(values) == 5
    assert values[-1] < values[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        ("ddp_moe_cpu", ""),  # Lightning starts the second rank
        ("expert_parallel_moe_cpu", "launch"),
        ("fsdp2_moe_cpu", "forks"),
    ],
)
def test_recipe_of_ranks_runs_on_two(
    name: str, launcher: str, own_memory: Path, tmp_path: Path, zygote: Zygote
) -> None:
    if launcher == "forks":
        _fit_ranks(name, tmp_path, 2, "", zygote)
    else:
        _fit_ranks(name, tmp_path, 2, launcher, zygote if launcher else None)
    losses = [read_losses(tmp_path / f"losses-{rank}.jsonl") for rank in (0, 1)]
    assert [len(found) for found in losses] == [5, 5]
    assert losses[0] != losses[1]  # each rank has its own batches
    sizes = [sum(tensor.numel() for tensor in read_state(tmp_path / f"final-{rank}")[0].values()) for rank in (0, 1)]
    same = compare_states(tmp_path / "final-0", tmp_path / "final-1", ("parameter:",)).equal
    assert same == (name == "ddp_moe_cpu")  # elsewhere each rank holds its own part
    assert sizes[0] == sizes[1]
