"""What an optimizer holds besides ``state`` and ``param_groups``: other optimizers, and attributes of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moetion_lightning.core.description import Describer
from moetion_lightning.core.rebuilding import Rebuilder
from moetion_lightning.errors import UnsupportedStateError

__all__ = [
    "attribute_tensors",
    "inner_optimizers",
    "is_optimizer",
    "own_attributes",
    "parameter_tables",
    "read_attributes",
    "write_attributes",
]

_MAX_DEPTH = 3  # lists in dicts in attributes
_MAX_ITEMS = 1000  # a longer container holds data, not optimizers
_LOOKED_AT = 64  # items of a container that are asked at each iteration
#: What torch and its schedulers and scalers themselves keep in an optimizer's attributes.
_OF_TORCH = frozenset(
    {
        "state", "param_groups", "defaults", "grad_scale", "found_inf", "_opt_called", "_zero_grad_profile_name",
        "_warned_capturable_if_run_uncaptured", "_need_device_dtype_check_for_fused", "_step_supports_amp_scaling",
        "_patched", "_step_count", "step", "zero_grad",
    }
)  # fmt: skip


_STATE = "state"  # of no parameter


def is_optimizer(value: object) -> bool:
    """Whether it updates parameters: a torch optimizer, or a class that behaves like one."""
    if isinstance(value, Optimizer):
        return True
    groups = getattr(value, "param_groups", None)
    return isinstance(groups, list) and callable(getattr(value, "step", None)) and not isinstance(value, nn.Module)


def inner_optimizers(optimizers: Iterable[Optimizer]) -> tuple[Optimizer, ...]:
    """The optimizers, followed by those that they hold in attributes, each once.

    Args:
        optimizers: Raw optimizers, or classes that behave alike.
    """
    found = list(optimizers)
    for optimizer in found:  # grows while it is walked
        for value in own_attributes(optimizer).values():
            found += [o for o in _optimizers_in(value, _MAX_DEPTH) if not any(o is known for known in found)]
    return tuple(found)


def _optimizers_in(value: Any, depth: int) -> Iterator[Any]:
    if isinstance(value, (list, tuple)) and depth and len(value) <= _MAX_ITEMS:
        for item in value:
            yield from _optimizers_in(item, depth - 1)
    elif isinstance(value, dict) and depth and len(value) <= _MAX_ITEMS:
        for item in value.values():
            yield from _optimizers_in(item, depth - 1)
    elif not isinstance(value, (Tensor, str, int, float)) and is_optimizer(value):
        yield value


def own_attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Attributes of the optimizer itself that are not torch's."""
    own = getattr(optimizer, "__dict__", {})
    return {k: v for k, v in own.items() if k not in _OF_TORCH and not k.startswith("_optimizer_")}


def parameter_tables(optimizer: Optimizer, names: Mapping[int, str]) -> tuple[str, ...]:
    """Attributes that map parameters to what is kept of them, as ``state`` does.

    Args:
        optimizer: The optimizer.
        names: Names of the module's parameters by ``id``.
    """
    return tuple(
        name
        for name, value in own_attributes(optimizer).items()
        if isinstance(value, dict) and value and all(id(key) in names for key in value)
    )


def attribute_tensors(optimizer: Optimizer) -> list[str]:
    """Attributes with floating-point tensors in them that belong to no single parameter."""
    return [name for name, value in own_attributes(optimizer).items() if _has_tensor(value, _MAX_DEPTH)]


def _has_tensor(value: Any, depth: int) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and not isinstance(value, nn.Parameter)
    if isinstance(value, (list, tuple)) and depth:
        return any(_has_tensor(item, depth - 1) for item in value[:_LOOKED_AT])
    if isinstance(value, dict) and depth:
        some = itertools.islice(value.items(), _LOOKED_AT)
        return any(_has_tensor(item, depth - 1) for key, item in some if not isinstance(key, Tensor))
    return False


def read_attributes(
    optimizer: Optimizer, index: int, names: Mapping[int, str], tables: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """What the optimizer keeps in attributes, and belongs to no single parameter.

    Args:
        optimizer: The optimizer.
        index: Its index, for messages.
        names: Names of the module's parameters by ``id``: they are referred to, not stored.
        tables: Attributes that are captured with the parameters.

    Returns:
        Descriptions by attribute, their tensors by path, and by attribute why others cannot be captured.

    Raises:
        UnsupportedStateError: Its ``state`` has an entry of no parameter that cannot be captured.
    """
    described: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    kept = {
        key: value for key, value in (getattr(optimizer, "state", None) or {}).items() if not isinstance(key, Tensor)
    }
    for attribute, value in [*own_attributes(optimizer).items(), *([(_STATE, kept)] if kept else [])]:
        if attribute in tables or _is_machinery(value) or any(True for _ in _optimizers_in(value, _MAX_DEPTH)):
            continue
        describer = Describer(f"optimizer {index} ({type(optimizer).__name__})", names=names)
        try:
            described[attribute] = [_is_stateful(value), describer.describe(_contents(value), attribute)]
        except UnsupportedStateError as error:
            if attribute == _STATE:  # an attribute may hold anything, the state is what it says
                raise
            refused[attribute] = str(error)
            continue
        tensors.update({f"{attribute}/{path}": tensor for path, tensor, _ in describer.tensors})
    return described, tensors, refused


def write_attributes(
    optimizer: Optimizer, described: Mapping[str, Any], tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`read_attributes` gave.

    Args:
        optimizer: The optimizer.
        described: The descriptions.
        tensors: Their tensors.
        parameters: The module's parameters by name.
    """
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    own = vars(optimizer)
    for attribute, (stateful, description) in described.items():
        rebuilder = Rebuilder(
            lambda path, attribute=attribute: tensors[f"{attribute}/{path}"],  # type: ignore[misc]
            device,
            parameters=parameters,
        )
        current = own.get(attribute)
        if attribute == _STATE:
            optimizer.state.update(rebuilder.rebuild(description, optimizer.state))
        elif not stateful:
            own[attribute] = rebuilder.rebuild(description, current)
        elif current is not None and _is_stateful(current):
            current.load_state_dict(rebuilder.rebuild(description))


def _contents(value: Any) -> Any:
    """What to capture of an attribute: an object with ``state_dict`` says itself."""
    return value.state_dict() if _is_stateful(value) else value


def _is_stateful(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _is_machinery(value: Any) -> bool:
    """Functions, modules, handles: nothing that training changes, or captured elsewhere."""
    return isinstance(value, (nn.Module, type, torch.Generator)) or (callable(value) and not _is_stateful(value))
