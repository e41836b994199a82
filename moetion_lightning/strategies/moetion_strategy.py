"""Pipeline x data, or data x expert, parallel training of unchanged LightningModules."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from moetion_lightning.core.layouts import MoESpec
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.strategies.expert_gradients import ExpertGradients
from moetion_lightning.strategies.expert_layout import ExpertGroups, ExpertLayout
from moetion_lightning.strategies.expert_parallel import ExpertShards, ShardedLayer, plan_layers
from moetion_lightning.strategies.expert_state import ExpertState
from moetion_lightning.strategies.optimizer_order import OptimizerOrder, SpreadState, plain_optimizer

__all__ = ["MoEtionStrategy"]

_logger = logging.getLogger(__name__)
_MARK = "_moetion_expert_parallel"


class MoEtionStrategy(DDPStrategy):
    """Data parallel training with the experts, or the layers, of an unchanged module spread over ranks.

    **Expert parallel.** The world is ``data x expert``: groups of ``expert_parallel_size`` neighbouring ranks share the
    experts of every MoE layer among them, in contiguous blocks, and exchange tokens in each forward and backward pass;
    every other parameter is replicated and averaged over all ranks as by DDPStrategy. With ``expert_parallel_size=1``
    no tokens travel; experts that are modules are still averaged apart from DDP, so that an expert without tokens needs
    no ``find_unused_parameters``. What it asks of a run with ``expert_parallel_size > 1``:

    - Every rank runs the same number of forward passes of the module, in validation too.
    - Experts act on rows ``[..., width]`` one by one. The forward of a block that calls expert modules runs twice, and
      must route alike both times; its other parts (shared experts) are computed twice. A container that is called as
      ``experts(hidden_states, ids, weights)``, as in transformers, runs once.
    - If a rank may have no token at all for a layer, its router has no gradient there: as for DDPStrategy, give
      ``find_unused_parameters=True``.
    - From setup on the module holds this rank's experts only; a checkpoint has all of them.

    **Pipeline parallel.** The world is ``pipeline x data``: global rank ``pp_rank * data_parallel_size + dp_rank``. The
    module's own step is cut at its list of layers; each rank runs its stages on ``num_microbatches`` pieces of every
    batch, under one of torch's schedules. The module is written as for one process, with automatic optimization; what
    it returns and logs is per micro-batch. What it asks of a run:

    - The layers are called once each, one after the other, and what follows them reads nothing else of them than their
      last output and side values such as auxiliary losses. What cannot be cut is refused with the first batch.
    - The loss of a batch is the mean over its micro-batches, as with gradient accumulation. ``training_step`` gives the
      loss, alone or in a dict; every rank gets the mean loss back, and no further entries of the dict.
    - All ranks of a pipeline iterate their loaders; the batch of the first stage counts.
    - From the first training batch on the module holds this rank's stages only; a checkpoint has all of them.

    Checkpoints are ordinary full ones, which any other strategy, or other sizes, can load.

    Source:
        GShard, Lepikhin et al. 2020, section 3 (experts sharded over the data-parallel ranks, all-to-all dispatch).
        GPipe, Huang et al. 2019; PipeDream (1F1B), Narayanan et al. 2019; Megatron-LM (interleaved 1F1B), Narayanan et
        al. 2021; Zero Bubble, Qi et al. 2024: the schedules of torch.distributed.pipelining.

    Args:
        expert_parallel_size: Ranks that share the experts; must divide the number of ranks.
        specs: Descriptions of MoE layers that are not detected automatically.
        pipeline_parallel_size: Ranks of a pipeline; must divide the number of ranks.
        num_microbatches: Pieces of a batch; None: as many as the pipeline has ranks.
        schedule: ``"1f1b"``, ``"gpipe"``, or with several ``chunks_per_rank`` ``"interleaved_1f1b"``,
            ``"interleaved_zero_bubble"``, ``"zbv_zero_bubble"``.
        chunks_per_rank: Stages of each rank.
        layers: Names of the lists of layers to cut between, in the order of their calls (``"model.layers"``); None:
            what the module's ``configure_pipeline()`` returns if it has that method, else they are found.
        balance: Where to cut: so that stages have alike ``"parameters"``, or take alike ``"time"`` (measured with the
            first batch), or the first layer of each stage.
        accelerator: As for DDPStrategy.
        parallel_devices: As for DDPStrategy.
        cluster_environment: As for DDPStrategy.
        checkpoint_io: As for DDPStrategy.
        precision_plugin: As for DDPStrategy.
        process_group_backend: As for DDPStrategy.
        timeout: Of all collectives, as for DDPStrategy.
        **kwargs: Further arguments of DDPStrategy and DistributedDataParallel.

    Raises:
        ConfigurationError: A size is not a positive integer, or settings contradict each other.
    """

    strategy_name = "moetion"

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """The strategy for what is asked: pipelines have a class of their own."""
        size, number = kwargs.get("pipeline_parallel_size", 1), kwargs.get("num_microbatches")
        if size == 1 and not number:
            return super().__new__(cls)
        from moetion_lightning.strategies.pipeline_strategy import PipelineStrategy

        if issubclass(cls, PipelineStrategy):
            return super().__new__(cls)
        if cls is not MoEtionStrategy:
            raise ConfigurationError(
                f"{cls.__name__}(pipeline_parallel_size={size!r}, num_microbatches={number!r}) would not cut the "
                "module: expected a subclass of PipelineStrategy (moetion_lightning.strategies.pipeline_strategy). "
                "Derive from that, or use MoEtionStrategy itself"
            )
        return super().__new__(PipelineStrategy)

    def __init__(
        self,
        expert_parallel_size: int = 1,
        specs: Sequence[MoESpec] = (),
        *,
        pipeline_parallel_size: int = 1,
        num_microbatches: int | None = None,
        schedule: str = "1f1b",
        chunks_per_rank: int = 1,
        layers: str | list[str] | None = None,
        balance: str | list[int] = "parameters",
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        **kwargs: Any,
    ) -> None:
        _check_sizes(
            expert_parallel_size=expert_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            num_microbatches=1 if num_microbatches is None else num_microbatches,
            chunks_per_rank=chunks_per_rank,
        )
        if not _is_balance(balance):
            raise ConfigurationError(
                f"MoEtionStrategy(balance={balance!r}): expected 'parameters', 'time', or the first layer of each stage"
            )
        if pipeline_parallel_size == 1 and num_microbatches is None:
            _warn_without_effect(schedule=schedule, chunks_per_rank=chunks_per_rank, layers=layers, balance=balance)
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            **kwargs,
        )
        self.expert_parallel_size = expert_parallel_size
        self.pipeline_parallel_size = pipeline_parallel_size
        self.num_microbatches = pipeline_parallel_size if num_microbatches is None else num_microbatches
        self.schedule = schedule
        self.chunks_per_rank = chunks_per_rank
        self.layers = layers
        self.balance = balance
        self._specs = tuple(specs)
        self._groups: ExpertGroups | None = None
        self._shards: ExpertShards | None = None
        self._gradients: ExpertGradients | None = None
        self._state: ExpertState | None = None

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Make the strategy known to Trainer as ``"moetion"``."""
        strategy_registry.register(
            cls.strategy_name, cls, description="Pipeline, expert and data parallel training of MoE models"
        )

    # --- what others may ask ---------------------------------------------------------------------------------------

    @property
    def layout(self) -> ExpertLayout:
        """Which rank is where; computed, so that it may be asked without process groups."""
        return ExpertLayout(world_size=self.world_size, expert_parallel_size=self.expert_parallel_size)

    @property
    def spreads_state(self) -> bool:
        """Whether a rank holds a part of the module only, and ordinary checkpoints are gathered."""
        return self.expert_parallel_size > 1

    @property
    def expert_layers(self) -> tuple[ShardedLayer, ...]:
        """The MoE layers that this strategy handles, whole and with this rank's share; empty before setup."""
        return () if self._shards is None else self._shards.layers

    def replica_ranks(self, parameter_name: str) -> tuple[int, ...]:
        """The global ranks that hold an identical copy of a parameter of this rank, this rank among them.

        Args:
            parameter_name: Its name in the LightningModule.
        """
        if self._shards is not None and parameter_name in self._shards.expert_parameters():
            return self.layout.replica_ranks(self.global_rank)
        return tuple(range(self.world_size))

    def rebuild_groups(self) -> None:
        """Make the process groups and the DDP wrapper anew; all tensors stay as they are.

        For use after torch.distributed was destroyed and initialised again, because a rank was replaced.

        Ranks:
            All ranks of the job, together.
        """
        if self._groups is not None:
            self._groups.drop()
            self._groups.build()
        self.model = self.lightning_module
        gc.collect()  # the old wrapper's reducer takes its hooks off the parameters when it is destroyed
        self.model = self._wrapped(self.lightning_module, init_sync=False)
        self._register_ddp_hooks()

    # --- setup -----------------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Checkpoints are cut apart when they are loaded, which needs the layers."""
        return True

    def setup(self, trainer: Trainer) -> None:
        """Spread the experts, then set up as DDPStrategy does.

        Raises:
            ConfigurationError: The module cannot be trained like this; see :func:`plan_layers`.
        """
        module = self.lightning_module
        assert module is not None
        if self._shards is None or self._shards.module is not module:
            self._spread(module)
        super().setup(trainer)

    def _spread(self, module: LightningModule) -> None:
        if getattr(module, _MARK, False):
            raise ConfigurationError(
                f"{type(module).__name__} holds the experts of one rank only, after training with another "
                "MoEtionStrategy. Make a new module, and load a checkpoint into it"
            )
        if self.expert_parallel_size > 1 and getattr(self.precision_plugin, "scaler", None) is not None:
            raise ConfigurationError(
                'precision="16-mixed" with expert_parallel_size > 1: an overflow in an expert is seen by its own ranks '
                'only, and the others would step. Use precision="bf16-mixed"'
            )
        layout = self.layout
        layers = plan_layers(module, layout, self.global_rank, self._specs)
        if not layers:
            return
        self._groups = ExpertGroups(layout, self.global_rank, self._timeout)
        self._groups.build()
        self._shards = ExpertShards(module, layers, self._groups)
        self._shards.broadcast(self.root_device)
        self._shards.take()
        self._state = ExpertState(self._shards, self._groups, self.root_device) if self._shards.taken else None
        self._gradients = ExpertGradients(self._shards.expert_parameters(), self._groups)
        object.__setattr__(module, _MARK, self.expert_parallel_size > 1)
        _logger.info(
            "%d MoE layers; rank %d holds the experts %s",
            len(layers),
            self.global_rank,
            [layer.owned for layer in layers],
        )

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Let ``configure_optimizers`` see the parameters of the whole module, then keep this rank's."""
        shards, state = self._shards, self._state
        if shards is None or state is None:
            super().setup_optimizers(trainer)
            return
        shards.show_placeholders(True)
        try:
            super().setup_optimizers(trainer)
        finally:
            shards.show_placeholders(False)
        names, plain = shards.names_by_id(), [plain_optimizer(optimizer) for optimizer in self.optimizers]
        state.orders = {id(o): OptimizerOrder(o, names, shards.is_placeholder) for o in plain}

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        return self._wrapped(model, init_sync=True)

    def _wrapped(self, model: nn.Module | None, *, init_sync: bool) -> DistributedDataParallel:
        assert model is not None
        if self._shards is not None:
            ignored = [*self._shards.expert_parameters(), *self._shards.expert_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        given = self._ddp_kwargs
        self._ddp_kwargs = {**given, "init_sync": init_sync and given.get("init_sync", True)}
        try:
            return super()._setup_model(model)
        finally:
            self._ddp_kwargs = given

    # --- training --------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's training step; a manual one may clip gradients, by their global norm."""
        with self._global_norm():
            return super().training_step(*args, **kwargs)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the experts' gradients at once if the module steps its optimizers itself."""
        super().post_backward(closure_loss)
        module = self.lightning_module
        if self._gradients is not None and module is not None and not module.automatic_optimization:
            self._gradients.average()

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the last backward pass, average the experts' gradients, clip by the global norm, step."""
        gradients, module = self._gradients, self.lightning_module

        def closure_and_average() -> Any:
            result = closure()
            if gradients is not None and module is not None and module.automatic_optimization:
                gradients.average()
            return result

        with self._global_norm():
            return super().optimizer_step(optimizer, closure_and_average, model, **kwargs)

    def _global_norm(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._gradients is None else self._gradients.global_norm()

    # --- checkpoints -----------------------------------------------------------------------------------------------

    @property
    def spread_state(self) -> SpreadState | None:
        """What gathers and cuts apart the state of the module; None while every rank has it whole."""
        return self._state

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state dict of the whole module on rank 0, of its own part on any other rank.

        Ranks:
            All ranks of the job, together.
        """
        state: dict[str, Any] = super().lightning_module_state_dict()
        spread = self.spread_state
        return state if spread is None else spread.gather(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state for the whole module on rank 0, for its own part on any other rank.

        Ranks:
            All ranks of the job, together.
        """
        state: dict[str, Any] = super().optimizer_state(optimizer)
        spread = self.spread_state
        return state if spread is None else spread.gather_optimizer(optimizer, state)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this rank's part of a checkpoint of the whole module."""
        if self.spread_state is None:
            super().load_model_state_dict(checkpoint, strict=strict)
        else:
            self.spread_state.load(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's part of the optimizers' states."""
        if self.spread_state is not None:
            states = self.spread_state.cut_optimizers(self.optimizers, checkpoint["optimizer_states"])
            checkpoint = {**checkpoint, "optimizer_states": states}
        super().load_optimizer_state_dict(checkpoint)


# LightningCLI offers the arguments of __new__ instead of those of __init__, unless it wraps the one of `object`.
MoEtionStrategy.__new__.__wrapped__ = object.__new__  # type: ignore[attr-defined]


def _check_sizes(**sizes: object) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"MoEtionStrategy({name}={value!r}): expected a number >= 1")


def _is_balance(balance: object) -> bool:
    if isinstance(balance, str):
        return balance in ("parameters", "time")
    if not isinstance(balance, (list, tuple)) or not balance:
        return False
    return all(isinstance(first, int) and not isinstance(first, bool) for first in balance)


def _warn_without_effect(**settings: object) -> None:
    defaults = {"schedule": "1f1b", "chunks_per_rank": 1, "layers": None, "balance": "parameters"}
    given = [f"{name}={value!r}" for name, value in settings.items() if value != defaults[name]]
    if given:
        _logger.warning(
            "MoEtionStrategy(%s) has no effect without pipeline_parallel_size or num_microbatches. Remove it, or give "
            "one of them",
            ", ".join(given),
        )
