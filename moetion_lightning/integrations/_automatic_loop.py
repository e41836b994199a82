"""The hand-written Accelerate loop of a script that knows nothing of this package."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from moetion_lightning.core.step_hooks import hook_steps
from moetion_lightning.errors import ForeignWindowError
from moetion_lightning.integrations._automatic_saves import OwnSaves
from moetion_lightning.integrations._loaders import Followed, follow
from moetion_lightning.integrations._parts import unwrap_optimizer
from moetion_lightning.integrations.accelerate import AcceleratedLoop
from moetion_lightning.integrations.loop import Position
from moetion_lightning.session import SessionSettings
from moetion_lightning.session.beginning import Beginning
from moetion_lightning.session.skipped_batches import refuse_skipping

__all__ = ["AutomaticLoop"]

_log = logging.getLogger(__name__)
_WHERE = "a loop over a prepared dataloader, in a script without attach(accelerator)"
_AT_ONCE = (
    "the script iterates several prepared dataloaders at once, as in zip(a, b) or with next(iterator) in a loop, and "
    "makes optimizer steps: a restart could not continue all of them. Write `run = moetion_lightning.attach("
    "accelerator)` and `for step, (a, b) in run.steps(first, second, epochs=...)`"
)


class _Place(Position):
    """Where the loop stands.

    Attributes:
        index: Which of the prepared loaders trains; -1 while no step was made.
        stepped: For each pass over it so far, whether a step was made in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.index = -1
        self.stepped: list[bool] = []

    def snapshot(self) -> dict[str, Any]:
        return {**super().snapshot(), "index": self.index, "stepped": list(self.stepped)}


