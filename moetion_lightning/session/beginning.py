"""How a fit began: what tells it from every other fit, and what a user may change between two starts of it.

A *beginning* is plain JSON, so that a window can carry it:

========== ==============================================================================================
model      digest of names, dtypes and shapes of the parameters
parameters their names, dtypes and shapes (in a window: beside its beginning)
weights    digest of a sample of the parameters' values
seed       of torch's generator, where a script has set one
checkpoint the checkpoint that the fit was told to begin from: ``given``, ``stamp`` (size and time)
data       digest of a sample of what the datasets hold
settings   what a user sets, by name: optimizers, schedulers, limits, loaders
attributes plain attributes and hyper-parameters of the user's objects, by name
code       digest of the code that makes the optimizers, where they do not exist yet
========== ==============================================================================================
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import CellType
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from moetion_lightning.core.containers import is_proxy
from moetion_lightning.core.local import local
from moetion_lightning.data.parts import length_of
from moetion_lightning.engine.restore import model_fingerprint, parameter_table

__all__ = [
    "Beginning",
    "Difference",
    "adopt",
    "differences",
    "later",
    "merged",
    "of_attributes",
    "of_checkpoint",
    "of_datasets",
    "of_function",
    "of_loaders",
    "of_module",
    "of_optimizers",
    "of_schedulers",
    "own_seed",
    "plain",
]

Beginning = dict[str, Any]

#: Without a call of ``manual_seed`` torch takes 53 random bits; seeds that people write are smaller.
_LARGEST_SEED = 2**32
_SAMPLE_ELEMENTS = 256
_MAX_ITEMS = 64
_EMPTY_CELL = CellType()
_LARGEST_NUMBER = 1e8  # larger ones are times, addresses, counts of bytes: they say nothing of what is trained
_MOVING_TEXT = re.compile(r"[/\\]|\d{4}|[0-9a-f]{8}")  # paths, dates, identifiers: they differ with every start


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A setting that is another one than when the window's fit began.

    Args:
        name: The setting.
        there: Its value in the window.
        here: Its value in this script.
        counts: Whose value training goes on with; ``"script later"``: this script's, once a restored state is whole.
    """

    name: str
    there: str
    here: str
    counts: Literal["window", "script", "script later"]

    def __str__(self) -> str:
        whose = {
            "window": "the window's counts",
            "script": "this script's counts",
            "script later": "this script's counts, once the state is whole",
        }[self.counts]
        return f"{self.name} is {self.there} in the window and {self.here} in this script ({whose})"


def own_seed() -> int | None:
    """The seed of torch's default generator, where somebody has set one."""
    seed = torch.initial_seed()
    return seed if seed < _LARGEST_SEED else None


def of_module(module: nn.Module) -> Beginning:
    """``model``, ``parameters``, ``weights`` and ``seed`` of a fit that is about to begin."""
    parameters = {name: parameter for name, parameter in module.named_parameters() if not is_lazy(parameter)}
    table = parameter_table(parameters)
    return {
        "model": model_fingerprint(table),
        "parameters": table,
        "weights": _digest(local(p) for p in parameters.values()),
        "seed": own_seed(),
    }


