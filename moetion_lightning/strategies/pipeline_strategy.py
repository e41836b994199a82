"""Pipeline x data parallel training of unchanged LightningModules."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.optim import Optimizer

from moetion_lightning.distributed.groups import current_groups
from moetion_lightning.distributed.messages import broadcast_json
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.layout import PipelineGroups, PipelineLayout
from moetion_lightning.pipeline.schedules import schedule_kind
from moetion_lightning.strategies.moetion_strategy import MoEtionStrategy
from moetion_lightning.strategies.optimizer_order import SpreadState, plain_optimizer
from moetion_lightning.strategies.pipeline_cut import Cut, PendingCut
from moetion_lightning.strategies.pipeline_link import PipelineLink
from moetion_lightning.strategies.pipeline_refusals import (
    NEED_WHOLE_MODULE,
    NEVER,
    refuse_callbacks,
    refuse_lists,
    refuse_parts,
)
from moetion_lightning.strategies.pipeline_steps import PipelineSteps, loss_of, step_arguments

__all__ = ["PipelineStrategy"]

_logger = logging.getLogger(__name__)


class PipelineStrategy(MoEtionStrategy):
    """What ``MoEtionStrategy(pipeline_parallel_size=...)`` makes; see there.

    From the first training batch on (:attr:`cut` is set) a rank trains the parameters of its own stages only.

    Attributes:
        given_bounds: First layer of each stage, set before the first batch to continue an earlier run's cut.
        link: Keeps the boundary log, and replays from it, if a callback asked for that.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.expert_parallel_size > 1:
            raise ConfigurationError(
                f"MoEtionStrategy(pipeline_parallel_size={self.pipeline_parallel_size}, expert_parallel_size="
                f"{self.expert_parallel_size}): expected one of them, not both together. Set the other one to 1"
            )
        if self._ddp_kwargs:
            _logger.warning(
                "MoEtionStrategy(%s) has no effect with pipeline_parallel_size or num_microbatches: stages are not "
                "wrapped in DistributedDataParallel. Remove it",
                ", ".join(f"{name}={value!r}" for name, value in self._ddp_kwargs.items()),
            )
        self.kind = schedule_kind(
            self.schedule, self.chunks_per_rank, self.num_microbatches, self.pipeline_parallel_size
        )
        self.cut: Cut | None = None
        self.given_bounds: tuple[int, ...] | None = None
        self.link: PipelineLink | None = None
        self._pending: PendingCut | None = None
        self._pipeline_groups: PipelineGroups | None = None
        self.steps = PipelineSteps(self)
        self._aside: list[tuple[nn.Parameter, Tensor]] = []
        self._agreed = False
        #: Whether the last step was skipped on all stages, because a gradient had overflowed.
        self.overflowed = False

    # --- what others may ask ---------------------------------------------------------------------------------------

    @property
    def pipeline_layout(self) -> PipelineLayout:
        """Which rank is where; computed, so that it may be asked without process groups."""
        return PipelineLayout(
            world_size=self.world_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            chunks_per_rank=self.chunks_per_rank,
            v_shaped=self.kind.v_shaped,
        )

    @property
    def pipeline_groups(self) -> PipelineGroups:
        """The process groups of this rank."""
        assert self._pipeline_groups is not None, "set up"
        return self._pipeline_groups

    @property
    def spreads_state(self) -> bool:
        """A rank holds its own stages only."""
        return True

    def replica_ranks(self, parameter_name: str) -> tuple[int, ...]:
        """The global ranks that hold an identical copy of a parameter of this rank, this rank among them.

        A tied parameter has copies on several stages, each of which counts as a parameter of its own here.
        """
        return self.pipeline_layout.replica_ranks(self.global_rank)

    def local_parameters(self) -> frozenset[str] | None:
        """Names of the parameters that this rank trains; None before the first training batch."""
        return None if self.cut is None else self.cut.local_names

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Replicas of the pipeline read different batches; the ranks of one pipeline the same ones."""
        layout = self.pipeline_layout
        return {"num_replicas": layout.data_parallel_size, "rank": layout.dp_rank(self.global_rank)}

    # --- setup -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        """Check that the module can be cut, and set up without a DDP wrapper.

        Raises:
            ConfigurationError: The module cannot be trained like this.
        """
        assert self.accelerator is not None
        assert self.model is not None
        module = self.lightning_module
        assert module is not None
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._refuse(trainer, module, fitting)
        self.accelerator.setup(trainer)
        if fitting and self._layer_sync:
            self.model = self._layer_sync.apply(self.model)
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if self._pipeline_groups is None:
            self._pipeline_groups = PipelineGroups(self.pipeline_layout, self.global_rank, self._timeout)
            self._pipeline_groups.build()
        if fitting:
            self._prepare_to_cut(module)
        elif self.cut is not None:
            self.cut.interceptor.install()
        if self.cut is None:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.detach(), 0)
        if fitting:
            self.setup_optimizers(trainer)
            if self.cut is not None:
                self.cut.prune(self.optimizers)
                if self.link is not None:
                    self.link.attach(self)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)
            self._share_overflows()

    def _refuse(self, trainer: Trainer, module: LightningModule, fitting: bool) -> None:
        """What would only fail later, or hang: before any rank waits for another."""
        spread = self.pipeline_parallel_size > 1
        if self.cut is None or self.cut.module is not module:
            refuse_parts(module, marked=spread or fitting)
        if fitting:
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            refuse_callbacks(callbacks, {**NEVER, **(NEED_WHOLE_MODULE if spread else {})})
            if spread:
                refuse_lists(module)

    def _cut_now(self) -> Cut:
        assert self.cut is not None, "the first training batch makes the cut"
        return self.cut

    def _prepare_to_cut(self, module: LightningModule) -> None:
        if not module.automatic_optimization:
            raise ConfigurationError(
                f"{type(module).__name__} sets automatic_optimization = False: under pipeline parallelism the strategy "
                "runs forward and backward of all micro-batches itself. Use automatic optimization, or "
                "MoEtionStrategy(pipeline_parallel_size=1)"
            )
        if self.cut is not None and self.cut.module is module:
            self.cut.interceptor.install()
            return
        stages, pieces = self.pipeline_layout.num_stages, self.num_microbatches
        self.cut = None
        self._pending = PendingCut(module, self.layers, self.balance, num_stages=stages, num_micro_batches=pieces)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """``configure_optimizers`` sees the parameters of the whole module.

        Raises:
            ConfigurationError: There is more than one optimizer, or one that cannot be spread.
        """
        super().setup_optimizers(trainer)
        kinds = [type(plain_optimizer(optimizer)).__name__ for optimizer in self.optimizers]
        if len(kinds) > 1 or "LBFGS" in kinds:
            raise ConfigurationError(
                f"configure_optimizers gives {', '.join(kinds)}: under pipeline parallelism expected one optimizer "
                "that works on gradients (AdamW, SGD, Lion ...)"
            )

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch; with the first training batch, cut the module."""
        batch = super().batch_to_device(batch, device, dataloader_idx)
        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        if self._pending is not None and trainer is not None and trainer.training:
            self._cut(batch)
        return batch

    def _cut(self, batch: Any) -> None:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        module = pending.module
        groups = current_groups()
        alone = groups is not None and groups.alone

        def call(micro_batch: Any) -> Any:
            with self.precision_plugin.train_step_context():
                return module.training_step(micro_batch, *step_arguments(module, 0))

        def agree(bounds: Sequence[int]) -> tuple[int, ...]:
            """Measured bounds differ between ranks: those of rank 0 count."""
            if alone:
                return tuple(bounds)
            world = dist.distributed_c10d._get_default_group()
            return tuple(broadcast_json(list(bounds), 0, world, self.root_device))

        self.cut = pending.cut(
            batch,
            call,
            agree,
            self.pipeline_groups,
            self.root_device,
            self.kind,
            loss_of,
            bounds=self.given_bounds,
        )
        self.cut.prune(self.optimizers)
        if self.link is not None:
            self.link.attach(self)
        self._agreed = False

    def _share_overflows(self) -> None:
        """An overflow on one stage must skip the step of all: one loss scale, one decision."""
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is None or "unscale_" in vars(scaler):
            return
        original = scaler.unscale_

        @functools.wraps(original)
        def unscale_(optimizer: Optimizer) -> None:
            original(optimizer)
            found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
            if not found:  # no parameter of this stage trains
                found[self.root_device] = torch.zeros(1, device=self.root_device)
            if self.cut is not None and not self.cut.replaying:
                for value in found.values():
                    dist.all_reduce(value, op=ReduceOp.MAX, group=self.pipeline_groups.pipeline)
            self.overflowed = any(bool(value) for value in found.values())

        scaler.unscale_ = unscale_

    # --- when ranks are replaced -----------------------------------------------------------------------------------

    def drop_groups(self) -> None:
        """Forget everything that refers to the process groups."""
        if self._pipeline_groups is not None:
            self._pipeline_groups.drop()
        if self.cut is not None:
            self.cut.drop()
        self._aside = []

    def rebuild_groups(self) -> None:
        """Make the process groups anew; all tensors stay as they are.

        Ranks:
            All ranks of the job, together.
        """
        self.drop_groups()
        self.pipeline_groups.build()
        self._agreed = False

    def _agree_once(self) -> None:
        """All ranks must have cut alike: otherwise they would send each other something else than is expected."""
        if self._agreed:
            return
        cut = self._cut_now()
        world = dist.distributed_c10d._get_default_group()
        mine = cut.plan.digest()
        first = broadcast_json(mine, 0, world, self.root_device)
        wrong = torch.tensor([float(first != mine)], device=self.root_device)
        dist.all_reduce(wrong)
        if float(wrong):
            raise ConfigurationError(
                f"{int(wrong)} of {self.world_size} ranks have cut {type(cut.module).__name__} in another way "
                "than rank 0. Give every rank the same module, data of the same form, and the same settings"
            )
        self._agreed = True

    def pipeline_state(self) -> dict[str, Any]:
        """What another process needs to cut the module in the same way, as JSON."""
        return {"bounds": list(self._cut_now().plan.bounds)}

    # --- training --------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward of all micro-batches, on all stages.

        Returns:
            The mean loss, on every rank (in a dict, if the module's step gives one; nothing else of it).
        """
        cut = self._cut_now()
        self._agree_once()
        result = self.steps.train(cut, args, kwargs)
        # Lightning takes the gradients away after the forward, in which they have been computed already.
        self._aside = [(p, p.grad) for p in cut.parameters.values() if p.grad is not None]
        for parameter, _ in self._aside:
            parameter.grad = None
        return result

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Give the gradients that the step has computed to the parameters, with the usual hooks around it."""
        assert self.lightning_module is not None
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        for parameter, gradient in self._aside:
            parameter.grad = gradient
        self._aside = []
        closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)
        self.post_backward(closure_loss)
        return closure_loss

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the last micro-batches, average over the replicas, clip by the global norm, step."""
        cut, link = self._cut_now(), self.link

        def closure_and_reduce() -> Any:
            result = closure()
            cut.gradients.reduce()
            if link is not None:
                link.reduced()
            return result

        with cut.gradients.global_norm(), contextlib.nullcontext() if link is None else link.stepping():
            return DDPStrategy.optimizer_step(self, optimizer, closure_and_reduce, model, **kwargs)

    # --- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's validation_step on all stages."""
        return self._evaluate("validation_step", self.precision_plugin.val_step_context, args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's test_step on all stages."""
        return self._evaluate("test_step", self.precision_plugin.test_step_context, args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's predict_step on all stages. Every rank gets the result."""
        return self._evaluate("predict_step", self.precision_plugin.predict_step_context, args, kwargs)

    def _evaluate(self, hook: str, context: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.cut is None:  # the module is whole on every rank
            return getattr(DDPStrategy, hook)(self, *args, **kwargs)
        return self.steps.evaluate(self.cut, hook, context, args, kwargs)

    # --- collectives -----------------------------------------------------------------------------------------------

    def reduce(
        self, tensor: Tensor | Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> Tensor:
        """Reduce over the replicas of the pipeline, whose ranks all have the same value."""
        group = self.pipeline_groups.replica if group is None else group
        return super().reduce(tensor, group=group, reduce_op=reduce_op)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks of the job, or any of them, have decided so."""
        value = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(value)
        return int(value) == self.world_size if all else bool(value)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    @property
    def spread_state(self) -> SpreadState | None:
        """What gathers and cuts apart the state of the module; None while every rank has it whole."""
        return None if self.cut is None else self.cut.state

    # --- end -------------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Give the module its own layers back; its parameters stay those of this rank."""
        if self.cut is not None:
            self.cut.interceptor.remove()
        super().teardown()
