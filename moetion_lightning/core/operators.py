"""Operators: the named parts into which the trainable state of a module is cut.

An operator is a set of *pieces*; a piece is a whole parameter, or rows of one along dim 0.
:mod:`moetion_lightning.core.partition` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from moetion_lightning.errors import OperatorError

if TYPE_CHECKING:
    import torch

__all__ = ["Operator", "OperatorKind", "Piece", "clean_name"]

# Name components added by wrappers that keep the wrapped module as a child; they are no part of the user's own names.
_WRAPPER_COMPONENTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def clean_name(name: str) -> str:
    """The name of a module or parameter without the components added by compile, checkpoint and FSDP wrappers.

    Args:
        name: Qualified name, for example ``"model._orig_mod.layers.0.mlp"``.

    Returns:
        The name as the user wrote the module, for example ``"model.layers.0.mlp"``.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_COMPONENTS)


class OperatorKind(str, Enum):
    """What an operator is part of."""

    EXPERT = "expert"
    GATE = "gate"
    SHARED = "shared"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A whole parameter, or rows ``[start, stop)`` of it along dim 0.

    Args:
        parameter: Canonical name, as ``module.named_parameters()`` gives it (tied parameters: the first name).
        start: First row, or None for the whole parameter.
        stop: Row after the last one, or None for the whole parameter.
    """

    parameter: str
    start: int | None = None
    stop: int | None = None

    def __post_init__(self) -> None:
        if (self.start is None) != (self.stop is None):
            raise OperatorError(
                f"piece of {self.parameter!r}: start={self.start}, stop={self.stop}; give both, or neither for the "
                "whole parameter"
            )
        if self.start is not None and self.stop is not None and not 0 <= self.start < self.stop:
            raise OperatorError(
                f"piece of {self.parameter!r}: rows [{self.start}:{self.stop}]; expected 0 <= start < stop"
            )

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This piece of a tensor laid out like the parameter (the parameter, its gradient, Adam's moments).

        Args:
            tensor: Shape of the parameter, any dtype and device.

        Returns:
            The tensor itself, or a view of its rows ``[start, stop)``.
        """
        return tensor if self.start is None else tensor[self.start : self.stop]

    @property
    def key(self) -> str:
        """``"name"`` or ``"name[3:4]"``: unique among the pieces of a partition."""
        return self.parameter if self.start is None else f"{self.parameter}[{self.start}:{self.stop}]"


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A named set of pieces that is captured, frozen and restored as one.

    Args:
        name: ``"<module>/expert/<index>"``, ``"<module>/experts"`` (not sliceable), ``"<module>/gate"``,
            ``"<module>/shared"``.
        kind: Expert, gate or shared.
        pieces: What it owns, at least one piece.
        layer: Name of the MoE layer of an expert or gate.
        expert: Index of the expert, None for gates, shared state and a whole layer of experts that cannot be sliced.
    """

    name: str
    kind: OperatorKind
    pieces: tuple[Piece, ...]
    layer: str | None = None
    expert: int | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-compatible description, the inverse of :meth:`from_json`."""
        return {
            "name": self.name,
            "kind": self.kind.value,
            "pieces": [[piece.parameter, piece.start, piece.stop] for piece in self.pieces],
            "layer": self.layer,
            "expert": self.expert,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Operator:
        """Build the operator that :meth:`to_json` described.

        Raises:
            OperatorError: A field is missing or has a wrong type.
        """
        try:
            return cls(
                name=str(data["name"]),
                kind=OperatorKind(data["kind"]),
                pieces=tuple(Piece(parameter=str(p), start=a, stop=b) for p, a, b in data["pieces"]),
                layer=data["layer"],
                expert=data["expert"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise OperatorError(
                f"not the description of an operator: {dict(data)!r} ({type(error).__name__}: {error}); expected the "
                "keys name, kind, pieces, layer, expert as written by Operator.to_json"
            ) from error
