"""Runs the same training as a pipeline and as one process; one start of all ranks serves many cases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from tests.runs.decoder import Decoder
from tests.runs.models import make_optimizer
from tests.runs.scenario import DEFAULTS

VOCABULARY, LENGTH = 32, 5
EPOCH = 2  # steps

COMMON: dict[str, Any] = {
    "model": "decoder",
    "num_microbatches": 4,
    "micro_batch_size": 2,
    "steps": 2 * EPOCH,
    "accumulate": 1,
    "clip": 0.5,
    "precision": "32-true",
    "optimizer": "adamw",
    "dropout": 0.0,
    "plain": True,  # compare with one process that knows nothing of pipelines
    "ragged": False,
    "evaluate": False,  # validate, keep the best, test and predict
}


def hugging_face(name: str, aux: bool) -> Any:
    import transformers as hf

    common = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16, "tie_word_embeddings": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    experts = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.02, "output_router_logits": aux}
    if name == "mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(**common, **experts, num_local_experts=4))
    if name == "qwen3_moe":
        return hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(**common, **experts, num_experts=4, moe_intermediate_size=16, head_dim=8)
        )
    if name == "olmoe":
        return hf.OlmoeForCausalLM(hf.OlmoeConfig(**common, **experts, num_experts=4))
    if name == "gpt_oss":
        return hf.GptOssForCausalLM(hf.GptOssConfig(**common, **experts, num_local_experts=4, head_dim=8))
    if name == "deepseek_v3":
        return hf.DeepseekV3ForCausalLM(
            hf.DeepseekV3Config(
                **common, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
                n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8,
                qk_rope_head_dim=8, v_head_dim=8,
            )
        )  # fmt: skip
    if name == "t5":
        config = hf.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2,
            dropout_rate=0.0, decoder_start_token_id=0, tie_word_embeddings=False,
        )  # fmt: skip
        return hf.T5ForConditionalGeneration(config)
    raise ValueError(name)


class LabelledModel(pl.LightningModule):
    """A model of transformers that computes its own loss from labels; written as for one process."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.case = case
        self.model = hugging_face(case["model"], case.get("aux", False))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens = batch[0]
        if self.case.get("padded"):
            mask = torch.ones_like(tokens)
            mask[:, -1] = 0
            labels = tokens.masked_fill(mask == 0, -100)
            loss = self.model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        else:
            loss = self.model(input_ids=tokens, labels=tokens).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(input_ids=batch[0], labels=batch[0]).loss)

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.case["optimizer"], self.parameters(), 1e-2)


class Tokens(Decoder):
    """The hand-written decoder, with metrics of every kind."""

    def __init__(self, case: dict[str, Any]) -> None:
        given = {"block": "list", "scheduler": "warmup", "optimizer": case["optimizer"], "dropout": case["dropout"]}
        more = {k: case[k] for k in ("tied", "frozen_front", "num_layers", "block") if k in case}
        super().__init__({**DEFAULTS, "num_layers": 4, "lr": 1e-2, **given, **more})
        self.seen = MeanMetric()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        loss = self.loss({"tokens": batch[0], "target": batch[0].sum(-1) % 32})
        self.log("train_loss", loss, prog_bar=True)
        return {"loss": loss}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = self.loss({"tokens": batch[0], "target": batch[0].sum(-1) % 32})
        self.seen(loss, batch[0].shape[0])
        self.log_dict({"val_loss": loss, "val_seen": self.seen})

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss({"tokens": batch[0], "target": batch[0].sum(-1) % 32}))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Any]:
        x = self.body.embed(batch[0]) + self.body.positions
        for layer in self.body.layers:
            x, _ = layer(x, torch.zeros(5, 5))
        return {"ids": self.body.head(self.body.norm(x)).argmax(-1), "of": batch_idx}


def data(case: dict[str, Any]) -> TensorDataset:
    per_step = case["num_microbatches"] * case["micro_batch_size"] * case["accumulate"] * case.get("dp", 1)
    count = per_step * EPOCH - (case["micro_batch_size"] if case["ragged"] else 0)
    tokens = torch.randint(3, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return TensorDataset(tokens)


def module_of(case: dict[str, Any]) -> pl.LightningModule:
    pl.seed_everything(3, verbose=False)
    return Tokens(case) if case["model"] == "decoder" else LabelledModel(case)


def precision(case: dict[str, Any]) -> dict[str, Any]:
    if case["precision"] != "16-mixed":
        return {"precision": case["precision"]}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def fit(given: dict[str, Any], out: Path, world: int, checkpoints: Path | None = None, *, plain: bool = False) -> Any:
    """Train; write an ordinary checkpoint and what the trainer and its loggers know.

    Args:
        given: The case.
        out: Path of the results, without suffix.
        world: Ranks of this job.
        checkpoints: Where checkpoints that a case resumes from are.
        plain: One process without our strategy, on the micro-batches.
    """
    from moetion_lightning.strategies import MoEtionStrategy

    case = {**COMMON, **given}
    size, dp = case["num_microbatches"], case.get("dp", 1)
    module, dataset = module_of(case), data(case)
    batch_size = case["micro_batch_size"] * (1 if plain else size)
    rank = int(os.environ.get("RANK", 0))
    strategy: Any = "auto"
    if not plain:
        names = ("schedule", "chunks_per_rank", "layers", "balance")
        options = {k: case[k] for k in names if k in case} if world > 1 else {}
        strategy = MoEtionStrategy(
            pipeline_parallel_size=world // dp, num_microbatches=size, process_group_backend="gloo", **options
        )
    saving = [ModelCheckpoint(out.parent / out.name, monitor="val_loss", save_last=True)] if case["evaluate"] else []
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_steps=case["steps"], callbacks=saving,
        enable_checkpointing=bool(saving),
        accumulate_grad_batches=case["accumulate"] * (size if plain else 1), gradient_clip_val=case["clip"],
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1,
        use_distributed_sampler=False, log_every_n_steps=1, default_root_dir=out.parent, **precision(case),
    )  # fmt: skip
    # Replicas take turns: their micro-batches in a row are those of one process.
    block = size * case["micro_batch_size"]
    sampler = [i for i in range(len(dataset)) if i // block % dp == rank % dp] if dp > 1 else None
    train = DataLoader(dataset, batch_size=batch_size, sampler=sampler)
    val = DataLoader(TensorDataset(dataset.tensors[0][:7]), batch_size=4)
    resume = str((checkpoints or out.parent) / f"{case['resume']}.ckpt") if "resume" in case else None
    trainer.fit(module, train, val, ckpt_path=resume)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    trainer.save_checkpoint(out.with_suffix(".ckpt"))
    results: dict[str, Any] = {
        "metrics": metrics,
        "best": [Path(checkpoint.best_model_path).name for checkpoint in saving],
        "elements": sum(p.untyped_storage().nbytes() // p.element_size() for p in module.parameters()),
        "scale": getattr(getattr(trainer.precision_plugin, "scaler", None), "_scale", None),
    }
    if case["evaluate"]:
        results["test"] = trainer.test(module, val, verbose=False)
        results["predictions"] = trainer.predict(module, val)
    torch.save(results, out.with_suffix(f".rank{rank}"))
    return module


def run(spec: dict[str, Any]) -> None:
    """All cases of one world size."""
    for name, case in spec["cases"].items():
        fit(case, Path(spec["out"]) / name, spec["ranks"])
    torch.distributed.barrier()  # rank 0 serves the store: it is the last one to need it
    torch.distributed.destroy_process_group()
