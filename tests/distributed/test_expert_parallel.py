"""Training with experts spread over ranks is the training of one process on the whole batch.

Compared in float64, where another order of summation leaves differences far below the tolerance; bitwise where the same
run is made twice. The ranks run this file as a script; one start serves all cases of one world size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.runs.ranks import free_port

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("expert_parallel")]  # one start serves many tests

WIDTH, SYMBOLS = 8, 16
SAMPLES = 64
GLOBAL_BATCH = 8


class Expert(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class FusedExperts(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up = nn.Parameter(torch.randn(num_experts, WIDTH, 2 * WIDTH) * 0.3)
        self.down = nn.Parameter(torch.randn(num_experts, 2 * WIDTH, WIDTH) * 0.3)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            rows, place = torch.where(top_k_index == expert)
            hidden = F.gelu(hidden_states[rows] @ self.up[expert]) @ self.down[expert]
            result = result.index_add(0, rows, (hidden * top_k_weights[rows, place, None]).to(result.dtype))
        return result


class Block(nn.Module):
    """Routes every token that is not symbol 0, which stands for padding."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        num_experts = case.get("num_experts", 4)
        self.gate = nn.Linear(WIDTH, num_experts, bias=False)
        self.fused = case["kind"] == "fused"
        self.experts = FusedExperts(num_experts) if self.fused else nn.ModuleList(Expert() for _ in range(num_experts))
        self.usable = case.get("usable", num_experts)

    def forward(self, x: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = x.reshape(-1, WIDTH)
        kept = real.reshape(-1).nonzero().squeeze(-1)
        weights, ids = self.gate(tokens[kept])[:, : self.usable].softmax(-1).topk(2, -1)
        if self.fused:
            mixed = self.experts(tokens[kept], ids, weights)
            return torch.zeros_like(tokens).index_add(0, kept, mixed.to(tokens.dtype)).view_as(x), {}
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, place = torch.where(ids == index)
            if rows.numel():
                result = expert(tokens[kept[rows]]).mul_(weights[rows, place, None])
                out = out.index_add(0, kept[rows], result.to(out.dtype))
        return out.view_as(x), {"weights": weights.detach()}


class Model(pl.LightningModule):
    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.case = case
        self.automatic_optimization = not case.get("manual", False)
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.blocks = nn.ModuleList(Block(case) for _ in range(2))
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def loss(self, tokens: Tensor) -> Tensor:
        x, real = self.embed(tokens), tokens > 0
        for norm, block in zip(self.norms, self.blocks):
            if self.case.get("checkpointing"):
                x = x + checkpoint(lambda h, b=block: b(h, real)[0], norm(x), use_reentrant=False)
            else:
                x = x + block(norm(x), real)[0]
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.roll(-1, 1).flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss / 2)
            if batch_idx % 2:
                torch.nn.utils.clip_grad_norm_(self.parameters(), 0.2)
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.dim() > 1]
        rest = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": rest, "weight_decay": 0.0}, {"params": matrices[::-1]}]
        return torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1)


def make_data(case: dict[str, Any]) -> TensorDataset:
    tokens = torch.randint(1, SYMBOLS, (SAMPLES, 6), generator=torch.Generator().manual_seed(1))
    if case.get("padded"):
        tokens[1::2] = 0  # the odd samples are the batches of rank 1 of 2
    return TensorDataset(tokens)


