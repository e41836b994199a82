"""``self.log`` inside a step that runs as a pipeline: noted where the last stage is, then logged on every rank."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from moetion_lightning.errors import ConfigurationError

__all__ = ["StepLogs", "gathers_lists"]

#: What may follow name and value by position.
_OPTIONS = tuple(inspect.signature(LightningModule.log).parameters)[3:]
_REDUCTIONS = {
    "mean": lambda values: values.mean(),
    "sum": lambda values: values.sum(),
    "min": lambda values: values.min(),
    "max": lambda values: values.max(),
}


def gathers_lists(thing: object) -> bool:
    """Whether this is a metric whose state grows with the data."""
    return isinstance(thing, Metric) and any(isinstance(value, list) for value in thing._defaults.values())


@dataclass
class _Entry:
    """What a step has logged under one name: one value a micro-batch, or a metric object."""

    options: dict[str, Any]
    reduction: str
    values: list[Tensor] = field(default_factory=list)
    metric: Metric | None = None


class StepLogs:
    """Stands in for a module's ``log`` while its step runs.

    A value that is logged once for each micro-batch becomes one value of the batch, by its ``reduce_fx``. Metric
    objects are updated where the last stage runs, and are computed together with the (empty) ones of the other ranks.

    Args:
        module: The module.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._entries: dict[str, _Entry] = {}
        self._listening = False

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """While this is open, nothing is logged; calls are noted inside :meth:`noting`."""
        self._entries = {}
        self._module.__dict__["log"] = self._note
        try:
            yield
        finally:
            self._module.__dict__.pop("log", None)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """While this is open, calls count: the last stage runs."""
        self._listening = True
        try:
            yield
        finally:
            self._listening = False

    def _note(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if not self._listening:
            return
        if args:
            kwargs = {**dict(zip(_OPTIONS, args)), **kwargs}
        reduction = kwargs.pop("reduce_fx", "mean")
        reduction = reduction if isinstance(reduction, str) else getattr(reduction, "__name__", "")
        if reduction not in _REDUCTIONS:
            raise ConfigurationError(
                f"self.log({name!r}, reduce_fx=...): under pipeline parallelism expected one of "
                f"{', '.join(map(repr, _REDUCTIONS))}"
            )
        for option in ("sync_dist_group", "metric_attribute"):
            kwargs.pop(option, None)
        size = kwargs.pop("batch_size", None)
        entry = self._entries.setdefault(name, _Entry(dict(kwargs), reduction))
        if size is not None:  # of a micro-batch; it weighs the whole batch in means over an epoch
            entry.options["batch_size"] = entry.options.get("batch_size", 0) + int(size)
        if isinstance(value, Metric):
            self._refuse_lists(name, value)
            entry.metric = value
        else:
            entry.values.append(_scalar(name, value))

    def _refuse_lists(self, name: str, metric: Metric) -> None:
        if gathers_lists(metric):
            raise ConfigurationError(
                f"self.log({name!r}, {type(metric).__name__}) inside a step: this metric gathers lists, which are on "
                "the last stage only under pipeline parallelism. Use a metric with a fixed-size state (such as the "
                "binned form, thresholds=...), or log a number"
            )

    def to_json(self) -> list[Any]:
        """What was noted, for the other ranks."""
        paths = {id(m): path for path, m in self._module.named_modules()}
        noted = []
        for name, entry in self._entries.items():
            metric: list[Any] = []
            if entry.metric is not None:
                if id(entry.metric) not in paths:
                    raise ConfigurationError(
                        f"self.log({name!r}, {type(entry.metric).__name__}(...)): assign the metric to an attribute of "
                        "the module in __init__, so that every rank has it"
                    )
                cached: Any = entry.metric._forward_cache
                is_number = isinstance(cached, Tensor) and cached.numel() == 1
                metric = [paths[id(entry.metric)], float(cached).hex() if is_number else None]
            value = _number(_REDUCTIONS[entry.reduction](torch.stack(entry.values))) if entry.values else None
            noted.append([name, entry.options, entry.reduction, value, metric])
        return noted

    def log(self, noted: list[Any], batch_size: int | None) -> None:
        """Log for real what :meth:`to_json` gave.

        Args:
            noted: From the rank with the last stage.
            batch_size: Of the whole batch; the module itself would look at a micro-batch.

        Ranks:
            All ranks of the job, where the module asks for ``sync_dist``.
        """
        device = self._module.device
        for name, options, reduction, value, metric in noted:
            given = {"batch_size": batch_size, **_without_none(options), "reduce_fx": reduction}
            if not metric:
                assert value is not None
                tensor = torch.tensor(float.fromhex(value[1]), dtype=getattr(torch, value[0]), device=device)
                self._module.log(name, tensor, **given)
                continue
            path, cached = metric
            found = self._module.get_submodule(path)
            assert isinstance(found, Metric)
            if cached is not None:
                vars(found)["_forward_cache"] = torch.tensor(float.fromhex(cached), device=device)
            self._module.log(name, found, **given, metric_attribute=path)


def _scalar(name: str, value: Any) -> Tensor:
    """A logged value as Lightning keeps it: a copy, of one element, in a dtype that means can be taken of."""
    default = torch.get_default_dtype()
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=default)
    if value.numel() != 1:
        raise ConfigurationError(
            f"self.log({name!r}, <tensor of shape {tuple(value.shape)}>): expected a tensor with one element. Log its "
            "mean, or each element under a name of its own"
        )
    dtype = value.dtype if value.dtype in (torch.float32, torch.float64) else default
    return value.detach().reshape(()).to(dtype, copy=True)


def _number(tensor: Tensor) -> list[str]:
    return [str(tensor.dtype).removeprefix("torch."), float(tensor).hex()]


def _without_none(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}
