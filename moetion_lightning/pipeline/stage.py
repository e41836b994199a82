"""One stage under torch's own pipeline schedules, with all that crosses its boundaries passing through one seam.

The schedules of :mod:`torch.distributed.pipelining` decide what runs when; they ask a stage for its send and receive
operations and call its forward and backward. :class:`BoundaryStage` answers with tensors whose shapes are known
beforehand (no negotiation, no run on uninitialised memory), of a size that may differ between micro-batches, and tells
a :class:`Traffic` of everything it sends. A replay feeds it from a log instead of from a neighbour; the schedule, and
with it the order in which gradients are summed, is the same.

Boundary ``b`` lies before stage ``b``. Directions: ``"F"`` activations to the next stage, ``"B"`` gradients back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from moetion_lightning.pipeline.specs import TensorSpec

__all__ = ["BoundaryStage", "Direction", "NetworkTraffic", "StageBody", "Traffic"]

Direction: TypeAlias = Literal["F", "B"]


class Traffic(Protocol):
    """What a stage tells of, and asks about, the tensors that cross its boundaries."""

    def record(self, boundary: int, direction: Direction, micro_batch: int, tensors: Sequence[Tensor]) -> None:
        """This stage sends these tensors, detached, in payload order (gradients: of differentiable ones only)."""

    def feed(self, boundary: int, direction: Direction, micro_batch: int) -> Sequence[Tensor] | None:
        """What another stage would send; None if it really sends."""

    def reaches(self, boundary: int) -> bool:
        """Whether somebody receives what this stage sends over a boundary."""


class NetworkTraffic:
    """Everything goes to, and comes from, the neighbours; nothing is recorded."""

    def record(self, boundary: int, direction: Direction, micro_batch: int, tensors: Sequence[Tensor]) -> None:
        """See :class:`Traffic`."""

    def feed(self, boundary: int, direction: Direction, micro_batch: int) -> Sequence[Tensor] | None:
        """See :class:`Traffic`."""
        return None

    def reaches(self, boundary: int) -> bool:
        """See :class:`Traffic`."""
        return True


class StageBody(nn.Module):
    """What torch's stage calls as its module: one micro-batch of the user's step, from one cut to the next.

    Args:
        run: Called with the micro-batch's index and the received tensors; returns what goes to the next stage, or the
            loss on the last stage.
        parameters: The stage's own parameters.
    """

    def __init__(
        self, run: Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...] | Tensor], parameters: Sequence[nn.Parameter]
    ) -> None:
        super().__init__()
        self._run = run
        self._own = tuple(parameters)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The stage's own parameters: the module that is cut holds those of all stages."""
        return iter(self._own)

    def forward(self, *received: Tensor, micro_batch: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Run one micro-batch, given as a tensor ``[1]`` of its index."""
        return self._run(int(micro_batch), received)


class BoundaryStage(PipelineStage):
    """A stage whose receive buffers are made for each micro-batch, from shapes that the caller knows.

    Args:
        body: Runs a micro-batch.
        index: Number of the stage.
        num_stages: Stages of the pipeline.
        device: Where the stage runs.
        group: The pipeline's ranks.
        traffic: Hears of, or feeds, the boundaries; may be replaced between steps.
    """

    def __init__(
        self,
        body: StageBody,
        index: int,
        num_stages: int,
        device: torch.device,
        group: dist.ProcessGroup,
        traffic: Traffic,
    ) -> None:
        super().__init__(body, index, num_stages, device, group=group)
        self.traffic = traffic
        self._specs_in: Sequence[Sequence[TensorSpec]] = ()
        self._specs_out: Sequence[Sequence[TensorSpec]] = ()
        self._inputs: dict[int, list[Tensor]] = {}
        self._outputs: dict[int, list[Tensor]] = {}
        self._grads: dict[int, list[Tensor | None]] = {}

    def expect(self, inputs: Sequence[Sequence[TensorSpec]], outputs: Sequence[Sequence[TensorSpec]]) -> None:
        """Before each step: what crosses the two boundaries, by micro-batch (empty at the pipeline's ends)."""
        self.chunks = len(inputs)
        self._specs_in, self._specs_out = inputs, outputs
        if hasattr(self, "_stage_meta"):  # how many of the backward's inputs are received ones
            self._stage_meta.inputs = (None,) * max(map(len, inputs))  # type: ignore[assignment]  # counted only

    # --- negotiation that torch would do: nothing is left to negotiate ----------------------------------------------

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> None:
        return None

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> None:
        return None

    # Versions of torch before 2.11 compare each micro-batch with what was negotiated; 2.15 frees what it had prepared.

    def _validate_fwd_input(self, *args: Any) -> None:
        return None

    def _validate_fwd_outputs(self, *args: Any) -> None:
        return None

    def _clear_unlaunched_fwd_recv(self, microbatch_index: int) -> None:
        self._inputs.pop(microbatch_index, None)

    def _clear_unlaunched_bwd_recv(self, microbatch_index: int) -> None:
        self._grads.pop(microbatch_index, None)

    # --- forward -----------------------------------------------------------------------------------------------------

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive a micro-batch's activations."""
        if self.is_first:
            return []
        fed = self.traffic.feed(self.stage_index, "F", fwd_chunk_id)
        if fed is not None:
            self._inputs[fwd_chunk_id] = [tensor.to(self.device) for tensor in fed]
            return []
        self._inputs[fwd_chunk_id] = [self._empty(spec) for spec in self._specs_in[fwd_chunk_id]]
        return self._operations(dist.irecv, self._inputs[fwd_chunk_id], self.stage_index - 1)

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """The stage before is on the same rank."""
        self._inputs[mb_index] = [tensor.detach() for tensor in prev_stage_outputs]

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Tensor, ...]:
        wanted = self.has_backward and torch.is_grad_enabled()
        tensors = self._inputs.pop(fwd_chunk_id)
        return tuple(
            tensor.requires_grad_(wanted and spec.requires_grad)
            for tensor, spec in zip(tensors, self._specs_in[fwd_chunk_id])
        )

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run a micro-batch, and keep what another rank is to get of it: how torch keeps it differs by version."""
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        after = None if self.is_last else self.stage_index_to_group_rank[self.stage_index + 1]
        if after not in (None, self.group_rank):
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            self._outputs[fwd_chunk_id] = [tensor.detach() for tensor in outputs]
        return output

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Send a micro-batch's activations."""
        if self.is_last:
            return []
        tensors = [tensor.contiguous() for tensor in self._outputs.pop(fwd_chunk_id)]
        return self._send(self.stage_index + 1, "F", fwd_chunk_id, tensors, self.stage_index + 1)

    # --- backward ----------------------------------------------------------------------------------------------------

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Receive the gradients of what was sent."""
        if not self.has_backward or self.is_last:
            return []
        specs = self._specs_out[bwd_chunk_id]
        fed = self.traffic.feed(self.stage_index + 1, "B", bwd_chunk_id)
        if fed is not None:
            ready = iter(fed)
            self._grads[bwd_chunk_id] = [next(ready).to(self.device) if spec.requires_grad else None for spec in specs]
            return []
        self._grads[bwd_chunk_id] = [self._empty(spec) if spec.requires_grad else None for spec in specs]
        buffers = [buffer for buffer in self._grads[bwd_chunk_id] if buffer is not None]
        return self._operations(dist.irecv, buffers, self.stage_index + 1)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Tensor | None, ...]:
        return tuple(self._grads.pop(bwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Send the gradients of what was received."""
        if not self.has_backward or self.is_first:
            return []
        tensors = [grad for grad in self._input_gradients(bwd_chunk_id) if grad is not None]
        return self._send(self.stage_index, "B", bwd_chunk_id, tensors, self.stage_index - 1)

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        """The gradients of what was received, for the stage before on the same rank."""
        return tuple(self._input_gradients(mb_index))

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """The stage after is on the same rank."""
        self._grads[mb_index] = list(next_stage_bwd_outputs)

    def _input_gradients(self, micro_batch: int) -> list[Tensor | None]:
        """By received tensor: its gradient, zeros if nothing depends on it, None if it has none."""
        specs = self._specs_in[micro_batch]
        grads = self.bwd_cache.pop(micro_batch)
        result: list[Tensor | None] = []
        for grad, spec in zip(grads, specs):
            if not spec.requires_grad:
                result.append(None)
            else:
                result.append(self._empty(spec).zero_() if grad is None else grad.contiguous())
        return result

    # --- both --------------------------------------------------------------------------------------------------------

    def clear_runtime_states(self) -> None:
        """Forget what a step that was broken off has left."""
        super().clear_runtime_states()
        for left in (self.bwd_cache, self.backward_state, self.dw_runner, self._inputs, self._outputs, self._grads):
            left.clear()

    def _empty(self, spec: TensorSpec) -> Tensor:
        return torch.empty(spec.shape, dtype=spec.torch_dtype, device=self.device)

    def _send(
        self, boundary: int, direction: Direction, micro_batch: int, tensors: list[Tensor], stage: int
    ) -> list[dist.P2POp]:
        self.traffic.record(boundary, direction, micro_batch, tensors)
        return self._operations(dist.isend, tensors, stage) if self.traffic.reaches(boundary) else []

    def _operations(self, operation: Any, tensors: Sequence[Tensor], stage: int) -> list[dist.P2POp]:
        assert self.group is not None
        peer = dist.get_global_rank(self.group, self.stage_index_to_group_rank[stage])
        # As bytes: backends do not know every dtype.
        return [
            dist.P2POp(operation, tensor.view(-1).view(torch.uint8), peer, self.group)
            for tensor in tensors
            if tensor.numel()
        ]
