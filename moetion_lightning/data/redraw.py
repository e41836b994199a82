"""Drawing batches again that were drawn before, with words for those who wait, and for what does not fit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from moetion_lightning.errors import ForeignWindowError

__all__ = ["draw_again", "foreign_length"]

_log = logging.getLogger(__name__)
_SAY_FROM_BATCHES = 100
_SECONDS_BETWEEN_LINES = 10.0
_REMEDY = (
    "Undo the change. If a hook of yours moves the loader to its place itself (load_state_dict of a DataModule, "
    "on_load_checkpoint), leave that to this package. Or start afresh with resume='never' or another job_id."
)


def draw_again(
    draw: Callable[[], Any], count: int, loader: object, *, number: int = 0, of: int = 1, quick: bool = False
) -> None:
    """Draw batches that were drawn before.

    Args:
        draw: Draws one.
        count: How many.
        loader: The loader, for messages.
        number: Which of several passes this is, from 0.
        of: How many passes there are.
        quick: Whether only the sampler is asked.

    Raises:
        ForeignWindowError: The loader has fewer.
    """
    began = said = time.monotonic()
    if count >= _SAY_FROM_BATCHES and not quick and not number:
        _log.warning(
            "drawing %d batches again to reach the data position%s: %s reads its samples in an order, or with random "
            "numbers, that only reading brings back. A map-style dataset whose workers draw no random numbers, or "
            "torchdata's StatefulDataLoader, restarts at once.",
            count, f", and those of {of - 1} more passes" if of > 1 else "", type(loader).__name__,
        )  # fmt: skip
    for done in range(count):
        try:
            draw()
        except StopIteration:
            raise ForeignWindowError(
                f"the data position is behind batch {count} of a pass, and this {type(loader).__name__} ended after "
                f"{done}: it gives fewer batches than the one that the window was captured with. {_REMEDY}"
            ) from None
        now = time.monotonic()
        if now - said > _SECONDS_BETWEEN_LINES and not quick:
            said = now
            _log.warning(
                "drew %d of %d batches again (pass %d of %d); about %.0f s more for this pass",
                done + 1, count, number + 1, of, (now - began) / (done + 1) * (count - done - 1),
            )  # fmt: skip


def foreign_length(
    loader: object, there: tuple[int | None, int | None], here: tuple[int | None, int | None]
) -> ForeignWindowError:
    """The error of a loader that is another one.

    Args:
        loader: The loader.
        there: Batches of a pass, and samples of a batch, where the window was captured.
        here: The same of this loader.
    """
    return ForeignWindowError(
        f"the window was captured in a loop over {_shown(there)} an epoch, this {type(loader).__name__} has "
        f"{_shown(here)}. {_REMEDY}"
    )


def _shown(length: tuple[int | None, int | None]) -> str:
    batches, size = length
    shown = "a stream" if batches is None else f"{batches} batches"
    return shown if size is None else f"{shown} of {size}"
