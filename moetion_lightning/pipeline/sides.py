"""What later stages need of a layer besides the next layer's input: found by leaving it out."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import NoReturn

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.cut_plan import CutPlan, LayerForm, SideOutput
from moetion_lightning.pipeline.layer_calls import ALTERNATIVES
from moetion_lightning.pipeline.rehearsal import Emission, Rehearsal
from moetion_lightning.pipeline.trace import Trace

__all__ = ["add_sides"]

_logger = logging.getLogger(__name__)

_Group = tuple[str, str, int]  # list of layers, tap, leaf


def add_sides(rehearsal: Rehearsal, plan: CutPlan, stage: int) -> CutPlan:
    """The plan with the side outputs that a stage needs so that it hands on, or returns, true values.

    Args:
        rehearsal: With a trace that has the values of all outputs.
        plan: Under which the stage does not.
        stage: Which stage.

    Raises:
        ConfigurationError: The stage needs something that does not cross.
    """
    trace = rehearsal.trace
    watched = replace(plan, forms=_with_all_taps(plan, trace))
    groups = _groups(rehearsal, plan, stage)
    needed = {emission for members in groups.values() for emission in members}
    if not rehearsal.is_true(watched, stage, needed):
        _refuse_unknown(rehearsal, plan, stage)
    # Inputs of the next layer come first: of two ways to the same value, the one that can cross must remain.
    order = sorted(groups, key=lambda group: not any(_is_input(trace, emission) for emission in groups[group]))
    for group in order:
        if rehearsal.is_true(watched, stage, needed - groups[group]):
            needed -= groups[group]
    if refused := sorted(emission for emission in needed if _is_input(trace, emission)):
        for emission in list(refused):
            if rehearsal.is_true(watched, stage, needed - {emission}):
                needed.discard(emission)
                refused.remove(emission)
        _refuse_inputs(plan, stage, refused)
    return _with_sides(rehearsal, plan, stage, needed)


def _groups(rehearsal: Rehearsal, plan: CutPlan, stage: int) -> dict[_Group, set[Emission]]:
    """All tensors that earlier stages' layers put out, alike ones of one list of layers together."""
    groups: dict[_Group, set[Emission]] = {}
    for index, record in enumerate(rehearsal.trace.layers[: plan.bounds[stage]]):
        stack = rehearsal.layers.names[index].rpartition(".")[0]
        for output in (record.returned, *record.taps):
            for leaf in output.values:
                groups.setdefault((stack, output.form.name, leaf), set()).add((index, output.form.name, leaf))
    return groups


def _is_input(trace: Trace, emission: Emission) -> bool:
    """Whether it is the first tensor that the layer returns, and as such the next layer's input."""
    index, tap, leaf = emission
    record = trace.layers[index]
    return not tap and leaf in record.inputs and leaf == min(record.returned.values)


def _with_all_taps(plan: CutPlan, trace: Trace) -> tuple[LayerForm, ...]:
    return tuple(
        LayerForm(form.structure, tuple(tap.form for tap in record.taps))
        for form, record in zip(plan.forms, trace.layers)
    )


def _with_sides(rehearsal: Rehearsal, plan: CutPlan, stage: int, needed: set[Emission]) -> CutPlan:
    trace = rehearsal.trace
    sides = {(side.layer, side.tap, side.leaf): side for side in plan.sides}
    for index, tap, leaf in needed:
        before = sides.get((index, tap, leaf))
        last = max(stage, before.last_stage if before else stage)
        differentiable = trace.layers[index].output(tap).differentiable[leaf]
        sides[index, tap, leaf] = SideOutput(index, tap, leaf, differentiable, last)
    if any(not tap and leaf == min(trace.layers[index].returned.values) for index, tap, leaf in needed):
        _logger.warning(
            "pipeline stage %d reads what earlier layers returned (%s and others) otherwise than as the next layer's "
            "input, so that every boundary carries it. It would carry less if the code between the layers (a residual, "
            "a norm) were inside of them",
            stage,
            plan.layer_names[min(index for index, _, _ in needed)],
        )
    # All layers of one list get the same taps, whether or not a later stage needs them of the last ones.
    tapped = {tap for _, tap, _ in sides}
    forms = tuple(
        LayerForm(form.structure, tuple(tap.form for tap in record.taps if tap.form.name in tapped))
        for form, record in zip(plan.forms, trace.layers)
    )
    found = replace(plan, sides=tuple(sides[key] for key in sorted(sides)), forms=forms)
    if not rehearsal.is_true(found, stage):
        _refuse_unknown(rehearsal, plan, stage)
    return found


def _where(plan: CutPlan, stage: int) -> str:
    if stage + 1 == plan.num_stages:
        return "the loss"
    return f"the input of layer {plan.layer_names[plan.bounds[stage + 1]]!r}"


def _refuse_inputs(plan: CutPlan, stage: int, refused: list[Emission]) -> NoReturn:
    names = ", ".join(repr(plan.layer_names[index]) for index, _, _ in refused)
    raise ConfigurationError(
        f"on pipeline stage {stage} (from layer {plan.layer_names[plan.bounds[stage]]!r} on), {_where(plan, stage)} "
        f"depends on what layers {names} of earlier stages returned as the next layer's input: a skip connection, or a "
        "head that reads intermediate hidden states (output_hidden_states). Expected that only the next layer reads "
        f"it. {ALTERNATIVES}"
    )


def _refuse_unknown(rehearsal: Rehearsal, plan: CutPlan, stage: int) -> NoReturn:
    error = rehearsal.error
    failed = f" The step failed there: {type(error).__name__}: {error}." if error is not None else ""
    raise ConfigurationError(
        f"on pipeline stage {stage} (from layer {plan.layer_names[plan.bounds[stage]]!r} on), {_where(plan, stage)} is "
        f"not what the whole module computes, although everything that earlier layers return is given.{failed} Some "
        "state of earlier layers reaches later code in another way: a list or another object that layers fill (so do "
        "transformers' models before 5.2 with the logits of their routers: upgrade transformers), a cache, "
        "weight-shared loops, layers that are called by code that this stage does not run, or a generator of "
        f"random numbers of the module's own. Expected that layers pass on what they compute by returning it. "
        f"{ALTERNATIVES}"
    ) from error
