"""The data position: where loaders stand, and how they come back to it."""

from moetion_lightning.data.attributes import Seen
from moetion_lightning.data.follow import make_resumable, release, unfollowed
from moetion_lightning.data.parts import length_of, loader_parts
from moetion_lightning.data.position import LoaderPosition, Mark

__all__ = ["LoaderPosition", "Mark", "Seen", "length_of", "loader_parts", "make_resumable", "release", "unfollowed"]