def fit(case: dict[str, Any], out: Path, world: int, checkpoints: Path | None = None) -> Any:
    """Train; write an ordinary checkpoint."""
    pl.seed_everything(case.get("seed", 0) + int(os.environ.get("RANK", 0)), verbose=False)
    model = Model(case)
    if "precision" not in case:
        model.double()  # Lightning would convert it only after it has loaded a checkpoint
    strategy: Any = "auto"
    if world > 1:
        from moetion_lightning.strategies import MoEtionStrategy

        # A rank without any real token has no gradient for its gate: as under DDP, that must be announced.
        options = {"find_unused_parameters": True} if case.get("padded") else {}
        strategy = MoEtionStrategy(expert_parallel_size=case["ep"], process_group_backend="gloo", **options)
    manual = case.get("manual", False)
    data = make_data(case)
    callbacks = [Rebuild()] if case.get("rebuild") else []
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, precision=case.get("precision", "64-true"),
        max_steps=case.get("steps", 4), accumulate_grad_batches=1 if manual else 2, callbacks=callbacks,
        gradient_clip_val=None if manual else 0.2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=1, num_sanity_val_steps=1,
        use_distributed_sampler=False,
    )  # fmt: skip
    # Every rank's batch is a part of the batch of one process; Lightning's own sampler would shuffle.
    sampler = DistributedSampler(data, world, int(os.environ.get("RANK", 0)), shuffle=False) if world > 1 else None
    loaders = [DataLoader(data, batch_size=GLOBAL_BATCH // world, sampler=sampler) for _ in range(2)]
    resume = str((checkpoints or out.parent) / f"{case['resume']}.ckpt") if "resume" in case else None
    trainer.fit(model, *loaders, ckpt_path=resume)
    trainer.save_checkpoint(out.with_suffix(".ckpt"))
    torch.save(
        {
            "local": model.state_dict(),
            "replicas": {n: strategy.replica_ranks(n) for n, _ in model.named_parameters()} if world > 1 else {},
        },
        out.with_suffix(f".rank{os.environ.get('RANK', 0)}"),
    )
    return model


class Rebuild(pl.Callback):
    """Destroys all process groups between two steps, as after a lost rank, and makes them again."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index != 4:
            return
        dist = torch.distributed
        rank, world = dist.get_rank(), dist.get_world_size()
        store = dist.PrefixStore("generation1", dist.distributed_c10d._get_default_store())
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        trainer.strategy.rebuild_groups()  # type: ignore[attr-defined]


COMMON = {"kind": "list"}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "list-ep1": {**COMMON, "ep": 1},
        "list-ep2": {**COMMON, "ep": 2},
        "fused-ep2": {"kind": "fused", "ep": 2},
        "fused-ep1": {"kind": "fused", "ep": 1},
        "unused-ep2": {**COMMON, "ep": 2, "usable": 2},
        "unused-ep1": {**COMMON, "ep": 1, "usable": 2},
        "fused-unused-ep2": {"kind": "fused", "ep": 2, "usable": 2},
        "padded-ep2": {**COMMON, "ep": 2, "padded": True},
        "padded-fused-ep2": {"kind": "fused", "ep": 2, "padded": True},
        "checkpointing-ep2": {**COMMON, "ep": 2, "padded": True, "checkpointing": True},
        "manual-ep2": {**COMMON, "ep": 2, "manual": True},
        "half-ep1": {**COMMON, "ep": 1, "steps": 2},
        "resumed-ep2": {**COMMON, "ep": 2, "resume": "half-ep1"},
        "half-fused-ep2": {"kind": "fused", "ep": 2, "steps": 2},
        "resumed-fused-ep1": {"kind": "fused", "ep": 1, "resume": "half-fused-ep2"},
        "bf16-ep2": {**COMMON, "ep": 2, "precision": "bf16-mixed"},
        "again-a": {**COMMON, "ep": 2, "precision": "32-true"},
        "again-b": {**COMMON, "ep": 2, "precision": "32-true"},
        "rebuilt": {**COMMON, "ep": 2, "precision": "32-true", "rebuild": True},
    },
    4: {
        "list-ep2": {**COMMON, "ep": 2},
        "list-ep4": {**COMMON, "ep": 4},
        "uneven-ep4": {**COMMON, "ep": 4, "num_experts": 6},
        "unused-ep2": {**COMMON, "ep": 2, "usable": 2},
        "fused-uneven-ep2": {"kind": "fused", "ep": 2, "num_experts": 5},
        "manual-ep2": {**COMMON, "ep": 2, "manual": True},
    },
}
BITWISE = ("again-a", "again-b", "rebuilt")
EXACT = [(w, n) for w, cases in CASES.items() for n in cases if n not in (*BITWISE, "bf16-ep2")]


def launch(world: int, folder: Path, arguments: list[str]) -> None:
    """Run this file once a rank, as a launcher for elastic training would."""
    port, root = free_port(), Path(__file__).resolve().parents[2]
    processes = []
    for rank in range(world):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "GROUP_RANK": "0",
            "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        with (folder / f"log{rank}").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(folder), *arguments], env=environment, stdout=log, stderr=log
                )
            )
    try:
        codes = [process.wait(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"log{rank}").read_text()[-3000:] for rank in range(world))
    assert codes == [0] * world, logs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of the finished runs of a world size."""
    done: dict[int, Path] = {}

    def of(world: int) -> Path:
        if world not in done:
            done[world] = tmp_path_factory.mktemp(f"world{world}")
            launch(world, done[world], [json.dumps(CASES[world])])
        return done[world]

    return of


def reference(case: dict[str, Any], folder: Path, checkpoints: Path) -> dict[str, Any]:
    """The checkpoint of one process, which resumes from the ranks' checkpoint where they did."""
    fit(case, folder / "single", 1, checkpoints)
    result: dict[str, Any] = torch.load(folder / "single.ckpt", weights_only=False)
    return result


def assert_close(actual: Any, expected: Any, where: str = "", **tolerance: float) -> None:
    """Tensors close, everything else equal, with the same names in the same order."""
    if isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key in expected:
            assert_close(actual[key], expected[key], f"{where}/{key}", **tolerance)
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for index, value in enumerate(expected):
            assert_close(actual[index], value, f"{where}/{index}", **tolerance)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, msg=lambda m: f"{where}: {m}", **tolerance)
    else:
        assert actual == expected, where


@pytest.mark.parametrize(("world", "name"), EXACT)
def test_training_equals_that_of_one_process(world: int, name: str, runs: Any, tmp_path: Path) -> None:
    expected = reference(CASES[world][name], tmp_path, runs(world))
    actual = torch.load(runs(world) / f"{name}.ckpt", weights_only=False)
    # float64: summation order leaves about 1e-15, which Adam's division may enlarge.
    assert_close(actual["state_dict"], expected["state_dict"], rtol=1e-8, atol=1e-10)
    assert_close(actual["optimizer_states"], expected["optimizer_states"], rtol=1e-6, atol=1e-10)


def test_two_runs_are_bitwise_equal_and_rebuilt_groups_change_nothing(runs: Any) -> None:
    first, second, rebuilt = (torch.load(runs(2) / f"{name}.ckpt", weights_only=False) for name in BITWISE)
    for other in (second, rebuilt):
        assert_close(other["state_dict"], first["state_dict"], rtol=0, atol=0)
        assert_close(other["optimizer_states"], first["optimizer_states"], rtol=0, atol=0)


def test_mixed_precision_stays_near_one_process(runs: Any, tmp_path: Path) -> None:
    expected = reference(CASES[2]["bf16-ep2"], tmp_path, runs(2))
    actual = torch.load(runs(2) / "bf16-ep2.ckpt", weights_only=False)
    # Four Adam steps of 3e-3: bfloat16 may turn the sign of a small gradient, and with it a step.
    assert_close(actual["state_dict"], expected["state_dict"], rtol=0, atol=1.3e-2)
    close = [
        torch.isclose(actual["state_dict"][n], t, atol=2e-3).float().mean() for n, t in expected["state_dict"].items()
    ]
    assert torch.stack(close).mean() > 0.9


def test_replica_ranks_hold_equal_tensors_and_each_rank_only_its_experts(runs: Any) -> None:
    saved = [torch.load(runs(4) / f"list-ep2.rank{rank}", weights_only=False) for rank in range(4)]
    for rank, one in enumerate(saved):
        experts = {name.split(".")[3] for name in one["local"] if ".experts." in name}
        assert experts == ({"0", "1"} if rank % 2 == 0 else {"2", "3"})
        for name, ranks in one["replicas"].items():
            assert ranks == ((rank % 2, rank % 2 + 2) if ".experts." in name else (0, 1, 2, 3)), name
            for other in ranks:
                assert torch.equal(saved[other]["local"][name], one["local"][name]), name


def main(folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    for name, case in cases.items():
        fit(case, folder / name, int(os.environ["WORLD_SIZE"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
