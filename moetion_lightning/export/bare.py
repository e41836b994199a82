"""A module and optimizers that hold a state, made from what manifests say of them."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moetion_lightning.errors import ConfigurationError, UnsupportedStateError

__all__ = ["bare_module", "find_optimizer", "make_optimizers"]


def bare_module(
    forms: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    buffers: Mapping[str, Tensor],
    tied: Mapping[str, str],
    transient: Collection[str],
    device: torch.device,
) -> nn.Module:
    """A module without a forward, with the parameters and buffers of another one by name.

    Args:
        forms: Dtype and shape of each parameter, in order; their values are zeros.
        buffers: The buffers' values, which are copied.
        tied: Further names of parameters and buffers.
        transient: Buffers that are in no ``state_dict()``.
        device: Where it is.
    """
    root = nn.Module()
    made: dict[str, Any] = {}
    for name, (dtype, shape) in forms.items():
        made[name] = nn.Parameter(torch.zeros(tuple(shape), dtype=dtype, device=device), requires_grad=False)
        owner, last = _owner(root, name)
        owner.register_parameter(last, made[name])
    for name, buffer in buffers.items():
        made[name] = buffer.to(device, copy=True)
        owner, last = _owner(root, name)
        owner.register_buffer(last, made[name], persistent=name not in transient)
    for name, other in tied.items():
        owner, last = _owner(root, name)
        if isinstance(made.get(other), nn.Parameter):
            owner.register_parameter(last, made[other])
        elif other in made:
            owner.register_buffer(last, made[other], persistent=name not in transient)
    return root


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        child = root._modules[part]
        assert child is not None  # only modules are added
        root = child
    return root, last


def make_optimizers(
    classes: Sequence[str],
    groups: Sequence[Sequence[Mapping[str, Any]]],
    parameters: Mapping[str, nn.Parameter],
    allowed: Collection[str],
) -> list[Optimizer]:
    """Optimizers with their parameter groups.

    Args:
        classes: ``module:Class`` of each.
        groups: Of each its groups: ``parameters``, their names as JSON, and ``settings``.
        parameters: By name.
        allowed: Classes besides torch's own that may be imported, as ``module.Class``.

    Raises:
        ConfigurationError: A class is not allowed.
        UnsupportedStateError: A class cannot be imported, or made from its groups' settings.
    """
    made = []
    for name, own in zip(classes, groups):
        kind = find_optimizer(name, allowed)
        given = [
            {**group["settings"], "params": [parameters[p] for p in json.loads(group["parameters"]) if p in parameters]}
            for group in own
        ]
        made.append(_made(kind, given))
    return made


def _made(kind: Any, groups: list[dict[str, Any]]) -> Optimizer:
    settings = groups[0] if groups else {}
    needed = [
        argument.name
        for argument in list(inspect.signature(kind).parameters.values())[1:]
        if argument.default is inspect.Parameter.empty
        and argument.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ]
    given: list[Any] = groups
    if not issubclass(kind, Optimizer):  # need not know of groups; these are put back later
        given = [parameter for group in groups for parameter in group["params"]]
    try:
        optimizer: Optimizer = kind(given, **{name: settings[name] for name in needed if name in settings})
    except Exception as error:  # whatever a user's class raises
        raise UnsupportedStateError(
            f"{kind.__module__}.{kind.__qualname__} cannot be made from its parameter groups alone "
            f"({type(error).__name__}: {error}). Save an ordinary checkpoint from the training script instead."
        ) from error
    return optimizer


def find_optimizer(name: str, allowed: Collection[str]) -> Any:
    """The class of an optimizer; only torch's own are imported unless others are allowed.

    Args:
        name: ``module:Class``.
        allowed: Further classes, as ``module.Class``.

    Raises:
        ConfigurationError: It is not allowed.
        UnsupportedStateError: It cannot be imported, or is no optimizer.
    """
    module, _, path = name.partition(":")
    dotted = name.replace(":", ".")
    if module == "__main__":  # another file in this process, and importing that one would train
        raise UnsupportedStateError(
            f"the optimizer {path} is defined in the training script itself, which an export does not run. Define it "
            "in a module that the script imports, or save an ordinary checkpoint from the script."
        )
    is_torchs = module == "torch.optim" or module.startswith("torch.optim.")
    if not is_torchs and dotted not in allowed:
        raise ConfigurationError(
            f"the optimizer {dotted} is none of torch.optim: to export, its code would be imported and run. If you "
            f"trust it, and it can be imported here, add: --allow {dotted}"
        )
    try:
        kind: Any = importlib.import_module(module)
        for part in path.split("."):
            kind = getattr(kind, part)
    except (ImportError, AttributeError) as error:
        raise UnsupportedStateError(
            f"the optimizer {dotted} cannot be imported ({error}). Run the command where the training script's "
            "packages are installed, from its folder if the class is defined there."
        ) from error
    is_class = isinstance(kind, type) and (issubclass(kind, Optimizer) or not is_torchs)
    if not is_class or (is_torchs and not kind.__module__.startswith("torch.optim")):
        raise UnsupportedStateError(f"{dotted}, which the window names, is no optimizer.")
    return kind
