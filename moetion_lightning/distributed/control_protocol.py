"""What the engine needs of the other ranks, and a job of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Control", "Merge", "SingleRank"]

#: Makes one value of several; the grouping of the ranks must not matter.
Merge = Callable[[list[Any]], Any]


class Control(Protocol):
    """What the engine needs of the other ranks."""

    @property
    def rank(self) -> int:
        """This process."""

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""

    def all_gather(self, topic: str, value: Any) -> list[Any]:
        """Every rank's value (JSON), by rank. All ranks call it in the same order with the same topic.

        Every rank reads all values: for what is exchanged rarely. In training use :meth:`all_reduce`.

        Raises:
            RankLostError: A rank was lost, or did not answer in time.
        """

    def all_reduce(self, topic: str, value: Any, merge: Merge) -> Any:
        """One value (JSON) made of those of all ranks; as :meth:`all_gather`.

        Args:
            topic: What it is about.
            value: This rank's.
            merge: Merges values, of ranks and of what it returned; the same on all ranks.
        """

    def meet(self, topic: str, seconds: float) -> bool:
        """Wait for all ranks, not longer than this. Returns whether all came; the same on all of them, if they live."""

    def vote(self, topic: str) -> None:
        """Go on only if every rank has come this far; otherwise no rank does.

        Raises:
            RankLostError: A rank was lost before it arrived.
        """

    def remember(self, name: str, value: str) -> None:
        """Keep a value where every later process of this run finds it. One rank calls it."""

    def recall(self, name: str) -> str:
        """What :meth:`remember` kept last; "" for nothing."""


class SingleRank:
    """A job of one process."""

    rank = 0
    world_size = 1

    def meet(self, topic: str, seconds: float) -> bool:
        """It is there."""
        return True

    def vote(self, topic: str) -> None:
        """Goes on."""

    def all_gather(self, topic: str, value: Any) -> list[Any]:
        """The value itself, as the others would see it."""
        return [json.loads(json.dumps(value))]

    def all_reduce(self, topic: str, value: Any, merge: Merge) -> Any:
        """The value itself, merged with nothing."""
        return merge([json.loads(json.dumps(value))])

    def remember(self, name: str, value: str) -> None:
        """Nobody comes later."""

    def recall(self, name: str) -> str:
        """Nothing."""
        return ""
