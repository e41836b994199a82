"""One training run of any adapter: which windows are its own, from the search for them to the end of the process."""

from moetion_lightning.session.settings import SessionSettings
from moetion_lightning.session.training_session import TrainingSession

__all__ = ["SessionSettings", "TrainingSession"]
