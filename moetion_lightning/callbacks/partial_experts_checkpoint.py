"""MoC-System's partial experts checkpointing, as a callback."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from moetion_lightning.callbacks._base import EngineCallback
from moetion_lightning.config import EngineConfig
from moetion_lightning.core.layouts import MoESpec
from moetion_lightning.core.policy import PartialExpertsPolicy, Policy
from moetion_lightning.events import Sink

__all__ = ["PartialExpertsCheckpoint"]

_log = logging.getLogger(__name__)


class PartialExpertsCheckpoint(EngineCallback):
    """Saves all non-expert state and K of the N experts of each layer: small, and lossy.

    After a failure, experts that were not in the last checkpoint come back from older ones; the tokens that they have
    seen since are lost. The proportion of lost tokens (PLT) is counted per layer and reported after each restore.

    Args:
        num_experts_per_checkpoint: K, experts of each MoE layer in one checkpoint.
        num_experts_persisted: How many of those K go to ``persist_dir``, taken by the same ``selection`` and so that
            each expert gets there within a bounded number of copies; None: all K. A restart that finds host memory
            loses fewer tokens than one that has only storage. Three checkpoints exist at a time: the one being made,
            the committed one, and the one being copied. The first copy of a process holds all experts.
        selection: "sequential" (round robin) or "load_aware" (most unsaved tokens first).
        every_n_steps: Optimizer steps between checkpoints.
        plt_limit: After a restore with a higher PLT, K doubles (and ``num_experts_persisted``); None keeps K.
        memory_dir: Directory for checkpoints in host memory; None takes /dev/shm.
        persist_dir: Directory or fsspec URL to which checkpoints are copied in the background; None for none.
        persist_every_n_windows: Copy only every n-th checkpoint.
        job_id: Identity under which checkpoints are found again; None derives it.
        resume: "auto" continues from the newest checkpoint of this job, "never" starts afresh.
        specs: Descriptions of MoE blocks that are not found by themselves.
        sharding: How state that several ranks hold is dealt out to them: "auto", "equal", "adaptive", or "none" (each
            rank captures its own copy).
        replicas: Copies of each rank's checkpoints in the memory of ranks on other failure domains; "auto" is 1 where
            there are several domains, else 0.
        failure_domain: What fails together with this rank; None takes its node (or what the launcher was told).
        interface: Address on which this rank serves its checkpoints to other ranks; None takes loopback on one node,
            else the address of the node's host name.
        events_path: JSONL file for the events of the run; None for none.
        log_metrics: Show numbers in progress bar and loggers.
        sinks: Callables that get every event.

    Raises:
        ConfigurationError: A value is out of range.

    Source: MoC-System (ASPLOS'25), sections 3 and 4.
    """

    def __init__(
        self,
        num_experts_per_checkpoint: int,
        num_experts_persisted: int | None = None,
        selection: Literal["sequential", "load_aware"] = "sequential",
        every_n_steps: int = 1,
        plt_limit: float | None = 0.0375,
        memory_dir: str | None = None,
        persist_dir: str | None = None,
        persist_every_n_windows: int = 1,
        job_id: str | None = None,
        resume: Literal["auto", "never"] = "auto",
        specs: list[MoESpec] | None = None,
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
        super().__init__(config, specs=specs, sinks=sinks, events_path=events_path, log_metrics=log_metrics)
        self._settings = (num_experts_per_checkpoint, selection, every_n_steps, plt_limit, num_experts_persisted)
        self._policy()  # a wrong value raises here
        if num_experts_persisted is not None and persist_dir is None:
            _log.warning("num_experts_persisted=%d has no effect without persist_dir=", num_experts_persisted)

    def _policy(self) -> Policy:
        return PartialExpertsPolicy(*self._settings)
