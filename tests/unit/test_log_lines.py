"""Where log lines go: to the standard error of the moment, above a progress bar, and seldom."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from tqdm import tqdm

from moetion_lightning.engine.reporting import Reporter, show_log_lines
from moetion_lightning.events import WindowCommitted

_log = logging.getLogger("moetion_lightning")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Log lines as an application without logging of its own sees them."""
    handlers, level, root = _log.handlers[:], _log.level, logging.getLogger().handlers[:]
    _log.handlers, logging.getLogger().handlers = [], []
    _log.setLevel(logging.NOTSET)
    show_log_lines(rank=0)
    yield
    _log.handlers, logging.getLogger().handlers = handlers, root
    _log.setLevel(level)


def test_lines_follow_standard_error(shown: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich puts another stream in its place while it draws, and a notebook for each cell."""
    first, second = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stderr", first)
    _log.info("one")
    monkeypatch.setattr("sys.stderr", second)
    _log.info("two")
    assert (first.getvalue(), second.getvalue()) == ("moetion: one\n", "moetion: two\n")


def test_line_stands_above_a_bar_of_tqdm(shown: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with tqdm(total=4, file=stream, ncols=40) as bar:
        bar.update(2)
        bar.refresh()
        _log.info("a line")
        before, _, after = stream.getvalue().partition("moetion: a line\n")
    assert before.endswith("\r"), "the bar was taken away before the line"
    assert after.lstrip("\r").startswith(" 50%"), "and drawn again under it"


def test_without_a_console_nothing_fails(shown: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    _log.info("nobody reads this")


def _committed(last: int) -> WindowCommitted:
    return WindowCommitted(first_iteration=last - 3, last_iteration=last, nbytes=8, seconds=0.1)


def test_first_window_is_told_and_then_one_in_ten_minutes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    reporter = Reporter()
    caplog.set_level(logging.INFO, "moetion_lightning")
    for last in range(4, 1204, 4):  # a window every ten seconds, for 50 minutes
        reporter(_committed(last))
        now[0] += 10.0
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert len(lines) == 5
    assert lines[0].startswith("committed window 1..4")
    assert lines[1].startswith("committed window 241..244")
