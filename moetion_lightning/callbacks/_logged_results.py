"""Values logged in a Lightning trainer: an epoch's means, and the newest numbers, survive in its middle."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor

__all__ = ["LoggedResults"]


class LoggedResults:
    """Takes and restores them.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def snapshot(self) -> dict[str, Any]:
        """All of it, as plain values and live tensors."""
        connector = self._trainer._logger_connector
        return {
            "results": self._results(),
            "first_loop_iter": bool(connector._first_loop_iter),
            "current_fx": connector._current_fx,
            "metrics": self._metrics(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Put it back, right before the first batch is fetched.

        Args:
            saved: What :meth:`snapshot` gave.
        """
        self._restore_results(saved["results"])
        connector = self._trainer._logger_connector
        # Saved after the next batch's `on_batch_start`, put back before it: None becomes True there, False stays.
        connector._first_loop_iter = None if saved["first_loop_iter"] else False
        connector._current_fx = saved["current_fx"]
        connector._progress_bar_metrics = dict(saved["metrics"]["progress_bar"])
        connector._logged_metrics = dict(saved["metrics"]["logged"])
        connector._callback_metrics = dict(saved["metrics"]["callback"])

    def show(self, metrics: dict[str, float], in_bar: dict[str, str]) -> None:
        """Hand numbers to the loggers and the progress bar, and leave what the user logs as it is.

        ``self.log`` would put them among the metrics that callbacks see, and into the module's own results.

        Args:
            metrics: The numbers.
            in_bar: What the progress bar shows, as text: a bar writes every number with three decimals.
        """
        trainer = self._trainer
        for logger in trainer.loggers:
            logger.log_metrics(metrics=dict(metrics), step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        shown: Any = trainer._logger_connector._progress_bar_metrics
        shown.update(in_bar)

    def _metrics(self) -> dict[str, Any]:
        connector = self._trainer._logger_connector
        return {
            "progress_bar": dict(connector._progress_bar_metrics),
            "logged": dict(connector._logged_metrics),
            "callback": dict(connector._callback_metrics),
        }

    def _results(self) -> list[dict[str, Any]]:
        """Partial sums of values logged with ``on_epoch=True``: an epoch's mean must survive in its middle."""
        saved = []
        for key, metric in self._trainer.fit_loop.epoch_loop._results.items():
            meta = metric.meta
            if not meta.on_epoch or meta.sync._group is not None:
                continue  # without on_epoch there is nothing to carry on
            if not metric.is_tensor and not meta.metric_attribute:
                continue
            saved.append(
                {
                    "key": key,
                    "meta": {
                        "fx": meta.fx,
                        "name": meta.name,
                        "prog_bar": meta.prog_bar,
                        "logger": meta.logger,
                        "on_step": meta.on_step,
                        "on_epoch": meta.on_epoch,
                        "reduce_fx": getattr(meta.reduce_fx, "__name__", "mean"),
                        "enable_graph": meta.enable_graph,
                        "add_dataloader_idx": meta.add_dataloader_idx,
                        "dataloader_idx": meta.dataloader_idx,
                        "metric_attribute": meta.metric_attribute,
                    },
                    "sync": [meta.sync._should, meta.sync.rank_zero_only],
                    "is_tensor": metric.is_tensor,  # else a torchmetrics object, whose state is kept with the module
                    "states": {name: getattr(metric, name) for name in metric._defaults},
                    "has_reset": metric.has_reset,
                    "updates": metric._update_count,
                    "cache": metric._forward_cache,
                }
            )
        return saved

    def _restore_results(self, saved: list[dict[str, Any]]) -> None:
        results = self._trainer.fit_loop.epoch_loop._results
        results.clear()  # hooks that began this process may have logged
        device = self._trainer.strategy.root_device
        for entry in saved:
            reduce_fx = getattr(torch, entry["meta"]["reduce_fx"])
            meta = _Metadata(**{**entry["meta"], "reduce_fx": reduce_fx})
            should, rank_zero_only = entry["sync"]
            meta.sync = _Sync(
                _should=should, fn=self._trainer.strategy.reduce, _group=None, rank_zero_only=rank_zero_only
            )
            metric = _ResultMetric(meta, entry["is_tensor"])
            for name, value in entry["states"].items():
                setattr(metric, name, value.to(device))
                metric._defaults[name] = torch.as_tensor(metric._defaults[name]).to(value)
            if not entry["is_tensor"]:
                metric.value = attrgetter(entry["meta"]["metric_attribute"])(self._trainer.lightning_module)
            metric.has_reset = entry["has_reset"]
            metric._update_count = entry["updates"]
            cache = entry["cache"]
            metric._forward_cache = cache.to(device) if isinstance(cache, Tensor) else cache
            results[entry["key"]] = metric
