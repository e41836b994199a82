"""How a ``fit`` of Lightning begins."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from moetion_lightning.session.beginning import (
    Beginning,
    of_attributes,
    of_checkpoint,
    of_function,
    of_loaders,
    of_module,
    plain,
)
from moetion_lightning.session.lineage import MOVING_CHECKPOINTS

__all__ = ["FitCall", "of_trainer"]

_LIMITS = ("max_epochs", "max_steps", "min_epochs", "min_steps")
_TRAINER = (*_LIMITS, "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision")


@dataclass(frozen=True, kw_only=True)
class FitCall:
    """The checkpoint of a call of ``trainer.fit``: what was asked for, and the file that stands for it.

    Args:
        given: The argument ``ckpt_path``, as text.
        path: The file that Lightning will restore; also one that it has chosen by itself.
    """

    given: str | None = None
    path: str | None = None

    @classmethod
    def of(cls, trainer: Trainer) -> FitCall:
        """Read it off the call that is under way: Lightning keeps what it resolved only, and only later."""
        given = path = None
        for frame in _frames():
            if frame.f_locals.get("self") is not trainer:
                continue
            if frame.f_code.co_name == "_run":
                path = frame.f_locals.get("ckpt_path")
            elif frame.f_code.co_name == "fit":
                given = frame.f_locals.get("ckpt_path")
                break
        return cls(given=None if given is None else str(given), path=None if path is None else str(path))

    def is_of_the_run(self, began: float) -> bool:
        """Whether the checkpoint is most likely one that this run has written itself: the newest of its folder.

        Args:
            began: When the run began, seconds since the epoch.
        """
        if self.given not in (None, *MOVING_CHECKPOINTS) or self.path is None or not os.path.exists(self.path):
            return False
        return os.stat(self.path).st_mtime >= began

    @property
    def shown(self) -> str:
        """What messages call it."""
        if self.given is None:
            return f"{self.path!r}, which Lightning has chosen by itself,"
        return f"trainer.fit(ckpt_path={self.given!r})"


def of_trainer(trainer: Trainer, module: LightningModule, call: FitCall) -> Beginning:
    """What is known of a fit when its weights exist, and neither optimizers nor loaders do."""
    settings = {name: getattr(trainer, name) for name in _TRAINER}
    attributes = of_attributes(module, module.hparams)
    data = getattr(trainer, "datamodule", None)
    attributes |= {} if data is None else of_attributes(data, data.hparams)
    used, code = of_function(module.configure_optimizers)
    known = {
        **of_module(module),
        "checkpoint": of_checkpoint(call.given, call.path),
        "settings": {name: plain(value) for name, value in settings.items()},
        "attributes": {**attributes, **used},
        "code": code,
    }
    given = trainer.fit_loop._data_source.instance
    if isinstance(given, (LightningModule, LightningDataModule)) or given is None or trainer.world_size > 1:
        return known  # loaders do not exist yet, or will be dealt out to the ranks
    loaders = of_loaders(CombinedLoader(given, "max_size_cycle").flattened)
    return {**known, "data": loaders["data"], "settings": {**known["settings"], **loaders["settings"]}}


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