class AutomaticLoop(AcceleratedLoop):
    """Captures the loop over the prepared loader in whose passes the optimizer steps.

    The script's own variables cannot be taken to where they were: when it is started again, it counts from its
    beginning. Its passes over the training loader that are done give no batch; the one in which the window begins gives
    the rest of its batches. Passes over other loaders between them give one batch: what the script measures there is of
    no use, and is neither logged nor saved (by the accelerator, torch or safetensors). Passes before the first step are
    what they were.

    Args:
        accelerator: The accelerator.
        settings: Keyword settings.
    """

    def __init__(self, accelerator: Any, settings: Mapping[str, Any]) -> None:
        self._followed: dict[int, Followed] = {}
        self._passes: dict[int, list[bool]] = {}
        self._within: list[int] = []  # loaders that are being iterated, the innermost last
        self._making: Any = None
        self._why_not = ""
        self._ended = False
        refuse_skipping(SessionSettings.read(settings, _WHERE).config, _WHERE)
        super().__init__(accelerator, settings)
        self._stop_warning()
        self._put_aside()
        raw = [unwrap_optimizer(optimizer) for optimizer in accelerator._optimizers]
        self._on_step = [handle for optimizer in raw for handle in hook_steps(optimizer, self._steps_now)]
        self._saves = OwnSaves(lambda: self.on_the_way or self.replaying)
        if self.on_the_way:
            self._saves.begin()

    @property
    def ended(self) -> bool:
        """Whether nothing is captured any more."""
        return self._ended

    @property
    def on_the_way(self) -> bool:
        """Whether the script has still to come to where the window begins that was found."""
        return not self._ended and self._run.saved is not None

    def close(self, *, completed: bool = True) -> None:
        """See :meth:`GuidedLoop.close`."""
        if not self._ended:
            self._ended = True
            self._saves.end()
            for handle in self._on_step:
                handle.remove()
            for followed in self._followed.values():
                followed.release()
            super().close(completed=completed)

    def iterate(self, index: int, loader: Any, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """A pass over a prepared loader.

        Args:
            index: Which of the prepared loaders.
            loader: The loader.
            make: Its own ``__iter__``.
        """
        if self._why_not and not self._ended:
            self._give_up()
        if self._ended or self._making is loader:
            return make()
        return self._pass(index, loader, make)

    # --- inside --------------------------------------------------------------------------------------------------

    def _give_up(self) -> None:
        _log.warning("%s; nothing is captured any more, and the windows are removed", self._why_not)
        self.close()

    def _open(self, root_dir: str | os.PathLike[str], module: nn.Module, beginning: Beginning) -> None:
        self._position: _Place = _Place()
        super()._open(root_dir, module, beginning)
        saved = self._run.saved
        if saved is not None and "stepped" not in saved["position"]:
            self._run.close(completed=False)
            raise ForeignWindowError(
                "the window that was found was captured in a loop over run.steps(dataloader), which this script does "
                "not have. Undo the change, or start afresh with another job_id."
            )

    def _pass(self, index: int, loader: Any, make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        passes = self._passes.setdefault(index, [])
        number = len(passes)
        passes.append(False)
        saved = self._run.saved
        if saved is not None:
            position = saved["position"]
            self._run.engine.say_once(
                f"the script is taken to where it was by its training dataloader: {sum(position['stepped'][:-1])} "
                "passes that are done give no batch, the next one goes on in its middle. Variables of the script (its "
                "own counters and sums) begin anew; what depends on them differs from a run that was not interrupted"
            )
            if index != position["index"] or number < len(position["stepped"]) - 1:
                passes[number] = index == position["index"] and position["stepped"][number]
                yield from () if passes[number] else self._done_again(make, position["index"])
                return
            passes[:] = position["stepped"]
        self._within.append(index)
        try:
            if self._position.index in (-1, index):
                yield from self._followed_pass(index, loader)
            else:
                yield from make()
        finally:
            self._within.remove(index)

    def _done_again(self, make: Callable[[], Iterator[Any]], training: int) -> Iterator[Any]:
        """A pass without steps, of a script that is on its way to where the window begins."""
        return itertools.islice(make(), 1) if any(self._passes.get(training, ())) else make()

    def _followed_pass(self, index: int, loader: Any) -> Iterator[Any]:
        if index not in self._followed:
            self._followed[index] = follow(loader)
        followed = self._followed[index]
        position = self._position
        if not self._run.begun:
            if self._run.saved is not None:
                position.index, position.stepped, position.loaders = index, self._passes[index], [followed]
            self._run.begin_loop(position, autocast=self._autocast())
        elif index == position.index:  # the last pass may have been left in its middle
            self._run.boundary()
        self._saves_again()
        self._making = loader
        try:
            batches = followed.iterate()
        finally:
            self._making = None
        try:
            for batch in batches:
                position.step += 1
                if not self._ended and position.index in (-1, index):
                    self._run.drew(batch, [followed])
                yield batch
                self._batch_done(index)
        finally:
            followed.finish()

    def _batch_done(self, index: int) -> None:
        training = index == self._position.index
        if training and len(self._within) > 1:
            self._why_not = _AT_ONCE
        if self._ended:
            return
        if self._why_not:
            self._give_up()
        elif training:
            self._run.boundary()
            self._saves_again()

    def _saves_again(self) -> None:
        """The script's own files are written again when the state is whole."""
        if not (self.on_the_way or self.replaying):
            self._saves.end()

    def _steps_now(self, *args: Any) -> None:
        """An optimizer is about to step."""
        position = self._position
        innermost = self._within[-1] if self._within else -1
        if innermost == -1:
            self._why_not = "the script makes optimizer steps outside of a loop over a prepared dataloader"
        elif len(self._within) > 1:
            self._why_not = _AT_ONCE
        elif position.index == -1:
            position.index, position.stepped = innermost, self._passes[innermost]
            position.loaders = [self._followed[innermost]]
        elif position.index != innermost:
            self._why_not = "the script makes optimizer steps in loops over several prepared dataloaders"
        if innermost != -1:
            self._passes[innermost][-1] = True

    def _put_aside(self) -> None:
        """While the script comes to where it was, what it would save or log is of no use."""
        accelerator = self._accelerator

        def quiet(original: Callable[..., Any], *, also_in_replay: bool) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if self._run.saved is not None or (also_in_replay and self.replaying):
                    return None
                return original(*args, **kwargs)

            return call

        for name in ("save_state", "save_model", "save", "log"):
            self._patches.put(accelerator, name, quiet(getattr(accelerator, name), also_in_replay=name != "log"))

        def load_state(*args: Any, **kwargs: Any) -> Any:
            _log.warning("accelerator.load_state() was called: the script restarts by itself, and is not captured")
            if self.on_the_way:
                self._run.prefer("accelerator.load_state()")
            self.close()
            return accelerator.load_state(*args, **kwargs)

        self._patches.put(accelerator, "load_state", load_state)
