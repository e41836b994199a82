"""Dense in-memory snapshots, as a callback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from moetion_lightning.callbacks._base import EngineCallback
from moetion_lightning.config import EngineConfig
from moetion_lightning.core.policy import DensePolicy, Policy
from moetion_lightning.events import Sink

__all__ = ["DenseInMemoryCheckpoint"]


class DenseInMemoryCheckpoint(EngineCallback):
    """Copies the whole state into host memory every ``every_n_steps`` optimizer steps. Exact, without a replay.

    Args:
        every_n_steps: Optimizer steps between snapshots.
        memory_dir: Directory for snapshots in host memory; None takes /dev/shm.
        persist_dir: Directory or fsspec URL to which snapshots are copied in the background; None for none.
        persist_every_n_windows: Copy only every n-th snapshot.
        job_id: Identity under which snapshots are found again; None derives it.
        resume: "auto" continues from the newest snapshot of this job, "never" starts afresh.
        sharding: How state that several ranks hold is dealt out to them: "auto", "equal", "adaptive", or "none" (each
            rank captures its own copy).
        replicas: Copies of each rank's snapshots in the memory of ranks on other failure domains; "auto" is 1 where
            there are several domains, else 0.
        failure_domain: What fails together with this rank; None takes its node (or what the launcher was told).
        interface: Address on which this rank serves its snapshots to other ranks; None takes loopback on one node, else
            the address of the node's host name.
        events_path: JSONL file for the events of the run; None for none.
        log_metrics: Show numbers in progress bar and loggers.
        sinks: Callables that get every event.

    Raises:
        ConfigurationError: A value is out of range.

    Source: Gemini (SOSP'23).
    """

    def __init__(
        self,
        every_n_steps: int = 1,
        memory_dir: str | None = None,
        persist_dir: str | None = None,
        persist_every_n_windows: int = 1,
        job_id: str | None = None,
        resume: Literal["auto", "never"] = "auto",
        sharding: Literal["auto", "equal", "adaptive", "none"] = "auto",
        replicas: int | Literal["auto"] = "auto",
        failure_domain: str | None = None,
        interface: str | None = None,
        events_path: str | None = None,
        log_metrics: bool = True,
        sinks: Sequence[Sink] = (),
    ) -> None:
        config = EngineConfig(
            window=1,
            memory_dir=memory_dir,
            persist_dir=persist_dir,
            persist_every_n_windows=persist_every_n_windows,
            job_id=job_id,
            resume=resume,
            sharding=sharding,
            replicas=replicas,
            failure_domain=failure_domain,
            interface=interface,
        )
        super().__init__(config, sinks=sinks, events_path=events_path, log_metrics=log_metrics)
        self._every_n_steps = every_n_steps
        self._policy()  # a wrong value raises here

    def _policy(self) -> Policy:
        return DensePolicy(self._every_n_steps)
