"""Every checkpointer that is measured, behind one small interface. Peers are imported only where they are used."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _names import OURS
from _timing import CaptureLog, HookClock, folder_bytes
from _trees import tensors_of
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

__all__ = ["Checkpointer", "Places", "make", "window_of"]


@dataclass(frozen=True)
class Places:
    """Where a checkpointer may write: a folder on disk, one in host memory; and the identity of the job."""

    disk: Path
    memory: Path
    job: str


@dataclass
class Checkpointer:
    """What a Trainer needs, and what is measured.

    Args:
        callbacks: For ``Trainer(callbacks=)``.
        plugins: For ``Trainer(plugins=)``.
        drain: Waits for whatever runs in the background.
        bytes_per_iteration: Bytes saved per iteration, known after some iterations.
        ckpt_path: What a restart gives to ``trainer.fit(ckpt_path=)``.
        restored_step: Optimizer steps that a restart has behind it already, where Lightning does not know it.
        log: Captures of ours.
    """

    callbacks: list[Callback] = field(default_factory=list)
    plugins: list[Any] = field(default_factory=list)
    drain: Callable[[], None] = lambda: None
    bytes_per_iteration: Callable[[], float] = lambda: 0.0
    ckpt_path: Callable[[], Path | None] = lambda: None
    restored_step: Callable[[], int] = lambda: 0
    log: CaptureLog | None = None


# --- ours ------------------------------------------------------------------------------------------------------------


def _ours(kind: str, places: Places, every: int, clock: HookClock, sinks: list[Any]) -> Checkpointer:
    from moetion_lightning import DenseInMemoryCheckpoint, GradientLogCheckpoint, SparseExpertCheckpoint

    log = CaptureLog(clock)
    common: dict[str, Any] = {"memory_dir": str(places.memory), "job_id": places.job, "sinks": [log, *sinks]}
    window = window_of(kind)
    if window is None:
        callback: Callback = DenseInMemoryCheckpoint(every_n_steps=every, **common)
    elif kind.startswith("log-"):
        callback = GradientLogCheckpoint(window=window, **common)
    else:
        callback = SparseExpertCheckpoint(window=window, **common)
    return Checkpointer(
        callbacks=[callback],
        drain=log.drain,
        bytes_per_iteration=lambda: _mean_of_whole_windows(log, window if kind.startswith("log-") else None),
        log=log,
    )


def window_of(name: str) -> Any:
    """The window of one of ours: a number, "auto", or None for those without."""
    if not name.startswith(("sparse-", "log-")):
        return None
    choice = name.partition("-")[2]
    return choice if choice == "auto" else int(choice.removeprefix("w"))


def _mean_of_whole_windows(log: CaptureLog, length: int | None) -> float:
    """Of a gradient log, whose restore points are of one iteration each, ``length`` is that of a round."""
    if not log.windows or not log.nbytes:
        return 0.0
    first, last = log.windows[-1]
    length = last - first + 1 if length is None else length
    newest = log.nbytes[: len(log.nbytes) // length * length][-length:]
    return sum(newest) / max(1, len(newest))


# --- files -----------------------------------------------------------------------------------------------------------


class _EveryStep(Callback):
    """Saves after every ``every``-th optimizer step, with a function that subclasses give."""

    def __init__(self, places: Places, every: int) -> None:
        self.places = places
        self.every = every
        self.saved = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self.save(trainer, pl_module, trainer.global_step)
            self.saved += 1

    def save(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        raise NotImplementedError


class _TorchSave(_EveryStep):
    """``torch.save`` of weights and optimizer state in the training thread, under a temporary name first."""

    def save(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        target = self.places.disk / "state.pt"
        partial = target.with_suffix(".partial")
        torch.save(
            {"model": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "step": step}, partial
        )
        partial.replace(target)


def _torch_save(kind: str, places: Places, every: int, clock: HookClock, sinks: list[Any]) -> Checkpointer:
    return Checkpointer(
        callbacks=[_TorchSave(places, every)], bytes_per_iteration=lambda: folder_bytes(places.disk) / every
    )


def _model_checkpoint(kind: str, places: Places, every: int, clock: HookClock, sinks: list[Any]) -> Checkpointer:
    # monitor="step" keeps the newest one only; save_last would write each file twice.
    saver = ModelCheckpoint(
        dirpath=places.disk, every_n_train_steps=every, save_top_k=1, monitor="step", mode="max", filename="{step}"
    )
    made = Checkpointer(
        callbacks=[saver],
        bytes_per_iteration=lambda: _newest_bytes(places.disk) / every,
        ckpt_path=lambda: _newest(places.disk),
    )
    if kind == "lightning-async":
        plugin = _OneInFlight()
        made.plugins, made.drain = [plugin], plugin.wait
    return made


class _OneInFlight(AsyncCheckpointIO):
    """AsyncCheckpointIO without its unbounded queue, which keeps one clone of all state per waiting save."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.wait()
        super().save_checkpoint(*args, **kwargs)

    def wait(self) -> None:
        if self._executor is not None:
            self._executor.submit(lambda: None).result()


def _newest(folder: Path) -> Path | None:
    return max(folder.glob("*.ckpt"), key=lambda p: p.stat().st_mtime, default=None)


def _newest_bytes(folder: Path) -> int:
    newest = _newest(folder)
    return 0 if newest is None else newest.stat().st_size


