"""Watches one optimizer step of a run and explains its operators."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moetion_lightning.core.compute_dtype import ComputeDtypeObserver
from moetion_lightning.core.discovery import discover_layers
from moetion_lightning.core.explain import Explanation, explain
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.moe.routing.counter import TokenCounter

__all__ = ["OperatorObserver"]


class OperatorObserver(Callback):
    """Counts tokens and observes compute dtypes until training ends, then explains the module.

    Args:
        window: Iterations of the window to schedule.
    """

    def __init__(self, window: int = 4) -> None:
        super().__init__()
        self.window = window
        self._counter: TokenCounter | None = None
        self._dtypes: ComputeDtypeObserver | None = None
        self._explanation: Explanation | None = None

    @property
    def explanation(self) -> Explanation:
        """What was found.

        Raises:
            ConfigurationError: No training step ran.
        """
        if self._explanation is None:
            raise ConfigurationError("the run ended before its first optimizer step; is there training data?")
        return self._explanation

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach before the first forward."""
        self._counter = TokenCounter(pl_module, discover_layers(pl_module))
        self._dtypes = ComputeDtypeObserver(dict(pl_module.named_parameters()))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch a micro-batch."""
        if self._dtypes is not None:
            self._dtypes.resume()
            self._dtypes.start()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """The optimizer reads master weights: that says nothing about the forward."""
        if self._dtypes is not None:
            self._dtypes.pause()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave the dispatch mode: only the thread that entered it may."""
        if self._dtypes is not None:
            self._dtypes.stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain."""
        if self._counter is None or self._dtypes is None or trainer.global_step == 0:
            return
        counts = self._counter.drain().tolist()
        layers = self._counter.layers
        self._counter.remove()
        self._explanation = explain(
            pl_module,
            optimizers=trainer.optimizers,
            layers=layers,
            window=self.window,
            tokens={(layer.name, e): row[e] for layer, row in zip(layers, counts) for e in range(layer.num_experts)},
            compute_dtype=self._dtypes.result(),
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take everything off the module again."""
        if self._dtypes is not None:
            self._dtypes.stop()
        if self._counter is not None:
            self._counter.remove()
