"""The cut of one module on one rank: made with its first training batch, and all that follows from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.balance import balance, check_bounds, layer_weights
from moetion_lightning.pipeline.cut_plan import CutPlan
from moetion_lightning.pipeline.hollow import hollow
from moetion_lightning.pipeline.intercept import Interceptor
from moetion_lightning.pipeline.layer_list import LayerList, find_layers
from moetion_lightning.pipeline.layout import PipelineGroups
from moetion_lightning.pipeline.micro_batches import map_tensors, split_batch
from moetion_lightning.pipeline.probe import make_plan, measure_layers
from moetion_lightning.pipeline.runner import PipelineRunner
from moetion_lightning.pipeline.schedules import ScheduleKind, usable_micro_batches
from moetion_lightning.strategies.optimizer_order import plain_optimizer
from moetion_lightning.strategies.pipeline_gradients import PipelineGradients
from moetion_lightning.strategies.pipeline_state import PipelineState
from moetion_lightning.strategies.step_logs import StepLogs

__all__ = ["CUT_MARK", "Cut", "PendingCut"]

_logger = logging.getLogger(__name__)
#: Attribute of a module that was cut.
CUT_MARK = "_moetion_pipeline"


class PendingCut:
    """A module that will be cut when the first batch is there; what can be checked before is checked now.

    Args:
        module: The whole module.
        layers: Names of the lists of layers; None: they are found.
        balance: ``"parameters"``, ``"time"``, or the first layer of each stage.
        num_stages: Stages of the pipeline.
        num_micro_batches: Into how many pieces a batch is cut.

    Raises:
        ConfigurationError: The module has no layers to cut between, or too few.
    """

    def __init__(
        self,
        module: LightningModule,
        layers: str | Sequence[str] | None,
        balance: str | Sequence[int],
        *,
        num_stages: int,
        num_micro_batches: int,
    ) -> None:
        self.module = module
        self._balance, self._num_stages, self._num_micro_batches = balance, num_stages, num_micro_batches
        self._layers: LayerList = find_layers(module, layers)
        self._bounds: tuple[int, ...] | None = None
        if len(self._layers) < num_stages:
            raise ConfigurationError(
                f"{type(module).__name__} has {len(self._layers)} layers ({', '.join(self._layers.names)}) for "
                f"{num_stages} stages: expected at least as many. Use fewer stages, or name finer layers"
            )
        if not isinstance(balance, str):
            self._bounds = check_bounds(balance, len(self._layers), num_stages)

    def cut(
        self,
        batch: Any,
        call: Callable[[Any], Any],
        agree: Callable[[Sequence[int]], tuple[int, ...]],
        groups: PipelineGroups,
        device: torch.device,
        kind: ScheduleKind,
        loss_of: Callable[[Any], Tensor],
        bounds: tuple[int, ...] | None = None,
    ) -> Cut:
        """Learn how the module is cut, and empty the parameters of other ranks.

        Args:
            batch: The first batch.
            call: Runs the module's step on a micro-batch.
            agree: Gives all ranks the bounds of rank 0, where they are measured.
            groups: Who is where.
            device: Where this rank computes.
            kind: The schedule.
            loss_of: Takes the loss out of what the step returns.
            bounds: Those of the run that is continued; None: what the user said.
        """
        module, num_stages = self.module, self._num_stages
        size = groups.layout.pipeline_parallel_size
        micro_batch = _split(module, batch, self._num_micro_batches, kind, size)[0]
        interceptor = Interceptor(self._layers)
        interceptor.install()
        logs = StepLogs(module)

        def loss() -> Tensor:
            return loss_of(call(micro_batch))

        try:
            with logs.standing_in():
                bounds = self._bounds if bounds is None else bounds
                if bounds is None and self._balance == "time":
                    bounds = agree(balance(measure_layers(module, interceptor, loss, seed=0), num_stages))
                elif bounds is None:
                    bounds = balance(layer_weights(module, self._layers), num_stages)
                plan = make_plan(module, interceptor, bounds, num_stages, loss, seed=0)
        except BaseException:
            interceptor.remove()
            raise
        cut = Cut(module, interceptor, plan, groups, device, kind, loss_of, logs)
        cut.template = map_tensors(batch, lambda tensor: tensor.new_empty(0))
        return cut


class Cut:
    """A module whose stages are spread over the ranks of a pipeline.

    Args:
        module: The module; parameters of other ranks are emptied here.
        interceptor: Installed on its layers.
        plan: How it is cut.
        groups: Who is where.
        device: Where this rank computes.
        kind: The schedule.
        loss_of: Takes the loss out of what the step returns.
        logs: Stands in for the module's ``log`` in its steps.

    Attributes:
        replaying: Whether this rank's stages are being replayed, without the others.
        template: The form of a batch, without its tensors.
        shared_buffers: Buffers that replicas take from the first of them; None until they have agreed.
    """

    def __init__(
        self,
        module: LightningModule,
        interceptor: Interceptor,
        plan: CutPlan,
        groups: PipelineGroups,
        device: torch.device,
        kind: ScheduleKind,
        loss_of: Callable[[Any], Tensor],
        logs: StepLogs,
    ) -> None:
        layout = groups.layout
        stages = layout.stages(groups.global_rank)
        self.module = module
        self.interceptor = interceptor
        self.plan = plan
        self.logs = logs
        self.replaying = False
        self.template: Any = None
        self.local_names = frozenset(name for stage in stages for name in plan.owned[stage])
        places: dict[str, list[int]] = {}
        for held_names in (plan.owned, plan.true_buffers):
            for stage, names in enumerate(held_names):
                for name in names:
                    held = places.setdefault(name, [])
                    if layout.owner(stage) not in held:
                        held.append(layout.owner(stage))
        hollow(module, self.local_names)
        object.__setattr__(module, CUT_MARK, True)
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in module.named_parameters() if name in self.local_names
        }
        #: Places of the pipeline that hold a copy, of all parameters that several hold.
        tied = plan.tied()
        self.tied_places = {n: tuple(held) for n, held in sorted(places.items()) if n in tied and len(held) > 1}
        self.gradients = PipelineGradients(self.parameters, self.tied_places, groups)
        self.state = PipelineState(module, places, groups, device)
        self.runner = PipelineRunner(module, interceptor, plan, groups, device, kind, loss_of)
        self.shared_buffers: list[str] | None = None
        _logger.info(
            "rank %d runs stages %s: %s",
            groups.global_rank,
            list(stages),
            "; ".join(f"layers {_first_and_last(plan, stage)}" for stage in stages),
        )

    def prune(self, optimizers: Sequence[Optimizer]) -> None:
        """Take the parameters of other ranks out of the optimizers."""
        self.state.orders = {}
        orders = [self.state.order_of(plain_optimizer(optimizer)) for optimizer in optimizers]
        names = {id(p): name for name, p in self.module.named_parameters()}
        order = [n for o in orders for group in o.groups for n in group]
        self.gradients.set_order([*order, *(n for n in names.values() if n not in set(order))])

    def split(self, batch: Any, num_micro_batches: int, kind: ScheduleKind, pipeline_parallel_size: int) -> list[Any]:
        """A batch as micro-batches."""
        return _split(self.module, batch, num_micro_batches, kind, pipeline_parallel_size)

    def drop(self) -> None:
        """Forget everything that refers to process groups, and what replicas have agreed on."""
        self.runner.drop()
        self.shared_buffers = None


def _split(
    module: LightningModule, batch: Any, wanted: int, kind: ScheduleKind, pipeline_parallel_size: int
) -> list[Any]:
    own = getattr(module, "split_batch", None)
    if own is not None:
        return list(own(batch, wanted))
    pieces = split_batch(batch, wanted)
    usable = usable_micro_batches(kind, wanted, len(pieces), pipeline_parallel_size)
    return pieces if usable == len(pieces) else split_batch(batch, usable)


def _first_and_last(plan: CutPlan, stage: int) -> str:
    last = plan.bounds[stage + 1] if stage + 1 < plan.num_stages else len(plan.layer_names)
    return f"{plan.layer_names[plan.bounds[stage]]} .. {plan.layer_names[last - 1]}"
