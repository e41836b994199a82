"""`moetion export`: what killed runs left becomes checkpoints, equal to what the runs themselves would have saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from moetion_lightning.cli import main
from moetion_lightning.storage.lock import JobLock
from moetion_lightning.testing.compare import flatten_state, read_state
from tests.runs import loops
from tests.runs.data import Samples, make_loader
from tests.runs.drill import Drill, Zygote, read_logs, start
from tests.runs.models import Automatic
from tests.runs.references import References
from tests.runs.scenario import DEFAULTS

LOG: dict[str, Any] = {"policy": "gradient_log", "policy_args": {"window": 4}}
ONE: dict[str, Any] = {"block": "fused", "precision": "bf16-mixed", "samples": 40, "epochs": 1, **LOG}  # 10 iterations
EMA: dict[str, Any] = {"block": "list", "samples": 40, "epochs": 1, "callbacks": ["ema", "history"], **LOG}
SCALED: dict[str, Any] = {
    "block": "list",
    "precision": "16-mixed",
    "optimizer": "adamw_fused",
    "clip": 0,
    "samples": 40,
    "epochs": 1,
    **LOG,
}
MANUAL: dict[str, Any] = {"block": "list", "manual": True, "samples": 40, "epochs": 1, **LOG}
LION: dict[str, Any] = {"block": "dense", "optimizer": "lion", "samples": 40, "epochs": 1, **LOG}
DENSE: dict[str, Any] = {
    "block": "list",
    "optimizer": "sgd",
    "samples": 40,
    "epochs": 1,
    "policy": "dense",
    "policy_args": {},
}
DDP: dict[str, Any] = {"block": "fused", "ranks": 2, "samples": 80, "epochs": 1, **LOG}
FSDP2: dict[str, Any] = {"block": "fused", "ranks": 2, "strategy": "fsdp2", "samples": 80, "epochs": 1, **LOG}
PARTIAL: dict[str, Any] = {**DENSE, "policy": "partial", "policy_args": {"num_experts_per_checkpoint": 1}}
EXPERTS: dict[str, Any] = {**DDP, "strategy": "moetion", "expert_parallel_size": 2}
SPARSE: dict[str, Any] = {
    "block": "fused",
    "samples": 40,
    "epochs": 1,
    "policy": "sparse",
    "policy_args": {"window": 4},
}


@dataclass(frozen=True)
class Left:
    """What a killed run left.

    Args:
        spec: The run.
        job: Its folder in memory.
        iteration: An iteration that all ranks have.
        kept: Folder of the run that never failed, with its state after that iteration.
    """

    spec: dict[str, Any]
    job: Path
    iteration: int
    kept: Path


Leave = Callable[[dict[str, Any]], Left]


@pytest.fixture(scope="module")
def leave(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, references: References) -> Iterator[Leave]:
    """Runs a spec until it is killed in its tenth iteration; each once."""
    known: dict[str, Left] = {}
    base = tmp_path_factory.mktemp("export")
    drill = Drill(zygote, base, base, references)

    def run(spec: dict[str, Any]) -> Left:
        key = json.dumps(spec, sort_keys=True)
        if key not in known:
            out = drill._directory("killed")
            memory = out / "memory"
            memory.mkdir(mode=0o700)
            least = 4 if spec["policy"] != "gradient_log" else 6 if spec.get("manual") else 9
            kill = {"hook": "backward", "step": 9, "committed": {"last_iteration": least}}
            ended = drill.start({**spec, "memory_dir": str(memory), "kill": kill}, out)
            assert ended.codes[0] == -9, read_logs(out)
            ranks = [memory / "job" / f"rank-{rank:05d}" / "windows" for rank in range(spec.get("ranks", 1))]
            iteration = max(set.intersection(*({int(p.stem) for p in w.glob("*.json")} for w in ranks)))
            kept = drill.reference({**spec, "keep_at": iteration})
            known[key] = Left(spec, memory / "job", iteration, kept)
        return known[key]

    yield run
    shutil.rmtree(base, ignore_errors=True)


def _export(left: Left, to: Path, *more: str) -> Path:
    assert main(["export", str(left.job), "--to", str(to), "--iteration", str(left.iteration), *more]) == 0
    return to


def _assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal bit for bit, all through."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor), where
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(ours.cpu(), theirs.cpu()), where
    elif isinstance(theirs, dict):
        assert set(ours) == set(theirs), where
        for key, value in theirs.items():
            _assert_same(ours[key], value, f"{where}.{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, value in enumerate(theirs):
            _assert_same(ours[index], value, f"{where}.{index}")
    else:
        assert ours == theirs, where


def _module(spec: dict[str, Any]) -> Automatic:
    return Automatic({**DEFAULTS, **spec})


def _trainer(folder: Path, **more: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given: dict[str, Any] = {"enable_checkpointing": False, "default_root_dir": folder, "accelerator": "cpu", **quiet}
    return pl.Trainer(**{**given, "num_sanity_val_steps": 0, "max_epochs": 3, **more})


@pytest.mark.parametrize(
    "spec",
    [ONE, EMA, SCALED, MANUAL, DENSE, DDP, EXPERTS],
    ids=["fused-bf16", "ema", "scaled", "manual", "dense", "ddp", "experts"],
)
def test_checkpoint_is_what_lightning_would_save(leave: Leave, spec: dict[str, Any], tmp_path: Path) -> None:
    left = leave(spec)
    path = _export(left, tmp_path / "exported.ckpt")
    assert path.stat().st_mode & 0o777 == 0o600
    ours = torch.load(path, weights_only=True)
    theirs = torch.load(left.kept / "kept.ckpt", weights_only=False)
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    for key in set(theirs) - {"loops"}:
        _assert_same(ours[key], theirs[key], key)


def test_trainer_goes_on_from_it(leave: Leave, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = leave(ONE)
    path = _export(left, tmp_path / "exported.ckpt")
    batches = left.iteration % 10
    assert f"{batches} batches of the epoch consumed, {4 * batches} samples" in capsys.readouterr().out
    loader = make_loader("shuffle", Samples(40, augment=False), 4)

    class Look(pl.Callback):
        seen: tuple[int, int, dict[str, Any]] | None = None

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if self.seen is None:
                tensors = {k: v.clone() for k, v in flatten_state(module, trainer.optimizers)[0].items()}
                self.seen = trainer.global_step, batch_idx, tensors

    look = Look()
    trainer = _trainer(tmp_path, callbacks=[look], precision="bf16-mixed")
    trainer.fit(_module(ONE), loader, loader, ckpt_path=path)
    assert look.seen is not None
    step, batch, tensors = look.seen
    assert (step, batch) == (left.iteration, left.iteration % 10)
    assert trainer.global_step == 30
    _assert_same(tensors, read_state(left.kept / "kept.safetensors")[0])

    loaded = Automatic.load_from_checkpoint(path, spec={**DEFAULTS, **ONE})
    _assert_same(dict(loaded.state_dict()), torch.load(path, weights_only=True)["state_dict"])
    assert _trainer(tmp_path).validate(_module(ONE), loader, ckpt_path=path, verbose=False)


def test_every_iteration_that_is_there(leave: Leave, zygote: Zygote, references: References, tmp_path: Path) -> None:
    """Two ranks keep several, as they need not be equally far."""
    left = leave(DDP)
    drill = Drill(zygote, tmp_path, tmp_path, references)
    there = [{int(p.stem) for p in rank.glob("windows/*.json")} for rank in sorted(left.job.glob("rank-*"))]
    common = sorted(set.intersection(*there))
    assert common
    for iteration in common[-2:]:
        kept = drill.reference({**DDP, "keep_at": iteration})
        path = _export(Left(DDP, left.job, iteration, kept), tmp_path / f"{iteration}.ckpt")
        ours, theirs = torch.load(path), torch.load(kept / "kept.ckpt", weights_only=False)
        for key in ("state_dict", "optimizer_states"):
            _assert_same(ours[key], theirs[key], key)


def _shards(left: Left) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the ranks held, joined along dimension 0, and the names of what is not cut."""
    first, second = (read_state(left.kept / f"kept-{rank}.safetensors")[0] for rank in range(2))
    cut = {k: torch.cat([v, second[k]]) for k, v in first.items() if not k.startswith("buffer:") and v.dim()}
    return cut, {k: v for k, v in first.items() if k not in cut}


