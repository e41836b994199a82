"""Fault drills and bitwise comparisons that users can run on their own training, too.

The public names are loaded when first used: commands read records without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetion_lightning.testing.fault_injection import FaultInjection
    from moetion_lightning.testing.faults import KillAt
    from moetion_lightning.testing.recording import FinalState, LossRecorder
    from moetion_lightning.testing.step_recorder import StepRecorder

__all__ = ["FaultInjection", "FinalState", "KillAt", "LossRecorder", "StepRecorder"]

_HOMES = {
    "FaultInjection": "fault_injection",
    "FinalState": "recording",
    "KillAt": "faults",
    "LossRecorder": "recording",
    "StepRecorder": "step_recorder",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its home module at first use."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
