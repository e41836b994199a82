"""What a user sets, for every adapter: the engine's settings, the policy, and who listens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetion_lightning.config import OF_THE_WINDOW, EngineConfig
from moetion_lightning.core.layouts import MoESpec
from moetion_lightning.core.log_policy import GradientLogPolicy
from moetion_lightning.core.policy import Policy, SparsePolicy
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.events import Sink

__all__ = ["SessionSettings"]

_OWN = ("policy", "specs", "sinks", "events_path")


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """Validated settings.

    Args:
        config: Of the engine.
        policy: What to capture when.
        specs: Descriptions of MoE blocks that are not detected automatically.
        sinks: Event sinks.
        events_path: JSONL file of events, or None.
        counts_tokens: Whether a sink wants the tokens of each expert.
    """

    config: EngineConfig
    policy: Policy
    specs: tuple[MoESpec, ...] = ()
    sinks: tuple[Sink, ...] = ()
    events_path: str | None = None
    counts_tokens: bool = False

    @classmethod
    def read(cls, given: Mapping[str, Any], where: str) -> SessionSettings:
        """Validate what a user gave as keywords.

        Args:
            given: The fields of :class:`~moetion_lightning.config.EngineConfig`, ``specs``, ``sinks``, ``events_path``,
                and ``policy``: ``"sparse"``, ``"gradient_log"`` (:class:`~.log_policy.GradientLogPolicy`, with
                ``window``), or in place of ``window``, ``max_window``, ``overlap_target`` and ``mtbf``
                ``DensePolicy(every_n_steps)`` or ``PartialExpertsPolicy(num_experts)`` of
                :mod:`moetion_lightning.core.policy`.
            where: The call in which it was given, for messages.

        Raises:
            ConfigurationError: A setting is unknown or out of range.
        """
        policy = given.get("policy")
        if isinstance(policy, str):
            return cls._read_named(policy, given, where)
        contradicting = [name for name in OF_THE_WINDOW if policy is not None and name in given]
        if contradicting:
            raise ConfigurationError(
                f"{where}: {contradicting[0]}={given[contradicting[0]]!r} has no effect with "
                f"policy={type(policy).__name__}(...). Give one of the two."
            )
        values = {name: value for name, value in given.items() if name not in _OWN}
        config = read_config(values if policy is None else {**values, "window": 1}, where, _OWN)
        if policy is None:
            policy = SparsePolicy(config.window, config.max_window, config.overlap_target, config.mtbf)
        return cls(
            config=config,
            policy=policy,
            specs=tuple(given.get("specs") or ()),
            sinks=tuple(given.get("sinks") or ()),
            events_path=given.get("events_path"),
        )

    @classmethod
    def _read_named(cls, policy: str, given: Mapping[str, Any], where: str) -> SessionSettings:
        """With a policy that is named, and takes its own settings from the engine's."""
        if policy not in ("sparse", "gradient_log"):
            raise ConfigurationError(
                f'{where}: policy={policy!r}: expected "sparse", "gradient_log", DensePolicy(...) or '
                "PartialExpertsPolicy(...)"
            )
        read = cls.read({name: value for name, value in given.items() if name != "policy"}, where)
        if policy == "sparse":
            return read
        return dataclasses.replace(read, policy=GradientLogPolicy(read.config.window))


def read_config(values: Mapping[str, Any], where: str, others: Sequence[str] = ()) -> EngineConfig:
    """The engine's settings out of keywords.

    Args:
        values: Keywords.
        where: The call in which they were given, for messages.
        others: Further names that the call knows, for messages.

    Raises:
        ConfigurationError: A setting is unknown or out of range.
    """
    known = [field.name for field in dataclasses.fields(EngineConfig)]
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise ConfigurationError(
            f"{where}: no setting is named {unknown[0]!r}; expected {', '.join(sorted([*known, *others]))}"
        )
    return EngineConfig(**values)
