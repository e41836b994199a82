"""The part of the training state that is no operator, as one tree: captured with a window's first iteration."""

from __future__ import annotations

import json
import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from moetion_lightning.core.generators import Generators
from moetion_lightning.core.kept_values import ClassFinder, MissingClassError, Reviver
from moetion_lightning.core.local import local, place
from moetion_lightning.core.module_table import joined_flags, split_flags
from moetion_lightning.core.optimizer_parts import read_attributes, write_attributes
from moetion_lightning.core.run_state import Rng, set_rng, write_buffers
from moetion_lightning.core.state import LiveState
from moetion_lightning.engine.journal import LivePoint
from moetion_lightning.engine.restore import PARAMETER_REFERENCE, RestorePoint
from moetion_lightning.errors import ForeignWindowError
from moetion_lightning.gradient_log.steps import set_groups

__all__ = ["EngineState", "build_values", "capture_run_state"]

_KEPT_KEYS = ("params", "param_names")  # of a parameter group
_TRAINING, _REQUIRES_GRAD = operator.attrgetter("training"), operator.attrgetter("requires_grad")
_log = logging.getLogger(__name__)


def capture_run_state(
    live: LiveState, adapter: Any, generators: Generators
) -> tuple[dict[str, Any], Callable[[object], Any]]:
    """The tree to store, and the function that replaces its leaves that are parameters by references.

    Args:
        live: The live state.
        adapter: The adapter's part.
        generators: Random number generators of user objects.
    """
    names, table = live.names_by_id, live.table
    places: list[Mapping[tuple[Any, ...], str]] = []  # looked up if a tensor comes at all

    def leaf(value: object) -> Any:
        if isinstance(value, Tensor) and value.layout == torch.strided and value.numel():
            if not places:
                places.append(live.places())
            name = places[0].get(place(value))
            if name is not None and value.is_contiguous() == live.weight(name).is_contiguous():
                return [PARAMETER_REFERENCE, name]
        return NotImplemented

    tree = {
        "adapter": adapter,
        "rng": Rng().packed(generators.states()),
        "buffers": table.buffers(),
        "metrics": _read_metrics(live),
        "optimizers": [type(optimizer).__name__ for optimizer in live.optimizers],
        "groups": [[_read_group(group, live) for group in opt.param_groups] for opt in live.optimizers],
        # Optimizers may keep state that belongs to no parameter, and state in attributes.
        **_read_optimizers(live, names),
        "training": split_flags(table.modules, map(_TRAINING, table.modules.values())),
        "requires_grad": split_flags(live.parameters, map(_REQUIRES_GRAD, live.parameters.values())),
    }
    return tree, leaf


def build_values(point: RestorePoint | LivePoint, roots: Iterable[object]) -> None:
    """Make values of users' classes out of what a restored run state holds in their place.

    What an adapter keeps as ``attributes`` stays as it is: it is put into the objects that are there.

    Args:
        point: The point; its run state is changed.
        roots: Objects of the user that reach the classes.

    Raises:
        ForeignWindowError: One of the classes is not there.
    """
    tree, reviver = point.run_state(), Reviver(ClassFinder(roots))
    try:
        for key in [key for key in tree if key != "adapter"]:
            tree[key] = reviver.revive(tree[key])
        adapter = tree["adapter"]
        tree["adapter"] = {k: v if k == "attributes" else reviver.revive(v) for k, v in adapter.items()}
    except MissingClassError as error:
        raise ForeignWindowError(
            f"{point.name} holds state of a class that this run does not have: {error}. Undo the change, or start "
            "afresh with resume='never' or another job_id."
        ) from error


def _read_optimizers(live: LiveState, names: Mapping[int, str]) -> dict[str, Any]:
    extras, keys, order = [], [], []
    for index, (optimizer, tables) in enumerate(zip(live.optimizers, live.table_names())):
        described, tensors, refused = read_attributes(optimizer, index, names, tables)
        extras.append({"described": described, "tensors": tensors})
        # What cannot be read may all the same be in the optimizer's own state_dict().
        keys.append(_own_keys(optimizer) if refused else {})
        kept = _kept_by_parameter(optimizer, tables)
        order.append({name: _order(table, optimizer, names) for name, table in kept.items()})
    return {"optimizer_extra": extras, "optimizer_keys": keys, "optimizer_order": order}


def _kept_by_parameter(optimizer: Optimizer, tables: Sequence[str]) -> dict[str, Any]:
    """The optimizer's state and its attributes that are tables by parameter, by name."""
    own = getattr(optimizer, "__dict__", {})
    found = {"": getattr(optimizer, "state", None), **{name: own.get(name) for name in tables}}
    return {name: value for name, value in found.items() if value}


