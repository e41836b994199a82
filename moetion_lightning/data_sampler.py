"""A sampler for several ranks whose place in the data can be saved and put back exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

from torch.utils.data import DistributedSampler

from moetion_lightning.errors import ConfigurationError, ForeignWindowError

__all__ = ["ExactDistributedSampler"]

_MUST_AGREE = ("seed", "num_replicas", "length", "shuffle", "drop_last")


class ExactDistributedSampler(DistributedSampler[int]):
    """Gives each rank its share of the samples, in an order that is a function of seed and epoch alone.

    The order is that of torch's ``DistributedSampler`` with the same arguments. What is added is the place in it:
    :meth:`state_dict` and :meth:`load_state_dict`, which torchdata's ``StatefulDataLoader`` calls by itself. Lightning
    keeps this sampler as it is: it replaces only samplers that are no ``DistributedSampler``.

    The position counts the samples *handed out*. A loader with workers asks for batches before they are used, so that
    ``sampler.state_dict()`` behind a plain ``DataLoader`` with workers is ahead of the training. ``StatefulDataLoader``
    accounts for that; the callbacks of this package count batches themselves and do not read this position.

    Args:
        dataset: The dataset, or its number of samples.
        num_replicas: Number of ranks that share the samples.
        rank: This rank, from 0 to ``num_replicas - 1``.
        shuffle: Shuffle anew in each epoch; otherwise the order is that of the dataset.
        seed: The same on all ranks.
        drop_last: Drop the samples that do not go round evenly; otherwise repeat the first ones.

    Raises:
        ConfigurationError: The rank is none of ``num_replicas`` ranks, or the number of samples is negative.
    """

    def __init__(
        self,
        dataset: Sized | int,
        *,
        num_replicas: int,
        rank: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        length = dataset if isinstance(dataset, int) else len(dataset)
        if length < 0:
            raise ConfigurationError(f"dataset={dataset!r}: expected a dataset, or a number of samples >= 0")
        if not 0 <= rank < num_replicas:
            raise ConfigurationError(
                f"rank={rank!r}, num_replicas={num_replicas!r}: expected a rank from 0 to num_replicas - 1"
            )
        super().__init__(range(length), num_replicas, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]
        self._length = length
        self._position = 0
        self._continue = False  # the next pass begins at the position that was loaded
        # A loader may load the state of a finished epoch only when the next one, already chosen, is to begin.
        self._epoch_after: int | None = None
        self._pass: object = None  # the newest pass: only it moves the position

    def __iter__(self) -> Iterator[int]:
        if self._continue:
            self._continue = False
        else:
            self._position = 0
            if self._epoch_after is not None:
                self.epoch, self._epoch_after = self._epoch_after, None
        self._pass = current = object()
        order = list(super().__iter__())
        return self._hand_out(order[self._position :], current)

    def _hand_out(self, order: list[int], current: object) -> Iterator[int]:
        for index in order:
            if self._pass is current:
                self._position += 1
            yield index

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass. Another epoch than the present one begins with its first sample.

        Args:
            epoch: Number of the epoch.
        """
        if epoch != self.epoch:
            self._position = 0
            self._continue = False
            self._pass = None
        self._epoch_after = None
        super().set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The place: the epoch, and how many of its samples this rank has handed out.

        Returns:
            Plain values, equal on all ranks that have handed out equally many.
        """
        return {"epoch": self.epoch, "position": self._position, **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass continue at a saved place, unless :meth:`set_epoch` chooses another epoch before.

        Args:
            state: From :meth:`state_dict`, of any rank.

        Raises:
            ForeignWindowError: The place belongs to another order: of another seed, world size or dataset.
        """
        mine = self._settings()
        wrong = [name for name in _MUST_AGREE if state.get(name) != mine[name]]
        if wrong:
            raise ForeignWindowError(
                "this data position belongs to another order of samples: "
                + ", ".join(f"saved with {name}={state.get(name)!r}, now {name}={mine[name]!r}" for name in wrong)
                + ". Make the sampler with the saved settings, or start the epoch anew without loading."
            )
        finished = state["position"] >= self.num_samples
        self._epoch_after = self.epoch if finished and self.epoch > state["epoch"] else None
        self.epoch = int(state["epoch"])
        self._position = int(state["position"])
        self._continue = True
        self._pass = None

    def _settings(self) -> dict[str, Any]:
        values = (self.seed, self.num_replicas, self._length, self.shuffle, self.drop_last)
        return dict(zip(_MUST_AGREE, values))
