"""Exact sparse checkpointing of Accelerate loops."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moetion_lightning.core.instance_patches import InstancePatches
from moetion_lightning.core.step_hooks import hook_steps
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.integrations._other_loaders import OtherLoader
from moetion_lightning.integrations._parts import Parts, unwrap_optimizer
from moetion_lightning.integrations.loop import GuidedLoop, beginning_of

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["AcceleratedLoop", "attach"]

_log = logging.getLogger(__name__)
_KINDS = {"NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU", "FSDP"}


def attach(accelerator: Accelerator, **settings: Any) -> AcceleratedLoop:
    """Capture the loop of an accelerator's script, and recover it bit for bit after a failure.

    ::

        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        run = moetion_lightning.attach(accelerator, window=8)
        for step, batch in run.steps(loader, epochs=3):
            with accelerator.accumulate(model):
                ...
        accelerator.end_training()

    Models, optimizers, schedulers, the scaler and what ``register_for_checkpointing`` was given are found by
    themselves. Only a loop over ``run.steps(loader)`` can be taken to where it was, so only there state is captured and
    put back; a script without it trains, saves and loads as if nothing were attached.

    Other prepared loaders (evaluation) give after a failure what they would have given, too. A warning names those of
    which that cannot be said.

    ``accelerator.load_state(folder)`` before the loop wins over a window that was found: the script has chosen that
    state, and says where it stands: ``run.start_at(step, loader)``. ``if not run.resuming:`` before both takes the
    window, which is newer. Folders that were saved without this package load as usual, and folders that are saved with
    it hold nothing of it. While steps are done again to make the state whole, ``save_state`` writes nothing: it did so
    when they were done first. ``end_training`` closes the run.

    Ranks: all of them together, after ``prepare``. DDP or FSDP2, started by ``torchrun`` or ``accelerate launch``.

    Args:
        accelerator: The accelerator; everything that trains is prepared.
        **settings: As of ``SparseExpertCheckpoint``, see :meth:`~moetion_lightning.session.SessionSettings.read`.

    Returns:
        The run: its ``steps``, ``epochs``, ``register`` and ``close``.

    Raises:
        ConfigurationError: Nothing is prepared, a setting is wrong, or the state is laid out in a way that is not known
            (DeepSpeed, Megatron-LM, FSDP1, tensor or context parallel, XLA).
        StoreError, HostMemoryError, JobBusyError, CorruptSnapshotError, VersionError: See the message.
    """
    return AcceleratedLoop(accelerator, settings)


class AcceleratedLoop(GuidedLoop):
    """See :func:`attach`.

    Args:
        accelerator: The accelerator.
        settings: Keyword settings.
    """

    def __init__(self, accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
        super().__init__(settings, "attach(accelerator)")
        self._accelerator: Any = accelerator
        self._patches = InstancePatches()
        self._warning: list[Any] = []
        _check(self._accelerator)
        parts = self._parts_so_far()
        self._open(self._accelerator.project_dir or Path.cwd(), parts.module, beginning_of(parts))
        self._patch()

    def close(self, *, completed: bool = True) -> None:
        """See :meth:`GuidedLoop.close`."""
        self._patches.undo()
        self._stop_warning()
        super().close(completed=completed)

    # --- inside --------------------------------------------------------------------------------------------------

    def _parts_so_far(self) -> Parts:
        accelerator, models = self._accelerator, self._accelerator._models
        modules = models[0] if len(models) == 1 else models
        return Parts.of(modules, self._where, accelerator._optimizers, accelerator._schedulers, accelerator.scaler)

    def _parts(self) -> Parts:
        accelerator, where = self._accelerator, self._where
        self._stop_warning()
        parts = self._parts_so_far()
        parts.add_all("custom", accelerator._custom_objects, where)
        parts.add("accelerator", _Counters(accelerator), where)
        return parts

    def _autocast(self) -> bool:
        return bool(self._accelerator.native_amp)

    def _find_others(self, followed: Sequence[Any]) -> Callable[[], Mapping[str, OtherLoader]]:
        return functools.partial(_prepared_loaders, self._accelerator, followed)

    def _patch(self) -> None:
        accelerator = self._accelerator
        backward, save, load, end = (
            accelerator.backward, accelerator.save_state, accelerator.load_state, accelerator.end_training,
        )  # fmt: skip
        point = self._run.point
        since = None if point is None else point.captured_at

        def backward_and_record(loss: Tensor, **kwargs: Any) -> None:
            self.record_loss(loss)
            backward(loss, **kwargs)

        def save_state(output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
            project = accelerator.project_configuration
            folder = None
            if project.automatic_checkpoint_naming:
                folder = Path(accelerator.project_dir, "checkpoints", f"checkpoint_{project.iteration}")
            if self.replaying:
                _log.info("%s is not written: this step is done again, and was saved before", folder or output_dir)
                project.iteration += 1
                return folder or output_dir
            if folder is not None and since is not None:
                _remove_undone(folder, since, accelerator)
            return save(output_dir, *args, **kwargs)

        def load_state(input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
            self._run.prefer(f"accelerator.load_state({input_dir!r})")
            self._position.load({"step": 0, "epoch": 0})
            load(input_dir, *args, **kwargs)

        def end_training() -> None:
            self.close()
            end()

        self._patches.put(accelerator, "backward", backward_and_record)
        self._patches.put(accelerator, "save_state", save_state)
        self._patches.put(accelerator, "load_state", load_state)
        self._patches.put(accelerator, "end_training", end_training)
        raw = [unwrap_optimizer(optimizer) for optimizer in accelerator._optimizers]
        self._warning = [handle for optimizer in raw for handle in hook_steps(optimizer, after=self._warn)]

    def _warn(self, *args: Any) -> None:
        self._stop_warning()
        _log.warning(
            "attach(accelerator): the script trains in a loop that is not over run.steps(dataloader), so nothing is "
            "captured. Write `for step, batch in run.steps(dataloader, epochs=...):`."
        )

    def _stop_warning(self) -> None:
        for handle in self._warning:
            handle.remove()
        self._warning = []


def _check(accelerator: Any) -> None:
    if not all(hasattr(accelerator, name) for name in ("distributed_type", "prepare", "_models", "_dataloaders")):
        raise ConfigurationError(
            f"attach({type(accelerator).__name__}): expected an accelerate.Accelerator. Make one, prepare() the model, "
            "optimizer and dataloaders with it, and give it to attach()."
        )
    kind = str(accelerator.distributed_type.value)
    fsdp1 = kind == "FSDP" and not accelerator.is_fsdp2
    plan = getattr(accelerator, "parallelism_config", None)
    spread = plan is not None and (plan.tp_enabled or plan.cp_enabled)
    if kind not in _KINDS or fsdp1 or spread:
        shown = "FSDP1" if fsdp1 else "tensor or context parallel" if spread else kind
        raise ConfigurationError(
            f"attach(accelerator) with {shown}: expected one process, DDP or FSDP2 (fsdp_version=2), whose state is "
            "laid out over the ranks in a known way."
        )
    if not accelerator._models or not accelerator._optimizers:
        raise ConfigurationError(
            f"attach(accelerator): {len(accelerator._models)} models and {len(accelerator._optimizers)} optimizers are "
            "prepared. Call attach() after accelerator.prepare(model, optimizer, ...)."
        )


def _remove_undone(folder: Path, since: float, accelerator: Any) -> None:
    """A folder of a step that is done again would be refused as existing already, whole or not."""
    if accelerator.is_main_process and folder.is_dir() and folder.stat().st_mtime >= since:
        _log.info("%s is written again: it may be incomplete", folder)
        shutil.rmtree(folder)
    accelerator.wait_for_everyone()


class _Counters:
    """What an accelerator counts and decides beside its objects.

    Args:
        accelerator: The accelerator.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, Any]:
        accelerator = self._accelerator
        return {
            "step": accelerator.step,
            "sync_gradients": accelerator.sync_gradients,
            "saved": accelerator.project_configuration.iteration,
            "skipped": [bool(optimizer.step_was_skipped) for optimizer in accelerator._optimizers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        accelerator = self._accelerator
        accelerator.step = state["step"]
        accelerator.gradient_state._set_sync_gradients(state["sync_gradients"])
        accelerator.project_configuration.iteration = state["saved"]
        for optimizer, skipped in zip(accelerator._optimizers, state["skipped"]):
            optimizer._is_overflow = skipped


def _prepared_loaders(accelerator: Any, followed: Sequence[Any]) -> dict[str, OtherLoader]:
    """Prepared loaders but for those that are followed, by their place: Accelerate orders a pass by its number."""
    found = {}
    for index, loader in enumerate(accelerator._dataloaders):
        if hasattr(loader, "base_dataloader") and not any(loader is known for known in followed):
            found[f"prepared loader {index} ({type(loader).__name__})"] = OtherLoader(
                loader,
                loader.base_dataloader,
                counter="iteration",
                under_way=functools.partial(_is_under_way, accelerator, loader),
            )
    return found


def _is_under_way(accelerator: Any, loader: Any) -> bool:
    """Whether a pass over a prepared loader was begun, and has not come to its end."""
    return any(loader is known for known in accelerator.gradient_state.dataloader_references)
