"""Exact sparse checkpointing of hand-written training loops."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from moetion_lightning.core.run_state import get_rng, set_rng
from moetion_lightning.data.parts import length_of
from moetion_lightning.errors import ConfigurationError, ForeignWindowError
from moetion_lightning.integrations._loaders import Followed, follow
from moetion_lightning.integrations._other_loaders import OtherLoader, OtherLoaders, find_loaders, script_variables
from moetion_lightning.integrations._parts import Parts
from moetion_lightning.integrations._run import Run
from moetion_lightning.session import SessionSettings
from moetion_lightning.session.beginning import Beginning, of_optimizers, of_schedulers

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GuidedLoop", "SparseCheckpointing"]

_NO_MORE = object()


class Position:
    """Where the loop stands.

    Attributes:
        step: Batches that are done, over the whole training.
        epoch: Epochs that are done.
        skipped: Batches to pass over when the first epoch begins.
        loaders: The loaders of the present epoch.
        others: Loaders that the script goes through beside them.
        script: The script's variables that lead to generators.
    """

    def __init__(self) -> None:
        self.step = 0
        self.epoch = 0
        self.skipped = 0
        self.loaders: list[Followed] = []
        self.others: OtherLoaders | None = None
        self.script: dict[str, object] = {}

    def snapshot(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "loaders": [loader.snapshot() for loader in self.loaders],
            "others": self.others.snapshot() if self.others is not None else {},
        }

    def lengths(self) -> list[int | None]:
        """Batches of a pass over each loader; None of a stream."""
        return [loader.length() for loader in self.loaders]

    def load(self, state: Mapping[str, Any]) -> None:
        """The counters alone."""
        self.step, self.epoch = int(state["step"]), int(state["epoch"])

    def restore(self, state: Mapping[str, Any]) -> None:
        self.load(state)
        if len(state["loaders"]) != len(self.loaders):
            raise ForeignWindowError(
                f"the window was captured in a loop over {len(state['loaders'])} loaders, this one has "
                f"{len(self.loaders)}. Undo the change, or start afresh with resume='never' or another job_id."
            )
        for loader, saved in zip(self.loaders, state["loaders"]):
            loader.restore(saved)
        if self.others is not None:
            self.others.restore(state["others"])

    def sources(self) -> list[Any]:
        return [loader.source for loader in self.loaders]

    def parts(self) -> dict[str, object]:
        roots = {
            f"loader{index}.{role}": part
            for index, loader in enumerate(self.loaders)
            for role, part in loader.parts().items()
        }
        return {**roots, **self.script, **(self.others.roots() if self.others is not None else {})}

    def release(self) -> None:
        """Leave all loaders as they were."""
        for loader in self.loaders:
            loader.release()
        if self.others is not None:
            self.others.release()
            self.others = None


class GuidedLoop:
    """What the adapters of hand-written loops have in common: the loop asks :meth:`steps` for its batches.

    An iteration ends when the loop asks for the next batch: the optimizer and the schedulers have stepped, and the
    weights have not moved since. After a failure the first batch is the one at which the window begins that was found;
    the loop then trains as usual, and after at most two windows it is where it was.

    Args:
        settings: Keyword settings.
        where: The user's call, for messages.
    """

    def __init__(self, settings: Mapping[str, Any], where: str) -> None:
        self._where = where
        self._settings = SessionSettings.read(settings, where)
        self._registered: dict[str, Any] = {}
        self._position = Position()
        self._in_epochs = False
        self._iterated = False  # this epoch, or outside of epochs() at all
        self._opened: Run | None = None

    def _open(self, root_dir: str | os.PathLike[str], module: nn.Module, beginning: Beginning) -> None:
        """Look for a window of this fit, when process groups exist, and the weights with which it would begin."""
        self._opened = Run(self._settings, self._where, self._all_parts, root_dir, module, beginning)
        if self._opened.saved is not None:
            self._position.load(self._opened.saved["position"])

    def _open_late(self) -> None:
        """For adapters that look for a window only when they are asked for something."""

    @property
    def _run(self) -> Run:
        if self._opened is None:
            raise ConfigurationError(f"{self._where} is not set up yet: {self._remedy}")
        return self._opened

    #: What to do before anything can be asked.
    _remedy = ""

    def _parts(self) -> Parts:
        """What the run consists of, but for what the user registers."""
        raise NotImplementedError

    def _all_parts(self) -> Parts:
        parts = self._parts()
        for name, thing in self._registered.items():
            parts.add(name, thing, f"{self._where}.register")
        return parts

    def _autocast(self) -> bool:
        """Whether the forward may cast parameters to 16 bits."""
        return True

    def _find_others(self, followed: Sequence[Any]) -> Callable[[], Mapping[str, OtherLoader]]:
        """What gives the script's loaders beside those that :meth:`steps` was given."""
        found = find_loaders(self._position.script)
        return lambda: found

    # --- what a script asks --------------------------------------------------------------------------------------

    @property
    def resuming(self) -> bool:
        """Whether a window was found from which training will continue: other checkpoints need not be loaded."""
        return self._run.saved is not None

    @property
    def replaying(self) -> bool:
        """Whether steps are done again to make the state whole: nothing should be saved from it now."""
        return self._run.replaying

    @property
    def step(self) -> int:
        """Batches that are done, over the whole training."""
        self._open_late()
        return self._position.step

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        self._open_late()
        return self._position.epoch

    @property
    def metrics(self) -> Mapping[str, float]:
        """Newest numbers for a progress bar or a logger."""
        return dict(self._run.reporter.metrics)

    # --- the loop ------------------------------------------------------------------------------------------------

    def register(self, **things: Any) -> None:
        """Capture and restore further objects of the script.

        Args:
            **things: Objects with ``state_dict()`` and ``load_state_dict()`` (counters, averages of the weights), or
                random number generators of torch, numpy or python, by a name that stays the same.

        Raises:
            ConfigurationError: Something cannot be saved, a name is taken, or training has begun.
        """
        if self._opened is not None and self._opened.begun:
            raise ConfigurationError(f"register({', '.join(things)}): call it before the loop begins")
        for name, thing in things.items():
            Parts(module=nn.Module()).add(name, thing, f"{self._where}.register")  # refuses what cannot be saved
            if name in self._registered:
                raise ConfigurationError(f"register({name}=...): this name is taken; choose another one")
            self._registered[name] = thing

    def start_at(self, step: int, loader: Any) -> None:
        """Begin behind the batches that a checkpoint has behind it which the script itself has loaded.

        The loop then passes over them. Has no effect where training continues from a window, which knows its place.

        Args:
            step: Batches that are done, over the whole training.
            loader: What :meth:`steps` will be given; it has a length.

        Raises:
            ConfigurationError: Training has begun, or the loader has no length.
        """
        length = length_of(loader)
        if self._run.begun or not length or step < 0:
            raise ConfigurationError(
                f"start_at({step!r}, {type(loader).__name__}): expected a step >= 0 and a loader with batches and a "
                "length, before the loop begins"
            )
        if self._run.saved is None:
            self._position.step = step
            self._position.epoch, self._position.skipped = divmod(step, length)

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """Number the epochs, from the one in which training continues: ``for epoch in run.epochs(3):``.

        What follows the loop over :meth:`steps` in an epoch (validation, a scheduler) belongs to it, and is done again
        if the window begins before it.

        Args:
            num_epochs: Epochs of the whole training.

        Yields:
            The epoch's number, from 0.
        """
        self._in_epochs = True
        while self.epoch < num_epochs:
            self._iterated = False
            yield self.epoch
            self._finish_epoch()
            self._run.boundary()

    def steps(self, *loaders: Any, epochs: int = 1) -> Iterator[tuple[int, Any]]:
        """Go through the batches that are not done yet: ``for step, batch in run.steps(loader, epochs=3):``.

        Args:
            *loaders: Where batches come from: ``DataLoader`` objects (of torch, or prepared by Fabric or Accelerate) or
                other iterables. With several, a batch is a tuple with one of each, until one of them has no more.
            epochs: Passes over the loaders. Samplers with ``set_epoch`` are told the epoch, if there are several.
                Inside of :meth:`epochs` it is one.

        Yields:
            The step (batches done before it, over the whole training) and the batch.

        Raises:
            ConfigurationError: It is called twice, or again in one epoch.
        """
        if not loaders:
            raise ConfigurationError(f"{self._where}.steps(): expected at least one loader")
        if self._iterated:
            raise ConfigurationError(
                f"{self._where}.steps() is called again: which passes are done already could not be told after a "
                "restart. Write `for epoch in run.epochs(3): for step, batch in run.steps(loader): ...`, or "
                "`for step, batch in run.steps(loader, epochs=3): ...`."
            )
        if self._in_epochs and epochs != 1:
            raise ConfigurationError(f"steps(epochs={epochs!r}) inside of epochs(): give the number to epochs() alone")
        self._iterated = True
        if not self._run.begun:
            self._position.script = script_variables(inspect.currentframe().f_back)  # type: ignore[union-attr]
        return self._steps(loaders, epochs)

    def record_loss(self, loss: Tensor) -> None:
        """Note the loss of a batch: after a failure, replayed steps are verified by it.

        Args:
            loss: 0-d tensor, on any device.
        """
        self._run.record_loss(loss)

    def close(self, *, completed: bool = True) -> None:
        """Training is over: remove its windows, so that the same command starts afresh. Harmless if called again.

        Args:
            completed: False keeps them: the same command then continues.
        """
        self._position.release()
        if self._opened is not None:
            self._opened.close(completed=completed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(completed=kind is None)

    # --- inside --------------------------------------------------------------------------------------------------

    def _steps(self, loaders: Sequence[Any], epochs: int) -> Iterator[tuple[int, Any]]:
        self._follow(loaders)
        if not self._run.begun:
            self._position.others = OtherLoaders(self._where, self._find_others(loaders))
            self._run.skipped.where = self._next_step
            self._run.begin_loop(self._position, autocast=self._autocast(), step=self._position.step)
        if self._in_epochs:
            yield from self._one_epoch()
            return
        while self.epoch < epochs:
            if epochs > 1:
                for loader in self._position.loaders:
                    loader.begin_epoch(self.epoch)
            yield from self._one_epoch()
            self._finish_epoch()

    def _next_step(self) -> int:
        return self._position.step

    def _follow(self, loaders: Sequence[Any]) -> None:
        """The same loaders keep their position from epoch to epoch (workers may live on)."""
        known = [loader.source for loader in self._position.loaders]
        if len(known) != len(loaders) or any(a is not b for a, b in zip(known, loaders)):
            for loader in self._position.loaders:
                loader.release()
            self._position.loaders = [follow(loader) for loader in loaders]

    def _one_epoch(self) -> Iterator[tuple[int, Any]]:
        position = self._position
        if position.skipped:
            for loader in position.loaders:
                loader.jump(position.epoch)
        iterators = [loader.iterate() for loader in position.loaders]
        if position.skipped:
            generators = get_rng()  # of the checkpoint
            for iterator in iterators:
                for _ in range(position.skipped):
                    next(iterator)
            set_rng(generators)
            position.skipped = 0
        while True:
            batches = []
            for iterator in iterators:
                batch = next(iterator, _NO_MORE)
                if batch is _NO_MORE:
                    return
                batches.append(batch)
            step, position.step = position.step, position.step + 1
            if self._run.skipped.is_left_out(step):
                self._run.skipped.note(step)
                continue
            batch = tuple(batches) if len(batches) > 1 else batches[0]
            self._run.drew(batch, position.loaders)
            yield step, batch
            self._run.boundary()

    def _finish_epoch(self) -> None:
        self._position.epoch += 1
        for loader in self._position.loaders:
            loader.finish()


class SparseCheckpointing(GuidedLoop):
    """Snapshots a part of the experts after every optimizer step of a plain PyTorch loop, and recovers bit for bit.

    ::

        run = SparseCheckpointing(model, optimizer, scheduler=scheduler, window=8)
        for step, batch in run.steps(loader, epochs=3):
            ...
        run.close()

    When the same command is started again after a failure, the loop continues at the batch at which the newest
    committed window begins, does its steps again, and goes on with exactly the weights, optimizer state, losses and
    samples of the run that never failed. Use it as a context manager to keep the windows when the loop raises.

    Ranks: under ``torchrun`` all ranks make it together, after ``init_process_group``; modules are wrapped in
    ``DistributedDataParallel`` or sharded by ``fully_shard``. What no wrapper keeps equal is taken to be each rank's
    own.

    Args:
        modules: The module, or all modules that train (a sequence, or a mapping by name); wrapped ones are fine.
        optimizers: The optimizer, or all of them.
        scheduler: Learning-rate scheduler, or several.
        scaler: Gradient scaler, or several.
        **settings: As of ``SparseExpertCheckpoint``, see :meth:`~moetion_lightning.session.SessionSettings.read`.

    Raises:
        ConfigurationError: A setting is unknown or out of range, or ``moetion launch`` started this process.
        StoreError, HostMemoryError, JobBusyError, CorruptSnapshotError, VersionError: See the message.
    """

    def __init__(
        self,
        modules: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module],
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        scheduler: Any = None,
        scaler: Any = None,
        **settings: Any,
    ) -> None:
        where = type(self).__name__
        self._found = Parts.of(modules, where, optimizers, scheduler, scaler)
        super().__init__(settings, where)
        self._open(Path.cwd(), self._found.module, beginning_of(self._found))

    def _parts(self) -> Parts:
        return self._found


def beginning_of(parts: Parts) -> Beginning:
    """What is known of how a loop begins, beside its weights, before it does."""
    return {"settings": {**of_optimizers(parts.optimizers), **of_schedulers(parts.schedulers())}}
