"""What keeps copies in a job of several ranks, behind one small interface, and the process of one rank.

Every rank is a process of ``replication.py``. It trains a block of steps each time it is told to, and reports.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from _checkpointers import Places, _EveryStep
from _model import dense_bytes, make_loader, make_model
from _timing import HookClock, cpu_seconds
from _trees import tensors_of
from lightning.pytorch import Callback, LightningModule, Trainer

from moetion_lightning.events import Event, WindowCommitted, WindowReplicated

__all__ = ["run_rank"]


@dataclass
class _Copies:
    """A checkpointer.

    Args:
        callbacks: For ``Trainer(callbacks=)``.
        drain: Waits for whatever runs in the background.
        wire_bytes: Bytes that this rank has sent to other ranks so far; None: nobody counts them.
    """

    callbacks: list[Callback] = field(default_factory=list)
    drain: Callable[[], None] = lambda: None
    wire_bytes: Callable[[], int | None] = lambda: 0


class _ReplicaLog:
    """An event sink: what was committed here and what the other ranks hold."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._condition = threading.Condition()
        self._committed = 0
        self._held: dict[int, int] = {}
        self.wire_bytes = 0

    def __call__(self, event: Event) -> None:
        with self._condition:
            if isinstance(event, WindowCommitted):
                self._committed = event.last_iteration
            elif isinstance(event, WindowReplicated):
                self._held[event.owner] = event.last_iteration
                self.wire_bytes += event.nbytes
            self._condition.notify_all()

    def drain(self) -> None:
        """Wait until every replica of the newest committed window is there."""
        with self._condition:
            self._condition.wait_for(
                lambda: sum(last >= self._committed for last in self._held.values()) >= self._replicas, timeout=60
            )


def _ours(replicas: int, args: argparse.Namespace) -> _Copies:
    from moetion_lightning import SparseExpertCheckpoint

    log = _ReplicaLog(replicas)
    callback = SparseExpertCheckpoint(
        window=args.window, memory_dir=str(args.memory), job_id=args.job, sinks=[log], log_metrics=False
    )
    # A label for each process: on one machine there are replicas only between failure domains.
    callback.config = dataclasses.replace(
        callback.config, replicas=replicas, failure_domain=f"domain-{os.environ['RANK']}", interface="127.0.0.1"
    )
    return _Copies([callback], log.drain, lambda: log.wire_bytes)


def _state(trainer: Trainer, module: LightningModule, step: int) -> dict[str, Any]:
    return {"model": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "step": step}


