"""What a pipeline cannot train: refused in setup, before any rank waits for another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.hollow import is_hollow
from moetion_lightning.strategies.pipeline_cut import CUT_MARK
from moetion_lightning.strategies.step_logs import gathers_lists

__all__ = ["NEED_WHOLE_MODULE", "NEVER", "refuse_callbacks", "refuse_lists", "refuse_parts"]

_AVERAGING = (
    "the averaged weights are kept whole, and here every rank holds only its own stages. Remove the callback, or train "
    "without a pipeline"
)
#: Callbacks that cannot work where a rank holds only some stages, by class name (older versions of Lightning do not
#: have all of them): why, and what to do.
NEED_WHOLE_MODULE = {"WeightAveraging": _AVERAGING, "StochasticWeightAveraging": _AVERAGING}
#: Callbacks that cannot work where a batch runs as micro-batches.
NEVER = {
    "BaseFinetuning": (
        "it freezes layers and adds parameter groups while training, and a pipeline is cut once, with the parameters "
        "and groups of the first batch. Freeze in the module's __init__, or train without a pipeline"
    )
}


def refuse_parts(module: LightningModule, *, marked: bool) -> None:
    """A module that another strategy has cut has no values for the parameters of other ranks.

    Args:
        module: The module.
        marked: Whether the mark of a cut is enough, even if nothing in the module is empty.
    """
    if (marked and getattr(module, CUT_MARK, False)) or any(is_hollow(p) for p in module.parameters()):
        raise ConfigurationError(
            f"{type(module).__name__} holds the stages of one rank only, after training with another "
            "MoEtionStrategy: this module's other stages are on other ranks; expected a whole module. Make a new "
            "module, and load a checkpoint into it"
        )


def refuse_callbacks(callbacks: Sequence[Any], reasons: Mapping[str, str]) -> None:
    """Callbacks of these kinds, by class name.

    Args:
        callbacks: The trainer's.
        reasons: Why, and what to do.
    """
    for callback in callbacks:
        for kind in type(callback).__mro__:
            if kind.__name__ in reasons:
                raise ConfigurationError(
                    f"{type(callback).__name__} in Trainer(callbacks=...) under pipeline parallelism: "
                    f"{reasons[kind.__name__]}"
                )


def refuse_lists(module: LightningModule) -> None:
    """Metrics whose state grows with the data."""
    for name, metric in module.named_modules():
        if gathers_lists(metric):
            raise ConfigurationError(
                f"{type(module).__name__}.{name} ({type(metric).__name__}): this metric gathers lists, which are on "
                "the last stage only under pipeline parallelism. Use a metric with a fixed-size state (such as the "
                "binned form, thresholds=...), or compute it in a run without a pipeline"
            )
