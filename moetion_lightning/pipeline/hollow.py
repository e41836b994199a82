"""Parameters that a stage does not own: they keep shape and dtype, and take no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from moetion_lightning.errors import ConfigurationError

__all__ = ["hollow", "is_hollow"]

# The mark, not the storage, says what is hollow: moving the module
# to another device gives hollow parameters ordinary memory, and still nobody may train them.
_HOLLOW: WeakIdKeyDictionary = WeakIdKeyDictionary()


def hollow(module: nn.Module, keep: Iterable[str]) -> None:
    """Free all parameters of a module but some.

    A hollow parameter is all NaN (zero, if it is of integers), so that nothing computes with it unnoticed. It has the
    same shape, dtype and device, on one element of memory, and cannot be written in place. If it receives a gradient,
    the backward raises: the stage does not own it, so nobody would use it.

    Args:
        module: The whole module.
        keep: Names of the parameters to keep, as in ``module.named_parameters()``.

    Raises:
        ConfigurationError: A name in ``keep`` is no parameter of the module.
    """
    parameters = dict(module.named_parameters())
    kept = set(keep)
    if unknown := sorted(kept - parameters.keys()):
        raise ConfigurationError(
            f"hollow(keep=...): {unknown[:5]} are no parameters of {type(module).__name__}; expected names as in "
            "named_parameters(). Make a new plan if parameters were renamed or replaced"
        )
    for name, parameter in parameters.items():
        if name not in kept and not is_hollow(parameter):
            _empty(name, parameter)


def _empty(name: str, parameter: nn.Parameter) -> None:
    parameter.grad = None
    inexact = parameter.is_floating_point() or parameter.is_complex()
    fill = float("nan") if inexact else 0
    parameter.data = torch.full((), fill, dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    _HOLLOW[parameter] = None
    if inexact:
        # A hook can only be registered while the parameter requires grad; it stays for one that is unfrozen later.
        requires_grad = parameter.requires_grad
        parameter.requires_grad_(True)
        _HOLLOW[parameter] = parameter.register_post_accumulate_grad_hook(_refusal(name))
        parameter.requires_grad_(requires_grad)


def _refusal(name: str) -> Callable[[Tensor], None]:
    def refuse(parameter: Tensor) -> None:
        parameter.grad = None
        raise ConfigurationError(
            f"parameter {name!r} received a gradient on a pipeline stage that does not own it: this micro-batch used "
            "it otherwise than the one from which the plan was made. Make the plan from a micro-batch that uses every "
            "parameter as training does, or declare the stages with configure_pipeline()"
        )

    return refuse


def is_hollow(parameter: Tensor) -> bool:
    """Whether :func:`hollow` emptied the parameter."""
    return parameter in _HOLLOW
