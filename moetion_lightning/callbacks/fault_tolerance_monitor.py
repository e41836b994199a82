"""Numbers of fault tolerance in the loggers, over all failures of a job."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moetion_lightning.badput import CAUSES, NANOSECONDS, Ledger, Use
from moetion_lightning.callbacks._account import NOTE_BYTES, Account
from moetion_lightning.callbacks._base import EngineCallback
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.events import (
    CopiesChanged,
    Event,
    IterationFinished,
    PartialExpertsRestored,
    ProtectionChanged,
    TokensCounted,
    WindowCommitted,
)
from moetion_lightning.metrics import (
    Badput,
    CheckpointStall,
    ExpertLoad,
    ProportionOfLostTokens,
)
from moetion_lightning.metrics.functional import expert_load_imbalance

__all__ = ["FaultToleranceMonitor"]

_log = logging.getLogger(__name__)

_SLOW = 1.5  # times the median


class FaultToleranceMonitor(Callback):
    """Logs how much of the time training goes forward, what checkpoints cost it, and how experts are loaded.

    Add it beside a capturing callback; order does not matter. To every logger of the Trainer go

    * ``moetion/ettr``, ``moetion/ettr_last_hour``: share of the wall time since the first start in which training went
      forward: iterations that were finished for the first time, without their stalls and validations;
    * ``moetion/productive_seconds``, ``moetion/wall_seconds``: the two whose ratio that is;
    * ``moetion/badput/<cause>_seconds``, ``moetion/badput_last_hour/<cause>_seconds``: the rest of the wall time by
      cause (``start``, ``detection``, ``groups``, ``restore``, ``replay``, ``redo``, ``stall``, ``validation``,
      ``idle``). With the productive seconds they are the wall time: each second is counted once;
    * ``moetion/lost_seconds``: the badput without stalls and validations;
    * ``moetion/stall_seconds_per_iteration``, ``moetion/stall_share``: waiting for captures, and preparing them;
    * ``moetion/committed_step``: last iteration of the newest committed window, -1 before the first;
    * ``moetion/protected``: 1 where a window is there to go back to and captures succeed, else 0;
    * ``moetion/missing_copies``: copies of windows on other nodes that could not be made; once there was one;
    * ``moetion/expert_imbalance``: tokens of the busiest expert over the mean, of the layer where that is largest;
    * ``moetion/slowest_rank``, ``moetion/slowest_over_median``: of several ranks, the one with the longest
      ``own_seconds`` (processor time of the training thread, and its waits for data), and how many times the median of
      all ranks that is. From 1.5 on the log says so. The others wait for it, but it is never killed for that;
    * ``moetion/plt``: proportion of lost tokens, which only ``PartialExpertsCheckpoint`` can make more than 0.

    The first step is logged, too: what is known by then. The numbers survive SIGKILL. The account of the wall time lies
    in host memory beside the windows and is written at each event, so that it never goes back; where a machine was
    lost, the one of the restored window is taken, and what came after it counts as ``detection``. Stalls and tokens are
    part of the state that windows carry and go back with training: each iteration counts once. Time that a job was
    stopped on purpose is ``idle``.

    An iteration ends where the next one begins, so what is logged last does not hold the last one. Seconds are means
    over ranks; tokens are summed over ranks already.

    Args:
        every_n_steps: Optimizer steps between two entries in the logs; None takes the Trainer's ``log_every_n_steps``.
        progress_bar: Whether ``ettr`` is shown in the progress bar, too.

    Attributes:
        account: Where the wall time of this rank went (its ``ledger``).
        badput: The same as a ``torchmetrics.Metric``, as it was logged last.
        stall: The stalls of this rank.
        expert_load: Tokens of all ranks by layer and expert; None before the first were counted.
        lost_tokens: The proportion of lost tokens; None as long as ``expert_load`` is.

    Raises:
        ConfigurationError: ``every_n_steps`` is not positive; at setup: nothing in the Trainer captures or restores.

    Ranks:
        All ranks log at the same step, together.
    """

    #: Hooks on the MoE layers are there while the monitor is: the imbalance needs them.
    counts_tokens = True

    def __init__(self, every_n_steps: int | None = None, progress_bar: bool = False) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigurationError(f"FaultToleranceMonitor(every_n_steps={every_n_steps}): expected a number >= 1")
        self.every_n_steps = every_n_steps
        self.progress_bar = progress_bar
        #: What was logged last.
        self.values: dict[str, float] = {}
        # Without a cache: ranks that were started at different times must all take part in every synchronization.
        self.badput, self.last_hour = (Badput(compute_with_cache=False) for _ in range(2))
        self.account = Account()
        self.stall = CheckpointStall(compute_with_cache=False)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.stall.reset()
        self.expert_load: ExpertLoad | None = None
        self.lost_tokens: ProportionOfLostTokens | None = None
        self._layers: tuple[str, ...] = ()
        self._own: list[float] = []
        self._num_iterations = 0
        self._logged_step = 0
        self._protection = {"moetion/committed_step": -1.0, "moetion/protected": 0.0}

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the MoE layers, in the order of the metrics' rows."""
        return self._layers

    @property
    def tokens(self) -> dict[str, list[int]]:
        """Expert assignments of all ranks so far, by layer."""
        if self.expert_load is None:
            return {}
        widths, rows = self._widths(self.expert_load), self.expert_load.tokens.tolist()
        return {name: row[:width] for name, width, row in zip(self._layers, widths, rows)}

    # --- listening -----------------------------------------------------------------------------------------------

    def on_moetion_event(self, event: Event) -> None:
        """The capturing callback beside this one hands over every event of the run."""
        self.account.add(event)
        if isinstance(event, IterationFinished):
            self.stall.update(event.stall_seconds, event.seconds)
            self._num_iterations += 1
            self._own.append(event.own_seconds)
        elif isinstance(event, TokensCounted):
            self._tokens_counted(event.tokens)
        elif isinstance(event, PartialExpertsRestored) and self.lost_tokens is not None:
            lost = [event.lost_by_layer.get(name, 0) for name in self._layers]
            self.lost_tokens.update(lost=torch.tensor(lost))
        elif isinstance(event, WindowCommitted):
            self._protection["moetion/committed_step"] = float(event.last_iteration)
        elif isinstance(event, ProtectionChanged):
            self._protection["moetion/protected"] = float(event.protected)
        elif isinstance(event, CopiesChanged):
            self._protection["moetion/missing_copies"] = float(event.missing)

    def _tokens_counted(self, tokens: dict[str, list[int]]) -> None:
        widths = tuple(len(row) for row in tokens.values())
        load, lost = self.expert_load, self.lost_tokens
        if load is None or lost is None or tuple(tokens) != self._layers or widths != load.num_experts:
            # Every rank is told the sums over all ranks: to sum again would be wrong.
            load = self.expert_load = ExpertLoad(widths, sync_on_compute=False)
            lost = self.lost_tokens = ProportionOfLostTokens(len(tokens), sync_on_compute=False)
            self._layers = tuple(tokens)
        counts = torch.zeros_like(load.tokens)
        for row, values in enumerate(tokens.values()):
            counts[row, : len(values)] = torch.tensor(values)
        load.update(counts)
        lost.update(total=counts.sum(dim=1))

    @staticmethod
    def _widths(load: ExpertLoad) -> tuple[int, ...]:
        assert isinstance(load.num_experts, tuple)
        return load.num_experts

    # --- over failures -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "ledger": self.account.ledger.dump(),
            "stall_seconds": float(self.stall.stall_seconds),
            "iteration_seconds": float(self.stall.iteration_seconds),
            "num_iterations": self._num_iterations,
            "tokens": self.tokens,
            "lost_tokens": [] if self.lost_tokens is None else self.lost_tokens.lost.tolist(),
            "logged_step": self._logged_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._begin_anew()
        self.account.follow(Ledger.load(state_dict["ledger"]))
        self._num_iterations = state_dict["num_iterations"]
        self.stall.update(state_dict["stall_seconds"], state_dict["iteration_seconds"], self._num_iterations)
        self._logged_step = state_dict["logged_step"]
        if state_dict["tokens"]:
            self._tokens_counted(state_dict["tokens"])
            assert self.lost_tokens is not None
            self.lost_tokens.update(lost=torch.tensor(state_dict["lost_tokens"]))

    # --- hooks of Lightning --------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        capturing = [c for c in trainer.callbacks if isinstance(c, EngineCallback)]  # type: ignore[attr-defined]
        if not capturing:
            raise ConfigurationError(
                "FaultToleranceMonitor in Trainer(callbacks=...) without a callback whose events it could count: add "
                "SparseExpertCheckpoint(), PartialExpertsCheckpoint() or DenseInMemoryCheckpoint()"
            )
        self._begin_anew()
        for note in filter(None, (callback.open_note("badput", NOTE_BYTES) for callback in capturing)):
            self.account.keep_in(note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = self.every_n_steps or max(1, getattr(trainer, "log_every_n_steps", 50))
        first = trainer.global_step > 0 and not self._logged_step
        due = first or trainer.global_step // every > self._logged_step // every
        if due and self._log(trainer) and self.progress_bar:
            ettr = self.values["moetion/ettr"]
            pl_module.log("moetion/ettr", ettr, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._logged_step:
            self._log(trainer)

    def _log(self, trainer: Trainer) -> bool:
        """All ranks: hand the values to the loggers. Returns whether those of whole iterations are among them."""
        self._logged_step = trainer.global_step
        self.values = dict(self._protection)
        if self._num_iterations:
            self._measure(trainer)
        for logger in trainer.loggers:
            logger.log_metrics(self.values, step=trainer.global_step - 1)  # Lightning counts steps from zero there
        return bool(self._num_iterations)

    def _measure(self, trainer: Trainer) -> None:
        if trainer.world_size > 1:  # a backend like NCCL sums on its own devices only
            self.stall.to(trainer.strategy.root_device)
        stall = self.stall.compute()
        self.stall.to("cpu")  # nobody waits for a device where events arrive
        ledger = self.account.ledger
        total = self._over_ranks(trainer, self.badput, ledger.totals)
        recent = self._over_ranks(trainer, self.last_hour, ledger.last_hour())
        self.values |= {
            "moetion/ettr": total["productive"] / (total["wall"] or 1.0),
            "moetion/ettr_last_hour": recent["productive"] / (recent["wall"] or 1.0),
            "moetion/productive_seconds": total["productive"],
            "moetion/wall_seconds": total["wall"],
            **{f"moetion/badput/{cause.value}_seconds": total[cause.value] for cause in CAUSES},
            **{f"moetion/badput_last_hour/{cause.value}_seconds": recent[cause.value] for cause in CAUSES},
            "moetion/lost_seconds": sum(total[c.value] for c in CAUSES if c not in (Use.STALL, Use.VALIDATION)),
            "moetion/stall_seconds_per_iteration": float(stall["seconds_per_iteration"]),
            "moetion/stall_share": float(stall["share"]),
        }
        if trainer.world_size > 1:
            self._find_slowest(trainer)
        if self.expert_load is not None and self.lost_tokens is not None:
            imbalance = expert_load_imbalance(self.expert_load.tokens, self._widths(self.expert_load))
            self.values["moetion/expert_imbalance"] = float(imbalance.max())
            self.values["moetion/plt"] = float(self.lost_tokens.compute())

    def _over_ranks(self, trainer: Trainer, metric: Badput, uses: Mapping[Use, int]) -> dict[str, float]:
        metric.reset()
        metric.update({use.value: nanoseconds / NANOSECONDS for use, nanoseconds in uses.items()})
        if trainer.world_size > 1:
            metric.to(trainer.strategy.root_device)
        values = {name: float(value) for name, value in metric.compute().items()}
        metric.to("cpu")
        return values

    def _find_slowest(self, trainer: Trainer) -> None:
        own, self._own = statistics.median(self._own or [0.0]), []
        given = torch.tensor([own], dtype=torch.float32, device=trainer.strategy.root_device)
        seconds = trainer.strategy.all_gather(given).flatten().tolist()
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        middle = statistics.median_low(seconds)
        factor = seconds[slowest] / middle if middle > 0 else 1.0
        self.values |= {"moetion/slowest_rank": float(slowest), "moetion/slowest_over_median": factor}
        if factor >= _SLOW and trainer.is_global_zero:
            _log.warning(
                "rank %d is slow: %.1f ms of processor time and waits for data in an iteration, %.1f times the median "
                "of all ranks, which wait for it. See its data loading, and what else runs on its processor.",
                slowest, 1e3 * seconds[slowest], factor,
            )  # fmt: skip
