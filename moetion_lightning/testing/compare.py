"""Bitwise comparison of two runs: final state (safetensors, no pickle) and losses (JSONL)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from moetion_lightning.core.local import local
from moetion_lightning.pipeline.hollow import is_hollow

__all__ = [
    "Comparison",
    "compare_losses",
    "compare_states",
    "flatten_state",
    "read_losses",
    "read_state",
    "write_state",
]

_SCALARS = "moetion_scalars"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Outcome of a comparison.

    Args:
        compared: How many things were compared.
        differences: One sentence for each thing that differs, or is in one run only.
    """

    compared: int
    differences: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether something was compared and nothing differs."""
        return self.compared > 0 and not self.differences


def flatten_state(module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All parameters, buffers and optimizer state of a run, by name.

    Of distributed tensors it takes this rank's shard, so that each rank's state is written and compared by itself.
    FSDP2 modules are resharded for that: after a forward without backward (validation) they show gathered weights.
    Of a pipeline it takes the parameters of this rank's stages.

    Args:
        module: The module that trained.
        optimizers: Its optimizers (raw ``torch.optim`` objects).

    Returns:
        Tensors (``parameter:NAME``, ``buffer:NAME``, ``optimizer:I:NAME:ENTRY``; views of the live state) and the
        values that are not tensors, floats as hexadecimal text.
    """
    for part in module.modules():
        reshard = getattr(part, "reshard", None)
        if callable(reshard):
            reshard()
    names = {id(p): name for name, p in module.named_parameters()}
    held = ((name, p) for name, p in module.named_parameters() if not is_hollow(p))
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, parameter in held:
        _put(f"parameter:{name}", parameter, tensors, scalars)
    tensors.update({f"buffer:{name}": local(b) for name, b in module.named_buffers()})
    for index, optimizer in enumerate(optimizers):
        for number, group in enumerate(optimizer.param_groups):
            for key, setting in group.items():
                if key != "params":
                    _put(f"optimizer:{index}:group{number}:{key}", setting, tensors, scalars)
        for owner, state in optimizer.state.items():
            name = names.get(id(owner), "?")
            for key, entry in state.items():
                _put(f"optimizer:{index}:{name}:{key}", entry, tensors, scalars)
    return tensors, scalars


def _put(name: str, value: Any, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__") and not hasattr(value, "to_local"):
        for part in value.__tensor_flatten__()[0]:
            _put(f"{name}.{part}", getattr(value, part), tensors, scalars)
    elif isinstance(value, Tensor):
        tensors[name] = local(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _put(f"{name}.{key}", item, tensors, scalars)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _put(f"{name}.{index}", item, tensors, scalars)
    else:
        scalars[name] = value.hex() if isinstance(value, float) else repr(value)


def write_state(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    """Write a flattened state; the file appears under its name only when it is complete.

    Args:
        path: File to write (safetensors).
        tensors: Tensors on any device; they are copied.
        scalars: Values that JSON knows.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    partial = target.with_name(target.name + ".partial")
    save_file(copies, partial, metadata={_SCALARS: json.dumps(dict(scalars), sort_keys=True)})
    partial.replace(target)


def read_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_state` wrote."""
    with safe_open(os.fspath(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        scalars = json.loads((file.metadata() or {}).get(_SCALARS, "{}"))
    return tensors, scalars


def compare_states(
    first: str | os.PathLike[str], second: str | os.PathLike[str], prefixes: Sequence[str] = ("",)
) -> Comparison:
    """Compare two written states with ``torch.equal``.

    Args:
        first: File of one run.
        second: File of the other run.
        prefixes: Compare only names that begin with one of these, e.g. ``("parameter:", "buffer:")``.
    """
    (tensors_a, scalars_a), (tensors_b, scalars_b) = read_state(first), read_state(second)
    wanted = tuple(prefixes)
    differences = []
    names = sorted(name for name in {*tensors_a, *tensors_b, *scalars_a, *scalars_b} if name.startswith(wanted))
    for name in names:
        in_a, in_b = name in tensors_a or name in scalars_a, name in tensors_b or name in scalars_b
        if in_a != in_b:
            differences.append(f"{name}: only in the {'first' if in_a else 'second'} run")
        elif name in tensors_a and name in tensors_b:
            sentence = _difference(tensors_a[name], tensors_b[name])
            if sentence:
                differences.append(f"{name}: {sentence}")
        elif scalars_a.get(name) != scalars_b.get(name):
            differences.append(f"{name}: {scalars_a.get(name)} and {scalars_b.get(name)}")
    return Comparison(compared=len(names), differences=tuple(differences))


def _difference(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
    if torch.equal(a, b) or torch.equal(_bytes(a), _bytes(b)):  # the bytes: NaN is unequal to itself
        return ""
    unequal = int((a != b).sum())
    gap = float((a.double() - b.double()).abs().max())
    return f"{unequal} of {a.numel()} elements differ, by up to {gap:.3g}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def read_losses(path: str | os.PathLike[str]) -> dict[tuple[int, int], list[str]]:
    """Losses written by ``LossRecorder``.

    Returns:
        For each micro-batch ``(epoch, batch_idx)`` every value that was recorded, in order, as hexadecimal text: more
        than one where steps were done again after a restart.
    """
    losses: dict[tuple[int, int], list[str]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        losses.setdefault((record["epoch"], record["batch_idx"]), []).append(record["loss"])
    return losses


def compare_losses(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> Comparison:
    """Compare the losses of every micro-batch of two runs; repeated ones must agree as well."""
    a, b = read_losses(first), read_losses(second)
    differences = []
    for key in sorted({*a, *b}):
        values = {*a.get(key, ["missing"]), *b.get(key, ["missing"])}
        if len(values) > 1:
            readable = sorted(v if v == "missing" else repr(float.fromhex(v)) for v in values)
            differences.append(f"loss of epoch {key[0]}, batch {key[1]}: {', '.join(readable)}")
    return Comparison(compared=len({*a, *b}), differences=tuple(differences))