class _Copy(_EveryStep):
    """All state to one buffer in host memory, in the training thread: DLRover's method without DLRover.

    Two buffers in turn, so that one is always whole.
    """

    def __init__(self, places: Places) -> None:
        super().__init__(places, every=1)
        self._buffers: list[torch.Tensor] = []

    def save(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        tensors = tensors_of(_state(trainer, module, step))
        if not self._buffers:
            size = sum(t.numel() * t.element_size() for t in tensors)
            self._buffers = [
                torch.from_file(
                    str(self.places.memory / f"copy-{os.environ['RANK']}-{i}"),
                    shared=True,
                    size=size,
                    dtype=torch.uint8,
                )
                for i in range(2)
            ]
        buffer, offset = self._buffers[step % 2], 0
        for tensor in tensors:
            raw = tensor.detach().reshape(-1).view(torch.uint8)
            buffer[offset : offset + raw.numel()].copy_(raw)
            offset += raw.numel()


class _NVRx(_EveryStep):
    """NVRx's local checkpoints in /dev/shm, synchronous, each replicated to the other rank (a clique of two)."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from _nvrx_state import CPUStateDict
        from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager
        from nvidia_resiliency_ext.checkpointing.local.replication.strategies import CliqueReplicationStrategy

        clique = CliqueReplicationStrategy.from_replication_params(replication_jump=1, replication_factor=2)
        self._manager = LocalCheckpointManager(
            str(self.places.memory), session_id=self.places.job, repl_strategy=clique
        )
        self._state_class = CPUStateDict

    def save(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        self._manager.save(self._state_class(_state(trainer, module, step)), step)


class _DLRover(_EveryStep):
    """DLRover's flash checkpoint to shared memory. Its saver process is a child here, as under plain ``torchrun``.

    Args:
        places: It wants to know a folder on disk.
        shards: Ranks that copy their state: 1 (its default for DDP) or all.
    """

    def __init__(self, places: Places, shards: int) -> None:
        super().__init__(places, every=1)
        self._shards = shards

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType
        from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer

        self._storage = StorageType.MEMORY
        self._checkpointer = DdpCheckpointer(
            str(self.places.disk), local_shard_num=self._shards, global_shard_num=self._shards
        )

    def save(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        self._checkpointer.save_checkpoint(step, _state(trainer, module, step), storage_type=self._storage)


def _make(name: str, args: argparse.Namespace) -> _Copies:
    if name == "none":
        return _Copies()
    if name.startswith("ours-"):
        return _ours(int(name.removeprefix("ours-r")), args)
    places = Places(disk=args.disk, memory=args.memory, job=args.job)
    if name == "copy":
        return _Copies([_Copy(places)])
    if name == "nvrx-clique":
        return _Copies([_NVRx(places, every=1)], wire_bytes=lambda: None)
    shards = 1 if name == "dlrover" else int(os.environ["WORLD_SIZE"])
    return _Copies([_DLRover(places, shards)])


# --- the process of one rank -----------------------------------------------------------------------------------------


class _Blocks:
    """Hands the machine back after each block of steps, and waits for the next order on stdin."""

    def __init__(self, warmup: int, block: int, copies: _Copies, stall: HookClock, report: Callable[..., None]) -> None:
        self._length, self._block = warmup, block
        self._copies, self._stall, self._report = copies, stall, report
        self.trainer: Trainer | None = None
        self._begin()

    def _begin(self) -> None:
        self._seconds: list[float] = []
        self._stalls: list[float] = []
        self._cpu, self._wire = cpu_seconds(), self._copies.wire_bytes()
        self._stalled = self._stall.seconds
        self._started = self._last = time.perf_counter()

    def tick(self) -> None:
        """After each batch."""
        now = time.perf_counter()
        self._seconds.append(now - self._last)
        self._stalls.append(self._stall.seconds - self._stalled)
        self._last, self._stalled = now, self._stall.seconds
        if len(self._seconds) < self._length:
            return
        self._copies.drain()
        wire = self._copies.wire_bytes()
        self._report(
            step_seconds=self._seconds,
            step=statistics.median(self._seconds),
            stall=statistics.median(self._stalls),
            wall=time.perf_counter() - self._started,
            cpu=cpu_seconds() - self._cpu,
            wire=None if wire is None or self._wire is None else wire - self._wire,
        )
        if sys.stdin.readline().strip() != "go":
            assert self.trainer is not None
            self.trainer.should_stop = True
        self._length = self._block
        self._begin()


def run_rank(args: argparse.Namespace) -> None:
    """Train and report until stdin says something other than ``go``."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning", "moetion_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)

    def report(**fields: Any) -> None:
        os.write(args.report, (json.dumps(fields) + "\n").encode())

    copies, stall = _make(args.rank, args), HookClock()
    for callback in copies.callbacks:
        stall.watch(callback)
    module = make_model(args)
    blocks = _Blocks(4 + 2 * args.window, args.block, copies, stall, report)
    module.clock = blocks.tick
    report(parameters=sum(p.numel() for p in module.parameters()), dense_bytes=dense_bytes(module))
    trainer = Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), precision=args.precision,
        strategy="ddp_find_unused_parameters_true",  # in some steps an expert gets no tokens
        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=copies.callbacks, default_root_dir=args.disk,
    )  # fmt: skip
    blocks.trainer = trainer
    trainer.fit(module, make_loader(args))
    if dist.is_initialized():
        dist.destroy_process_group()