def test_shards_of_two_ranks_are_joined(leave: Leave, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = leave(FSDP2)
    checkpoint = torch.load(_export(left, tmp_path / "exported.ckpt"))
    assert "rank 1 holds other values of the buffers body.batch_norm.running_mean" in capsys.readouterr().out
    module = _module(FSDP2)
    optimizer = module.configure_optimizers()["optimizer"]
    module.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    tensors, _ = flatten_state(module, [optimizer])
    cut, whole = _shards(left)
    _assert_same(tensors, {**cut, **whole})


@pytest.mark.parametrize("spec", [FSDP2, DDP], ids=["fsdp2", "ddp"])
def test_distributed_checkpoint_is_loaded_by_one_process(leave: Leave, spec: dict[str, Any], tmp_path: Path) -> None:
    left = leave(spec)
    folder = _export(left, tmp_path / "exported", "--format", "dcp")
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    module = _module(spec)
    optimizer = module.configure_optimizers()["optimizer"]
    model_state, optimizer_state = get_state_dict(module, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    state_dict_loader.load(state, checkpoint_id=folder, no_dist=True)
    set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    tensors, _ = flatten_state(module, [optimizer])
    if spec is FSDP2:
        cut, whole = _shards(left)
        _assert_same(tensors, {**cut, **whole})
    else:
        _assert_same(tensors, read_state(left.kept / "kept-0.safetensors")[0])


def test_distributed_checkpoint_is_loaded_by_two_ranks(leave: Leave, zygote: Zygote, tmp_path: Path) -> None:
    left = leave(FSDP2)
    folder = _export(left, tmp_path / "exported", "--format", "dcp")
    start(zygote, {**FSDP2, "runner": "tests.runs.sharded_load", "folder": str(folder)}, tmp_path, 60.0)
    for rank in range(2):
        loaded, _ = read_state(tmp_path / f"loaded-{rank}.safetensors")
        kept, _ = read_state(left.kept / f"kept-{rank}.safetensors")
        of_rank_0, _ = read_state(left.kept / "kept-0.safetensors")
        _assert_same(loaded, {**kept, **{k: v for k, v in of_rank_0.items() if k.startswith("buffer:")}})


def test_safetensors_hold_the_weights(leave: Leave, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = leave(ONE)
    folder = _export(left, tmp_path / "weights")
    said = capsys.readouterr().out
    assert "not in it: the optimizers' state" in said
    note = json.loads((folder / "moetion_export.json").read_text())
    assert note["iteration"] == left.iteration
    assert note["tied"] == {"body.head.weight": "body.embed.weight"}
    theirs = torch.load(left.kept / "kept.ckpt", weights_only=False)["state_dict"]
    assert set(theirs) - {"body.head.weight"} == set(load_file(folder / "model.safetensors"))
    _assert_same(load_file(folder / "model.safetensors"), {k: v for k, v in theirs.items() if k != "body.head.weight"})


def test_plain_loop_gives_a_plain_checkpoint(
    zygote: Zygote, references: References, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drill = Drill(zygote, tmp_path, tmp_path, references)
    spec = {"runner": "tests.runs.loops", "block": "fused", "second_optimizer": True, "samples": 40, **LOG}
    memory = tmp_path / "memory"
    memory.mkdir(mode=0o700)
    kill = {"hook": "backward", "step": 20, "committed": {"last_iteration": 20}}
    ended = drill.start({**spec, "memory_dir": str(memory), "kill": kill}, tmp_path)
    assert ended.codes == [-9], read_logs(tmp_path)
    assert main(["export", "job", "--memory-dir", str(memory), "--to", str(tmp_path / "plain.pt")]) == 0
    assert "a plain checkpoint (not of Lightning)" in capsys.readouterr().out
    checkpoint = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert checkpoint["iteration"] == 20
    module, optimizers, _, _ = loops._pieces({**loops.DEFAULTS, **spec})
    module.load_state_dict(checkpoint["model"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    reference = drill.reference({**spec, "epochs": 2})
    _assert_same(flatten_state(module, optimizers)[0], read_state(reference / "final.safetensors")[0])


# --- what is refused -------------------------------------------------------------------------------------------------


def _refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert main(["export", *args]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_optimizers_of_others_are_imported_only_if_allowed(
    leave: Leave, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = leave(LION)
    told = _refused(capsys, str(left.job), "--to", str(tmp_path / "x.ckpt"))
    assert "lion_pytorch.lion_pytorch.Lion is none of torch.optim" in told
    assert "--allow lion_pytorch.lion_pytorch.Lion" in told
    assert list(tmp_path.iterdir()) == []
    path = _export(left, tmp_path / "x.ckpt", "--allow", "lion_pytorch.lion_pytorch.Lion")
    ours, theirs = torch.load(path), torch.load(left.kept / "kept.ckpt", weights_only=False)
    _assert_same(ours["optimizer_states"], theirs["optimizer_states"])


def _copy(left: Left, tmp_path: Path) -> Path:
    job = tmp_path / "copy" / "job"
    shutil.copytree(left.job, job)
    return job


def test_flipped_byte_is_refused(leave: Leave, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = _copy(leave(ONE), tmp_path)
    manifest = json.loads(max(job.glob("rank-00000/windows/*.json")).read_text())
    name = next(iter(manifest["extra"]["log"][-1]["gradients"][0].values()))
    file = job / "rank-00000" / "files" / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    told = _refused(capsys, str(job), "--to", str(tmp_path / "x.ckpt"))
    assert name in told
    assert "checksum" in told
    assert not (tmp_path / "x.ckpt").exists()


def test_missing_rank_is_refused(leave: Leave, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = _copy(leave(DDP), tmp_path)
    shutil.rmtree(job / "rank-00001")
    told = _refused(capsys, str(job), "--to", str(tmp_path / "x.ckpt"))
    assert "the windows of rank 1 of 2 are not here" in told


def test_copy_that_another_rank_keeps_takes_its_place(leave: Leave, tmp_path: Path) -> None:
    left = leave(DDP)
    job = _copy(left, tmp_path)
    (job / "rank-00001").rename(job / "replica-00001-at-00000")
    path = _export(Left(DDP, job, left.iteration, left.kept), tmp_path / "x.ckpt")
    _assert_same(torch.load(path)["state_dict"], torch.load(left.kept / "kept.ckpt", weights_only=False)["state_dict"])


def test_memory_of_a_live_job_is_refused(leave: Leave, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = _copy(leave(ONE), tmp_path)
    lock = JobLock(job / "rank-00000")
    lock.acquire()
    try:
        assert "a live process trains there" in _refused(capsys, str(job), "--to", str(tmp_path / "x.ckpt"))
    finally:
        lock.release()


@pytest.mark.parametrize("form", ["rank", "manifest", "base", "url", "remote"])
def test_whatever_names_the_job(leave: Leave, tmp_path: Path, form: str) -> None:
    left = leave(ONE)
    named = {
        "rank": left.job / "rank-00000",
        "manifest": left.job / "rank-00000" / "windows" / f"{left.iteration:012d}.json",
        "base": left.job.parent,
        "url": f"file://{left.job}",
        "remote": "memory://exported/job",
    }
    if form == "remote":
        fsspec.filesystem("memory").put(str(left.job), "/exported/job", recursive=True)
    assert main(["export", str(named[form]), "--to", str(tmp_path / "x.ckpt")]) == 0
    _assert_same(torch.load(tmp_path / "x.ckpt")["global_step"], left.iteration)


def test_rank_of_another_run_is_refused(leave: Leave, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, left = _copy(leave(FSDP2), tmp_path), leave(DDP)
    shutil.rmtree(job / "rank-00001")
    shutil.copytree(left.job / "rank-00001", job / "rank-00001")
    told = _refused(capsys, str(job), "--to", str(tmp_path / "x.ckpt"))
    assert "another course of training" in told or "no iteration is there of all ranks" in told


def test_sparse_window_is_refused(leave: Leave, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = _refused(capsys, str(leave(SPARSE).job), "--to", str(tmp_path / "x.ckpt"))
    assert "is sparse" in told
    assert "Start the training script again" in told
    assert "GradientLogCheckpoint" in told


def test_partial_experts_are_refused(leave: Leave, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = _refused(capsys, str(leave(PARTIAL).job), "--to", str(tmp_path / "x.ckpt"))
    assert "is LOSSY" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "x.ckpt", "--format", "dcp"], "is of folders"),
        (["--to", "model.safetensors"], "are written into a folder"),
    ],
)
def test_targets_of_another_kind_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in _refused(capsys, "job", *arguments)


def test_iterations_that_are_not_there_are_listed(
    leave: Leave, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = leave(ONE)
    told = _refused(capsys, str(left.job), "--to", str(tmp_path / "x.ckpt"), "--iteration", "3")
    assert f"rank 0: {left.iteration}" in told


def test_existing_targets_are_replaced_only_by_force(
    leave: Leave, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left, mine = leave(ONE), tmp_path / "mine"
    path = _export(left, tmp_path / "x.ckpt")
    assert "--force" in _refused(capsys, str(left.job), "--to", str(path))
    _export(left, path, "--force")
    folder = _export(left, tmp_path / "weights")
    _export(left, folder, "--force")
    mine.mkdir()
    (mine / "work").touch()
    assert "is not replaced" in _refused(capsys, str(left.job), "--to", str(mine), "--force")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "weights", "x.ckpt"]
