"""The step run on one stage while a plan is being made: on true values, with poison for everything else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.cut_plan import CutPlan
from moetion_lightning.pipeline.layer_calls import ALTERNATIVES
from moetion_lightning.pipeline.layer_list import LayerList
from moetion_lightning.pipeline.specs import SIMPLE, LeafSpec, flatten, same_bits
from moetion_lightning.pipeline.stage_run import StageCalls, StageRun
from moetion_lightning.pipeline.trace import Trace, WholeCalls
from moetion_lightning.pipeline.trace_free import ModuleState

if TYPE_CHECKING:
    from moetion_lightning.pipeline.intercept import Interceptor

__all__ = ["Emission", "EntryCalls", "PoisonedCalls", "Rehearsal", "all_trainable"]

#: A tensor that a layer puts out: layer, tap (empty: returned by the layer), position of the leaf.
Emission = tuple[int, str, int]


class PoisonedCalls(StageCalls):
    """Layer calls of a stage whose stubs give poison: NaN; for integers and booleans, wrong values.

    Args:
        trace: Of the whole module.
        true: What stand-ins put out truly.
        layers: All layers.
        plan: The plan so far.
        stage: Which stage.
        received: True values of what the stage receives.
    """

    def __init__(
        self,
        trace: Trace,
        true: Collection[Emission],
        layers: LayerList,
        plan: CutPlan,
        stage: int,
        received: Sequence[Tensor],
    ) -> None:
        super().__init__(layers, plan, stage, received, trace.stubs(plan, stage))
        self._trace = trace
        self._true = true

    def fill(self, index: int, tap: str, leaf: int, spec: LeafSpec, device: torch.device) -> Tensor:
        """Poison, or the true value."""
        value = self._trace.layers[index].output(tap).values.get(leaf)
        if (index, tap, leaf) in self._true:
            assert value is not None
            return value.clone()
        if value is None or value.is_floating_point() or value.is_complex():
            return super().fill(index, tap, leaf, spec, device)
        return ~value if value.dtype is torch.bool else value ^ 1


class EntryCalls(PoisonedCalls):
    """Goes only as far as the stage's first layer, to see what it is called with."""

    def __init__(self, trace: Trace, layers: LayerList, plan: CutPlan, stage: int) -> None:
        super().__init__(trace, (), layers, plan, stage, ())
        self.stop = self.start
        self.entry: list[Any] = []

    def cut(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the arguments."""
        leaves, structure = flatten((args, kwargs))
        self._check_entry(self.start, self.plan.boundary(self.stage).structure, structure)
        self.entry = leaves


class Rehearsal:
    """Runs the step as often as a plan needs, each time from the same state of the module.

    Args:
        module: The whole module.
        interceptor: Installed on its layers.
        call: The step.
        seed: The seed of all runs.
        state: To which the module is put back before every run.
    """

    def __init__(
        self, module: nn.Module, interceptor: Interceptor, call: Callable[[], Any], seed: int, state: ModuleState
    ) -> None:
        self.module = module
        self.interceptor = interceptor
        self.layers = interceptor.layers
        self.parameters = dict(module.named_parameters())
        self.state = state
        self.trace = Trace({}, [])
        self.deterministic = True
        self.everything = False
        self.error: Exception | None = None  # that the last stage run which failed has raised
        self._call = call
        self._seed = seed

    def whole(self, entries: Collection[int], *, everything: bool = False, backward: bool = False) -> Trace:
        """Run and record the whole module."""
        self._begin()
        calls = WholeCalls(self.layers, entries, everything)
        result = self.interceptor.execute(calls, self._call, self._seed)
        trace = calls.trace
        trace.result = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in flatten(result)[0]]
        trace.buffers = self.state.changed_buffers()
        loss = loss_of(result)
        if backward:
            loss.backward()
            trace.norms = {name: gradient_norm(p.grad) for name, p in self.parameters.items() if p.grad is not None}
            self.clear_gradients()
        return trace

    def _begin(self) -> None:
        self.state.put_back()
        # Inside of a caller's autocast, casts of parameters would outlive a change of their values.
        torch.clear_autocast_cache()

    def received(self, plan: CutPlan, stage: int) -> list[Tensor]:
        """The true payload of the stage before."""
        if not stage:
            return []
        trace = self.trace
        entry = trace.entries[plan.bounds[stage]]
        tensors = [entry.leaves[c.positions[0]].clone() for c in plan.boundary(stage).crossings]
        tensors += [trace.layers[s.layer].output(s.tap).values[s.leaf].clone() for s in plan.sides_into(stage)]
        flags = [c.differentiable for c in plan.boundary(stage).crossings]
        flags += [side.differentiable for side in plan.sides_into(stage)]
        return [tensor.requires_grad_(flag) for tensor, flag in zip(tensors, flags)]

    def entry(self, plan: CutPlan, stage: int) -> list[Any]:
        """Leaves of what a stage's first layer is called with when all earlier layers put out poison."""
        self._begin()
        calls = EntryCalls(self.trace, self.layers, plan, stage)
        try:
            self.interceptor.execute(calls, self._call, self._seed)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigurationError(
                f"the step failed before layer {self.layers.names[plan.bounds[stage]]!r}, where stage {stage} would "
                f"begin, with poison (NaN) in place of what earlier layers put out: {type(error).__name__}: {error}. "
                f"Code around the layers of a pipelined step must not look into values of earlier stages. "
                f"{ALTERNATIVES}"
            ) from error
        return calls.entry

    def is_true(self, plan: CutPlan, stage: int, true: Collection[Emission] = ()) -> bool:
        """Whether a stage, given true values of what it receives, hands on (or returns) true values.

        Args:
            plan: The plan so far.
            stage: Which stage.
            true: What stand-ins put out truly besides.
        """
        self._begin()
        self.error = None
        calls = PoisonedCalls(self.trace, true, self.layers, plan, stage, self.received(plan, stage))
        try:
            result = self.interceptor.execute(calls, self._call, self._seed)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # poison may make the step fail anywhere, which is an answer
            self.error = error.with_traceback(None)
            return False
        if stage + 1 == plan.num_stages:
            return self.agree(self.trace.result, flatten(result)[0])
        crossings = plan.boundary(stage + 1).crossings
        expected = self.trace.entries[plan.bounds[stage + 1]].leaves
        return self.agree([expected[c.positions[0]] for c in crossings], calls.payload()[: len(crossings)])

    def run(self, plan: CutPlan, stage: int, received: Sequence[Tensor]) -> StageRun:
        """Run a stage as training will."""
        self._begin()
        stubs = self.trace.stubs(plan, stage)
        return self.interceptor.run(plan, stage, self._call, received=received, stubs=stubs, seed=self._seed)

    def agree(self, expected: Sequence[Any], found: Sequence[Any]) -> bool:
        """Whether leaves are equal: bitwise if the step is deterministic, else in shape and in that no NaN came."""
        return len(expected) == len(found) and all(self._alike(a, b) for a, b in zip(expected, found))

    def _alike(self, expected: Any, found: Any) -> bool:
        if isinstance(expected, Tensor) != isinstance(found, Tensor):
            return False
        if not isinstance(expected, Tensor):
            # Compared as text: a NaN equals itself. Of objects of other kinds nothing is known.
            simple = isinstance(expected, SIMPLE)
            return not simple or (repr(expected) == repr(found) if self.deterministic else found == found)
        if self.deterministic:
            return same_bits(expected, found)
        no_new_nan = not bool((found.isnan() & ~expected.isnan()).any()) if expected.shape == found.shape else False
        return no_new_nan and expected.dtype == found.dtype

    def clear_gradients(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None


def loss_of(result: Any) -> Tensor:
    """The loss in what a step returned: a tensor, the entry "loss" of a dict, or the first tensor.

    Raises:
        ConfigurationError: There is none, it is no single number, or it has no gradient.
    """
    if isinstance(result, dict) and isinstance(result.get("loss"), Tensor):
        result = result["loss"]
    loss = next((leaf for leaf in flatten(result)[0] if isinstance(leaf, Tensor)), None)
    if loss is None or loss.numel() != 1 or not loss.requires_grad:
        given = f"a {type(result).__name__}" if loss is None else f"a tensor of shape {tuple(loss.shape)}"
        raise ConfigurationError(
            f"the step returned {given}{'' if loss is None or loss.requires_grad else ' without gradient'}; expected "
            "the loss: a tensor of one element that requires grad"
        )
    return loss


def gradient_norm(gradient: Tensor) -> float:
    """The 2-norm of a gradient, also of a sparse one."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return float(torch.linalg.vector_norm(values.detach().float()))


@contextmanager
def all_trainable(module: nn.Module) -> Iterator[None]:
    """Inside, all floating-point parameters require grad and have none; all is as before afterwards.

    So frozen parameters are treated like others: what crosses must not depend on what is frozen today. Hooks that act
    on accumulated gradients (an optimizer fused into the backward) do not run.
    """
    before = [(p, p.grad, p.requires_grad, dict(p._post_accumulate_grad_hooks or {})) for p in module.parameters()]
    try:
        for parameter, _, _, hooks in before:
            parameter.grad = None
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(True)
            if hooks:
                parameter._post_accumulate_grad_hooks.clear()  # to set it to None has no effect on the backward
        yield
    finally:
        for parameter, grad, requires_grad, hooks in before:
            parameter.grad = grad
            parameter.requires_grad_(requires_grad)
            if hooks:
                parameter._post_accumulate_grad_hooks.update(hooks)
