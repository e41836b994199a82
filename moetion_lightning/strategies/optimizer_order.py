"""One ordinary checkpoint of a module whose parameters are spread over the ranks, by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from moetion_lightning.distributed.messages import receive_message, send_message
from moetion_lightning.errors import ConfigurationError, UnsupportedStateError

__all__ = ["Entries", "OptimizerOrder", "SpreadState", "plain_optimizer", "receive_entries", "send_entries"]

#: Tensors and plain values by field, by the name of the parameter or state entry that they belong to.
Entries = dict[str, dict[str, Any]]


def send_entries(entries: Mapping[str, Mapping[str, Any]], to: int, device: torch.device) -> None:
    """Send entries to a global rank, as JSON and the bytes of the tensors.

    Raises:
        UnsupportedStateError: A value is neither a tensor nor a plain value.
    """
    tensors: list[Tensor] = []
    header: list[Any] = []
    for name, fields in entries.items():
        described: list[Any] = []
        for field, value in fields.items():
            if isinstance(value, Tensor):
                described.append([field])
                tensors.append(value)
            elif value is None or isinstance(value, (bool, int, float, str)):
                described.append([field, value])
            else:
                raise UnsupportedStateError(
                    f"optimizer state {field!r} of {name!r} is a {type(value).__name__}; state of other ranks can be "
                    "put into a checkpoint only if it is tensors, numbers and strings"
                )
        header.append([name, described])
    send_message(header, tensors, to, device)


def receive_entries(source: int, device: torch.device) -> Entries:
    """Receive what a global rank sends with :func:`send_entries`, on the CPU."""
    header, tensors = receive_message(source, device, keep=torch.device("cpu"))
    waiting = iter(tensors)
    return {
        name: {field: value[0] if value else next(waiting) for field, *value in described} for name, described in header
    }


class OptimizerOrder:
    """The parameter groups that an optimizer has for the whole module, by name.

    Args:
        optimizer: Its parameters of other ranks are taken out, with their state.
        names: Name of every parameter by ``id``.
        foreign: Whether a parameter is of another rank.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str], foreign: Callable[[Tensor], bool]) -> None:
        self.groups: list[list[str]] = []
        self.local: list[list[str]] = []
        self.user_names: list[list[str] | None] = []
        for number, group in enumerate(optimizer.param_groups):
            labels = [names.get(id(p), f"parameter {i} of group {number}") for i, p in enumerate(group["params"])]
            keep = [not foreign(p) for p in group["params"]]
            self.groups.append(labels)
            self.local.append([label for label, kept in zip(labels, keep) if kept])
            self.user_names.append(group.get("param_names"))
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [value for value, kept in zip(group[key], keep) if kept]
        for parameter in [p for p in optimizer.state if foreign(p)]:
            del optimizer.state[parameter]

    def entries(self, state: Mapping[str, Any]) -> Entries:
        """A local optimizer state dict by parameter name.

        Raises:
            ConfigurationError: Parameter groups were added or changed since.
        """
        sizes = [len(group["params"]) for group in state["param_groups"]]
        if sizes != [len(names) for names in self.local]:
            raise ConfigurationError(
                f"the optimizer's parameter groups have {sizes} parameters, and had {[len(n) for n in self.local]} "
                "when training began; where the state is spread over the ranks, a checkpoint needs unchanged groups. "
                "Give the optimizer all its groups in configure_optimizers"
            )
        names = [name for local in self.local for name in local]
        return {names[index]: dict(fields) for index, fields in state["state"].items()}

    def whole(self, state: Mapping[str, Any], entries: Entries) -> dict[str, Any]:
        """The optimizer state dict of the whole module.

        Args:
            state: Of this rank; its options are kept.
            entries: Of all parameters, by name.
        """
        result: dict[str, Any] = {**state, "state": {}, "param_groups": []}
        first = 0
        for group, names, user_names in zip(state["param_groups"], self.groups, self.user_names):
            indices = list(range(first, first + len(names)))
            first += len(names)
            options = {**group, "params": indices}
            if user_names is not None:
                options["param_names"] = user_names
            result["param_groups"].append(options)
            result["state"].update({i: entries[name] for i, name in zip(indices, names) if name in entries})
        return result

    def cut(
        self, state: Mapping[str, Any], part: Callable[[str, Any], Any] = lambda name, value: value
    ) -> dict[str, Any]:
        """This rank's part of an optimizer state dict.

        Args:
            state: Of the whole module.
            part: Gives this rank's part of a value of a parameter's state, by the parameter's name.

        Raises:
            ConfigurationError: The groups differ from this optimizer's.
        """
        sizes = [len(group["params"]) for group in state["param_groups"]]
        if sizes != [len(names) for names in self.groups]:
            raise ConfigurationError(
                f"the checkpoint's optimizer has groups of {sizes} parameters, this run's has "
                f"{[len(names) for names in self.groups]}: it is of another module or another configure_optimizers"
            )
        result: dict[str, Any] = {**state, "state": {}, "param_groups": []}
        index = 0
        for group, names, local in zip(state["param_groups"], self.groups, self.local):
            by_name = dict(zip(names, group["params"]))
            options = {**group, "params": list(range(index, index + len(local)))}
            if "param_names" in group:
                given = dict(zip(names, group["param_names"]))
                options["param_names"] = [given[name] for name in local]
            result["param_groups"].append(options)
            for name in local:
                fields = state["state"].get(by_name[name])
                if fields is not None:
                    result["state"][index] = {k: part(name, v) for k, v in fields.items()}
                index += 1
        return result


def plain_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer without Lightning's wrapper."""
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


class SpreadState:
    """What of a module's state is whose: gathered on saving, cut apart on loading.

    Args:
        global_rank: This rank; rank 0 has the whole state of a checkpoint.

    Attributes:
        orders: By ``id`` of an optimizer: its parameter groups in the whole module.
    """

    def __init__(self, global_rank: int) -> None:
        self._global_rank = global_rank
        self.orders: dict[int, OptimizerOrder] = {}

    def gather(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state dict of the whole module on global rank 0; elsewhere ``state``.

        Ranks:
            Those that have something of which rank 0 knows nothing, and rank 0, together; others return at once.
        """
        raise NotImplementedError

    def gathered(self, entries: Entries) -> Entries:
        """On global rank 0 the entries of other ranks, elsewhere nothing; as :meth:`gather`."""
        raise NotImplementedError

    def load(self, state: Mapping[str, Any], *, strict: bool) -> None:
        """Load this rank's part of a state dict of the whole module."""
        raise NotImplementedError

    def part(self, name: str, value: Any) -> Any:
        """This rank's part of a value of a parameter's optimizer state."""
        return value

    def gather_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """The optimizer state dict of the whole module on global rank 0; elsewhere ``state``. As :meth:`gather`."""
        order = self.orders[id(plain_optimizer(optimizer))]
        entries = order.entries(state)
        entries.update(self.gathered(entries))
        return state if self._global_rank else order.whole(state, entries)

    def cut_optimizers(self, optimizers: Iterable[Optimizer], states: Iterable[Mapping[str, Any]]) -> list[Any]:
        """This rank's part of the optimizers' state dicts."""
        return [self.orders[id(plain_optimizer(o))].cut(state, self.part) for o, state in zip(optimizers, states)]
