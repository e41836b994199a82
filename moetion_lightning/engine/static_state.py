"""Parameters that do not train now, and what an optimizer keeps of those that trained before or may train later."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from moetion_lightning.capture.fence import DeviceFence
from moetion_lightning.core.description import Describer
from moetion_lightning.core.local import is_wrapper
from moetion_lightning.core.operators import Piece
from moetion_lightning.core.rebuilding import Rebuilder
from moetion_lightning.core.slot_contents import read_kept, write_kept
from moetion_lightning.core.state import LiveState
from moetion_lightning.errors import ForeignWindowError

__all__ = ["StaticLook", "read_static", "static_bytes", "static_weight", "weight_parts", "write_static"]

_SAMPLE_ELEMENTS = 4096
#: In the tree beside the parameters; no parameter has a name that begins with a dot.
_OPTIMIZER = ".optimizer"


def _weights(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name != _OPTIMIZER}


def _tensors(tree: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in _weights(tree).values():
        yield from [value] if isinstance(value, Tensor) else value["tensors"].values()
    yield from tree[_OPTIMIZER]["tensors"].values()


def static_bytes(tree: Mapping[str, Any]) -> int:
    """Bytes of what :func:`read_static` gave."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(tree))


class StaticLook:
    """A look at a sample of what :func:`read_static` gave.

    In-place updates through ``.data`` (moving-average teachers) leave no trace in version counters, so a few thousand
    elements of each tensor are looked at: an update of the whole tensor changes them.

    Args:
        tree: From :func:`read_static`.
        fence: On its devices the look follows the copies that are queued already.
    """

    def __init__(self, tree: Mapping[str, Any], fence: DeviceFence) -> None:
        described = {n: v["described"] for n, v in _weights(tree).items() if not isinstance(v, Tensor)}
        self._names = json.dumps([list(_weights(tree)), described, tree[_OPTIMIZER]["scalars"]], sort_keys=True)
        self._sources: dict[torch.device, list[Tensor]] = {}  # kept until the samples have arrived
        for tensor in _tensors(tree):
            self._sources.setdefault(tensor.device, []).append(tensor)
        self._samples = [
            fence.fetch(device, functools.partial(_sample, tensors)) for device, tensors in self._sources.items()
        ]

    def digest(self) -> str:
        """Equal as long as nothing has changed; when the samples have arrived."""
        self._sources.clear()
        digest = xxhash.xxh3_64(self._names.encode())
        for sample in self._samples:
            digest.update(sample.cpu().numpy().data)
        return digest.hexdigest()


@torch.no_grad()
def _sample(tensors: Sequence[Tensor]) -> Tensor:
    flat = [tensor.reshape(-1) for tensor in tensors]
    some = [values[:: max(1, values.numel() // _SAMPLE_ELEMENTS)] for values in flat]
    return torch.cat([values.contiguous().view(torch.uint8) for values in some])


def read_static(live: LiveState, names: Sequence[str]) -> dict[str, Any]:
    """The parameters' values by name, and their optimizer state; copies nothing.

    A weight of a tensor subclass that keeps its values elsewhere (a quantised one) is taken apart.

    Raises:
        UnsupportedStateError: Something cannot be captured.
    """
    tensors, scalars = read_kept(live, [name for name in names if live.weight(name).numel()])
    return {**{n: _taken_apart(live, n) for n in names}, _OPTIMIZER: {"tensors": tensors, "scalars": scalars}}


def _taken_apart(live: LiveState, name: str) -> Any:
    weight = live.weight(name)
    if weight.layout is torch.strided and not is_wrapper(weight):
        return weight
    describer = Describer(f"the parameter {name!r}")
    described = describer.describe(weight)
    return {"described": described, "tensors": {path: tensor for path, tensor, _ in describer.tensors}}


def weight_parts(live: LiveState, name: str) -> dict[str, Tensor]:
    """The plain tensors of which a parameter consists in this process, by path; they share its memory."""
    found = _taken_apart(live, name)
    return {"": found} if isinstance(found, Tensor) else found["tensors"]


def static_weight(value: Any) -> Tensor:
    """A parameter out of the tree, on the CPU."""
    if isinstance(value, Tensor):
        return value
    rebuilt: Tensor = Rebuilder(value["tensors"].__getitem__, torch.device("cpu")).rebuild(value["described"])
    return rebuilt


@torch.no_grad()
def write_static(live: LiveState, tree: Mapping[str, Any]) -> None:
    """Put back what :func:`read_static` gave.

    Raises:
        ForeignWindowError: A parameter is of another form than the one that was captured.
    """
    kept = tree[_OPTIMIZER]
    for name, value in _weights(tree).items():
        weight = live.weight(name)
        if isinstance(value, Tensor):
            weight.copy_(value)
        else:
            rebuilder = Rebuilder(value["tensors"].__getitem__, weight.device)
            if rebuilder.rebuild(value["described"], weight) is not weight:
                raise ForeignWindowError(
                    f"the frozen parameter {name!r} is of another form (a {type(weight).__name__}) than in the window. "
                    "Make it as in the run that was captured, for example with the same quantisation settings."
                )
        if name in live.owners and weight.numel():
            write_kept(live, Piece(parameter=name), kept["tensors"].__getitem__, kept["scalars"][name])
