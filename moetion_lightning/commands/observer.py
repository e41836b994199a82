"""Watches the first optimizer step of a run, takes the time of the next ones, and explains its operators."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moetion_lightning.capture.thread import measure_bandwidth
from moetion_lightning.core.compute_dtype import ComputeDtypeObserver
from moetion_lightning.core.discovery import discover_layers
from moetion_lightning.core.explain import Explanation, explain
from moetion_lightning.core.policy import SparsePolicy
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.moe.routing.counter import TokenCounter

__all__ = ["OperatorObserver"]


class OperatorObserver(Callback):
    """Counts tokens and observes compute dtypes in the first optimizer step; explains the module when training ends.

    Args:
        policy: Plans the window.
    """

    #: Optimizer steps that are enough: one to watch, two to take the time of.
    STEPS = 3

    def __init__(self, policy: SparsePolicy) -> None:
        super().__init__()
        self._policy = policy
        self._counter: TokenCounter | None = None
        self._dtypes: ComputeDtypeObserver | None = None
        self._counts: list[list[int]] | None = None
        self._ended: list[float] = []
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
        if self._dtypes is not None and self._counts is None:
            self._dtypes.resume()
            self._dtypes.start()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """The optimizer reads master weights: that says nothing about the forward."""
        if self._dtypes is not None and self._counts is None:
            self._dtypes.pause()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave the dispatch mode: only the thread that entered it may. After a step, take the time."""
        if self._dtypes is not None and self._counts is None:
            self._dtypes.stop()
        if trainer.global_step == 0:
            return
        if self._counts is None and self._counter is not None:
            self._counts = self._counter.drain().tolist()
            self._counter.remove()
        if trainer.global_step > len(self._ended):
            self._ended.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain."""
        if self._counter is None or self._dtypes is None or self._counts is None:
            return
        layers = self._counter.layers
        self._explanation = explain(
            pl_module,
            optimizers=trainer.optimizers,
            layers=layers,
            policy=self._policy,
            tokens={(la.name, e): row[e] for la, row in zip(layers, self._counts) for e in range(la.num_experts)},
            compute_dtype=self._dtypes.result(),
            iteration_seconds=min((b - a for a, b in zip(self._ended, self._ended[1:])), default=0.0),
            bytes_per_second=measure_bandwidth(pl_module.device),
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take everything off the module again."""
        if self._dtypes is not None:
            self._dtypes.stop()
        if self._counter is not None:
            self._counter.remove()
