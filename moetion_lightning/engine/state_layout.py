"""What a manifest says of module and optimizers for whoever makes a checkpoint of it without the training script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moetion_lightning.core.kept_values import class_name
from moetion_lightning.core.layouts import MoELayer
from moetion_lightning.core.state import LiveState
from moetion_lightning.distributed.layout import shard_box
from moetion_lightning.storage.manifest import EncodedDict

__all__ = ["StateLayout"]


class StateLayout:
    """Looks again only when parameters, buffers or modules came or went.

    Args:
        live: The live state.
        layers: MoE layers whose experts are spread over the ranks; see :class:`~.ranks.RankLayout`.
    """

    def __init__(self, live: LiveState, layers: Sequence[MoELayer] = ()) -> None:
        self._live = live
        self._layers = layers
        self._known: tuple[int, EncodedDict] | None = None

    def json(self) -> EncodedDict:
        """The layout.

        ``optimizers``: classes of all optimizers, ``module:Class``, and of how many (``given``) the others are parts;
        ``device``: where the parameters are; ``torch``: version; ``tied``: names of parameters and buffers that are
        another one, with that one's name; ``transient``: buffers that are in no ``state_dict()``; ``shards``: of
        parameters of which this rank holds a part (stacked experts, too), what
        :func:`~.distributed.layout.shard_box` gives.
        """
        if self._known is None or self._known[0] != self._live.generation:
            self._known = (self._live.generation, EncodedDict(self._look()))
        return self._known[1]

    def _look(self) -> dict[str, Any]:
        live = self._live
        module = live.module
        boxes = {name: shard_box(parameter) for name, parameter in live.parameters.items()}
        return {
            "optimizers": [class_name(type(optimizer)) for optimizer in live.optimizers],
            "given": live.num_given,
            "device": next((p.device.type for p in live.parameters.values()), "cpu"),
            "torch": str(torch.__version__),
            "tied": {**_tied(module.named_parameters), **_tied(module.named_buffers)},
            "transient": [
                f"{prefix}.{name}" if prefix else name
                for prefix, part in module.named_modules(remove_duplicate=False)
                for name in sorted(part._non_persistent_buffers_set)
            ],
            "shards": {**self._stacked(), **{name: list(box) for name, box in boxes.items() if box is not None}},
        }

    def _stacked(self) -> dict[str, list[Any]]:
        """Parameters that hold the rows of neighbouring experts, of those of all ranks."""
        found = {}
        for layer in self._layers:
            rows: dict[str, list[tuple[int, int, int]]] = {}
            for expert, pieces in enumerate(layer.experts):
                for piece in pieces:
                    if piece.start is not None and piece.stop is not None and piece.parameter in self._live.parameters:
                        rows.setdefault(piece.parameter, []).append((expert, piece.start, piece.stop))
            for name, owned in rows.items():
                first, _, each = owned[0]
                shape = list(self._live.weight(name).shape)
                if owned == [(first + i, i * each, (i + 1) * each) for i in range(shape[0] // each)]:
                    found[name] = [[layer.num_experts * each, *shape[1:]], [first * each, *[0] * (len(shape) - 1)]]
        return found


def _tied(named: Any) -> dict[str, str]:
    first: dict[int, str] = {}
    found = {}
    for name, tensor in named(remove_duplicate=False):
        known = first.setdefault(id(tensor), name)
        if known != name:
            found[name] = known
    return found
