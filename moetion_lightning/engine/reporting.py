"""What a user sees: log lines, progress-bar fields, logger metrics."""

from __future__ import annotations

import logging
import sys
import time

from moetion_lightning.events import (
    CaptureFinished,
    Event,
    IterationFinished,
    OperatorAudited,
    ProtectionChanged,
    ScheduleMade,
    WindowCommitted,
    WindowPersisted,
)

__all__ = ["Reporter", "show_log_lines"]

_log = logging.getLogger("moetion_lightning")
_SECONDS_BETWEEN_LINES = 600.0


class _Terminal(logging.Handler):
    """Writes to the standard error of the moment, above a progress bar.

    Rich replaces `sys.stderr` while it draws. tqdm's bars are taken away for a line, and drawn again under it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
            bars = sys.modules.get("tqdm.std")
            if bars is not None and bars.tqdm._instances:
                bars.tqdm.write(line, file=sys.stderr, end="")
            elif sys.stderr is not None:  # a process without a console has none
                sys.stderr.write(line)
                sys.stderr.flush()
        except Exception:  # as in logging's own handlers: a line that cannot be written ends no training
            self.handleError(record)


def show_log_lines(rank: int) -> None:
    """Make the package's lines visible where the application has not set up logging itself: INFO lines of rank 0."""
    if not _log.handlers and not logging.getLogger().handlers:
        handler = _Terminal()
        handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        handler.setFormatter(logging.Formatter("moetion: %(message)s"))
        _log.addHandler(handler)
    if _log.level == logging.NOTSET and logging.getLogger().level > logging.INFO:
        _log.setLevel(logging.INFO)


class Reporter:
    """An event sink that keeps the newest numbers, and writes a line for the first window and one every ten minutes."""

    def __init__(self) -> None:
        #: From the first step on, whether or not anything has been captured yet.
        self.metrics: dict[str, float] = {
            "moetion/committed_step": -1.0,
            "moetion/protected": 0.0,
            "moetion/stall_ms": 0.0,
            "moetion/checkpoint_stall": 0.0,
        }
        self._window = (0, False)
        self._stall = 0.0
        self._sums = (0.0, 0.0)  # seconds of stalls, and of all
        self._last_line = float("-inf")
        self._batches = 0
        self._logged_step: float | None = None

    def __call__(self, event: Event) -> None:
        """Take note of one event."""
        if isinstance(event, ScheduleMade):
            window = event.window, event.measured
            is_news, self._window = self._window != window, window
            _log.log(
                logging.INFO if is_news else logging.DEBUG,
                "window of %d iterations (%s): at most %.1f MB per iteration, %.1f MB per window; dense: %.1f MB",
                event.window, event.reason, event.heaviest_bytes / 1e6, event.total_bytes / 1e6,
                event.dense_bytes / 1e6,
            )  # fmt: skip
        elif isinstance(event, CaptureFinished):
            self.metrics["moetion/captured_mb"] = event.nbytes / 1e6
            self.metrics["moetion/window_progress"] = (event.slot + 1) / event.num_slots
        elif isinstance(event, IterationFinished):
            self.metrics["moetion/stall_ms"] = 1e3 * event.stall_seconds
            self._stall += event.stall_seconds
            stalled, seconds = self._sums[0] + event.stall_seconds, self._sums[1] + event.seconds
            self._sums = stalled, seconds
            self.metrics["moetion/checkpoint_stall"] = stalled / seconds if seconds > 0 else 0.0
        elif isinstance(event, OperatorAudited):
            failures = self.metrics.get("moetion/audit_failures", 0.0)
            self.metrics["moetion/audit_failures"] = failures + bool(event.difference)
        elif isinstance(event, ProtectionChanged):
            self.metrics["moetion/protected"] = float(event.protected)
        elif isinstance(event, WindowCommitted):
            self._committed(event)
        elif isinstance(event, WindowPersisted):
            self.metrics["moetion/persisted_step"] = float(event.last_iteration)

    def _committed(self, event: WindowCommitted) -> None:
        self.metrics["moetion/committed_step"] = float(event.last_iteration)
        now = time.monotonic()
        level = logging.INFO if now - self._last_line >= _SECONDS_BETWEEN_LINES else logging.DEBUG
        first, last = event.first_iteration, event.last_iteration
        _log.log(
            level,
            "committed %s: %.1f MB in %.1f s, training stalled %.1f ms",
            f"window {first}..{last}" if first < last else f"iteration {last}",
            event.nbytes / 1e6, event.seconds, 1e3 * self._stall,
        )  # fmt: skip
        self._stall = 0.0
        if level == logging.INFO:
            self._last_line = now

    def is_due(self, every_n_batches: int) -> bool:
        """Whether to log after this batch: in Lightning's own interval, and for every new window."""
        self._batches += 1
        committed = self.metrics.get("moetion/committed_step")
        due = committed != self._logged_step or self._batches % max(1, every_n_batches) == 0
        self._logged_step = committed
        return due and bool(self.metrics)