def _order(table: Mapping[Any, Any], optimizer: Optimizer, names: Mapping[int, str]) -> list[str] | None:
    """Names of a table's parameters in its order; None if it is that of the groups."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(parameters) == len(table) and all(map(operator.is_, parameters, table)):
        return None
    found = [id(key) for key in table if isinstance(key, Tensor)]
    groups = [id(p) for p in parameters if p in table]
    return None if found == groups else [names[key] for key in found if key in names]


def _own_keys(optimizer: Optimizer) -> dict[str, Any]:
    if type(optimizer).state_dict is Optimizer.state_dict:
        return {}
    return {k: v for k, v in optimizer.state_dict().items() if k not in ("state", "param_groups")}


def _read_group(group: Mapping[str, Any], live: LiveState) -> dict[str, Any]:
    settings = {k: v for k, v in group.items() if k not in _KEPT_KEYS}
    return {"parameters": live.listed(id(group), group["params"]), "settings": settings}


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """A restore point's run state.

    Args:
        tree: What :func:`capture_run_state` stored.
        compute_dtype: Compute dtypes by parameter.
        routing: Token counts; empty where none are kept.
        policy: State of the policy.
    """

    tree: Mapping[str, Any]
    compute_dtype: dict[str, torch.dtype]
    routing: Mapping[str, Any]
    policy: Mapping[str, Any]

    @classmethod
    def of(cls, point: RestorePoint | LivePoint) -> EngineState:
        """Read it."""
        extra = point.extra
        return cls(
            tree=point.run_state(),
            compute_dtype={n: getattr(torch, d) for n, d in extra["compute_dtype"].items()},
            routing=extra.get("routing", {}),
            policy=extra["policy"],
        )

    def apply_structure(self, live: LiveState) -> None:
        """Put back which parameters train, in which groups, and which modules are in training mode: before all values.

        Raises:
            ForeignWindowError: The run has other optimizers.
        """
        trains = joined_flags(self.tree["requires_grad"])
        for name, parameter in live.parameters.items():
            parameter.requires_grad_(trains(name))
        training = joined_flags(self.tree["training"])
        live.table.refresh()
        for name, module in live.table.modules.items():
            module.training = training(name)
        ours = [type(optimizer).__name__ for optimizer in live.optimizers]
        if self.tree["optimizers"] != ours:
            raise ForeignWindowError(
                f"the window was captured with the optimizers {', '.join(self.tree['optimizers'])}, this run has "
                f"{', '.join(ours)}. Undo the change, or start afresh with resume='never' or another job_id."
            )
        for optimizer, groups in zip(live.optimizers, self.tree["groups"]):
            while len(optimizer.param_groups) < len(groups):
                optimizer.param_groups.append({**getattr(optimizer, "defaults", {}), "params": []})
            del optimizer.param_groups[len(groups) :]
            for group, saved in zip(optimizer.param_groups, groups):
                group["params"] = [live.parameters[name] for name in json.loads(saved["parameters"])]
        for optimizer, keys in zip(live.optimizers, self.tree["optimizer_keys"]):
            if keys:  # parameters' states and the groups' settings follow
                optimizer.load_state_dict({**optimizer.state_dict(), **keys})
        live.refresh()

    def apply(self, live: LiveState, generators: Generators) -> list[str]:
        """Put everything but the adapter's part back; the random generators last.

        Returns:
            Names of generators that are not there.
        """
        write_buffers(live.module, self.tree["buffers"])
        _write_metrics(live, self.tree["metrics"])
        self.apply_optimizers(live)
        live.refresh()  # tables that were empty in a new process are known now
        self._apply_gradients(live)
        missing = set_rng(self.tree["rng"], generators)
        if missing:
            _log.warning(
                "the window holds the state of random number generators that are not there now: %s. Each gets it as "
                "soon as it is found; numbers that it gives before that differ. Make it where its owner is made.",
                ", ".join(missing),
            )
        return missing

    def apply_optimizers(self, live: LiveState) -> None:
        """Put back what optimizers keep that belongs to no single parameter: settings of groups, attributes."""
        for optimizer, groups, extra in zip(live.optimizers, self.tree["groups"], self.tree["optimizer_extra"]):
            set_groups(optimizer, [saved["settings"] for saved in groups])
            write_attributes(optimizer, extra["described"], extra["tensors"], live.parameters)

    def _apply_gradients(self, live: LiveState) -> None:
        gradients = self.tree["adapter"].get("gradients") if isinstance(self.tree["adapter"], Mapping) else None
        for name, parameter in live.parameters.items():
            saved_gradient = gradients.get(name) if gradients else None
            parameter.grad = None
            if saved_gradient is not None and saved_gradient.layout is not torch.strided:
                parameter.grad = saved_gradient.to(parameter.device)
            elif saved_gradient is not None:
                parameter.grad = torch.zeros_like(parameter)
                local(parameter.grad).copy_(saved_gradient)

    def apply_order(self, live: LiveState) -> None:
        """The state is dense: put what optimizers keep by parameter into the order in which it was made."""
        for index, (optimizer, orders) in enumerate(zip(live.optimizers, self.tree["optimizer_order"])):
            for name, table in _kept_by_parameter(optimizer, list(filter(None, orders))).items():
                if not name and index in live.aliases:
                    continue
                groups = (p for group in optimizer.param_groups for p in group["params"])
                order = orders.get(name)
                first = groups if order is None else (live.parameters[n] for n in order if n in live.parameters)
                entries = {key: table[key] for key in dict.fromkeys([*(p for p in first if p in table), *table])}
                table.clear()
                table.update(entries)


def _is_metric(module: nn.Module) -> bool:
    return isinstance(module, Metric)


def _metrics(live: LiveState) -> list[tuple[str, Any]]:
    return live.table.where(_is_metric)


def _read_metrics(live: LiveState) -> dict[str, Any]:
    """States of torchmetrics inside the module: no buffers, in no state_dict, yet later values need them."""
    saved = {}
    for name, metric in _metrics(live):
        states = {key: getattr(metric, key) for key in metric._defaults}
        saved[name] = {"states": states, "updates": metric._update_count}
    return saved


def _write_metrics(live: LiveState, saved: Mapping[str, Any]) -> None:
    for name, metric in _metrics(live):
        if name in saved:
            for key, value in saved[name]["states"].items():
                current = getattr(metric, key)
                if isinstance(value, Tensor):
                    setattr(metric, key, value.to(metric.device))
                elif isinstance(current, list):
                    setattr(metric, key, [v.to(metric.device) for v in value])
            metric._update_count = saved[name]["updates"]
            metric._computed = None
