"""The facade that every adapter calls."""

from moetion_lightning.engine.facade import Engine, RunState
from moetion_lightning.engine.journal import LivePoint
from moetion_lightning.engine.plain_attributes import PlainAttributes
from moetion_lightning.engine.ranks import RankLayout, Ranks
from moetion_lightning.engine.restore import RestorePoint
from moetion_lightning.engine.run_state import build_values
from moetion_lightning.engine.stage_link import StageLink, StageReplay, StageWork
from moetion_lightning.engine.stage_recovery import StageReplayError

__all__ = [
    "Engine",
    "LivePoint",
    "PlainAttributes",
    "RankLayout",
    "Ranks",
    "RestorePoint",
    "RunState",
    "StageLink",
    "StageReplay",
    "StageReplayError",
    "StageWork",
    "build_values",
]
