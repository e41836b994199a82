"""What one call of an optimizer's ``step`` consumed."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moetion_lightning.core.local import is_wrapper, local
from moetion_lightning.core.optimizer_parts import own_attributes, read_attributes, write_attributes
from moetion_lightning.core.state import LiveState
from moetion_lightning.errors import UnsupportedStateError

__all__ = ["Call", "Consumed", "Settings", "calls_tree", "read_settings", "set_groups", "take_call"]

#: Of a parameter group: these say which parameters, not how.
_MEMBERS = ("params", "param_names")
_GRADIENT = operator.attrgetter("grad")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a step works with besides gradients, weights and the state of parameters: copies.

    Args:
        groups: The settings of the parameter groups.
        attributes: What the optimizer keeps in attributes of its own, described, and the tensors in it.
    """

    groups: Sequence[Mapping[str, Any]]
    attributes: tuple[Mapping[str, Any], Mapping[str, Tensor]] = ({}, {})

    def apply(self, optimizer: Any, parameters: Mapping[str, Tensor]) -> None:
        """Give an optimizer these settings.

        Args:
            optimizer: The optimizer.
            parameters: The module's parameters by name.
        """
        set_groups(optimizer, self.groups)
        if self.attributes[0]:
            write_attributes(optimizer, *self.attributes, parameters)

    def to_tree(self) -> dict[str, Any]:
        """For :func:`~.tree.flatten_tree`."""
        return {"groups": [dict(group) for group in self.groups], "attributes": self.attributes}


def read_settings(live: LiveState, index: int) -> Settings:
    """An optimizer's settings, as they are now.

    Args:
        live: The live state.
        index: Number of the optimizer.
    """
    optimizer = live.optimizers[index]
    groups = read_groups(optimizer)
    if not own_attributes(optimizer):
        return Settings(groups=groups)
    described, tensors, _ = read_attributes(optimizer, index, live.names_by_id, live.table_names()[index])
    return Settings(groups=groups, attributes=(described, {path: tensor.clone() for path, tensor in tensors.items()}))


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call.

    Args:
        optimizer: Which of the live state's optimizers.
        settings: When it was entered.
        parameters: Its parameters.
        gradients: Their gradients, unscaled and clipped: references.
        closure: What its closure gave, and the settings behind it, which it may have changed; empty without a closure.
        scaling: A gradient scaler's factor and verdict that a fused optimizer was given; None without.
    """

    optimizer: int
    settings: Settings
    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor | None]
    closure: tuple[Any, Settings] | None = None
    scaling: tuple[Tensor | None, Tensor | None] | None = None

    def versions(self) -> list[int]:
        """Version counters of the gradients: every change in place counts, except through ``.data``."""
        return [0 if g is None else g._version if type(g) is Tensor else local(g)._version for g in self.gradients]


def take_call(live: LiveState, index: int, entered: Settings, result: tuple[Any, ...] = ()) -> Call:
    """Training thread: the gradients of a call are complete.

    Args:
        live: The live state.
        index: Number of the optimizer.
        entered: Its settings when ``step`` was entered.
        result: What its closure gave, as a tuple of one; empty without a closure.
    """
    optimizer: Any = live.optimizers[index]
    parameters: list[Tensor] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    scaling = None
    if getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None:
        scale, found = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        scaling = (None if scale is None else scale.clone(), None if found is None else found.clone())
    return Call(
        optimizer=index,
        settings=entered,
        parameters=parameters,
        gradients=list(map(_GRADIENT, parameters)),
        closure=(_plain(result[0]), read_settings(live, index)) if result else None,
        scaling=scaling,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return local(value).clone()
    return value if _is_number(value) else None


def _is_number(value: object) -> bool:
    return type(value) in (bool, int, float)


def read_groups(optimizer: Any) -> tuple[dict[str, Any], ...]:
    """The settings of an optimizer's parameter groups: copies, but for what cannot change in place."""
    return tuple(
        {key: _copied(value) for key, value in group.items() if key not in _MEMBERS} for group in optimizer.param_groups
    )


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.deepcopy(value) if isinstance(value, (list, dict, set)) else value


def set_groups(optimizer: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Give the groups these settings; those that they do not have go, unless the class itself gives them a default."""
    for group, saved in zip(optimizer.param_groups, groups):
        for key in [k for k in group if k not in saved and k not in _MEMBERS]:
            if key not in getattr(optimizer, "defaults", {}):
                del group[key]
        for key, value in saved.items():
            current = group.get(key)
            if isinstance(current, Tensor) and isinstance(value, Tensor):
                current.copy_(value)
            elif isinstance(value, Tensor):
                group[key] = value.clone()
            else:
                group[key] = value


@dataclass(frozen=True, kw_only=True)
class Consumed:
    """A call's gradients, by parameter.

    Args:
        dense: Of the parameter's shape and dtype, strided: what files of gradients hold. Local shards.
        strides: Strides of those of them that do not lie in row-major order.
        others: Sparse ones, and of another dtype.
    """

    dense: dict[str, Tensor] = field(default_factory=dict)
    strides: dict[str, list[int]] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, call: Call, live: LiveState) -> Consumed:
        """Sort a call's gradients.

        Raises:
            UnsupportedStateError: One of them is of a kind that cannot be stored.
        """
        found = cls()
        names = live.names_by_id
        for parameter, gradient in zip(call.parameters, call.gradients):
            name = names.get(id(parameter))
            if gradient is None or name is None:
                continue
            mine = local(gradient).detach()
            weight = live.weight(name)
            if mine.layout is torch.strided and is_wrapper(mine):
                raise UnsupportedStateError(
                    f"the gradient of {name!r} is a {type(mine).__name__}: only plain tensors can be logged. Train "
                    "without that tensor subclass, or take SparseExpertCheckpoint."
                )
            if mine.layout is not torch.strided or mine.dtype != weight.dtype or mine.shape != weight.shape:
                found.others[name] = mine
                continue
            found.dense[name] = mine
            if not mine.is_contiguous():
                found.strides[name] = list(mine.stride())
        return found


def calls_tree(calls: Sequence[tuple[Call, Consumed]]) -> list[dict[str, Any]]:
    """What a file of one iteration's steps holds beside the dense gradients, for :func:`~.tree.flatten_tree`."""
    return [
        {
            "optimizer": call.optimizer,
            "settings": call.settings.to_tree(),
            "closure": None if call.closure is None else [call.closure[0], call.closure[1].to_tree()],
            "scaling": None if call.scaling is None else list(call.scaling),
            "strides": consumed.strides,
            "others": consumed.others,
        }
        for call, consumed in calls
    ]
