"""Makes the plan of a cut by running the user's step: once whole, and then stage by stage, with poison elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.balance import balance, check_bounds, layer_weights
from moetion_lightning.pipeline.cut_plan import Boundary, Crossing, CutPlan
from moetion_lightning.pipeline.intercept import Interceptor
from moetion_lightning.pipeline.layer_calls import ALTERNATIVES
from moetion_lightning.pipeline.ownership import with_owners
from moetion_lightning.pipeline.rehearsal import Rehearsal, all_trainable
from moetion_lightning.pipeline.sides import add_sides
from moetion_lightning.pipeline.specs import SIMPLE, same_bits
from moetion_lightning.pipeline.trace import TimedCalls
from moetion_lightning.pipeline.trace_free import trace_free

__all__ = ["make_plan", "measure_layers"]

_logger = logging.getLogger(__name__)


def make_plan(
    module: nn.Module,
    interceptor: Interceptor,
    bounds: Sequence[int] | None,
    num_stages: int,
    call: Callable[[], Any],
    *,
    seed: int,
    timed: bool = False,
) -> CutPlan:
    """Learn how a module is cut into stages, from one real micro-batch.

    Runs the step about four times as a whole and three times on each stage, in this process, more often if layers put
    out more than the next layer's input. Everything that a stage hands on, and the loss, is compared bitwise with the
    run of the whole module; gradients by their norms. Nothing remains of the runs in the module: parameters, gradients,
    buffers, attributes and random number generators are as before.

    Args:
        module: The whole module, in training mode, with true values in all parameters.
        interceptor: Installed on its layers.
        bounds: First layer of each stage; None: balanced by ``layer_weights``, or by time.
        num_stages: Number of stages.
        call: Runs the step once on the micro-batch, always from the same input, and returns the loss (or a dict or
            tuple with the loss first, of which everything is compared).
        seed: Any number, the same on all ranks.
        timed: Balance by measured seconds. They differ from rank to rank: agree on bounds first (``measure_layers``).

    Raises:
        ConfigurationError: The module cannot be cut there, with the reason.

    Ranks:
        None; every rank may make the plan itself, and comes to the same one (``CutPlan.digest``).
    """
    if lazy := [name for name, parameter in module.named_parameters() if is_lazy(parameter)]:
        raise ConfigurationError(
            f"parameters {lazy[:5]} are not initialized yet (lazy modules); expected a module whose parameters exist. "
            "Run one batch through it before training"
        )
    num_layers = len(interceptor.layers)
    if bounds is None:
        weights = (
            measure_layers(module, interceptor, call, seed=seed) if timed else layer_weights(module, interceptor.layers)
        )
        bounds = balance(weights, num_stages)
    first_layers = check_bounds(bounds, num_layers, num_stages)
    with trace_free(module) as state, all_trainable(module):
        rehearsal = Rehearsal(module, interceptor, call, seed, state)
        plan = _start(rehearsal, first_layers)
        if num_stages == 1:
            return plan
        for stage in range(1, num_stages):
            plan = _with_crossings(rehearsal, plan, stage)
        for stage in range(1, num_stages):
            if not rehearsal.is_true(plan, stage):
                _record_everything(rehearsal, plan)
                plan = add_sides(rehearsal, plan, stage)
        return with_owners(rehearsal, plan)


def measure_layers(module: nn.Module, interceptor: Interceptor, call: Callable[[], Any], *, seed: int) -> list[float]:
    """Seconds of each layer's forward, as weights for ``balance``; leaves no trace.

    Time outside of the layers counts for the layer that follows, and the rest for the last one.

    Args:
        module: The whole module.
        interceptor: Installed on its layers.
        call: Runs the step once.
        seed: Any number.
    """
    calls = TimedCalls(interceptor.layers)
    with trace_free(module) as state:
        interceptor.execute(calls, call, seed)  # the first run also pays for warming up
        state.put_back()
        calls = TimedCalls(interceptor.layers)
        interceptor.execute(calls, call, seed)
        calls.end()
    return calls.seconds


def _start(rehearsal: Rehearsal, bounds: tuple[int, ...]) -> CutPlan:
    """Run the whole module twice; a plan in which nothing crosses yet."""
    entries = bounds[1:]
    first = rehearsal.whole(entries)
    rehearsal.trace = rehearsal.whole(entries, backward=True)
    rehearsal.deterministic = rehearsal.agree(first.result, rehearsal.trace.result) and all(
        rehearsal.agree(first.entries[layer].leaves, rehearsal.trace.entries[layer].leaves) for layer in entries
    )
    if not rehearsal.deterministic:
        _logger.warning(
            "two runs of the step on the same micro-batch differ, so that the cut cannot be verified bitwise, only "
            "that no stage uses values that it does not have. torch.use_deterministic_algorithms(True) may make them "
            "equal"
        )
    num_stages = len(bounds)
    boundaries = tuple(Boundary(rehearsal.trace.entries[layer].structure, ()) for layer in entries)
    everything = tuple(rehearsal.parameters)
    return CutPlan(
        bounds=bounds,
        num_stages=num_stages,
        layer_names=rehearsal.layers.names,
        owned=(everything,) * num_stages,
        boundaries=boundaries,
        sides=(),
        forms=tuple(replace(form, taps=()) for form in rehearsal.trace.forms()),
        true_buffers=(tuple(sorted(rehearsal.trace.buffers)),) * num_stages,
        junk_buffers=((),) * num_stages,
        deterministic=rehearsal.deterministic,
    )


def _with_crossings(rehearsal: Rehearsal, plan: CutPlan, stage: int) -> CutPlan:
    """What crosses into a stage: what has a gradient, and what cannot be computed again from the batch."""
    true = rehearsal.trace.entries[plan.bounds[stage]]
    found = rehearsal.entry(plan, stage)
    crossings = []
    for position, leaf in enumerate(true.leaves):
        if isinstance(leaf, Tensor):
            if position != true.groups[position][0]:
                continue
            again = [found[p] for p in true.groups[position]]
            same = all(isinstance(other, Tensor) and same_bits(leaf, other) for other in again)
            if true.differentiable[position] or not same:
                crossings.append(Crossing(true.groups[position], true.differentiable[position]))
        elif isinstance(leaf, SIMPLE) and repr(leaf) != repr(found[position]):
            raise ConfigurationError(
                f"layer {plan.layer_names[plan.bounds[stage]]!r}, where pipeline stage {stage} would begin, is called "
                f"with the python value {leaf!r}, computed from what earlier layers put out; only tensors cross. Pass "
                f"it as a tensor. {ALTERNATIVES}"
            )
    boundaries = list(plan.boundaries)
    boundaries[stage - 1] = replace(boundaries[stage - 1], crossings=tuple(crossings))
    return replace(plan, boundaries=tuple(boundaries))


def _record_everything(rehearsal: Rehearsal, plan: CutPlan) -> None:
    """Run the whole module once more, with the values of all outputs and all that may be a tap."""
    if rehearsal.everything:
        return
    before = rehearsal.trace
    rehearsal.trace = rehearsal.whole(plan.bounds[1:], everything=True)
    rehearsal.trace.norms = before.norms
    rehearsal.everything = True