def of_attributes(owner: object, hyper_parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Plain settings that an object of the user holds: numbers, truth values, short texts.

    What moves with every start (times, paths, identifiers) is left out.
    """
    found = {name: value for name, value in vars(owner).items() if not name.startswith("_")}
    found |= dict(hyper_parameters or {})
    return _plain_of(found, type(owner).__name__)


def of_checkpoint(given: str | None, file: str | os.PathLike[str] | None) -> dict[str, Any]:
    """``checkpoint`` of a fit.

    Args:
        given: What the fit was told to begin from, as it was told.
        file: A local file that tells this checkpoint from others of the same name, if there is one.
    """
    stamp = None
    if file is not None and os.path.exists(file):
        status = os.stat(file)
        stamp = [status.st_size, status.st_mtime_ns]
    return {"given": given, "stamp": stamp}


def of_function(function: Any) -> tuple[dict[str, Any], str]:
    """Plain values that a function of the user takes from where it was defined, and a digest of its code."""
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return {}, ""
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != _EMPTY_CELL]
    values = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
    values |= dict(zip(code.co_freevars, cells))
    text = repr((code.co_code, code.co_names, [c for c in code.co_consts if isinstance(c, (int, float, str, tuple))]))
    return _plain_of(values, function.__name__), xxhash.xxh3_64_hexdigest(text.encode())


def of_optimizers(optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Classes, and the settings of every parameter group."""
    found: dict[str, Any] = {"optimizers": _classes(optimizers)}
    for where, group in _groups(optimizers):
        # Schedules move the learning rate, and keep its first value beside it.
        moving = ("params", "param_names", *(["lr"] if "initial_lr" in group else []))
        found |= _plain_of({k: v for k, v in group.items() if k not in moving}, where)
    return found


def of_schedulers(schedulers: Sequence[Any]) -> dict[str, Any]:
    """Classes, and the settings of every learning-rate scheduler."""
    found: dict[str, Any] = {"schedulers": _classes(schedulers)}
    for where, scheduler in _named(schedulers):
        state = scheduler.state_dict()
        found |= _plain_of({k: v for k, v in state.items() if not k.startswith("_") and k != "last_epoch"}, where)
    return found


def of_loaders(loaders: Iterable[Any], *, reloaded: bool = False) -> Beginning:
    """``data``, and the ``settings`` of the training loaders.

    Args:
        loaders: The loaders.
        reloaded: Whether they are made again while training: then they may grow from epoch to epoch, and their sizes
            say nothing of how the fit began.
    """
    known = list(loaders)
    lists: dict[str, list[Any]] = {
        "batches an epoch": [length_of(loader) for loader in known],
        "batch size": [plain(getattr(loader, "batch_size", None)) for loader in known],
    }
    sizes = {} if reloaded else lists
    settings = {key: found for key, found in sizes.items() if any(value is not None for value in found)}
    return {
        **of_datasets([getattr(loader, "dataset", None) for loader in known]),
        "settings": {"loaders": len(known), **settings},
    }


def of_datasets(datasets: Iterable[Any]) -> Beginning:
    """``data`` of the training datasets."""
    return {"data": _digest(piece for dataset in datasets for piece in _arrays(dataset))}


def differences(there: Beginning, here: Beginning, script_counts: Collection[str] = ()) -> list[Difference]:
    """The settings and attributes that both know and that differ, by name.

    Args:
        there: How the window's fit began.
        here: How this one begins.
        script_counts: Names of settings of which the script's value is used; attributes are the script's anyway.
    """
    found = []
    for kind in ("settings", "attributes"):
        theirs, ours = there.get(kind, {}), here.get(kind, {})
        for name in {**theirs, **ours}:
            if name in theirs and name in ours and theirs[name] != ours[name]:
                whose: Literal["window", "script"] = (
                    "script" if kind == "attributes" or name in script_counts else "window"
                )
                found.append(Difference(name=name, there=_shown(theirs[name]), here=_shown(ours[name]), counts=whose))
    return found


def later(difference: Difference) -> Difference:
    """The same, where the script lets its own settings of optimizers and schedulers count (:func:`adopt`)."""
    is_adopted = difference.counts == "window" and " of " in difference.name
    return replace(difference, counts="script later") if is_adopted else difference


def merged(first: Beginning, then: Beginning) -> Beginning:
    """What is known of a beginning, with what has become known later."""
    nested = {kind: {**first.get(kind, {}), **then.get(kind, {})} for kind in ("settings", "attributes")}
    return {**first, **then, **nested}


@torch.no_grad()
def adopt(
    changed: Collection[str], here: Beginning, optimizers: Sequence[Optimizer], schedulers: Sequence[Any]
) -> None:
    """Let this script's settings of optimizers and schedulers count from now on, where they were changed.

    A learning rate is changed in the proportion in which its initial value was: a schedule may have moved it.

    Args:
        changed: Names of the settings.
        here: How this fit begins.
        optimizers: The optimizers.
        schedulers: The schedulers.
    """
    wanted = {name: here["settings"][name] for name in changed}
    for where, group in _groups(optimizers):
        for key in list(group):
            value: Any = wanted.get(f"{key} of {where}")
            if value is None:
                continue
            if key == "initial_lr" and group[key]:
                _set(group, "lr", float(group["lr"]) / float(group[key]) * float(value))
            _set(group, key, value)
    for where, scheduler in _named(schedulers):
        for key in list(vars(scheduler)):
            if f"{key} of {where}" in wanted:
                setattr(scheduler, key, wanted[f"{key} of {where}"])


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group[key], Tensor):
        group[key].fill_(value)
    else:
        group[key] = tuple(value) if isinstance(group[key], tuple) else value


