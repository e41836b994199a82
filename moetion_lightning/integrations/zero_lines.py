"""Capturing scripts that know nothing of this package: Accelerate loops and Hugging Face Trainers.

Nothing is imported that the script does not import: classes are changed right after their modules were executed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from moetion_lightning.integrations._after_import import after_import
from moetion_lightning.integrations._automatic_loop import AutomaticLoop
from moetion_lightning.integrations._settings import Settings

__all__ = ["ZeroLines"]

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

    def install(self) -> None:
        """Begin: before the script runs."""
        after_import("accelerate.accelerator", self._change_accelerator)
        after_import("transformers.trainer", self._change_trainer)

    def finish(self, *, completed: bool) -> None:
        """The script has ended.

        Args:
            completed: Whether it came to its own end.
        """
        for loop in self._loops:
            loop.close(completed=completed)

    def _settings(self) -> Settings:
        """For one run: a policy remembers its run."""
        return copy.copy(self._given) | (  # type: ignore[return-value]
            {"policy": copy.deepcopy(self._given["policy"])} if "policy" in self._given else {}
        )

    # --- Accelerate ----------------------------------------------------------------------------------------------

    def _change_accelerator(self, module: ModuleType) -> None:
        kind: Any = module.Accelerator
        prepare = kind.prepare_data_loader

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

        kind.prepare_data_loader, kind.load_state = prepare_data_loader, load_state

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
