"""Lightning's own checkpoint of a run: what a window keeps of it, and how the trainer restores it.

Weights, optimizer state, loops, schedulers and the states of callbacks never come from what the user's checkpoint hooks
leave in the dict: they are taken before the hooks run. What hooks add is kept beside them, and given back to them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer import call
from torch import nn

from moetion_lightning.callbacks._ranks import gathers_state
from moetion_lightning.core.instance_patches import InstancePatches
from moetion_lightning.core.module_table import module_table

__all__ = ["CheckpointSeam"]

_PACKAGE = __name__.partition(".")[0]
#: Of a checkpoint: what the trainer itself reads from it, apart from weights and optimizer state.
_OWN = ("epoch", "global_step", "pytorch-lightning_version", "callbacks", "lr_schedulers")


class CheckpointSeam:
    """Takes and restores it.

    Args:
        trainer: The trainer.
        patches: What is replaced on the trainer's objects until the run ends.
    """

    def __init__(self, trainer: Trainer, patches: InstancePatches) -> None:
        self._trainer = trainer
        self._patches = patches
        self._placed = InstancePatches()  # only while a checkpoint is restored
        self._taken: dict[str, Any] | None = None
        self._other_loops: dict[str, Any] | None = None  # none of which moves while training does
        #: Puts weights into the module where the trainer would load them; None leaves them to the engine.
        self.load_weights: Callable[[], None] | None = None

    # --- taking --------------------------------------------------------------------------------------------------

    def dump(self, counters: dict[str, Any], *, weights: bool) -> dict[str, Any]:
        """What an ordinary checkpoint of this moment would hold, without what others keep.

        Args:
            counters: Progress of the fit loop.
            weights: Whether weights are in it (as live tensors), where the strategy has them at hand. The optimizers'
                states and the loaders' states are not.

        Returns:
            ``own``: what the trainer restores; ``shown``: what the user's hooks left of the dict, for the user's hooks.
        """
        self._taken = {}
        connector = self._trainer._checkpoint_connector
        if self._other_loops is None:
            self._other_loops = connector._get_loops_state_dict()
        loops = {**self._other_loops, "fit_loop": _copy(counters)}
        try:
            weights = weights and not gathers_state(self._trainer) and self._weights_are_seen()
            with self._dumping(loops, weights=weights):
                shown = connector.dump_checkpoint(weights_only=False)
            # Without a callback of ours in the trainer's list (a tuner has taken it away) there was no look before.
            own = self._taken or self._own_part(shown)
        finally:
            self._taken = None
        for key in self._hyper_parameters():
            shown.pop(key, None)
        states = shown.get("optimizer_states")
        if states is not None:
            shown["optimizer_states"] = [
                {**state, "state": {}} if isinstance(state, dict) and "state" in state else state for state in states
            ]
        now = {"fit_loop": counters}
        if "loops" in shown:
            shown["loops"] = now
        return {"own": {**own, "loops": now}, "shown": shown}

    def _weights_are_seen(self) -> bool:
        """Whether anything looks at, or adds to, a checkpoint's weights: to list them takes long if they are many."""
        trainer: Any = self._trainer
        module, datamodule = trainer.lightning_module, trainer.datamodule
        kinds: list[tuple[type, Any]] = [
            (LightningModule, module),
            *((LightningDataModule, d) for d in [datamodule] if d is not None),
        ]
        kinds += [(Callback, c) for c in trainer.callbacks if type(c).__module__.partition(".")[0] != _PACKAGE]
        hooks = ("on_save_checkpoint", "on_load_checkpoint")
        pairs = [(getattr(type(value), h, None), getattr(base, h, None)) for base, value in kinds for h in hooks]
        if any(own is not None and own is not given for own, given in pairs):
            return True
        if any(name in vars(module) for name in ("state_dict", "load_state_dict", *hooks)):
            return True
        return bool(module_table(module).where(_adds_to_state_dict))

    def note_before_hooks(self, checkpoint: Mapping[str, Any]) -> None:
        """Called as the first of all checkpoint hooks, also for checkpoints that are not for a window."""
        if self._taken is not None:
            self._taken = self._own_part(checkpoint)

    def _own_part(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        trainer = self._trainer
        keys = [*_OWN, type(trainer.precision_plugin).__qualname__]
        if trainer.datamodule is not None:  # type: ignore[attr-defined]
            keys.append(type(trainer.datamodule).__qualname__)  # type: ignore[attr-defined]
        found = _copy({key: checkpoint[key] for key in keys if key in checkpoint})
        return {**found, "entries": self._entries(checkpoint.get("state_dict", {}))}

    def _entries(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """What modules put into ``state_dict()`` besides parameters, buffers and extra state."""
        if not state_dict:
            return {}
        module: Any = self._trainer.lightning_module
        if any(getattr(type(module), n) is not getattr(LightningModule, n) for n in ("state_dict", "load_state_dict")):
            return {}  # its keys need not be what modules below it gave
        known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        known |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
        return {k: v for k, v in state_dict.items() if k not in known and not k.endswith("_extra_state")}

    def _hyper_parameters(self) -> dict[str, Any]:
        """The keys under which a checkpoint keeps hyper-parameters, which the script gives again, with their values."""
        found: dict[str, Any] = {}
        trainer: Any = self._trainer
        for holder in (trainer.lightning_module, trainer.datamodule):
            if holder is not None and holder.hparams:
                if hasattr(holder, "_hparams_name"):
                    found[holder.CHECKPOINT_HYPER_PARAMS_NAME] = holder._hparams_name
                found[holder.CHECKPOINT_HYPER_PARAMS_KEY] = dict(holder.hparams)
                if not isinstance(holder.hparams, dict):
                    found[holder.CHECKPOINT_HYPER_PARAMS_TYPE] = type(holder.hparams)
        return found

    @contextlib.contextmanager
    def _dumping(self, loops: Mapping[str, Any], *, weights: bool) -> Iterator[None]:
        """The loops' states are known; weights and optimizer state, which may have to be gathered, come if asked."""
        strategy: Any = self._trainer.strategy
        patches = InstancePatches()
        patches.put(self._trainer._checkpoint_connector, "_get_loops_state_dict", lambda: loops)
        if not weights:
            patches.put(strategy, "lightning_module_state_dict", dict)
            patches.put(strategy, "optimizer_state", lambda optimizer: {"state": {}, "param_groups": []})
        try:
            yield
        finally:
            patches.undo()

    # --- restoring -----------------------------------------------------------------------------------------------

    def inject(self, choose: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]) -> None:
        """Let the trainer restore what ``choose`` returns, in its own order.

        Args:
            choose: Called with the checkpoint that the trainer has read, which is empty if it was given none. Returns
                what to restore instead (what :meth:`dump` gave); None to leave it at that.
        """
        connector = self._trainer._checkpoint_connector
        original = connector.resume_start

        def resume_start(*args: Any, **kwargs: Any) -> None:
            undo()  # the trainer's own call is the first one
            original(*args, **kwargs)
            injected = choose(connector._loaded_checkpoint or {})
            if injected is not None:
                connector._ckpt_path = None
                self._place(injected)
                resume_end = connector.resume_end

                def resume_end_and_undo() -> None:
                    self._placed.undo()  # checkpoints that are restored later (by a tuner) are ordinary ones
                    undo_end()
                    resume_end()

                undo_end = self._patches.put(connector, "resume_end", resume_end_and_undo)

        undo = self._patches.put(connector, "resume_start", resume_start)

    def restore_in_place(self, checkpoint: Mapping[str, Any]) -> None:
        """Let a trainer that is training restore a checkpoint now.

        Args:
            checkpoint: What :meth:`dump` gave.
        """
        connector = self._trainer._checkpoint_connector
        self._place(checkpoint)
        try:
            connector.restore_datamodule()
            connector.restore_model()
            connector.restore_callbacks()
            connector.restore_training_state()
        finally:
            self._placed.undo()
            connector._loaded_checkpoint = {}

    def remove(self) -> None:
        """Leave the trainer as it was, also where restoring has failed half-way."""
        self._placed.undo()

    def _place(self, checkpoint: Mapping[str, Any]) -> None:
        connector: Any = self._trainer._checkpoint_connector
        trainer = self._trainer
        own = {"state_dict": {}, "optimizer_states": [], **_copy(checkpoint["own"])}
        shown = {"pytorch-lightning_version": own["pytorch-lightning_version"], **_copy(checkpoint["shown"])}
        shown |= self._hyper_parameters()
        connector._loaded_checkpoint = own
        restore_model = connector.restore_model

        def restore_model_from_shown() -> None:
            if not connector._loaded_checkpoint:
                return
            connector._loaded_checkpoint = shown
            try:
                restore_model()  # calls the module's hook, then our `load_model_state_dict`
            finally:
                connector._loaded_checkpoint = own

        def restore_callbacks() -> None:
            if connector._loaded_checkpoint:
                call._call_callbacks_on_load_checkpoint(trainer, shown)
                call._call_callbacks_load_state_dict(trainer, own)

        self._placed.put(connector, "restore_model", restore_model_from_shown)
        self._placed.put(connector, "restore_callbacks", restore_callbacks)
        self._placed.put(
            trainer.strategy, "load_model_state_dict", lambda *args, **kwargs: self._load_weights(own["entries"])
        )
        # The engine puts optimizers back itself: `load_state_dict` would change dtypes, and refuse groups that
        # were added while training.
        self._placed.put(connector, "restore_optimizers", lambda: None)

    def _load_weights(self, entries: Mapping[str, Any]) -> None:
        """In place of the trainer's strict load of what hooks have left."""
        if self.load_weights is not None:
            self.load_weights()
        module: Any = self._trainer.lightning_module
        if entries:
            module.load_state_dict({**module.state_dict(), **entries}, strict=False)


def _adds_to_state_dict(module: nn.Module) -> bool:
    kind = type(module)
    own = LightningModule if isinstance(module, LightningModule) else nn.Module
    names = ("state_dict", "_save_to_state_dict", "load_state_dict", "_load_from_state_dict", "get_extra_state")
    changed = any(getattr(kind, name) is not getattr(own, name) for name in names) and not _is_torchs(kind)
    return changed or bool(module._state_dict_hooks or module._state_dict_pre_hooks)


def _is_torchs(kind: type) -> bool:
    """Torch's own modules read older forms of their state in methods of their own, and write parameters and buffers."""
    return kind.__module__.startswith("torch.nn.modules.")


def _copy(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that hooks cannot change by adding to, or taking from, its upper levels."""
    return {key: _shallow(value) for key, value in checkpoint.items()}


def _shallow(value: Any) -> Any:
    if type(value) is dict:
        return {key: dict(item) if type(item) is dict else item for key, item in value.items()}
    return list(value) if type(value) is list else value
