"""Batches of any nesting: cut into micro-batches, their tensors found and replaced."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from moetion_lightning.errors import ConfigurationError

__all__ = ["Signature", "map_tensors", "signature", "split_batch", "tensors_of"]

#: Shapes and dtypes of a micro-batch's tensors, in order: micro-batches that agree in it look alike on every stage.
Signature = tuple[tuple[tuple[int, ...], str], ...]


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """A batch with other tensors; everything else as it is.

    Args:
        value: Tensors in mappings (also ones such as transformers' BatchEncoding), sequences, named tuples and
            dataclasses.
        function: Gives the replacement of each tensor, called in a fixed order.
    """
    if isinstance(value, Tensor):
        return function(value)
    return _rebuild(value, lambda item: map_tensors(item, function))


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a batch, in the order of :func:`map_tensors`."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found


def signature(micro_batch: Any) -> Signature:
    """What decides the shapes of all that passes between stages."""
    return tuple((tuple(t.shape), str(t.dtype)) for t in tensors_of(micro_batch))


def split_batch(batch: Any, num_micro_batches: int) -> list[Any]:
    """Cut a batch along dimension 0 of its tensors, as evenly as possible.

    Args:
        batch: Its tensors have the same size in dimension 0; tensors without dimensions, and values that are no
            tensors, go to every micro-batch whole, except lists and tuples of plain values of that length, which are
            cut too.
        num_micro_batches: How many; fewer if the batch has fewer samples.

    Raises:
        ConfigurationError: The tensors have different sizes, or no rows.
    """
    sized = [t for t in tensors_of(batch) if t.dim()]
    sizes = sorted({t.shape[0] for t in sized})
    if len(sizes) != 1 or sizes == [0]:
        found = f"tensors of {' and '.join(map(str, sizes))} samples" if sizes else "no tensor with a batch dimension"
        raise ConfigurationError(
            f"a batch with {found} cannot be cut into micro-batches: expected tensors that agree in dimension 0, "
            "with at least one sample. Define split_batch(self, batch, num_micro_batches) in the LightningModule, which"
            " returns the micro-batches"
        )
    (size,) = sizes
    count = min(num_micro_batches, size)
    bounds = [size * index // count for index in range(count + 1)]
    # The larger pieces come first, as with torch.tensor_split.
    lengths = sorted((stop - start for start, stop in zip(bounds, bounds[1:])), reverse=True)
    pieces, start = [], 0
    for length in lengths:
        pieces.append(_piece(batch, start, start + length, size))
        start += length
    return pieces


def _piece(value: Any, start: int, stop: int, size: int) -> Any:
    if isinstance(value, Tensor):
        return value[start:stop] if value.dim() else value
    # A named tuple, or a size, is one value.
    of_samples = isinstance(value, list) or type(value) is tuple
    if of_samples and len(value) == size and not any(map(_is_nested, value)):
        return type(value)(value[start:stop])
    return _rebuild(value, lambda item: _piece(item, start, stop, size))


def _is_nested(value: Any) -> bool:
    return isinstance(value, (Tensor, Mapping, list, tuple)) or dataclasses.is_dataclass(value)


def _rebuild(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same container around ``function`` of its items; anything else unchanged."""
    if isinstance(value, dict) and type(value) is dict:
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, MutableMapping):
        items = dict(value)
        # A shallow copy of a mapping that is no dict may share its items with it.
        shallow = isinstance(value, (dict, UserDict))
        result = copy.copy(value) if shallow else copy.deepcopy(value, {id(item): item for item in items.values()})
        for key, item in items.items():
            result[key] = function(item)
        return result
    if isinstance(value, Mapping) and tensors_of(dict(value)):
        raise ConfigurationError(
            f"a {type(value).__name__} in a batch holds tensors and cannot be written to: expected a dict, or another "
            "mutable mapping. Return one from the dataset or the collate function"
        )
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(function(item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(function(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: function(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value
