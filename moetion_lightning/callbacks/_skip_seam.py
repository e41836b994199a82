"""Batches that a Lightning fit loop draws and does not train on.

Lightning knows the end of an epoch by counting what its fetcher gave, and the validation there by counting what was
trained on: both are told of batches that are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher

from moetion_lightning.core.instance_patches import InstancePatches
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.session.skipped_batches import SkippedBatches

__all__ = ["SkipSeam"]


class SkipSeam:
    """Knows the numbers of the batches of a pass, and counts those that are left out of it.

    Args:
        trainer: The trainer.
        skipped: Says which batches are left out.
    """

    def __init__(self, trainer: Trainer, skipped: SkippedBatches) -> None:
        self._trainer = trainer
        self._skipped = skipped
        self._before: int | None = None  # batches that were drawn before this pass, once the first one was asked for
        self._left_out = 0  # of this pass
        self._owed = 0  # of them, those that the fetcher has not been told
        self._checked = False  # whether all epochs have batches left, and the one that was restored
        epoch_loop = trainer.fit_loop.epoch_loop
        original = epoch_loop._should_check_val_fx

        def should_check_val_fx(fetcher: _DataFetcher) -> bool:
            return original(fetcher) or self._ends_where_a_validation_was_due()

        self._patches = InstancePatches()
        self._patches.put(epoch_loop, "_should_check_val_fx", should_check_val_fx)

    def remove(self) -> None:
        """Leave the loop as it was."""
        self._patches.undo()

    def begin_pass(self, drawn: int) -> None:
        """The loaders are iterated anew.

        Args:
            drawn: Batches of the last pass.

        Raises:
            ConfigurationError: Batches are to be left out, and steps draw theirs themselves.
        """
        if self._skipped.wanted and isinstance(self._trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher):
            raise ConfigurationError(
                "skip_batches with a training_step(dataloader_iter), which draws its batches itself: expected a "
                "training_step(batch). Leave the batches out where the step draws them."
            )
        if self._before is not None:
            self._before += drawn
        self._left_out = self._owed = 0

    def restore(self, state: Mapping[str, Any]) -> None:
        """The pass that begins is the rest of one.

        Args:
            state: From :meth:`record`.
        """
        self._before = state["before"]
        self._left_out = self._owed = state["left_out"]

    def record(self) -> dict[str, int]:
        """Where the pass stands, behind what is left out before the batch that is drawn next."""
        return {"before": self.number(0), "left_out": self._left_out}

    def number(self, index: int) -> int:
        """The number of a batch by its index in the pass."""
        if self._before is None:
            self._before = self._trainer.current_epoch * (self._length or 0)
        return self._before + index

    def check_rest(self, index: int) -> None:
        """Before the first batch: all epochs have batches left, also that in whose middle training continues.

        At the end of an epoch schedulers step, and validation follows: behind its last batch, in the process that
        trained on it.

        Args:
            index: Of the batch that is drawn next, in the pass.

        Raises:
            ConfigurationError: Nothing of an epoch would be left.
        """
        length = self._length
        if self._checked or length is None:
            return
        self._checked = True
        if length:
            self._skipped.check_epochs(length)
        if self.ends_without(index):
            self._refuse(self.number(index), self.number(length - 1))

    def check_given(self, given: int, index: int) -> None:
        """A stream is at its end, behind batches that were thrown away.

        Args:
            given: Batches of the pass that Lightning got in this process.
            index: Batches of the pass.

        Raises:
            ConfigurationError: It got none.
        """
        if not given:
            self._refuse(self.number(index) - self._owed, self.number(index - 1))

    def _refuse(self, first: int, last: int) -> NoReturn:
        raise ConfigurationError(
            f"skip_batches has all batches from {first} on, where training continues, to {last}, the end of the "
            "epoch: expected at least one that is left, behind which the epoch ends. Go back further, with "
            "resume=<an iteration before it>, or leave them in."
        )

    def leaves_out(self, index: int) -> bool:
        """Whether a batch is to be thrown away.

        Args:
            index: In the pass.
        """
        return self._skipped.is_left_out(self.number(index))

    def ends_without(self, index: int) -> bool:
        """Whether from this batch on all of the pass are to be thrown away.

        Known only of loaders with a length; behind the last batch of a stream Lightning looks itself.
        """
        length = self._length
        if length is None or index >= length:
            return False
        rest = range(self.number(index), self.number(length))
        return self._skipped.is_left_out(rest[0]) and all(map(self._skipped.is_left_out, rest))

    def note(self, index: int) -> None:
        """A batch was drawn, and is thrown away."""
        self._skipped.note(self.number(index))
        self._left_out += 1
        self._owed += 1

    def tell_fetcher(self) -> None:
        """A batch is handed to the fetcher, which counts that one alone."""
        fetcher = self._trainer.fit_loop._data_fetcher
        assert fetcher is not None
        fetcher.fetched += self._owed
        self._owed = 0

    @property
    def _length(self) -> int | None:
        fetcher = self._trainer.fit_loop._data_fetcher
        return None if fetcher is None else fetcher.length

    def _ends_where_a_validation_was_due(self) -> bool:
        """Whether the epoch ends with this batch, with fewer batches than Lightning waits for to validate."""
        trainer: Any = self._trainer
        loop = trainer.fit_loop.epoch_loop
        every = trainer.val_check_batch
        if not (self._left_out and loop.batch_progress.is_last_batch and loop._should_check_val_epoch()):
            return False
        if trainer._val_check_time_interval is not None or trainer.check_val_every_n_epoch is None:
            return False
        return bool(trainer.num_training_batches % every == 0)
