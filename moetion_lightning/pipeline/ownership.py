"""Which stage holds which parameter: observed from gradients, and from what changes when a parameter is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.cut_plan import CutPlan
from moetion_lightning.pipeline.layer_calls import ALTERNATIVES
from moetion_lightning.pipeline.rehearsal import Rehearsal, gradient_norm, loss_of
from moetion_lightning.pipeline.specs import same_bits

__all__ = ["with_owners"]

_logger = logging.getLogger(__name__)

# Gradients of a cut module differ from the whole module's at most in the order of summation. These bounds only tell
# that from a gradient that is lost or flows through junk: relative to the parameter's own, and to the largest one.
_RELATIVE, _ABSOLUTE = 0.05, 1e-4


def with_owners(rehearsal: Rehearsal, plan: CutPlan) -> CutPlan:
    """The plan with owners of all parameters, and with what becomes of buffers.

    Args:
        rehearsal: With a trace that has gradient norms.
        plan: Under which every stage hands on true values.

    Raises:
        ConfigurationError: A layer's parameter is used outside of the layer, or gradients are not the whole module's.
    """
    homes = _homes(rehearsal, plan)
    owned = _with_gradient(rehearsal, plan)
    for stage, names in enumerate(owned):
        for name in sorted(names):
            if name in homes and stage not in homes[name]:
                _refuse_foreign(plan, name, homes[name], stage)
    for name, stages in homes.items():
        for stage in stages:
            owned[stage].add(name)
    trained = frozenset[str]().union(*owned)
    for stage, names in enumerate(owned):
        # Two passes: a parameter may be read where another one that is read too is missing.
        if missing := [name for name in rehearsal.parameters if name not in names]:
            names |= _read(rehearsal, plan, stage, missing, trained, homes)
    _place_unused(rehearsal, owned)
    order = list(rehearsal.parameters)
    plan = replace(plan, owned=tuple(tuple(name for name in order if name in names) for names in owned))
    return _with_buffers(rehearsal, plan)


def _homes(rehearsal: Rehearsal, plan: CutPlan) -> dict[str, set[int]]:
    """Stages of the layers that each layer's parameter belongs to."""
    names = {id(parameter): name for name, parameter in rehearsal.parameters.items()}
    homes: dict[str, set[int]] = {}
    for index, layer in enumerate(rehearsal.layers.modules):
        for parameter in layer.parameters():
            homes.setdefault(names[id(parameter)], set()).add(plan.stage_of(index))
    return homes


def _with_gradient(rehearsal: Rehearsal, plan: CutPlan) -> list[set[str]]:
    """Run all stages backward, last one first, and see which parameters get a gradient in each."""
    owned: list[set[str]] = [set() for _ in range(plan.num_stages)]
    sums: dict[str, Tensor] = {}
    incoming: Sequence[Tensor | None] = ()
    for stage in reversed(range(plan.num_stages)):
        received = rehearsal.received(plan, stage)
        run = rehearsal.run(plan, stage, received)
        if stage + 1 == plan.num_stages:
            loss_of(run.result).backward()
        elif pairs := [(t, g) for t, g in zip(run.payload, incoming) if t.requires_grad and g is not None]:
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        incoming = [tensor.grad for tensor in received]
        for name, parameter in rehearsal.parameters.items():
            if parameter.grad is not None:
                owned[stage].add(name)
                sums[name] = parameter.grad if name not in sums else sums[name] + parameter.grad
        rehearsal.clear_gradients()
    _compare(rehearsal, {name: gradient_norm(gradient) for name, gradient in sums.items()})
    return owned


def _compare(rehearsal: Rehearsal, found: dict[str, float]) -> None:
    expected = rehearsal.trace.norms
    largest = max(expected.values(), default=0.0)
    for name, norm in expected.items():
        if name not in found:
            said = (
                "none in the cut one: what it computes crosses a boundary in a way that no gradient flows back through"
            )
        elif rehearsal.deterministic and not abs(found[name] - norm) <= _RELATIVE * norm + _ABSOLUTE * largest:
            said = f"one of norm {found[name]:.6g} in the cut one: some of it is lost, or flows through junk"
        else:
            continue
        raise ConfigurationError(
            f"parameter {name!r} gets a gradient of norm {norm:.6g} in the whole module, and {said}. {ALTERNATIVES}"
        )