# --- inside ------------------------------------------------------------------------------------------------------


def _named(objects: Sequence[Any]) -> list[tuple[str, Any]]:
    """Each object with a name for people."""
    several = len(objects) > 1
    return [(f"{type(o).__name__} {i}" if several else type(o).__name__, o) for i, o in enumerate(objects)]


def _classes(objects: Sequence[Any]) -> str:
    return ", ".join(type(o).__name__ for o in objects) or "none"


def _plain_of(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = {f"{name} of {where}": plain(value) for name, value in values.items()}
    return {name: value for name, value in sorted(found.items()) if value is not None}


def _groups(optimizers: Sequence[Optimizer]) -> list[tuple[str, dict[str, Any]]]:
    """Each parameter group with a name for people."""
    return [
        (f"{where}, group {number}" if len(optimizer.param_groups) > 1 else where, group)
        for where, optimizer in _named(optimizers)
        for number, group in enumerate(optimizer.param_groups)
    ]


def plain(value: object, depth: int = 2) -> Any:
    """JSON of a setting; None for what is no plain value, or moves with every start."""
    if is_proxy(type(value)):
        return None
    if isinstance(value, Tensor):
        return plain(value.item()) if value.numel() == 1 else None
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.item()) if value.size == 1 else None
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, (bool, int, float)):
        exact = next(kind(value) for kind in (bool, int, float) if isinstance(value, kind))  # not of a subclass
        return exact if abs(value) < _LARGEST_NUMBER or abs(value) == float("inf") else None
    if isinstance(value, str):
        return None if len(value) > _MAX_ITEMS or _MOVING_TEXT.search(value) else str(value)
    if isinstance(value, (list, tuple)) and depth and len(value) <= _MAX_ITEMS:
        items = [plain(item, depth - 1) for item in value]
        return items if all(item is not None for item in items) else None
    if isinstance(value, Mapping) and depth and len(value) <= _MAX_ITEMS:
        pairs = {str(key): plain(item, depth - 1) for key, item in value.items()}
        return {key: item for key, item in sorted(pairs.items()) if item is not None} or None
    return None


def _shown(value: Any) -> str:
    text = f"{value:.9g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MAX_ITEMS else f"{text[:_MAX_ITEMS]}..."


def _arrays(dataset: object, depth: int = 4) -> list[Any]:
    """Arrays of numbers in a dataset and in what it wraps, and the choice that a subset makes."""
    if dataset is None or not depth or not hasattr(dataset, "__dict__"):
        return []
    found: list[Any] = []
    for _, value in sorted(vars(dataset).items(), key=lambda item: item[0]):
        if is_proxy(type(value)):
            continue
        if isinstance(value, (Tensor, np.ndarray)):
            found.append(value)
        elif type(value) in (list, tuple, range) and value and isinstance(value[0], (int, float)):
            found.append(np.asarray(_sampled(value)))
        elif type(value) in (list, tuple) and value and isinstance(value[0], (Tensor, np.ndarray)):
            found += list(value[:_MAX_ITEMS])
        elif isinstance(value, torch.utils.data.Dataset):
            found += _arrays(value, depth - 1)
    return found


def _sampled(values: Any) -> Any:
    return values[:: max(1, len(values) // _SAMPLE_ELEMENTS)]


@torch.no_grad()
def _digest(tensors: Iterable[Any]) -> str:
    """Digest of a sample of each tensor, of its dtype and shape; placeholders count by their shape alone."""
    digest = xxhash.xxh3_128()
    for value in tensors:
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biufc":
                continue
            value = torch.from_numpy(np.ascontiguousarray(_sampled(value.reshape(-1))))
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
            digest.update(f"{type(value).__name__}{tuple(getattr(value, 'shape', ()))}".encode())
            continue
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if value.device.type == "meta" or not value.numel():
            continue
        flat = _sampled(value.detach().reshape(-1)) if value.is_contiguous() else _strided_sample(value.detach())
        digest.update(flat.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _strided_sample(value: Tensor) -> Tensor:
    """Some rows of a tensor that has no flat view, without a copy of all of it."""
    while value.dim() > 1:
        value = value[:: max(1, value.shape[0] // 4)].select(-1, 0) if value.shape[-1] else value.flatten()
    sampled: Tensor = _sampled(value)
    return sampled
