"""A page about a run, drawn from the events that all its processes left, over all failures."""

from moetion_lightning.report.history import UNUSED, History, tell
from moetion_lightning.report.numbers import as_json
from moetion_lightning.report.page import write_report
from moetion_lightning.report.reading import Reading, Record, read_events

__all__ = ["UNUSED", "History", "Reading", "Record", "as_json", "read_events", "tell", "write_report"]
