"""Sparse checkpointing with exact recovery, as a callback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from moetion_lightning.callbacks._base import EngineCallback
from moetion_lightning.config import EngineConfig
from moetion_lightning.core.layouts import MoESpec
from moetion_lightning.core.policy import Policy, SparsePolicy
from moetion_lightning.events import Sink

__all__ = ["SparseExpertCheckpoint"]


class SparseExpertCheckpoint(EngineCallback):
    """Snapshots a part of the experts after every optimizer step, and recovers bit for bit after a kill.

    Add it to a Trainer, change nothing else. When the same command is started again after a failure, training goes on
    from the newest committed window, having re-executed at most two windows of iterations, with exactly the weights,
    optimizer state, losses and samples of the run that never failed.

    Args:
        window: Iterations over which the state is spread; "auto" takes the smallest window whose copies are hidden
            behind training.
        max_window: Upper limit for "auto".
        overlap_target: Share of an iteration that the copies may take, in (0, 1].
        skip_frozen_gradients: While replaying, skip the weight gradients of operators that are not rebuilt yet
            (clipping then uses the recorded norm). Has no effect with a gradient scaler ("16-mixed").
        memory_dir: Directory for windows in host memory; None takes /dev/shm.
        persist_dir: Directory or fsspec URL to which committed windows are copied in the background; None for none.
        persist_every_n_windows: Copy only every n-th window.
        keep_persisted: Windows to keep in persist_dir.
        job_id: Identity under which windows are found again; None derives it from user, directory and command line.
        resume: "auto" continues from the newest window of this job, "never" starts afresh.
        on_mismatch: What to do when a replayed iteration differs from the recorded one (non-deterministic training).
        specs: Descriptions of MoE blocks that are not found by themselves, see `moetion explain`.
        elementwise_optimizers: Qualified class names of third-party optimizers whose update is elementwise, so that
            experts of a fused parameter may be captured one by one.
        sharding: How state that several ranks hold is dealt out to them: "auto", "equal", "adaptive", or "none" (each
            rank captures its own copy).
        replicas: Copies of each rank's windows in the memory of ranks on other failure domains; "auto" is 1 where there
            are several domains, else 0.
        failure_domain: What fails together with this rank; None takes its node (or what the launcher was told).
        interface: Address on which this rank serves its windows to other ranks; None takes loopback on one node, else
            the address of the node's host name.
        events_path: JSONL file for the events of the run; None for none.
        log_metrics: Show window, stall and bytes in progress bar and loggers.
        sinks: Callables that get every event.

    Raises:
        ConfigurationError: A value is out of range.

    Source: MoEtion (NSDI'26, published as MoEvement), sections 3 and 4.
    """

    def __init__(
        self,
        window: int | Literal["auto"] = "auto",
        max_window: int = 32,
        overlap_target: float = 0.8,
        skip_frozen_gradients: bool = False,
        memory_dir: str | None = None,
        persist_dir: str | None = None,
        persist_every_n_windows: int = 1,
        keep_persisted: int = 1,
        job_id: str | None = None,
        resume: Literal["auto", "never"] = "auto",
        on_mismatch: Literal["warn", "raise"] = "warn",
        specs: list[MoESpec] | None = None,
        elementwise_optimizers: Sequence[str] = (),
        sharding: Literal["auto", "equal", "adaptive", "none"] = "auto",
        replicas: int | Literal["auto"] = "auto",
        failure_domain: str | None = None,
        interface: str | None = None,
        events_path: str | None = None,
        log_metrics: bool = True,
        sinks: Sequence[Sink] = (),
    ) -> None:
        config = EngineConfig(
            window=window,
            max_window=max_window,
            overlap_target=overlap_target,
            skip_frozen_gradients=skip_frozen_gradients,
            memory_dir=memory_dir,
            persist_dir=persist_dir,
            persist_every_n_windows=persist_every_n_windows,
            keep_persisted=keep_persisted,
            job_id=job_id,
            resume=resume,
            on_mismatch=on_mismatch,
            elementwise_optimizers=tuple(elementwise_optimizers),
            sharding=sharding,
            replicas=replicas,
            failure_domain=failure_domain,
            interface=interface,
        )
        super().__init__(config, specs=specs, sinks=sinks, events_path=events_path, log_metrics=log_metrics)

    def _policy(self) -> Policy:
        return SparsePolicy(self.config.window, self.config.max_window, self.config.overlap_target)
