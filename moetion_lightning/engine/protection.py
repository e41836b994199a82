"""Whether a failure now would be survived; what is said when it would not, and when a capture is tried again."""

from __future__ import annotations

import logging
from collections.abc import Callable

from moetion_lightning.errors import HostMemoryError, UnsupportedStateError
from moetion_lightning.events import EventBus, ProtectionChanged

__all__ = ["Protection"]

#: Causes that do not go away by themselves: another window would fail alike.
_LASTING = (UnsupportedStateError, HostMemoryError)
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 1024  # iterations
_SPOKEN = 3  # windows in a row whose loss is said one by one


class Protection:
    """Follows what becomes of the windows of one course of training.

    A cause is said once, as an error if nothing is protected as long as it lasts; then windows are tried ever more
    rarely and silently, until one is whole again.

    Args:
        bus: Gets a :class:`~moetion_lightning.events.ProtectionChanged` whenever the answer changes.
        say: Tells the user something, at a level of :mod:`logging`.
    """

    def __init__(self, bus: EventBus, say: Callable[[str, int], None]) -> None:
        self._bus = bus
        self._say = say
        self._told: bool | None = None
        self._reason = ""
        self._has_window = False
        self._said: set[str] = set()
        self._lost = False
        self._pause = 0
        self._next_try = 0
        self._failed_at = -1
        #: Windows in a row that were given up.
        self.given_up = 0

    @property
    def protected(self) -> bool:
        """Whether there is a window to go back to, and captures succeed."""
        return self._has_window and not self._reason

    def begin(self, *, restored: bool) -> None:
        """A course of training begins.

        Args:
            restored: Whether it continues from a window.
        """
        self._has_window = restored
        self._reason = ""
        self._failed_at = -1
        self.tell()

    def may_begin(self, iteration: int) -> bool:
        """Whether to try another window now."""
        return iteration >= self._next_try

    def committed(self, first_iteration: int) -> None:
        """A window is whole.

        Args:
            first_iteration: Where it began. If that was before the last failure, captures do not succeed again yet.
        """
        self._has_window = True
        if first_iteration < self._failed_at:
            self.tell()
            return
        if self._lost:
            self._say("windows are whole again: training is protected from here on", logging.WARNING)
        self._lost, self._reason = False, ""
        self.given_up = self._pause = self._next_try = 0
        self.tell()

    def failed(self, iteration: int, what: str, why: str, error: Exception | None, held: str) -> None:
        """A window did not come about.

        Args:
            iteration: Completed iterations.
            what: Which window.
            why: The cause.
            error: The error, if it was one; None for a window that was given up by decision.
            held: The newest window that is whole.
        """
        self.given_up += 1
        self._failed_at = iteration
        lasting = isinstance(error, _LASTING)
        if lasting or self.given_up > 1:
            self._reason = why if lasting else f"{self.given_up} windows in a row were given up: {why}"
        kind = type(error).__name__ if error is not None else ""
        if lasting and kind not in self._said:
            self._lost = True
            self._say(
                f"TRAINING IS NOT PROTECTED from iteration {iteration} on: {what}: {why}. Training goes on; a restart "
                f"would go back to {held}. Captures are tried again ever more rarely; a message tells when one "
                "succeeds.",
                logging.ERROR,
            )
        elif kind not in self._said and self.given_up <= _SPOKEN:
            warn = error is not None or self.given_up > 1
            self._say(
                f"{what} was given up ({why}); training goes on, the newest committed window is {held}, and another "
                "window begins now",
                logging.WARNING if warn else logging.INFO,
            )
        if error is not None:
            self._said.add(kind)
            if lasting or self.given_up > 1:
                self._pause = min(max(_FIRST_PAUSE, 2 * self._pause), _LONGEST_PAUSE)
                self._next_try = iteration + self._pause
        self.tell()

    def tell(self) -> None:
        """Emit the event if the answer has changed."""
        if self._told is not self.protected:
            self._told = self.protected
            reason = self._reason or ("" if self._has_window else "no window is committed yet")
            self._bus.emit(ProtectionChanged(protected=self.protected, reason=reason))
