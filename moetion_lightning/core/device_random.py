"""The default random generators of the accelerator, of whatever kind it is.

A process may see several devices and train on one. After a restart that may be another one: a rank's numbers are those
of the device that it uses, so the current device's generator comes first here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["accelerator_kind", "device_states", "set_device_states"]


def accelerator_kind() -> str:
    """What :attr:`torch.device.type` of this machine's accelerator is; "" if it has none."""
    device = torch.accelerator.current_accelerator()
    return device.type if device is not None and torch.accelerator.is_available() else ""


def device_states() -> tuple[str, list[Tensor]]:
    """Kind of the accelerator, and the states of its generators; none as long as nobody uses it."""
    kind, module = _in_use()
    if module is None:
        return kind, []
    if not hasattr(module, "get_rng_state_all"):  # there is one device
        return kind, [module.get_rng_state()]
    states = module.get_rng_state_all()
    return kind, [states[index] for index in _order(module, len(states))]


def set_device_states(kind: str, states: Sequence[Tensor]) -> None:
    """Put the states of :func:`device_states` back, as far as there are devices of that kind."""
    if not states or kind != accelerator_kind():
        return
    module: Any = torch.get_device_module(kind)
    if not hasattr(module, "get_rng_state_all"):
        module.set_rng_state(states[0])
        return
    for index, state in zip(_order(module, module.device_count()), states):
        module.set_rng_state(state, index)


def _in_use() -> tuple[str, Any]:
    # Asking what is available may begin to use it, and fork() must stay possible before that.
    device = torch.accelerator.current_accelerator()
    if device is None:
        return "", None
    module: Any = torch.get_device_module(device)
    in_use = module.is_initialized() if hasattr(module, "is_initialized") else torch.accelerator.is_available()
    return device.type, module if in_use else None


def _order(module: Any, count: int) -> list[int]:
    current = int(module.current_device())
    return [current, *(index for index in range(count) if index != current)]
