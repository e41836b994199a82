"""Batches that are drawn and not trained on: which, and which were.

A batch's number counts batches as they are drawn from the training loader, from 0 over the whole training. What is
behind stays so: a window says which batches were left out before its end, and its replay trains on all others, whatever
the script asks for now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moetion_lightning.config import EngineConfig
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.units import batches_text

__all__ = ["SkippedBatches", "refuse_skipping"]


class SkippedBatches:
    """Decides for each batch whether it is left out.

    Args:
        wanted: Numbers that the user has given.
        say: Tells the user something, once; ``warning=True`` for a warning.

    Attributes:
        where: Gives the number of the batch that is trained on next; None where the adapter does not count batches.
    """

    def __init__(self, wanted: Sequence[int], say: Callable[..., None]) -> None:
        self.wanted = frozenset(wanted)
        self.where: Callable[[], int] | None = None
        self._say = say
        self._left_out: set[int] = set()
        self._decided = 0  # of the batches before this number it is known

    def continue_from(self, lineage: Mapping[str, Any]) -> None:
        """Training goes on from a window that says this.

        Args:
            lineage: Of the window; empty: training begins anew.
        """
        self._left_out = {int(number) for number in lineage.get("skipped", ())}
        self._decided = int(lineage.get("drawn", 0))
        too_late = sorted(number for number in self.wanted - self._left_out if number < self._decided)
        if too_late:
            self._say(
                f"skip_batches: {batches_text(too_late)} cannot be left out any more: training continues behind batch "
                f"{self._decided - 1}, and it was trained on. resume=<iteration> goes back to before it, as far as "
                "windows are kept",
                warning=True,
            )

    @property
    def next_is_another(self) -> bool:
        """Whether the batch that follows the restored state, and followed it before, is left out now."""
        return self._decided in self.wanted

    def is_left_out(self, number: int) -> bool:
        """Whether a batch is to be thrown away."""
        return number in (self._left_out if number < self._decided else self.wanted)

    def note(self, number: int) -> None:
        """It was drawn, and is thrown away."""
        self._left_out.add(number)
        self._say(f"skip_batches: batch {number} of the training loader is left out")

    def check_epochs(self, length: int) -> None:
        """Refuse what leaves nothing of an epoch.

        Args:
            length: Batches of an epoch, > 0.

        Raises:
            ConfigurationError: All of them are to be left out.
        """
        for epoch in {number // length for number in self.wanted}:
            batches = range(epoch * length, (epoch + 1) * length)
            if self.wanted.issuperset(batches):
                raise ConfigurationError(
                    f"skip_batches has all of {batches[0]}..{batches[-1]}, which are all batches of epoch {epoch}: "
                    "expected at least one that is left to train on"
                )

    def described(self) -> dict[str, Any]:
        """What a window says of it that ends now."""
        if self.where is None:
            return {}
        drawn = self.where()
        return {"skipped": sorted(number for number in self._left_out if number < drawn), "drawn": drawn}


def refuse_skipping(config: EngineConfig, where: str) -> None:
    """For adapters that cannot leave batches out.

    Args:
        config: Settings.
        where: The adapter, for the message.

    Raises:
        ConfigurationError: Some are to be left out.
    """
    if config.skip_batches:
        raise ConfigurationError(
            f"{where}: skip_batches={list(config.skip_batches)} has no effect there. Batches are left out by the "
            "callbacks of Lightning, and in loops over run.steps(loader) (SparseCheckpointing, FabricCheckpointing, "
            "attach(accelerator)). Remove the setting, and leave the batches out in the data."
        )
