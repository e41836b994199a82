"""Runs a user's unchanged step as one rank of a pipeline: schedules for training, plain passes for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moetion_lightning.distributed.messages import broadcast_json, receive_message, send_message
from moetion_lightning.errors import MoEtionError
from moetion_lightning.pipeline.cut_plan import CutPlan
from moetion_lightning.pipeline.evaluation import EvalMessage
from moetion_lightning.pipeline.intercept import Interceptor
from moetion_lightning.pipeline.layout import PipelineGroups
from moetion_lightning.pipeline.micro_batches import Signature, signature
from moetion_lightning.pipeline.schedules import ScheduleKind, make_schedule, run_step
from moetion_lightning.pipeline.specs import LayerSpec, TensorSpec
from moetion_lightning.pipeline.stage import BoundaryStage, NetworkTraffic, StageBody, Traffic
from moetion_lightning.pipeline.stage_run import StageRun
from moetion_lightning.pipeline.trace_free import trace_free

__all__ = ["PipelineRunner", "StageShapes", "Step"]

#: Runs the user's step on a micro-batch and returns what the step returns. The second argument says whether what it
#: logs counts: on the last stage, except where only shapes are wanted.
Step = Callable[[Any, bool], Any]


@dataclass(frozen=True, kw_only=True)
class StageShapes:
    """What crosses the boundaries for micro-batches of one signature.

    Args:
        payloads: By stage: of what it receives; empty for the first.
        layers: By layer: of what its stand-in returns on later stages.
    """

    payloads: tuple[tuple[TensorSpec, ...], ...]
    layers: tuple[LayerSpec, ...]

    def to_json(self) -> list[Any]:
        """As plain JSON values."""
        return [[[s.to_json() for s in payload] for payload in self.payloads], [s.to_json() for s in self.layers]]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> StageShapes:
        """What :meth:`to_json` gave."""
        payloads, layers = value
        return cls(
            payloads=tuple(tuple(map(TensorSpec.from_json, payload)) for payload in payloads),
            layers=tuple(map(LayerSpec.from_json, layers)),
        )

    def followed_by(self, run: StageRun) -> StageShapes:
        """With what one more stage has shown."""
        return StageShapes(payloads=(*self.payloads, run.payload_specs), layers=(*self.layers, *run.layer_specs))


class PipelineRunner:
    """The stages of one rank.

    Args:
        module: The whole module; parameters of other ranks may be hollow.
        interceptor: Installed on its layers.
        plan: How it is cut.
        groups: Who is where.
        device: Where this rank computes.
        kind: The schedule.
        loss_of: Takes the loss out of what the user's step returns.
    """

    def __init__(
        self,
        module: nn.Module,
        interceptor: Interceptor,
        plan: CutPlan,
        groups: PipelineGroups,
        device: torch.device,
        kind: ScheduleKind,
        loss_of: Callable[[Any], Tensor],
    ) -> None:
        self.plan = plan
        self.layout = groups.layout
        self.stages = self.layout.stages(groups.global_rank)
        #: Shapes by signature; the same on all ranks of the pipeline.
        self.shapes: dict[Signature, StageShapes] = {}
        self._module = module
        self._interceptor = interceptor
        self._groups = groups
        self._device = device
        self._kind = kind
        self._loss_of = loss_of
        self._traffic: Traffic = NetworkTraffic()
        self._built: dict[int, BoundaryStage] = {}
        self._schedules: dict[int, Any] = {}
        # Of the run that is under way:
        self._micro_batches: Sequence[Any] = ()
        self._step: Step | None = None
        self._seed = 0
        self._results: dict[int, Any] = {}
        self._divide: Callable[[Tensor], Tensor] = lambda loss: loss

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage, and with it the user's results."""
        return self.layout.num_stages - 1 in self.stages

    @property
    def last_place(self) -> int:
        """Place in the pipeline of the rank with the last stage."""
        return self.layout.owner(self.layout.num_stages - 1)

    def use(self, traffic: Traffic) -> None:
        """From now on, what crosses the boundaries goes through this."""
        self._traffic = traffic
        for stage in self._built.values():
            stage.traffic = traffic

    def drop(self) -> None:
        """Forget everything that refers to process groups, and what a broken run has left."""
        self._built.clear()
        self._schedules.clear()
        self.shapes = {}
        self._micro_batches, self._step, self._results = (), None, {}

    # --- training ------------------------------------------------------------------------------------------------

    def train(
        self, micro_batches: Sequence[Any], step: Step, *, scale: Callable[[Tensor], Tensor], seed: int
    ) -> list[Any]:
        """Forward and backward of all micro-batches; gradients are added to the parameters'.

        Args:
            micro_batches: The same on all ranks of the pipeline.
            step: Runs the user's step.
            scale: Makes of a loss what the backward starts from.
            seed: Of the random generators inside the step.

        Returns:
            What the user's step returned, by micro-batch, where the last stage is; empty elsewhere.

        Ranks:
            All ranks of the pipeline, together.
        """
        self._micro_batches, self._step, self._seed, self._divide = micro_batches, step, seed, scale
        self._results = {}
        shapes = [self._shapes_of(micro_batch, index) for index, micro_batch in enumerate(micro_batches)]
        count = len(micro_batches)
        schedule = self._schedule(count)
        for number, stage in self._built.items():
            after = number + 1
            outputs = [s.payloads[after] if after < self.layout.num_stages else () for s in shapes]
            stage.expect([s.payloads[number] for s in shapes], outputs)
        losses: list[Tensor] = []
        indices = torch.arange(count)
        try:
            run_step(schedule, micro_batch=indices, target=indices if self.is_last else None, losses=losses)
            return [self._results[index] for index in range(count)] if self.is_last else []
        except BaseException as error:
            # Schedules keep losses of a step that was broken off.
            self._built.clear()
            self._schedules.clear()
            if isinstance(error.__cause__, MoEtionError):  # torch wraps whatever a stage raises
                raise error.__cause__ from None
            raise
        finally:
            self._micro_batches, self._step, self._results = (), None, {}

    def _schedule(self, num_micro_batches: int) -> Any:
        if not self._built:
            parameters = dict(self._module.named_parameters())
            for number in self.stages:
                body = StageBody(self._runner_of(number), [parameters[name] for name in self.plan.owned[number]])
                self._built[number] = BoundaryStage(
                    body, number, self.layout.num_stages, self._device, self._groups.pipeline, self._traffic
                )
        if num_micro_batches not in self._schedules:
            self._schedules[num_micro_batches] = make_schedule(
                self._kind,
                list(self._built.values()),
                num_micro_batches,
                self.layout.pipeline_parallel_size,
                lambda loss, index: self._divide(loss),
            )
        return self._schedules[num_micro_batches]

    def _runner_of(self, stage: int) -> Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...] | Tensor]:
        def run(index: int, received: tuple[Tensor, ...]) -> tuple[Tensor, ...] | Tensor:
            layers = self.shapes[signature(self._micro_batches[index])].layers
            counts = stage == self.layout.num_stages - 1
            done = self._run(stage, index, received, layers[: self.plan.bounds[stage]], counts=counts)
            if stage < self.layout.num_stages - 1:
                return done.payload
            self._results[index] = done.result
            return self._loss_of(done.result)

        return run

    def _run(
        self, stage: int, index: int, received: Sequence[Tensor], stubs: Sequence[LayerSpec], *, counts: bool
    ) -> StageRun:
        step, micro_batch = self._step, self._micro_batches[index]
        assert step is not None
        return self._interceptor.run(
            self.plan,
            stage,
            lambda: step(micro_batch, counts),
            received=received,
            stubs=stubs,
            seed=self._seed + index,
        )

    # --- shapes --------------------------------------------------------------------------------------------------

    def _shapes_of(self, micro_batch: Any, index: int) -> StageShapes:
        known = signature(micro_batch)
        if known not in self.shapes:
            with trace_free(self._module):
                self.shapes[known] = self._learn_shapes(index)
        return self.shapes[known]

    def _learn_shapes(self, index: int) -> StageShapes:
        """Pass one micro-batch through all stages, forward only, each telling the next what it sends."""
        shapes, received = StageShapes(payloads=((),), layers=()), list[Tensor]()
        for stage in self.stages:
            if stage and self._rank_of(stage - 1) != self._groups.global_rank:
                header, received = receive_message(self._rank_of(stage - 1), self._device)
                shapes = StageShapes.from_json(header)
            inputs = [t.detach().requires_grad_(s.requires_grad) for t, s in zip(received, shapes.payloads[-1])]
            done = self._run(stage, index, inputs, shapes.layers, counts=False)
            if stage == self.layout.num_stages - 1:
                break
            shapes, received = shapes.followed_by(done), [tensor.detach() for tensor in done.payload]
            if self._rank_of(stage + 1) != self._groups.global_rank:
                send_message(shapes.to_json(), received, self._rank_of(stage + 1), self._device)
        found = broadcast_json(shapes.to_json(), self.last_place, self._groups.pipeline, self._device)
        return StageShapes.from_json(found)

    def _rank_of(self, stage: int) -> int:
        return self.layout.global_rank(self.layout.owner(stage), self.layout.dp_rank(self._groups.global_rank))

    # --- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, call: Callable[[], Any]) -> Any:
        """One forward pass of a step through all stages.

        Args:
            call: Runs the user's step on this rank's copy of the batch.

        Returns:
            What the step returned, where the last stage is; None elsewhere.

        Ranks:
            All ranks of the pipeline, together.
        """
        message: EvalMessage | None = None
        for stage in self.stages:
            if stage and self._rank_of(stage - 1) != self._groups.global_rank:
                header, tensors = receive_message(self._rank_of(stage - 1), self._device)
                message = EvalMessage(header=header, tensors=tensors)
            done = self._interceptor.run_eval(self.plan, stage, call, message)
            if stage == self.layout.num_stages - 1:
                return done
            message = done
            if self._rank_of(stage + 1) != self._groups.global_rank:
                send_message(done.header, done.tensors, self._rank_of(stage + 1), self._device)
        return None
