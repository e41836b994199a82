"""The same as numbers: what ``moetion report --json`` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moetion_lightning.badput import Use
from moetion_lightning.report.history import History

__all__ = ["as_json"]


def as_json(name: str, history: History) -> dict[str, Any]:
    """The numbers of a run, in seconds, means over ranks.

    Args:
        name: What it is called.
        history: What happened.
    """
    last = history.newest()
    return {
        "run": name,
        "start": history.start,
        "end": history.end,
        "wall_seconds": history.wall_seconds,
        "num_ranks": len(history.lanes),
        "num_processes": history.num_processes,
        "iterations": history.iterations,
        "completed": last.completed,
        "ended_by": last.reason,
        "ettr": history.ettr,
        "ettr_last_hour": _share(history.recent),
        **_seconds(history, history.uses, ""),
        **_seconds(history, history.recent, "_last_hour"),
        "stall_seconds_per_iteration": float(history.stalls.values.mean()) if len(history.stalls.values) else None,
        "captured_bytes_per_iteration": float(history.nbytes.values.mean()) if len(history.nbytes.values) else None,
        "dense_bytes": history.dense_bytes,
        "last_loss": float(history.loss.values[-1]) if len(history.loss.values) else None,
        "plt": history.plt,
        "failures": [dataclasses.asdict(failure) for failure in history.failures],
        "environment": last.environment,
        "settings": last.settings,
    }


def _share(uses: Mapping[Use, int]) -> float:
    return uses[Use.PRODUCTIVE] / max(1, sum(uses.values()))


def _seconds(history: History, uses: Mapping[Use, int], when: str) -> dict[str, Any]:
    seconds = {use.value: value for use, value in history.seconds(uses).items()}
    return {f"productive_seconds{when}": seconds.pop("productive"), f"badput_seconds{when}": seconds}