def _read(
    rehearsal: Rehearsal,
    plan: CutPlan,
    stage: int,
    missing: Sequence[str],
    trained: Iterable[str],
    homes: dict[str, set[int]],
) -> set[str]:
    """Parameters that a stage reads, of those that give it no gradient; they must be there all the same."""

    def matters(names: Iterable[str]) -> bool:
        return any(_matters(rehearsal, plan, stage, names, fill) for fill in (_nan, _zero))

    if not matters(missing):
        return set()
    found: set[str] = set()
    pending = [_units(rehearsal, missing, set(trained))]
    while pending:
        units = pending.pop()
        if not matters(name for unit in units for name in unit):
            continue
        if len(units) > 1:
            pending += [units[: len(units) // 2], units[len(units) // 2 :]]
            continue
        found.update(units[0])
    for name in sorted(found):
        if name in homes:
            _refuse_foreign(plan, name, homes[name], stage)
    if matters(name for name in missing if name not in found):
        raise ConfigurationError(
            f"pipeline stage {stage} reads parameters without a gradient, in a way that cannot be told apart: leaving "
            f"out all but {sorted(found)[:5]} changes what it computes. {ALTERNATIVES}"
        )
    _logger.info("pipeline stage %d keeps %d parameters that it reads without a gradient", stage, len(found))
    return found


def _matters(
    rehearsal: Rehearsal, plan: CutPlan, stage: int, names: Iterable[str], fill: Callable[[Tensor], Tensor]
) -> bool:
    with _replaced([rehearsal.parameters[name] for name in names], fill):
        return not rehearsal.is_true(plan, stage)


def _nan(data: Tensor) -> Tensor:
    missing = float("nan") if data.is_floating_point() or data.is_complex() else 0
    return torch.full((), missing, dtype=data.dtype, device=data.device)


def _zero(data: Tensor) -> Tensor:
    return torch.zeros((), dtype=data.dtype, device=data.device)


@contextmanager
def _replaced(parameters: Sequence[Tensor], fill: Callable[[Tensor], Tensor]) -> Iterator[None]:
    held = [(parameter, parameter.data) for parameter in parameters]
    try:
        for parameter, data in held:
            parameter.data = fill(data).expand(data.shape)
        yield
    finally:
        for parameter, data in held:
            parameter.data = data


def _units(rehearsal: Rehearsal, names: Sequence[str], trained: set[str]) -> list[list[str]]:
    """Parameters that are looked for together: of the largest module that has none with a gradient (a teacher)."""
    inside = {prefix for name in trained for prefix in _prefixes(name)}
    units: dict[str, list[str]] = {}
    for name in names:
        constant = next((prefix for prefix in _prefixes(name) if prefix not in inside), name)
        units.setdefault(name if name in trained else constant, []).append(name)
    return list(units.values())


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[: length + 1]) for length in range(len(parts))]


def _place_unused(rehearsal: Rehearsal, owned: list[set[str]]) -> None:
    """A parameter that nobody used goes where its neighbours in the module tree are, if that is one stage."""
    used = {name: stage for stage, names in enumerate(owned) for name in names}
    for name in rehearsal.parameters:
        if name in used:
            continue
        place = 0
        for prefix in reversed(_prefixes(name)):
            near = {stage for stage, names in enumerate(owned) for other in names if other.startswith(prefix + ".")}
            if near:
                place = near.pop() if len(near) == 1 else 0
                break
        owned[place].add(name)


def _refuse_foreign(plan: CutPlan, name: str, homes: set[int], stage: int) -> None:
    raise ConfigurationError(
        f"parameter {name!r} belongs to a layer of pipeline stage {sorted(homes)} and is used outside of the layer on "
        f"stage {stage}; expected a layer's parameters to be used by the layer only. Hold the parameter outside of the "
        f"layers, or pass its value along as an argument. {ALTERNATIVES}"
    )


def _with_buffers(rehearsal: Rehearsal, plan: CutPlan) -> CutPlan:
    """See on which stages buffers change as in the whole module, and where junk changes them."""
    expected = rehearsal.trace.buffers
    true: list[tuple[str, ...]] = []
    junk: list[tuple[str, ...]] = []
    for stage in range(plan.num_stages):
        kept = set(plan.owned[stage])
        others = [parameter for name, parameter in rehearsal.parameters.items() if name not in kept]
        with _replaced(others, _nan):  # as hollow parameters
            rehearsal.is_true(plan, stage)
            found = rehearsal.state.changed_buffers()
        good = {name for name, buffer in found.items() if name in expected and same_bits(buffer, expected[name])}
        true.append(tuple(sorted(good)))
        junk.append(tuple(sorted(found.keys() - good)))
    if rehearsal.deterministic:
        lost = sorted(expected.keys() - frozenset[str]().union(*true))
        if lost:
            raise ConfigurationError(
                f"buffers {lost[:5]} change in a step of the whole module, and as they do there on no stage of the cut "
                f"one: they depend on layers of several stages. Keep the module that holds them inside a layer. "
                f"{ALTERNATIVES}"
            )
    return replace(plan, true_buffers=tuple(true), junk_buffers=tuple(junk))
