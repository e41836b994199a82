"""Errors of moetion_lightning.

Every error derives from :class:`MoEtionError` and from the builtin that a caller would catch anyway. A message says
what was given, what was expected, where, and what to do.
"""

from __future__ import annotations

__all__ = [
    "AuditError",
    "ConfigurationError",
    "CorruptSnapshotError",
    "ForeignWindowError",
    "HostMemoryError",
    "JobBusyError",
    "LaunchError",
    "MoEtionError",
    "NonDeterminismError",
    "OperatorError",
    "OwnerLostError",
    "RankLostError",
    "ReplicationError",
    "StateLostError",
    "StoreError",
    "StrandedRankError",
    "UnsupportedStateError",
    "VersionError",
]


class MoEtionError(Exception):
    """Root of all errors raised by this package."""


class ConfigurationError(MoEtionError, ValueError):
    """A setting is wrong, or two settings contradict each other. Raised at construction or setup."""


class OperatorError(MoEtionError, ValueError):
    """The operators do not partition the trainable state, or a layout description does not fit the module."""


class UnsupportedStateError(MoEtionError, TypeError):
    """A piece of training state cannot be stored without pickle."""


class StoreError(MoEtionError, OSError):
    """A tier cannot be created, read or written (permissions, missing directory, full disk)."""


class OwnerLostError(StoreError):
    """Another process has taken over the place on storage that this one wrote to; this one writes there no more."""


class HostMemoryError(MoEtionError, MemoryError):
    """The host-memory tier is too small for the windows it must hold."""


class JobBusyError(MoEtionError, RuntimeError):
    """Another live process owns the state of this job."""


class CorruptSnapshotError(MoEtionError, ValueError):
    """A file is truncated, altered or unreadable: its size, checksum or structure is not what was committed."""


class VersionError(MoEtionError, ValueError):
    """A file was written by a newer, incompatible version of the format."""


class ForeignWindowError(MoEtionError, ValueError):
    """A window belongs to another job or to another model."""


class NonDeterminismError(MoEtionError, RuntimeError):
    """A replayed iteration differs from the recorded one, so the recovered state is not exact."""


class AuditError(MoEtionError, RuntimeError):
    """What a gradient log leads to is not the state that trains, or replicas of a state differ."""


class RankLostError(MoEtionError, RuntimeError):
    """A process of the job died, hangs or left; what was being done together cannot be finished."""


class StateLostError(RankLostError):
    """State was lost that nothing can bring back; starting processes again does not help."""


class StrandedRankError(RankLostError):
    """This process took a lost rank's place where the others cannot take it back; the job must be started again."""


class ReplicationError(MoEtionError, ConnectionError):
    """A copy could not be sent to, or fetched from, another rank (refused, unauthenticated, broken off, altered)."""


class LaunchError(MoEtionError, RuntimeError):
    """A job cannot be started, or has failed more often than allowed."""
