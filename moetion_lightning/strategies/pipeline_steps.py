"""One batch of a pipeline: agreed on by its ranks, run through the stages, its results told to all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import xxhash
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from moetion_lightning.distributed.messages import broadcast_json, broadcast_tensors
from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.micro_batches import map_tensors, tensors_of
from moetion_lightning.strategies.pipeline_cut import Cut
from moetion_lightning.strategies.pipeline_values import decode, encode

if TYPE_CHECKING:
    from moetion_lightning.strategies.pipeline_strategy import PipelineStrategy

__all__ = ["PipelineSteps", "loss_of", "step_arguments"]


class PipelineSteps:
    """Runs the steps of a module whose stages are spread over ranks.

    Args:
        strategy: Gives groups, precision and settings.

    Ranks:
        All ranks of a pipeline call each method together.
    """

    def __init__(self, strategy: PipelineStrategy) -> None:
        self._strategy = strategy

    def train(self, cut: Cut, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward and backward of one batch; gradients are added to those of the batches before it in this step.

        Args:
            cut: The module.
            args: The batch, and what else the module's training_step takes.
            kwargs: The same by name.

        Returns:
            The mean loss, in a dict if the module's step gives one.
        """
        trainer = cut.module.trainer
        batch, given = _batch_of(args, kwargs)
        batch, seed = self._agree_on(batch, self._seed(cut))
        number, accumulated = trainer.fit_loop.epoch_loop.batch_idx, trainer.accumulate_grad_batches
        if number % accumulated == 0:
            for parameter in cut.parameters.values():
                parameter.grad = None
        with cut.logs.standing_in():
            results = self.run_stages(cut, batch, number, seed, accumulated, arguments=given)
            losses, is_dict, noted = self._share_results(cut, results)
        cut.logs.log(noted, _batch_size(batch))
        if self._strategy.link is not None:
            self._strategy.link.end_round(batch, number, seed, losses)
        loss = torch.stack(losses).mean()
        return {"loss": loss} if is_dict else loss

    def run_stages(
        self,
        cut: Cut,
        batch: Any,
        number: int,
        seed: int,
        accumulated: int,
        arguments: tuple[Any, ...] | None = None,
    ) -> list[Any]:
        """Run one batch through the stages; gradients are added to the parameters'.

        Args:
            cut: The module.
            batch: The same on all ranks of the pipeline.
            number: Its index in the epoch.
            seed: Of the random generators.
            accumulated: Batches whose gradients are summed for one step.
            arguments: What the user's step is called with besides the batch; None: its index, if it takes it.

        Returns:
            What the user's step returned, by micro-batch, where the last stage is; empty elsewhere.
        """
        strategy, module = self._strategy, cut.module
        self._share_buffers(cut)
        rest = step_arguments(module, number) if arguments is None else arguments
        micro_batches = cut.split(batch, strategy.num_microbatches, strategy.kind, strategy.pipeline_parallel_size)
        divisor = len(micro_batches) * accumulated
        scaler = getattr(strategy.precision_plugin, "scaler", None)

        def step(micro_batch: Any, counts: bool) -> Any:
            noting = cut.logs.noting() if counts else contextlib.nullcontext()
            with strategy.precision_plugin.train_step_context(), noting:
                return module.training_step(micro_batch, *rest)

        def scale(loss: Tensor) -> Tensor:
            loss = loss / divisor
            return loss if scaler is None else scaler.scale(loss)

        return cut.runner.train(micro_batches, step, scale=scale, seed=seed)

    def evaluate(
        self,
        cut: Cut,
        hook: str,
        context: Callable[[], contextlib.AbstractContextManager[None]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Forward of one batch by another step of the module.

        Args:
            cut: The module.
            hook: Name of the step.
            context: The precision's context for it.
            args: The batch, and what else the step takes.
            kwargs: The same by name.

        Returns:
            What the step returned; of that only tensors and plain values reach ranks without the last stage.
        """
        strategy = self._strategy
        batch, rest = _batch_of(args, kwargs)
        batch, _ = self._agree_on(batch, 0)
        is_last = cut.runner.is_last

        def call() -> Any:
            with context(), cut.logs.noting() if is_last else contextlib.nullcontext():
                return getattr(cut.module, hook)(batch, *rest)

        with cut.logs.standing_in():
            result = cut.runner.evaluate(call)
            described, tensors = encode(result) if is_last else (None, [])
            found: Any = [cut.logs.to_json(), described] if is_last else None
            if strategy.pipeline_parallel_size > 1:
                group, source = strategy.pipeline_groups.pipeline, cut.runner.last_place
                tensors, found = broadcast_tensors(tensors, source, group, strategy.root_device, extra=found)
        noted, described = found
        cut.logs.log(noted, _batch_size(batch))
        return result if is_last else decode(described, tensors)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _agree_on(self, batch: Any, seed: int) -> tuple[Any, int]:
        """The batch, and a seed, of the first stage's rank on all ranks of its pipeline."""
        strategy = self._strategy
        if strategy.pipeline_parallel_size == 1:
            return batch, seed
        group = strategy.pipeline_groups.pipeline
        shared, seed = broadcast_tensors(tensors_of(batch), 0, group, strategy.root_device, extra=seed)
        replaced = iter(shared)
        return map_tensors(batch, lambda tensor: next(replaced)), seed

    def _share_buffers(self, cut: Cut) -> None:
        """Replicas begin a batch with the buffers of the first one, as under DistributedDataParallel."""
        if self._strategy.pipeline_layout.data_parallel_size == 1:
            return
        group, buffers = self._strategy.pipeline_groups.replica, dict(cut.module.named_buffers())
        if cut.shared_buffers is None:  # which of them change may look different to replicas: the first one says
            mine = [name for name in buffers if cut.state.local(name)]
            cut.shared_buffers = broadcast_json(mine, 0, group, self._strategy.root_device)
        for name in cut.shared_buffers:
            dist.broadcast(buffers[name].detach(), group=group, group_src=0)

    def _seed(self, cut: Cut) -> int:
        """Of one batch: follows from the run's seed and the position, so that nobody's generators move."""
        strategy = self._strategy
        position = cut.module.trainer.fit_loop.epoch_loop.total_batch_idx
        what = f"{torch.initial_seed()}/{position}/{strategy.pipeline_layout.dp_rank(strategy.global_rank)}"
        return xxhash.xxh3_64_intdigest(what.encode()) >> 2

    def _share_results(self, cut: Cut, results: list[Any]) -> tuple[list[Tensor], bool, list[Any]]:
        """Losses and logged values of the last stage, on all ranks of the pipeline."""
        strategy = self._strategy
        found: Any = None
        device = strategy.root_device
        if cut.runner.is_last:
            losses = [loss_of(result).detach() for result in results]
            dtype = str(losses[0].dtype).removeprefix("torch.")
            found = [
                [dtype, [float(loss).hex() for loss in losses]],
                isinstance(results[0], Mapping),
                cut.logs.to_json(),
            ]
        if strategy.pipeline_parallel_size > 1:
            found = broadcast_json(found, cut.runner.last_place, strategy.pipeline_groups.pipeline, device)
        (dtype, values), is_dict, noted = found
        tensors = [torch.tensor(float.fromhex(v), dtype=getattr(torch, dtype), device=device) for v in values]
        return tensors, is_dict, noted


def step_arguments(module: LightningModule, batch_idx: int) -> tuple[Any, ...]:
    """What a module's training_step is called with besides the batch: ``batch_idx`` only if it takes it."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    return (batch_idx,) if takes_index else ()


def loss_of(result: Any) -> Tensor:
    """The loss in what a training step returned.

    Raises:
        ConfigurationError: There is none.
    """
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = type(result).__name__ if not isinstance(loss, Tensor) else f"a tensor of shape {tuple(loss.shape)}"
        raise ConfigurationError(
            f"training_step returned {what}: under pipeline parallelism expected a loss (a tensor with one element), "
            'or a dict with one under "loss", for every micro-batch'
        )
    return loss.reshape(())


def _batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The batch, and the step's other arguments."""
    values = (*args, *kwargs.values())
    return values[0], values[1:]


def _batch_size(batch: Any) -> int | None:
    return next((t.shape[0] for t in tensors_of(batch) if t.dim()), None)
