"""One run of a Hugging Face Trainer on a tiny Qwen3-MoE, described by plain data. Runs in a child process."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    EarlyStoppingCallback,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from moetion_lightning.integrations.hf_trainer import MoEtionTrainerCallback
from moetion_lightning.testing.compare import flatten_state, write_state
from moetion_lightning.testing.faults import KillAt
from tests.runs.ranks import suffix

DEFAULTS: dict[str, Any] = {
    "accumulate": 2,
    "clip": 0.5,
    "samples": 44,
    "batch_size": 2,
    "epochs": 2,
    "max_steps": -1,
    "augment": False,
    "stream": False,
    "args": {},  # of TrainingArguments
    "scaler": False,
    "overflow_at": 0,
    "early_stopping": False,
    "steering": False,  # a callback keeps what it does in plain attributes
    "resume_from": "",
    "policy_args": {"window": 3},
    "capture": True,
    "break": "",
    "kill": None,
    "seed": 1,
    "job_id": "job",
    "ranks": 1,
}
LENGTH, VOCABULARY = 8, 64
_TIMINGS = ("runtime", "per_second")


def make_model(seed: int = 1) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        attention_dropout=0.1,
        output_router_logits=True,
        tie_word_embeddings=True,
    )
    return Qwen3MoeForCausalLM(config)


class Tokens(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, count: int, augment: bool) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = self.tokens[index].clone()
        if self.augment:  # from three generators, in whichever process loads the batch
            tokens[random.randrange(LENGTH)] = int(np.random.randint(VOCABULARY))
            tokens[int(torch.randint(LENGTH, ()))] = 3
        return {"input_ids": tokens, "labels": tokens}


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.tokens[i] for i in range(len(self.tokens)))


class Steering(TrainerCallback):
    """Changes losses by what it has seen."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)

    def watch(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if module.training:
            output.loss = output.loss * (1 + 0.01 * (sum(self.steps) % 11))
        return output


class Recorder(TrainerCallback):
    """Writes every micro-batch's loss and samples, draws from generators; may kill the process."""

    def __init__(self, path: Path, spec: dict[str, Any]) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._spec = spec
        self._seen: list[dict[str, Any]] = []
        self._step = 0

    def watch(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if module.training:
            self._seen.append({"loss": float(output.loss).hex(), "ids": kwargs["input_ids"].flatten().tolist()})
            if self._spec["overflow_at"] and self._step == self._spec["overflow_at"]:
                output.loss = output.loss * torch.inf
        return output

    def kill(self, hook: str, step: int) -> None:
        kill = self._spec["kill"]
        if kill and kill.get("hook") == hook and kill["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step
        random.random()  # as a user's callback might
        self.kill("step_begin", state.global_step)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kill("substep", state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kill("before_step", state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kill("after_step", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        record = {
            "epoch": int(np.ceil(state.epoch)) - 1,
            "batch": state.global_step,
            "at": state.epoch,
            "micro_batches": self._seen,
            "lr": [float(g["lr"]).hex() for g in kwargs["optimizer"].param_groups],
            "drawn": [random.random(), float(np.random.rand()), float(torch.rand(()))],
        }
        self._seen = []
        os.write(self._file, (json.dumps(record) + "\n").encode())
        self.kill("step_end", state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kill("evaluate", state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kill("saved", state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kill("epoch_end", state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kill("end", 0)


class KilledTrainer(Trainer):
    """May die while it writes a checkpoint."""

    recorder: Recorder

    def _save_rng_state(self, output_dir: str) -> None:
        self.recorder.kill("saving", self.state.global_step)
        super()._save_rng_state(output_dir)


def _callback(spec: dict[str, Any], out: Path) -> list[Any]:
    if not spec["capture"]:
        return []
    given: dict[str, Any] = {
        "memory_dir": spec["memory_dir"],
        "job_id": spec["job_id"],
        "events_path": str(out / "events.jsonl"),
        **spec["policy_args"],
    }
    kill = spec["kill"]
    if kill and "event" in kill:
        given["sinks"] = [KillAt(kill["event"], kill.get("count", 1), kill.get("copies", 0), **kill.get("fields", {}))]
    return [MoEtionTrainerCallback(**given)]


def _make_trainer(spec: dict[str, Any], out: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(out / "output"),
        per_device_train_batch_size=spec["batch_size"],
        gradient_accumulation_steps=spec["accumulate"],
        max_grad_norm=spec["clip"],
        num_train_epochs=spec["epochs"],
        max_steps=spec["max_steps"],
        learning_rate=0.02,
        seed=spec["seed"],
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"lr_scheduler_type": "cosine", "warmup_steps": 5, "logging_steps": 2, "save_strategy": "no", **spec["args"]},
    )
    recorder = Recorder(out / f"steps{spec['suffix']}.jsonl", spec)
    callbacks: list[Any] = [recorder]
    if spec["early_stopping"]:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=5.0))
    steering = Steering()
    if spec["steering"]:
        callbacks.append(steering)
    samples = Tokens(spec["samples"], spec["augment"])
    trainer = KilledTrainer(
        model=make_model(spec["seed"]),
        args=arguments,
        train_dataset=Stream(samples) if spec["stream"] else samples,
        eval_dataset=Tokens(6, augment=False),
        callbacks=[*callbacks, *_callback(spec, out)],
    )
    trainer.recorder = recorder
    if spec["steering"]:
        trainer.model.register_forward_hook(steering.watch, with_kwargs=True)
    trainer.model.register_forward_hook(recorder.watch, with_kwargs=True)
    if spec["scaler"]:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    return trainer


def run(given: dict[str, Any]) -> None:
    spec = {**DEFAULTS, **given}
    out = Path(spec["out"])
    rank = int(os.environ.get("RANK", "0"))
    spec["suffix"] = suffix(rank, spec["ranks"])
    if spec["kill"] and spec["kill"].get("rank", 0) != rank:
        spec["kill"] = None
    if spec["break"]:
        from tests.runs import hf_sabotage

        hf_sabotage.apply(spec["break"])
    set_seed(spec["seed"])
    trainer = _make_trainer(spec, out)
    if spec["ranks"] > 1:  # all ranks seed alike: a rank restored with another one's generators would go unnoticed
        random.seed(rank)
    result = trainer.train(resume_from_checkpoint=spec["resume_from"].format(out=out) or None)
    tensors, scalars = flatten_state(trainer.model, [trainer.optimizer.optimizer])
    history = [{k: v for k, v in line.items() if not k.endswith(_TIMINGS)} for line in trainer.state.log_history]
    scalars |= {
        "history": json.dumps(history),
        "train_loss": result.training_loss.hex(),
        "progress": [trainer.state.global_step, trainer.state.epoch, trainer.state.total_flos],
        "best": [trainer.state.best_metric, str(trainer.state.best_model_checkpoint).replace(str(out), "")],
        "scheduler": repr(trainer.lr_scheduler.state_dict()),
        "scaler": repr(trainer.accelerator.scaler.state_dict()) if spec["scaler"] else "",
        "saved": sorted(path.name for path in (out / "output").glob("checkpoint-*")),
    }
    write_state(out / f"final{spec['suffix']}.safetensors", tensors, scalars)
    if spec["ranks"] > 1:
        torch.distributed.barrier()  # rank 0 serves the store: it is the last one to need it
        torch.distributed.destroy_process_group()
