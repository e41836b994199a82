"""The facade that every adapter calls."""

from moetion_lightning.engine.facade import Engine, RunState
from moetion_lightning.engine.identity import derive_job_id
from moetion_lightning.engine.journal import LivePoint
from moetion_lightning.engine.ranks import RankLayout, Ranks
from moetion_lightning.engine.restore import RestorePoint

__all__ = ["Engine", "LivePoint", "RankLayout", "Ranks", "RestorePoint", "RunState", "derive_job_id"]