class _DistributedAsync(_EveryStep):
    """``torch.distributed.checkpoint.async_save`` on a thread, one at a time.

    Staging is waited for before the next optimizer step: an unfinished one would tear. Only ``.metadata`` says that a
    folder is complete.
    """

    def __init__(self, places: Places, every: int) -> None:
        super().__init__(places, every)
        self._pending: Any = None
        self._folder: Path | None = None
        self._previous: Path | None = None
        self.offset = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self._group = dist.new_group(backend="gloo")
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
            )
        )
        self._load(trainer, pl_module)

    def _load(self, trainer: Trainer, module: LightningModule) -> None:
        import torch.distributed.checkpoint as dcp

        whole = [p.parent for p in self.places.disk.glob("step-*/.metadata")]
        newest = max(whole, key=lambda p: int(p.name.removeprefix("step-")), default=None)
        if newest is None:
            return
        optimizer = trainer.optimizers[0]
        for parameter in module.parameters():  # an empty step makes the state that is loaded into
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        state = self._state(trainer, module, 0)
        dcp.load(state, checkpoint_id=newest, process_group=self._group)
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        self.offset = int(state["step"])

    def _state(self, trainer: Trainer, module: LightningModule, step: int) -> dict[str, Any]:
        return {
            "model": module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "step": torch.tensor(step),
        }

    def save(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self.wait()
        self._folder = self.places.disk / f"step-{self.offset + step}"
        self._pending = dcp.async_save(
            self._state(trainer, module, self.offset + step),
            checkpoint_id=self._folder,
            process_group=self._group,
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
            async_stager=self._stager,
        )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        staging = getattr(self._pending, "staging_completion", None)
        if isinstance(staging, Future):
            staging.result()

    def wait(self) -> None:
        if self._pending is None:
            return
        upload = getattr(self._pending, "upload_completion", self._pending)
        upload.result()
        self._pending = None
        if self._previous is not None and self._previous != self._folder:
            shutil.rmtree(self._previous, ignore_errors=True)
        self._previous = self._folder

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.wait()
        self._stager.close()


def _distributed_async(kind: str, places: Places, every: int, clock: HookClock, sinks: list[Any]) -> Checkpointer:
    saver = _DistributedAsync(places, every)

    def size() -> float:
        folder = saver._previous or saver._folder
        return folder_bytes(folder) / every if folder is not None else 0.0

    return Checkpointer(
        callbacks=[saver], drain=saver.wait, bytes_per_iteration=size, restored_step=lambda: saver.offset
    )


class _Accelerate(_EveryStep):
    """accelerate's ``save_state``, with automatic names and two kept."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from accelerate import Accelerator
        from accelerate.utils import ProjectConfiguration

        configuration = ProjectConfiguration(
            project_dir=str(self.places.disk), automatic_checkpoint_naming=True, total_limit=2
        )
        self._accelerator = Accelerator(cpu=True, project_config=configuration)
        # Registered as its own `prepare` would do, but not wrapped: Lightning trains them.
        self._accelerator._models.append(pl_module)
        self._accelerator._optimizers.append(trainer.optimizers[0])

    def save(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        self._accelerator.save_state()


def _accelerate(kind: str, places: Places, every: int, clock: HookClock, sinks: list[Any]) -> Checkpointer:
    def size() -> float:
        folders = sorted((places.disk / "checkpoints").glob("*"))
        return folder_bytes(folders[-1]) / every if folders else 0.0

    return Checkpointer(callbacks=[_Accelerate(places, every)], bytes_per_iteration=size)


class _DLRover(_EveryStep):
    """DLRover's flash checkpoint to shared memory. Its saver process is a child here, as under plain ``torchrun``."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        import torch.distributed as dist
        from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType
        from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer

        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
            os.environ.setdefault(name, str(value))
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self._storage = StorageType.MEMORY
        self._checkpointer = DdpCheckpointer(str(self.places.disk), local_shard_num=1, global_shard_num=1)

    def save(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        state = {"model": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "step": step}
        self._checkpointer.save_checkpoint(step, state, storage_type=self._storage)
        self.nbytes = sum(t.numel() * t.element_size() for t in tensors_of(state))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        close = getattr(self._checkpointer, "close", None)
        if close is not None:
            close()


class _NVRx(_EveryStep):
    """NVIDIA's local checkpoints in /dev/shm, synchronous, without replication (its own state dict is CUDA only)."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        import torch.distributed as dist
        from _nvrx_state import CPUStateDict
        from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self._manager = LocalCheckpointManager(str(self.places.memory), session_id=self.places.job)
        self._state_class = CPUStateDict

    def save(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        state = {"model": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "step": step}
        self._manager.save(self._state_class(state), step)
        self.nbytes = folder_bytes(self.places.memory)


def _memory_peer(kind: str, places: Places, every: int, clock: HookClock, sinks: list[Any]) -> Checkpointer:
    saver = (_DLRover if kind == "dlrover" else _NVRx)(places, every)
    return Checkpointer(callbacks=[saver], bytes_per_iteration=lambda: getattr(saver, "nbytes", 0) / every)


# --- all -------------------------------------------------------------------------------------------------------------

_BUILDERS: dict[str, Callable[..., Checkpointer]] = {
    "none": lambda *args: Checkpointer(),
    "torch-save": _torch_save,
    "lightning": _model_checkpoint,
    "lightning-async": _model_checkpoint,
    "dcp": _distributed_async,
    "accelerate": _accelerate,
    "dlrover": _memory_peer,
    "nvrx": _memory_peer,
    **dict.fromkeys(("dense", *OURS), _ours),
}


def make(
    name: str, places: Places, *, every: int = 1, clock: HookClock | None = None, sinks: list[Any] | None = None
) -> Checkpointer:
    """Build a checkpointer by name."""
    for folder in (places.disk, places.memory):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return _BUILDERS[name](name, places, every, clock or HookClock(), sinks or [])
