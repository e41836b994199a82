"""The loop of a ``Trainer`` of transformers 4.57 to 5.2: one method, whose counters are local variables."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import transformers.trainer
from torch import Tensor

from moetion_lightning.integrations._trainer_loop import NEEDED, FollowedLoader, LoaderInPlace, TrainerLoop

__all__ = ["OlderTrainerLoop"]


class OlderTrainerLoop(TrainerLoop):
    """Where such a loop stands.

    Epoch and batches are given to it as those of a checkpoint, of which it asks the
    step, and the sum of the losses since the last log line is seen where the loop gives it to who logs.

    Args:
        trainer: The trainer.

    Raises:
        ConfigurationError: This version of transformers has another loop.
    """

    needed: ClassVar[tuple[str, ...]] = (
        *NEEDED,
        *("get_train_dataloader", "_maybe_log_save_evaluate", "_load_scaler", "_load_callback_state"),
        *("_load_rng_state", "_load_from_checkpoint"),
    )

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._sum: Tensor | None = None  # of losses, as the loop would have it now if it had begun earlier
        self._folder = ""

    def remove(self) -> None:
        """See :class:`TrainerLoop`."""
        super().remove()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _follow_passes(self) -> None:
        trainer = self._trainer
        vars(trainer).pop("_tr_loss", None)  # of an earlier training
        make, tell = trainer.get_train_dataloader, trainer._maybe_log_save_evaluate

        def get_train_dataloader() -> _Passes:
            return _Passes(make(), self._iterate)

        def noting_maybe_log_save_evaluate(tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
            if self._sum is not None:
                tr_loss.copy_(self._sum)
                self._sum = None
            trainer._tr_loss = tr_loss  # the name that it has in later versions
            tell(tr_loss, *args, **kwargs)

        self._patch("get_train_dataloader", get_train_dataloader)
        self._patch("_maybe_log_save_evaluate", noting_maybe_log_save_evaluate)

    def _iterate(self, loader: Any, epoch: int, skipped: int) -> Iterator[Any]:
        if self._followed is not None and self._source is loader:
            self._followed.finish()
        if self._begin_pass(loader, epoch) is not None:
            skipped = 0  # it continues by itself
        elif skipped:
            self._drawn = skipped
        assert self._followed is not None
        return iter(FollowedLoader(loader, self._followed, lambda: None, skipped, self._drew))

    def _trained(self, loss: Tensor) -> None:
        """Until the loop has the sum: add as it does."""
        total, trainer = self._sum, self._trainer
        if total is None:
            return
        if trainer.args.logging_nan_inf_filter and not torch.isfinite(loss):
            self._sum = total + total / (1 + trainer.state.global_step - trainer._globalstep_last_logged)
        else:
            self._sum = total + loss

    def restore(self, state: Mapping[str, Any]) -> None:
        """See :class:`TrainerLoop`."""
        super().restore(state)
        if "_tr_loss" in state["counters"]:
            self._sum = getattr(self._trainer, "_tr_loss", None)

    def _begin_there(self, position: Mapping[str, Any]) -> str:
        trainer, args = self._trainer, self._trainer.args
        self._folder = tempfile.mkdtemp(prefix="moetion-")
        compared = {name: getattr(args, name) for name in ("logging_steps", "eval_steps", "save_steps")}
        compared["train_batch_size"] = args.per_device_train_batch_size
        with open(os.path.join(self._folder, "trainer_state.json"), "w", encoding="utf-8") as file:
            json.dump(compared, file)
        ignores, args.ignore_data_skip = args.ignore_data_skip, False
        made: list[Any] = []

        def load_scaler(checkpoint: str) -> None:
            made.append(trainer.state)  # as it is for this run, before one that is loaded takes its place

        def load_callback_state() -> None:
            trainer.state = made[0]
            self._restore_state(position)
            epoch, updates = position["epoch"], position["batches"] // trainer.args.gradient_accumulation_steps
            trainer.state.global_step = _Step(trainer.state, epoch, updates)

        def undo() -> None:
            args.ignore_data_skip = ignores

        self._until_restored += [
            self._patch("_load_scaler", load_scaler),
            self._patch("_load_callback_state", load_callback_state),
            self._patch("_load_from_checkpoint", lambda *args: None),
            undo,
        ]
        return self._folder


class _Step(int):
    """The step of a checkpoint; the loop divides it by the updates of an epoch, to know where it is. Only once."""

    _of: tuple[Any, int, int]

    def __new__(cls, state: Any, epoch: int, updates: int) -> _Step:
        step = super().__new__(cls, state.global_step)
        step._of = (state, epoch, updates)
        return step

    def __floordiv__(self, updates_per_epoch: int) -> int:
        return self._of[1]

    def __mod__(self, updates_per_epoch: int) -> int:
        state, _, updates = self._of
        state.global_step = int(self)
        return updates


class _Passes(LoaderInPlace):
    """Stands for the training loader.

    Args:
        loader: The loader.
        iterate: Begins a pass: gets the loader, the epoch, and the batches to pass over.
    """

    def __init__(self, loader: Any, iterate: Callable[[Any, int, int], Iterator[Any]]) -> None:
        super().__init__(loader)
        self._moetion_iterate = iterate
        self._moetion_epoch = self._moetion_skipped = 0

    def set_epoch(self, epoch: int) -> None:
        self._moetion_epoch = epoch
        if hasattr(self._moetion_loader, "set_epoch"):
            self._moetion_loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        skipped, self._moetion_skipped = self._moetion_skipped, 0
        return self._moetion_iterate(self._moetion_loader, self._moetion_epoch, skipped)


def _skipping(original: Callable[..., Any]) -> Callable[..., Any]:
    def skip_first_batches(loader: Any, num_batches: int = 0) -> Any:
        if not isinstance(loader, _Passes):
            return original(loader, num_batches)
        loader._moetion_skipped = num_batches  # the Trainer would go on with another loader
        return loader

    return skip_first_batches


if not hasattr(transformers.trainer.Trainer, "_run_epoch"):
    _names = vars(transformers.trainer)
    _names["skip_first_batches"] = _skipping(_names["skip_first_batches"])
