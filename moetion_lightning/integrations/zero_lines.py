"""Capturing scripts that know nothing of this package: Accelerate loops and Hugging Face Trainers.

Nothing is imported that the script does not import: classes are changed right after their modules were executed.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moetion_lightning.distributed.control import default_world
from moetion_lightning.engine.reporting import show_log_lines
from moetion_lightning.integrations._after_import import after_import
from moetion_lightning.integrations._automatic_loop import AutomaticLoop

__all__ = ["ZeroLines"]

_log = logging.getLogger(__name__)
_LOOP, _INDEX, _ACCELERATOR, _BY_TRAINER = "_moetion_loop", "_moetion_index", "_moetion_accelerator", "_moetion_trainer"
#: ``DataLoaderAdapter`` answers for its ``__class__`` by a property: this is the attribute itself.
_CLASS: Any = object.__dict__["__class__"]


class ZeroLines:
    """Lets every ``Accelerator`` and ``Trainer`` of this process be captured.

    A ``Trainer`` that has the callback already, and an accelerator that :func:`~.accelerate.attach` was called for, are
    left to themselves.

    Args:
        settings: Keyword settings, as of ``SparseExpertCheckpoint``.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._given = dict(settings)
        self._loops: list[AutomaticLoop] = []
        self._classes: dict[type, type] = {}
        self._accelerator_made = False
        self._watched = False
        self._watching: Any = None

    def install(self) -> None:
        """Begin: before the script runs."""
        after_import("accelerate.accelerator", self._change_accelerator)
        after_import("transformers.trainer", self._change_trainer)
        self._watching = register_optimizer_step_pre_hook(self._watch)

    @property
    def on_the_way(self) -> bool:
        """Whether a loop has still to come to where the window begins that was found."""
        return any(loop.on_the_way for loop in self._loops)

    def finish(self, *, completed: bool) -> None:
        """The script has ended.

        Args:
            completed: Whether it came to its own end.
        """
        if self._watching is not None:
            self._watching.remove()
        for loop in self._loops:
            loop.close(completed=completed)

    def _settings(self) -> dict[str, Any]:
        """For one run: a policy remembers its run."""
        return copy.copy(self._given) | (
            {"policy": copy.deepcopy(self._given["policy"])} if "policy" in self._given else {}
        )

    def _watch(self, optimizer: Optimizer, *args: Any) -> None:
        """The first optimizer step of all shows whether the script's loop was found."""
        if not self._watched:
            self._watched = True
            if not self._loops and not _is_followed(optimizer):
                show_log_lines(default_world()[0])
                _log.warning(self._why_nothing())

    def _why_nothing(self) -> str:
        if self._accelerator_made:
            return (
                "nothing is captured: the script makes an optimizer step, but iterates no dataloader that its "
                "Accelerator has prepared. Give model, optimizer and dataloader to accelerator.prepare(), and iterate "
                "what it returns."
            )
        return (
            "nothing is captured: the script makes an optimizer step, but has made neither an Accelerator nor a "
            "Trainer of Lightning or Hugging Face. In a loop of plain PyTorch, write SparseCheckpointing, with Fabric "
            "FabricCheckpointing, of moetion_lightning.integrations."
        )

    # --- Accelerate ----------------------------------------------------------------------------------------------

    def _change_accelerator(self, module: ModuleType) -> None:
        kind: Any = module.Accelerator
        init, prepare = kind.__init__, kind.prepare_data_loader

        @functools.wraps(init)
        def __init__(accelerator: Any, *args: Any, **kwargs: Any) -> None:
            self._accelerator_made = True
            init(accelerator, *args, **kwargs)

        @functools.wraps(prepare)
        def prepare_data_loader(accelerator: Any, *args: Any, **kwargs: Any) -> Any:
            loader = prepare(accelerator, *args, **kwargs)
            if any(loader is known for known in accelerator._dataloaders) and _INDEX not in vars(loader):
                vars(loader)[_INDEX] = len(accelerator._dataloaders) - 1
                vars(loader)[_ACCELERATOR] = accelerator
                _CLASS.__set__(loader, self._iterated_by_us(type(loader)))
            return loader

        load = kind.load_state

        @functools.wraps(load)
        def load_state(accelerator: Any, *args: Any, **kwargs: Any) -> Any:
            loop = self._loop_of(accelerator)
            if loop is not None and not loop.ended:  # which has a load_state of its own in the accelerator
                return accelerator.load_state(*args, **kwargs)
            return load(accelerator, *args, **kwargs)

        kind.__init__, kind.prepare_data_loader, kind.load_state = __init__, prepare_data_loader, load_state

    def _iterated_by_us(self, base: type) -> type:
        if base not in self._classes:
            zero_lines = self

            def __iter__(loader: Any) -> Iterator[Any]:
                make = functools.partial(base.__iter__, loader)  # type: ignore[attr-defined]
                loop = zero_lines._loop_of(vars(loader)[_ACCELERATOR])
                return make() if loop is None else loop.iterate(vars(loader)[_INDEX], loader, make)

            namespace = {"__iter__": __iter__, "__doc__": base.__doc__, "__module__": base.__module__}
            self._classes[base] = type(base.__name__, (base,), namespace)
        return self._classes[base]

    def _loop_of(self, accelerator: Any) -> AutomaticLoop | None:
        known = vars(accelerator)
        if _LOOP not in known:
            attached = getattr(known.get("backward"), "__module__", "") == AutomaticLoop.__mro__[1].__module__
            if _BY_TRAINER in known or attached or not (accelerator._models and accelerator._optimizers):
                return None
            known[_LOOP] = AutomaticLoop(accelerator, self._settings())
            self._loops.append(known[_LOOP])
        loop: AutomaticLoop = known[_LOOP]
        return loop

    # --- Hugging Face --------------------------------------------------------------------------------------------

    def _change_trainer(self, module: ModuleType) -> None:
        kind: Any = module.Trainer
        init = kind.__init__

        @functools.wraps(init)
        def __init__(trainer: Any, *args: Any, **kwargs: Any) -> None:
            from moetion_lightning.integrations.hf_trainer import MoEtionTrainerCallback

            init(trainer, *args, **kwargs)
            vars(trainer.accelerator)[_BY_TRAINER] = True
            if not any(isinstance(c, MoEtionTrainerCallback) for c in trainer.callback_handler.callbacks):
                trainer.add_callback(MoEtionTrainerCallback(**self._settings()))

        kind.__init__ = __init__


def _is_followed(optimizer: Optimizer) -> bool:
    """Whether something of this package hooks into its steps."""
    hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    return any(getattr(hook, "__module__", "").startswith("moetion_lightning.") for hook in hooks)
