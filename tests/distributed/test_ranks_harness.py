"""The runs of several ranks that other tests kill and compare: deterministic, sharded, and ended as a whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from moetion_lightning.testing.compare import read_state
from tests.runs.drill import Drill, Zygote, differences, read_logs, read_steps, replica_differences
from tests.runs.ranks import environments

pytestmark = pytest.mark.slow

DDP2: dict[str, Any] = {"ranks": 2, "strategy": "ddp", "block": "list"}
DDP3: dict[str, Any] = {"ranks": 3, "strategy": "ddp", "block": "fused", "samples": 30}
FSDP2: dict[str, Any] = {"ranks": 2, "strategy": "fsdp2", "block": "list"}
FSDP3: dict[str, Any] = {"ranks": 3, "strategy": "fsdp2", "block": "fused", "samples": 30}
EXPERT_PARALLEL: dict[str, Any] = {"ranks": 2, "strategy": "moetion", "expert_parallel_size": 2, "block": "fused"}
ALL = pytest.mark.parametrize(
    "spec", [DDP2, DDP3, FSDP2, FSDP3, EXPERT_PARALLEL], ids=["ddp2", "ddp3", "fsdp2-2", "fsdp2-3", "moetion"]
)


def _again(drill: Drill, spec: dict[str, Any], **changes: Any) -> Path:
    out = _directory(drill, "again")
    ended = drill.start({**spec, "capture": False, **changes}, out)
    assert ended.good, f"{ended}\n{read_logs(out)}"
    return out


@ALL
def test_two_runs_are_equal_bit_for_bit(drill: Drill, spec: dict[str, Any]) -> None:
    reference = drill.reference(spec)
    assert len(list(reference.glob("final-*.safetensors"))) == spec["ranks"]
    assert differences(reference, _again(drill, spec)) == []


@ALL
def test_ranks_share_each_epoch_and_see_every_sample_once(drill: Drill, spec: dict[str, Any]) -> None:
    reference = drill.reference(spec)
    epochs: dict[int, list[int]] = {}
    for rank in range(spec["ranks"]):
        for (epoch, _), records in read_steps(reference, rank).items():
            (record,) = records
            epochs.setdefault(epoch, []).extend(i for ids in record["ids"] for i in ids)
    assert len(epochs) == 3
    assert all(sorted(ids) == list(range(spec.get("samples", 28))) for ids in epochs.values())
    assert epochs[0] != epochs[1]


@ALL
def test_ranks_draw_differently(drill: Drill, spec: dict[str, Any]) -> None:
    steps = [read_steps(drill.reference(spec), rank) for rank in range(spec["ranks"])]
    for generator in ("python", "numpy", "torch"):
        assert len({rank[0, 0][0][generator] for rank in steps}) == spec["ranks"]


@pytest.mark.parametrize("spec", [DDP2, DDP3], ids=["ddp2", "ddp3"])
def test_replicas_end_equal(drill: Drill, spec: dict[str, Any]) -> None:
    assert replica_differences(drill.reference(spec)) == []


def test_sharded_state_is_written_by_shard(drill: Drill) -> None:
    for spec, rows in ((FSDP2, [16, 16]), (FSDP3, [11, 11, 10])):
        for rank, count in enumerate(rows):
            tensors, _ = read_state(drill.reference(spec) / f"final-{rank}.safetensors")
            assert tensors["parameter:body.embed.weight"].shape == (count, 16)
            assert tensors["optimizer:0:body.embed.weight:exp_avg"].shape == (count, 16)
    # Four experts over three ranks: the last one has none of them.
    assert tensors["parameter:body.blocks.0.experts.up"].shape == (0, 16, 32)


def test_sharded_training_computes_what_replicated_training_does(drill: Drill) -> None:
    spec = {"ranks": 2, "block": "fused"}
    ddp, fsdp2 = (read_steps(drill.reference({**spec, "strategy": s}), 1) for s in ("ddp", "fsdp2"))
    assert ddp.keys() == fsdp2.keys()
    for key, (record,) in ddp.items():
        losses = float.fromhex(record["loss"]), float.fromhex(fsdp2[key][0]["loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # summed in another order


def test_a_difference_on_any_rank_is_found(drill: Drill) -> None:
    reference, other = drill.reference(DDP2), drill.base / "changed"
    for rank in (0, 1):
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(reference, other)
        path = other / f"steps-{rank}.jsonl"
        first, *rest = path.read_text().splitlines()
        record = json.loads(first)
        record["ids"][0].reverse()
        path.write_text("\n".join([json.dumps(record), *rest]) + "\n")
        (found,) = differences(reference, other)
        assert found.startswith(f"rank {rank}: micro-batch (0, 0)")
        path.unlink()
        assert differences(reference, other) != []


def test_another_seed_is_found_on_all_ranks(drill: Drill) -> None:
    found = differences(drill.reference(DDP2), _again(drill, DDP2, seed=2))
    assert {sentence.split(":")[0] for sentence in found} == {"rank 0", "rank 1"}


@pytest.mark.parametrize(
    ("spec", "hook"),
    [(DDP2, "backward"), (DDP2, "validation"), (FSDP2, "before_step"), (FSDP2, "batch_end")],
    ids=["ddp-backward", "ddp-validation", "fsdp2-before_step", "fsdp2-batch_end"],
)
def test_a_killed_rank_ends_its_group(drill: Drill, spec: dict[str, Any], hook: str) -> None:
    step = 4 if hook == "validation" else 3
    out = _directory(drill, "killed")
    ended = drill.start(
        {**spec, "capture": False, "epochs": 10**6, "kill": {"hook": hook, "step": step, "rank": 1}}, out
    )
    assert ended.codes[1] == -signal.SIGKILL
    assert ended.codes[0] in (-signal.SIGKILL, 1)  # 1: it noticed before it was killed
    assert 1 in ended.failed
    assert not ended.timed_out
    assert list(out.glob("final-*")) == []
    assert len(read_steps(out, 1)) == (4 if hook == "validation" else 3)


def test_a_killed_run_is_started_again_until_it_completes(drill: Drill) -> None:
    kills = [{"hook": "backward", "step": 3, "rank": 1}, {"hook": "batch_end", "step": 6}]
    killed = drill.killed({**DDP2, "capture": False}, kills)  # without capture each start begins anew
    assert differences(drill.reference(DDP2), killed) == []
    assert [len(read_steps(killed, 0)[0, batch]) for batch in (0, 1, 2)] == [3, 3, 3]


def test_data_workers_of_killed_ranks_end(drill: Drill) -> None:
    out = _directory(drill, "workers")
    kill = {"hook": "batch_end", "step": 2, "rank": 1}
    ended = drill.start({**DDP2, "capture": False, "loader": "persistent", "epochs": 10**6, "kill": kill}, out)
    assert 1 in ended.failed
    _, alive = psutil.wait_procs(_writing_below(out), timeout=2.0)
    assert alive == []


def test_a_rank_with_an_error_ends_its_group(drill: Drill) -> None:
    out = _directory(drill, "error")
    spec = {**DDP2, "out": str(out), "capture": False}
    specs = [spec, {**spec, "strategy": "nonsense"}]
    ended = drill.zygote.run_group(specs, [out / "log-0", out / "log-1"], environments(2, "job"))
    assert ended.codes == [-signal.SIGKILL, 1]
    assert ended.failed == [1]
    assert "nonsense" in read_logs(out)


def test_a_group_that_takes_too_long_is_ended(drill: Drill) -> None:
    out = _directory(drill, "slow")
    ended = drill.start({**DDP2, "capture": False, "epochs": 10**6}, out, timeout_seconds=2.0)
    assert ended.timed_out
    assert ended.failed == []
    assert ended.codes == [-signal.SIGKILL, -signal.SIGKILL]
    assert _writing_below(out) == []


@pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed"])
def test_no_rank_outlives_who_started_it(tmp_path: Path, killed: bool) -> None:
    zygote = Zygote()
    spec = {**DDP2, "out": str(tmp_path), "capture": False, "epochs": 10**6}
    zygote.send([spec, spec], [tmp_path / "log-0", tmp_path / "log-1"], environments(2, "job"), 60.0)
    deadline = time.monotonic() + 30.0
    while not all((tmp_path / f"steps-{rank}.jsonl").exists() for rank in range(2)):
        assert time.monotonic() < deadline, read_logs(tmp_path)
        time.sleep(0.02)
    ranks = _writing_below(tmp_path)
    assert len(ranks) == 2
    if killed:
        os.kill(zygote.pid, signal.SIGKILL)
    zygote.close()
    _, alive = psutil.wait_procs(ranks, timeout=5.0)
    assert alive == []


def _directory(drill: Drill, name: str) -> Path:
    out = drill.base / name
    out.mkdir()
    return out


def _writing_below(directory: Path) -> list[psutil.Process]:
    """Processes that have a file below the directory open: ranks and their workers have their log."""
    found = []
    for process in psutil.process_iter():
        try:
            paths = [file.path for file in process.open_files()]
        except psutil.Error:  # it ended meanwhile
            continue
        if any(path.startswith(str(directory)) for path in paths):
            found.append(process)
    return found
