"""What a layer returns, described without its values: enough to build a stand-in for it on another stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from moetion_lightning.errors import ConfigurationError

__all__ = [
    "SIMPLE",
    "LayerSpec",
    "LeafSpec",
    "Opaque",
    "TensorSpec",
    "assemble",
    "dtype_of",
    "flatten",
    "junk_like",
    "leaf_specs",
    "outline",
    "same_bits",
]

SIMPLE = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype (``"float32"``) and differentiability of a tensor that crosses a stage boundary."""

    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Describe a tensor."""
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return dtype_of(self.dtype)

    def to_json(self) -> list[Any]:
        """As plain JSON values."""
        return [list(self.shape), self.dtype, self.requires_grad]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> TensorSpec:
        """What :meth:`to_json` gave."""
        shape, dtype, requires_grad = value
        return cls(tuple(shape), dtype, requires_grad)


@dataclass(frozen=True)
class LeafSpec:
    """One leaf of an output.

    Args:
        kind: ``tensor`` (``value`` is its dtype), ``value`` (a plain python value), ``argument`` (the object at
            position ``value`` among the leaves of the call's arguments, handed through) or ``opaque`` (an object of the
            type named by ``value``).
        value: See ``kind``.
        shape: Shape of a tensor.
    """

    kind: Literal["tensor", "value", "argument", "opaque"]
    value: bool | int | float | str | None
    shape: tuple[int, ...] = ()

    def to_json(self) -> list[Any]:
        """As plain JSON values."""
        return [self.kind, self.value, list(self.shape)]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> LeafSpec:
        """What :meth:`to_json` gave."""
        kind, held, shape = value
        return cls(kind, held, tuple(shape))


@dataclass(frozen=True)
class LayerSpec:
    """The outputs of one layer in one run.

    Args:
        output: Leaves of what the layer returned.
        taps: For each of the layer's taps, in the plan's order, the leaves of what it put out.
    """

    output: tuple[LeafSpec, ...]
    taps: tuple[tuple[LeafSpec, ...], ...] = ()

    def to_json(self) -> list[Any]:
        """As plain JSON values."""
        return [[leaf.to_json() for leaf in leaves] for leaves in (self.output, *self.taps)]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> LayerSpec:
        """What :meth:`to_json` gave."""
        output, *taps = (tuple(LeafSpec.from_json(leaf) for leaf in leaves) for leaves in value)
        return cls(output, tuple(taps))


class Opaque:
    """Stands on a later stage for an object, neither tensor nor plain value, that an earlier stage's layer returned."""

    def __init__(self, type_name: str, layer: str) -> None:
        self.__dict__.update(type_name=type_name, layer=layer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ConfigurationError(
            f"{name!r} of the {self.__dict__['type_name']} that layer {self.__dict__['layer']!r} returned was read on "
            "a later pipeline stage, where it does not exist; only tensors and plain values cross. Return tensors in "
            "tuples or dicts from the layer, or declare the stages with configure_pipeline()"
        )


def flatten(value: Any) -> tuple[list[Any], TreeSpec]:
    """Leaves and structure of nested containers."""
    return tree_flatten(value)


def outline(structure: TreeSpec) -> str:
    """A structure on one line, for messages."""
    return " ".join(repr(structure).split())


def leaf_specs(leaves: Sequence[Any], arguments: Any) -> tuple[LeafSpec, ...]:
    """Describe the leaves of an output.

    Args:
        leaves: The leaves.
        arguments: The call's ``(args, kwargs)``, in which objects that are handed through are looked up.
    """
    specs = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            specs.append(LeafSpec("tensor", str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape)))
        elif isinstance(leaf, SIMPLE):
            specs.append(LeafSpec("value", leaf))
        else:
            given = [index for index, argument in enumerate(flatten(arguments)[0]) if argument is leaf]
            specs.append(LeafSpec("argument", given[0]) if given else LeafSpec("opaque", type(leaf).__name__))
    return tuple(specs)


def assemble(
    structure: TreeSpec,
    specs: Sequence[LeafSpec],
    tensor: Callable[[int, LeafSpec], Tensor],
    arguments: Any,
    layer: str,
) -> Any:
    """Build an output from its description.

    Args:
        structure: Structure of the output.
        specs: Its leaves.
        tensor: Gives the tensor for a position and its spec.
        arguments: The call's ``(args, kwargs)``, for objects that are handed through.
        layer: Name of the layer, for messages.

    Raises:
        ConfigurationError: The number of leaves is not that of the structure.
    """
    if len(specs) != structure.num_leaves:
        raise ConfigurationError(
            f"the specs of layer {layer!r} have {len(specs)} leaves; its structure has {structure.num_leaves}. Give "
            "the specs that the layer's own stage returned for this micro-batch, in the order of the layers"
        )
    leaves: list[Any] = []
    for position, spec in enumerate(specs):
        if spec.kind == "tensor":
            leaves.append(tensor(position, spec))
        elif spec.kind == "value":
            leaves.append(spec.value)
        elif spec.kind == "argument":
            assert isinstance(spec.value, int)
            leaves.append(flatten(arguments)[0][spec.value])
        else:
            leaves.append(Opaque(str(spec.value), layer))
    return tree_unflatten(leaves, structure)


def dtype_of(name: object) -> torch.dtype:
    """The dtype of a name such as ``"bfloat16"``."""
    dtype = getattr(torch, str(name))
    assert isinstance(dtype, torch.dtype)
    return dtype


def junk_like(spec: LeafSpec, device: torch.device) -> Tensor:
    """A stand-in for a tensor that must not be used: NaN, or zeros where there is no NaN."""
    dtype = dtype_of(spec.value)
    fill = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full(spec.shape, fill, dtype=dtype, device=device)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits (a NaN equals itself)."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    a, b = (tensor.detach().reshape(-1).contiguous().view(torch.uint8) for tensor in (first, second))
    return torch.equal(a, b)
