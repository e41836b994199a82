"""The keyword settings of the loop adapters: those of the Lightning callback, and the policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from moetion_lightning.config import EngineConfig
from moetion_lightning.core.layouts import MoESpec
from moetion_lightning.core.policy import Policy, SparsePolicy
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.events import Sink

__all__ = ["RunSettings", "Settings"]

_OF_THE_WINDOW = ("window", "max_window", "overlap_target")


class Settings(TypedDict, total=False):
    """Keyword settings; each has the meaning and the default that it has in ``SparseExpertCheckpoint``.

    ``policy`` takes the place of ``window``, ``max_window`` and ``overlap_target``: ``DensePolicy(every_n_steps)`` or
    ``PartialExpertsPolicy(num_experts)`` of :mod:`moetion_lightning.core.policy`.
    """

    window: int | Literal["auto"]
    max_window: int
    overlap_target: float
    policy: Policy
    skip_frozen_gradients: bool
    memory_dir: str | None
    persist_dir: str | None
    persist_every_n_windows: int
    keep_persisted: int
    job_id: str | None
    resume: Literal["auto", "never"]
    on_mismatch: Literal["warn", "raise"]
    specs: Sequence[MoESpec] | None
    elementwise_optimizers: Sequence[str]
    sharding: Literal["auto", "equal", "adaptive", "none"]
    replicas: int | Literal["auto"]
    failure_domain: str | None
    interface: str | None
    events_path: str | None
    sinks: Sequence[Sink]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Validated settings.

    Args:
        config: Of the engine.
        policy: What to capture when.
        specs: Descriptions of MoE blocks that are not found by themselves.
        sinks: Event sinks.
        events_path: JSONL file of events, or None.
    """

    config: EngineConfig
    policy: Policy
    specs: tuple[MoESpec, ...]
    sinks: tuple[Sink, ...]
    events_path: str | None

    @classmethod
    def read(cls, given: Mapping[str, Any], where: str) -> RunSettings:
        """Validate what a user gave.

        Args:
            given: As :class:`Settings`.
            where: The call in which it was given, for messages.

        Raises:
            ConfigurationError: A setting is unknown or out of range.
        """
        unknown = sorted(given.keys() - Settings.__annotations__.keys())
        if unknown:
            raise ConfigurationError(
                f"{where}: no setting is named {unknown[0]!r}; expected {', '.join(sorted(Settings.__annotations__))}"
            )
        policy = given.get("policy")
        contradicting = [name for name in _OF_THE_WINDOW if policy is not None and name in given]
        if contradicting:
            raise ConfigurationError(
                f"{where}: {contradicting[0]}={given[contradicting[0]]!r} has no effect with "
                f"policy={type(policy).__name__}(...). Give one of the two."
            )
        fields = {field.name for field in dataclasses.fields(EngineConfig)}
        values = {name: value for name, value in given.items() if name in fields}
        if "elementwise_optimizers" in values:
            values["elementwise_optimizers"] = tuple(values["elementwise_optimizers"])
        config = EngineConfig(**values) if policy is None else EngineConfig(**values, window=1)
        return cls(
            config=config,
            policy=SparsePolicy(config.window, config.max_window, config.overlap_target) if policy is None else policy,
            specs=tuple(given.get("specs") or ()),
            sinks=tuple(given.get("sinks") or ()),
            events_path=given.get("events_path"),
        )
