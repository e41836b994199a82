"""Exact sparse checkpointing of Lightning Fabric loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from moetion_lightning.core.instance_patches import InstancePatches
from moetion_lightning.distributed.torchrun import separate_restarts
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.integrations._parts import Parts
from moetion_lightning.integrations._run import Run
from moetion_lightning.integrations.loop import GuidedLoop, beginning_of

__all__ = ["FabricCheckpointing"]

_STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy"}


class FabricCheckpointing(GuidedLoop):
    """A callback for ``Fabric(callbacks=[...])`` that captures a Fabric loop and recovers it bit for bit.

    ::

        run = FabricCheckpointing(window=8)
        fabric = Fabric(callbacks=[run])
        fabric.launch()
        model, optimizer = fabric.setup(model, optimizer)
        loader = fabric.setup_dataloaders(loader)
        run.track(optimizer, scheduler=scheduler)
        for step, batch in run.steps(loader, epochs=3):
            ...
        run.close()

    Fabric tells a callback of modules, not of optimizers: hence :meth:`track`. A window that was found is put in place
    when the loop begins, over whatever ``fabric.load`` has loaded before; ``resume="never"`` prefers that. Call neither
    ``fabric.save`` while :attr:`replaying`, nor ``fabric.load`` inside the loop.

    Ranks: all of them, in the same order. With ``strategy="ddp"`` or ``ModelParallelStrategy`` (FSDP2).

    Args:
        **settings: As of ``SparseExpertCheckpoint``, see :meth:`~moetion_lightning.session.SessionSettings.read`.

    Raises:
        ConfigurationError: A setting is unknown or out of range.
    """

    _remedy = "give it to Fabric(callbacks=[...]), and call fabric.setup() first"

    def __init__(self, **settings: Any) -> None:
        where = type(self).__name__
        separate_restarts()
        self._fabric: Any = None
        self._modules: list[nn.Module] = []
        self._optimizers: list[Any] = []
        self._schedulers: list[Any] = []
        self._patches = InstancePatches()
        super().__init__(settings, where)

    # --- hooks of Fabric -----------------------------------------------------------------------------------------

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:
        """Fabric has set a module up."""
        if self._opened is not None and self._opened.begun:
            raise ConfigurationError("fabric.setup() after the loop has begun: set all modules up before run.steps()")
        if fabric is not self._fabric:
            self._adopt(fabric)
        self._modules.append(module)

    def _adopt(self, fabric: Any) -> None:
        names = {kind.__name__ for kind in type(fabric.strategy).__mro__}
        if fabric.world_size > 1 and not names & _STRATEGIES:
            raise ConfigurationError(
                f"Fabric(strategy=...) is {type(fabric.strategy).__name__} with {fabric.world_size} processes: "
                'expected DDPStrategy ("ddp") or ModelParallelStrategy (FSDP2).'
            )
        self._fabric = fabric
        original = fabric.backward

        def backward(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            self.record_loss(tensor)
            original(tensor, *args, **kwargs)

        self._patches.put(fabric, "backward", backward)

    @property
    def _run(self) -> Run:
        """The run; it is opened when it is asked for first: by then the modules have their weights."""
        self._open_late()
        return super()._run

    def _open_late(self) -> None:
        if self._opened is None and self._modules:
            parts = self._parts_so_far()
            self._open(Path.cwd(), parts.module, beginning_of(parts) if parts.optimizers else {})

    # --- what a script calls -------------------------------------------------------------------------------------

    def track(self, *optimizers: Optimizer, scheduler: Any = None) -> None:
        """Say what else trains: after ``fabric.setup``.

        Args:
            *optimizers: All optimizers, as ``fabric.setup`` returned them.
            scheduler: Learning-rate scheduler, or several.
        """
        self._optimizers += optimizers
        several = scheduler if isinstance(scheduler, (list, tuple)) else [scheduler]
        self._schedulers += [one for one in several if one is not None]

    def close(self, *, completed: bool = True) -> None:
        """See :meth:`GuidedLoop.close`."""
        self._patches.undo()
        super().close(completed=completed)

    # --- inside --------------------------------------------------------------------------------------------------

    def _parts(self) -> Parts:
        where = self._where
        if not self._optimizers:
            raise ConfigurationError(
                f"{where} knows no optimizer: call run.track(optimizer, scheduler=...) after fabric.setup()"
            )
        return self._parts_so_far()

    def _parts_so_far(self) -> Parts:
        modules = self._modules[0] if len(self._modules) == 1 else self._modules
        scaler = getattr(self._fabric.strategy.precision, "scaler", None)
        return Parts.of(modules, self._where, self._optimizers, self._schedulers, scaler)

    def _autocast(self) -> bool:
        return type(self._fabric.strategy.precision).__name__ == "MixedPrecision"
