"""Plain DDP with experts that may get no token: said at the start, and by name when it happens.

DDP sums a bucket of gradients when all of them are there. Where an expert got no token on this rank, one is missing:
the others wait for this rank's part of the bucket, and this rank for them before the next thing that all do together.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer

from moetion_lightning.callbacks._ranks import ddp_of
from moetion_lightning.core.layouts import MoELayer
from moetion_lightning.errors import ConfigurationError

__all__ = ["UnusedExperts"]

_log = logging.getLogger(__name__)

_REMEDY = 'use strategy="ddp_find_unused_parameters_true", or experts in one 3-D parameter'


class UnusedExperts:
    """Looks at the experts of a module under plain DDP.

    Args:
        trainer: The trainer; its module is wrapped.
        module: The module.
        layers: Its MoE layers.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, layers: Sequence[MoELayer]) -> None:
        parameters = dict(module.named_parameters())
        self._trainer = trainer
        self._experts = [
            (f"expert {index} of {layer.name or 'the module'}", parameters[pieces[0].parameter])
            for layer in layers
            if layer.expert_modules  # else an expert is a part of a parameter that all share
            for index, pieces in enumerate(layer.experts)
            if pieces and pieces[0].parameter in parameters and parameters[pieces[0].parameter].requires_grad
        ]
        if self._is_plain() and self._experts:
            _log.warning(
                "%s has experts that are modules of their own, under DDP without find_unused_parameters: when one of "
                "them gets no token on one rank only, all ranks would wait for ever, in any framework. That is an "
                "error here, with the expert's name. To be safe from it, %s.",
                layers[0].name or "the module", _REMEDY,
            )  # fmt: skip

    def _is_plain(self) -> bool:
        ddp = ddp_of(self._trainer)
        return ddp is not None and not ddp.find_unused_parameters and not ddp.static_graph

    def check(self) -> None:
        """Gradients are complete, and nothing that all ranks do together has begun since.

        Raises:
            ConfigurationError: One is missing, and the other ranks wait for it.
        """
        if not self._experts or not self._is_plain():
            return
        missing = [name for name, parameter in self._experts if parameter.grad is None and parameter.requires_grad]
        if missing:
            listed = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise ConfigurationError(
                f"rank {self._trainer.global_rank}: no token went to {listed} in this step, so that there is no "
                "gradient, for which DDP without find_unused_parameters makes all other ranks wait for ever: "
                f"{_REMEDY}."
            )
