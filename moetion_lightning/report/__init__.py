"""A page about a run, drawn from the events that all its processes left, over all failures."""

from moetion_lightning.report.page import write_report
from moetion_lightning.report.reading import Reading, Record, read_events

__all__ = ["Reading", "Record", "read_events", "write_report"]
