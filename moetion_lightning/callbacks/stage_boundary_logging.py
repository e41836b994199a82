"""Boundary logs of a pipeline, so that a lost stage recovers alone."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moetion_lightning.config import launched_process
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.storage.room import memory_limit_bytes
from moetion_lightning.strategies.pipeline_link import PipelineLink
from moetion_lightning.strategies.pipeline_strategy import PipelineStrategy

__all__ = ["StageBoundaryLogging"]

_log = logging.getLogger(__name__)
_SHARE_OF_MEMORY = 0.1


class StageBoundaryLogging(Callback):
    """Lets a lost pipeline stage recover alone, from what its neighbours have sent it.

    Every rank keeps what it sends over its stage boundaries, activations and gradients, in its own host memory, for as
    long as the newest committed window of the stages may need it. When all ranks of a stage are lost, under
    ``moetion launch``, the new processes restore that stage's window and replay it from their neighbours' logs; all
    other stages keep their state and wait. Without it, all stages go back to a window together.

    Add it beside ``SparseExpertCheckpoint`` in a Trainer with ``MoEtionStrategy(pipeline_parallel_size=...)``.

    Args:
        max_bytes: Host memory that the log of one rank may take. When it is full the oldest iterations are dropped,
            with one message: a stage that needs them is then recovered by a rollback of all. None: a tenth of the
            node's memory (of what its control groups allow), shared by its ranks.
        log_metrics: Whether the bytes of an iteration go to the loggers.

    Raises:
        ConfigurationError: ``max_bytes`` is not positive; at setup: the strategy is no pipeline, or nothing captures
            windows.

    Source:
        MoEvement (NSDI'26), upstream logging and localized recovery.
    """

    def __init__(self, max_bytes: int | None = None, log_metrics: bool = True) -> None:
        is_number = isinstance(max_bytes, (int, float)) and not isinstance(max_bytes, bool)
        if max_bytes is not None and not (is_number and max_bytes > 0):
            raise ConfigurationError(f"StageBoundaryLogging(max_bytes={max_bytes!r}): expected a number of bytes > 0")
        self.max_bytes = max_bytes
        self._log_metrics = log_metrics
        self._link: PipelineLink | None = None

    @property
    def link(self) -> PipelineLink | None:
        """The log of this rank while a fit runs."""
        return self._link

    def make_link(self, trainer: Trainer) -> None:
        """Make the log, once; the strategy must know its ranks.

        Raises:
            ConfigurationError: The strategy is no pipeline.
        """
        strategy: Any = trainer.strategy
        if not isinstance(strategy, PipelineStrategy) or strategy.pipeline_parallel_size == 1:
            raise ConfigurationError(
                f"StageBoundaryLogging in Trainer(strategy={type(strategy).__name__}): expected "
                "MoEtionStrategy(pipeline_parallel_size=...) with 2 ranks or more, whose stages have boundaries. "
                "Remove the callback, or change the strategy"
            )
        if self._link is None:
            ranks = max(1, trainer.world_size // max(1, trainer.num_nodes))
            bound = int(_SHARE_OF_MEMORY * memory_limit_bytes() / ranks) if self.max_bytes is None else self.max_bytes
            self._link = strategy.link = PipelineLink(strategy, bound, _log.warning)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.make_link(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if not any(getattr(callback, "captures", lambda: False)() for callback in callbacks):
            raise ConfigurationError(
                "StageBoundaryLogging without a callback that captures windows: a stage is replayed from a window. Add "
                "SparseExpertCheckpoint() to Trainer(callbacks=...)"
            )
        if launched_process() is None and trainer.is_global_zero:
            _log.warning(
                "StageBoundaryLogging has no effect here but its cost: a stage recovers alone only under `moetion "
                "launch`, which keeps the other ranks alive. Start the script with it, or remove the callback"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = max(1, getattr(trainer, "log_every_n_steps", 50))
        if self._log_metrics and self._link is not None and trainer.global_step % every == 0:
            nbytes = float(self._link.log.iteration_bytes)
            pl_module.log("moetion/boundary_log_bytes", nbytes, on_step=True, on_epoch=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close(trainer)

    def _close(self, trainer: Trainer) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
            trainer.strategy.link = None  # type: ignore[attr-defined]
