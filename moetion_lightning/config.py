"""Settings, validated at construction. The only module that reads environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moetion_lightning.errors import ConfigurationError

__all__ = ["EngineConfig", "default_memory_dir", "job_id_from_environment"]

#: Set this to give a job an explicit identity, e.g. the id that the cluster's scheduler gave it.
JOB_ID_VARIABLE = "MOETION_JOB_ID"
#: Set this to keep the host-memory tier somewhere else than /dev/shm.
MEMORY_DIR_VARIABLE = "MOETION_MEMORY_DIR"


def job_id_from_environment() -> str | None:
    """The job identity given by the environment, if any."""
    return os.environ.get(JOB_ID_VARIABLE) or None


def default_memory_dir() -> Path | None:
    """Base directory of the host-memory tier given by the environment, if any."""
    value = os.environ.get(MEMORY_DIR_VARIABLE)
    return Path(value) if value else None


def _check(condition: bool, name: str, given: object, expected: str) -> None:
    if not condition:
        raise ConfigurationError(f"{name}={given!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of the engine, common to all adapters.

    Args:
        window: Iterations of a sparse window, or ``"auto"``.
        max_window: Upper limit for ``"auto"``.
        overlap_target: Share of an iteration that the copies may take, in (0, 1].
        skip_frozen_gradients: Skip the weight gradients of frozen operators while replaying.
        memory_dir: Base directory of the host-memory tier; None for ``/dev/shm``.
        persist_dir: Directory or fsspec URL of the storage tier; None for none.
        persist_every_n_windows: Persist only every n-th committed window.
        keep_persisted: Windows kept on the storage tier.
        job_id: Identity of the job; None derives it.
        resume: ``"auto"`` continues from the newest window of this job, ``"never"`` starts afresh.
        on_mismatch: What to do when a replayed iteration differs from its witness.
        stale_after_seconds: Age after which the host memory of a dead job is reclaimed.
        elementwise_optimizers: Qualified class names of further optimizers whose update is elementwise.
    """

    window: int | Literal["auto"] = "auto"
    max_window: int = 32
    overlap_target: float = 0.8
    skip_frozen_gradients: bool = False
    memory_dir: str | None = None
    persist_dir: str | None = None
    persist_every_n_windows: int = 1
    keep_persisted: int = 1
    job_id: str | None = None
    resume: Literal["auto", "never"] = "auto"
    on_mismatch: Literal["warn", "raise"] = "warn"
    stale_after_seconds: float = 24 * 3600.0
    elementwise_optimizers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        window_ok = self.window == "auto" or (
            isinstance(self.window, int) and not isinstance(self.window, bool) and self.window >= 1
        )
        _check(window_ok, "window", self.window, 'a number of iterations >= 1, or "auto"')
        _check(isinstance(self.max_window, int) and self.max_window >= 1, "max_window", self.max_window, "an int >= 1")
        _check(0 < self.overlap_target <= 1, "overlap_target", self.overlap_target, "a share in (0, 1]")
        _check(self.resume in ("auto", "never"), "resume", self.resume, '"auto" or "never"')
        _check(self.on_mismatch in ("warn", "raise"), "on_mismatch", self.on_mismatch, '"warn" or "raise"')
        _check(
            isinstance(self.persist_every_n_windows, int) and self.persist_every_n_windows >= 1,
            "persist_every_n_windows",
            self.persist_every_n_windows,
            "an int >= 1",
        )
        _check(
            isinstance(self.keep_persisted, int) and self.keep_persisted >= 1,
            "keep_persisted",
            self.keep_persisted,
            "an int >= 1",
        )
        _check(self.stale_after_seconds > 0, "stale_after_seconds", self.stale_after_seconds, "seconds > 0")
        if self.job_id is not None:
            ok = 0 < len(self.job_id) <= 100 and all(c.isalnum() or c in "._-" for c in self.job_id)
            ok = ok and not self.job_id.startswith(".")
            _check(ok, "job_id", self.job_id, "1 to 100 letters, digits, '.', '_' or '-', not starting with '.'")
